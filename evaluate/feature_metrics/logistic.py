"""Logistic regression on one number, for many numbers at once, by Newton's method.

Letters: M tokens, C candidate latents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as functional
from jaxtyping import Float
from torch import Tensor

RIDGE = 1e-6  # beside the standardised weight, so that labels which a threshold parts have an optimum at all
STEPS = 100
HALVINGS = 1e-8  # the least share of a Newton step that is tried


class Fit(NamedTuple):
    """p(y = 1) = sigmoid(weight z + bias); loss: mean cross-entropy in nats on the tokens of the fit; gradient: the
    largest entry of the objective's gradient, z standardised."""

    weight_C: Float[Tensor, " C"]
    bias_C: Float[Tensor, " C"]
    loss_C: Float[Tensor, " C"]
    gradient_C: Float[Tensor, " C"]


def cross_entropy(eta: Float[Tensor, "M C"], y_M: Float[Tensor, " M"]) -> Float[Tensor, "M C"]:
    """Compute -log p(y) of each token in nats, p(1) = sigmoid(eta)."""
    return functional.softplus(eta, threshold=50) - y_M[:, None] * eta


class _Point(NamedTuple):
    """The objective at a point (w, b) of each candidate, its gradient, the Newton step from there, what it promises."""

    objective: Tensor
    gradient: Tensor
    decrease: Tensor
    step_w: Tensor
    step_b: Tensor


def _point(u_MC: Tensor, yu_C: Tensor, y_mean: float, w_C: Tensor, b_C: Tensor) -> _Point:
    eta = torch.addcmul(b_C, u_MC, w_C)
    p = eta.sigmoid()
    # log(1 + e^eta) - y eta, its mean over tokens. The part in y is linear in w and b, so y meets z once, before the
    # first step (yu_C).
    objective = functional.softplus(eta, threshold=50).mean(0) - w_C * yu_C - b_C * y_mean + RIDGE / 2 * w_C.square()
    g_w, g_b = torch.linalg.vecdot(p, u_MC, dim=0) / len(u_MC) - yu_C + RIDGE * w_C, p.mean(0) - y_mean
    s = p - p.square()
    su = s * u_MC
    h_bb, h_wb = s.mean(0), su.mean(0)
    h_ww = torch.linalg.vecdot(su, u_MC, dim=0) / len(u_MC) + RIDGE
    # The Hessian is 2 x 2 for each candidate: its inverse is written out, and thousands are solved by a few products.
    det = (h_ww * h_bb - h_wb.square()).clamp_min(1e-12)
    step_w, step_b = (h_wb * g_b - h_bb * g_w) / det, (h_wb * g_w - h_ww * g_b) / det
    return _Point(objective, torch.maximum(g_w.abs(), g_b.abs()), -(g_w * step_w + g_b * step_b) / 2, step_w, step_b)


def fit_logistic(z_MC: Float[Tensor, "M C"], y_M: Float[Tensor, " M"], tolerance: float | None = None) -> Fit:
    """Find the optimum for each column of z, in z's dtype; y in {0, 1}, both present.

    Newton's steps, halved while they do not lower the objective, until the gradient is below `tolerance` (1e-5 in
    float32, 1e-12 in float64) or the dtype cannot tell what a step gains. RIDGE lies on the standardised weight.
    """
    tolerance = tolerance or (1e-12 if z_MC.dtype == torch.float64 else 1e-5)
    std_C, mean_C = torch.std_mean(z_MC, 0, correction=0)
    std_C = torch.where(std_C > 1e-12 * mean_C.abs(), std_C, torch.inf)  # a constant says nothing: its weight stays 0
    u_MC = (z_MC - mean_C) / std_C
    y_mean = float(y_M.mean())
    yu_C = y_M @ u_MC / len(y_M)
    w_C = torch.zeros_like(mean_C)
    # The optimum where z says nothing: from there a Newton step rarely overshoots.
    b_C = torch.full_like(mean_C, torch.logit(torch.tensor(y_mean, dtype=torch.float64)).item())
    result = _descend(u_MC, yu_C, y_mean, w_C, b_C, tolerance)
    w_C, b_C, objective_C, gradient_C = result
    weight_C = w_C / std_C
    return Fit(weight_C, b_C - weight_C * mean_C, objective_C - RIDGE / 2 * w_C.square(), gradient_C)


def _descend(
    u_MC: Tensor, yu_C: Tensor, y_mean: float, w_C: Tensor, b_C: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find w, b, objective and gradient at the optima; columns that have arrived are left out of later steps."""
    now = _point(u_MC, yu_C, y_mean, w_C, b_C)
    fitted = torch.stack([w_C, b_C, now.objective, now.gradient])
    share_C, live_c = torch.ones_like(w_C), torch.arange(len(w_C), device=w_C.device)
    for _ in range(STEPS):
        new_w, new_b = w_C + share_C * now.step_w, b_C + share_C * now.step_b
        new = _point(u_MC, yu_C, y_mean, new_w, new_b)
        better = new.objective < now.objective
        w_C, b_C = torch.where(better, new_w, w_C), torch.where(better, new_b, b_C)
        now = _Point(*(torch.where(better, a, b) for a, b in zip(new, now, strict=True)))
        share_C = torch.where(better, 1.0, share_C / 2)
        fitted[:, live_c] = torch.stack([w_C, b_C, now.objective, now.gradient])
        # Half of what the quadratic model promises. Below the objective's last digit no step can be seen to help, and
        # halving would go on to the end.
        is_above_rounding = now.decrease > torch.finfo(now.objective.dtype).eps * now.objective
        open_c = ((now.gradient > tolerance) & is_above_rounding & (share_C > HALVINGS)).nonzero().squeeze(1)
        if not len(open_c):
            break
        # Copying the columns that are left costs a pass over them: worth it only where enough have arrived.
        if len(open_c) <= 0.7 * len(live_c):
            u_MC, yu_C, live_c = u_MC[:, open_c], yu_C[open_c], live_c[open_c]
            w_C, b_C, share_C = w_C[open_c], b_C[open_c], share_C[open_c]
            now = _Point(*(part[open_c] for part in now))
    return fitted[0], fitted[1], fitted[2], fitted[3]
