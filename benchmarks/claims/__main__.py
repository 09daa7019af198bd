"""`python -m benchmarks.claims saes=outputs/claims/saes`: a verdict for each claim; `make claims` trains the SAEs."""

from benchmarks.claims.run import main
from data.base.cli import run

if __name__ == "__main__":
    run(main, "claims")
