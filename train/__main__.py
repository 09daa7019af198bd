"""python -m train sae=topk sae.k=32 site=resid_post.3    (-m for a sweep; resume=<run folder> goes on)"""

from data import cli
from train.run import main
from train.together import register

if __name__ == "__main__":
    register()
    cli.run(main, "train")
