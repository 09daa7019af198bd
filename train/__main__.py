"""python -m train sae=topk sae.k=32 site=resid_post.3    (-m for a sweep; resume=<run folder> goes on)"""

import sys

from omegaconf import DictConfig

from data.base import cli
from train.launcher import register
from train.sweep import job_folder


def main(config: DictConfig) -> None:
    """Run the stage; its imports come after `--help`, which needs none of them."""
    from train import run

    run.main(config)


def end_process_group() -> None:
    """Close what Lightning leaves open: a rank whose gloo threads still run at the interpreter's end aborts."""
    dist = sys.modules.get("torch.distributed")  # whoever opened one has imported it
    if dist is not None and dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    register()
    try:
        cli.run(main, "train", job_folder)
    finally:
        end_process_group()
