"""The papers' claims, tested again on the SAEs of one site: `python -m benchmarks.claims saes=<their folder>`."""
