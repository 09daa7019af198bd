"""Jobs on a Slurm cluster, for a sweep's passes and a harvest's workers alike: submit, look after, and go on."""
