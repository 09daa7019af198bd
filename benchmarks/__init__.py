"""What prints ratios: each contestant's threads wait alike, as `data` says, before torch is imported."""

import data  # noqa: F401
