"""The papers' claims, tested again on the SAEs of one site: `python -m evaluate.claims saes=<their folder>`."""
