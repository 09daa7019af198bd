"""`python -m evaluate saes=outputs/train/...`: score trained SAEs on held-out text."""

from data.base.cli import run
from evaluate.run import main

if __name__ == "__main__":
    run(main, "evaluate")
