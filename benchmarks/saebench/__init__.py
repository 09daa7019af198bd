"""SAEBench on SAEs of ours, in an environment of its own, its core metrics beside ours."""
