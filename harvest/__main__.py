"""`python -m harvest <overrides>`; the settings are in conf/harvest.yaml.

Several processes share one harvest: `torchrun --nproc-per-node 4 -m harvest <overrides>`, each with its own GPU, or the
same command started any number of times, at any time, on hosts that share the cache's folder.
"""

from omegaconf import DictConfig

from data.base.cli import run


def main(config: DictConfig) -> None:
    """Run the stage; its imports come after `--help`, which needs none of them."""
    from harvest import run as stage

    stage.main(config)


if __name__ == "__main__":
    run(main, "harvest")
