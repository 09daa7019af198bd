"""`python -m benchmarks.saebench saes=outputs/demo/saes`: SAEBench's metrics beside ours; see `run`."""

from omegaconf import DictConfig

from data.base.cli import run


def main(config: DictConfig) -> None:
    """Run the comparison; its imports come after `--help`, which needs none of them."""
    from benchmarks.saebench import run as comparison

    comparison.main(config)


if __name__ == "__main__":
    run(main, "saebench")
