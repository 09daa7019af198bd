"""`python -m evaluate.features folder=...`: browsable pages of one SAE's latents."""

import sys

from omegaconf import DictConfig

from data.base.cli import run
from evaluate.features.arguments import with_own_text


def main(config: DictConfig) -> None:
    """Run the stage; its imports come after `--help`, which needs none of them."""
    from evaluate.features import run as stage

    stage.main(config)


if __name__ == "__main__":
    sys.argv[1:] = with_own_text(sys.argv[1:])
    run(main, "features")
