"""`python -m evaluate.features folder=...`: browsable pages of one SAE's latents."""

from data.base.cli import run
from evaluate.features.run import main

if __name__ == "__main__":
    run(main, "features")
