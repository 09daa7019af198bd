"""`python -m benchmarks.claims saes=outputs/claims/saes`: a verdict for each claim; `make claims` trains the SAEs."""

from omegaconf import DictConfig

from data.base.cli import run


def main(config: DictConfig) -> None:
    """Run the study; its imports come after `--help`, which needs none of them."""
    from benchmarks.claims import run as study

    study.main(config)


if __name__ == "__main__":
    run(main, "claims")
