"""`python -m harvest <overrides>`; the settings are in conf/harvest.yaml."""

from data.cli import run
from harvest.run import main

if __name__ == "__main__":
    run(main, "harvest")
