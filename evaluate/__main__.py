"""`python -m evaluate saes=outputs/train/...`: score trained SAEs on held-out text."""

from omegaconf import DictConfig

from data.base.cli import run


def main(config: DictConfig) -> None:
    """Run the stage; its imports come after `--help`, which needs none of them."""
    from evaluate import run as stage

    stage.main(config)


if __name__ == "__main__":
    run(main, "evaluate")
