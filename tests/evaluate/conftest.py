"""Fixtures of the evaluation's tests."""

from tests.helpers.tiny_lm import constant_sae, harvested, identity_sae, relu_lm, rough_sae, tiny_lm

__all__ = ["constant_sae", "harvested", "identity_sae", "relu_lm", "rough_sae", "tiny_lm"]
