"""Score trained SAEs on held-out text: reconstruction, firing, and what a splice costs the language model."""

import data  # noqa: F401  (sets how threads wait, before torch is imported)
