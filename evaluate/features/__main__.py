"""`python -m evaluate.features folder=...`: browsable pages of one SAE's latents."""

import sys

from data.base.cli import run
from evaluate.features.run import main, with_own_text

if __name__ == "__main__":
    sys.argv[1:] = with_own_text(sys.argv[1:])
    run(main, "features")
