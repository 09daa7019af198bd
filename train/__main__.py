"""python -m train sae=topk sae.k=32 site=resid_post.3    (-m for a sweep; resume=<run folder> goes on)"""

from data.base import cli
from train.launcher import register
from train.run import main
from train.sweep import job_folder

if __name__ == "__main__":
    register()
    cli.run(main, "train", job_folder)
