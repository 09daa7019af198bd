"""`python -m evaluate.claims saes=outputs/claims/saes`: a verdict for each claim; `make claims` trains the SAEs."""

from data.cli import run
from evaluate.claims.run import main

if __name__ == "__main__":
    run(main, "claims")
