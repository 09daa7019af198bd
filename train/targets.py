"""Whether a run ended at the L0 it was asked for, and what to do where it did not."""

from __future__ import annotations

TOLERANCE = 0.03  # of the L0 asked for
FAR = 0.1  # likewise: a distance before calibration that costs NMSE, as the weights were trained for another L0


def l0_miss(
    variant: str,
    asked: float,
    l0: float,
    *,
    trained: float,
    calibrated: bool = False,
    before: float | None = None,
    coefficient: float | None = None,
) -> str | None:
    """Say in one line that `l0` is not what was `asked` for; None within 3%, reached from within 10%.

    trained: L0 on training rows, those a threshold was calibrated on or those of the last step. before: that of the
    calibration rows as training left it, where calibration moved it. coefficient: of the penalty at the end, where it
    follows L0.
    """
    advice = "train longer (tokens=...), or pull harder with a larger sae.sparsity"
    if coefficient is not None:
        advice = f"train longer (tokens=...), or start nearer to its coefficient, sae.sparsity={coefficient:.2g}"
    if before is not None and abs(before / asked - 1) > FAR:
        return (
            f"{variant}: asked for an L0 of {asked:g}, training ended at {before:.1f} and calibration brought it to "
            f"{l0:.1f}, at some cost in NMSE: {advice}"
        )
    if _near(l0, asked):
        return None
    start = f"{variant}: asked for an L0 of {asked:g}, got {l0:.1f}: "
    if _near(trained, asked):
        rows = "the calibration rows" if calibrated else "the last training batch"
        return f"{start}it is {trained:.1f} on {rows}, so the held-out text differs from what was trained on"
    if calibrated:
        return f"{start}too few latents are positive on the calibration rows, lower sae.k"
    return start + advice


def _near(l0: float, asked: float) -> bool:
    return abs(l0 / asked - 1) <= TOLERANCE
