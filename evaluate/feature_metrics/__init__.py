"""The feature metrics of Gao et al. 2406.04093: probe loss, explainability by token patterns, sparsity downstream."""
