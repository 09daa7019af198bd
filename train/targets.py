"""Whether a run ended at the L0 it was asked for, and what to do where it did not."""

from __future__ import annotations

TOLERANCE = 0.03  # of the L0 asked for


def l0_miss(
    variant: str, asked: float, l0: float, coefficient: float | None = None, calibrated: float | None = None
) -> str | None:
    """Say in one line that `l0` is not what was `asked` for; None within 3%.

    coefficient: of the penalty at the end, where it follows L0. calibrated: L0 on the rows a threshold was settled on.
    """
    if abs(l0 / asked - 1) <= TOLERANCE:
        return None
    start = f"{variant}: asked for an L0 of {asked:g}, got {l0:.1f}: "
    if calibrated is not None and abs(calibrated / asked - 1) <= TOLERANCE:
        return (
            f"{start}the threshold gives {calibrated:.1f} on the calibration rows, so the held-out text differs from "
            "them: hold out text of the same kind, or choose sae.k for it"
        )
    if calibrated is not None:
        return f"{start}too few latents are positive on the calibration rows: lower sae.k"
    if coefficient is not None:
        return (
            f"{start}train longer (tokens=...), or start nearer to the coefficient with sae.sparsity={coefficient:.2g}"
        )
    return f"{start}train longer (tokens=...), or pull harder with a larger sae.sparsity"
