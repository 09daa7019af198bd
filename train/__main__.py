"""python -m train sae=topk sae.k=32 site=resid_post.3    (-m for a sweep; resume=<run folder> goes on)"""

import torch.distributed as dist

from data.base import cli
from train.launcher import register
from train.run import main
from train.sweep import job_folder

if __name__ == "__main__":
    register()
    try:
        cli.run(main, "train", job_folder)
    finally:
        # Lightning leaves its process group open; a rank whose gloo threads still run at the interpreter's end aborts.
        if dist.is_initialized():
            dist.destroy_process_group()
