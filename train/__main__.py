"""python -m train sae=topk sae.k=32 site=resid_post.3    (-m for a sweep; resume=<run folder> goes on)"""

from data import cli
from train.run import main

if __name__ == "__main__":
    cli.run(main, "train")
