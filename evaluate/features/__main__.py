"""`python -m evaluate.features folder=...`: browsable pages of one SAE's latents."""

from omegaconf import DictConfig

from data.base.cli import run


def main(config: DictConfig) -> None:
    """Run the stage; its imports come after `--help`, which needs none of them."""
    from evaluate.features import run as stage

    stage.main(config)


if __name__ == "__main__":
    run(main, "features")
