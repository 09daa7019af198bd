"""Every loss and every gradient from its formula, in numpy and float64, by hand: no autograd, nothing of the package.

x [B, D] is normalised input, v = Vx. p maps parameter names to arrays. Of a transcoder y [B, E] is what it predicts and
centre [D] what its encoder subtracts; W_skip in p is its skip.
Each function returns the loss and the gradients by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Parameters = dict[str, Array]
Result = tuple[float, Parameters]


def largest(z: Array, count: int) -> NDArray[np.bool_]:
    """Mask of the `count` largest of a flat array, equal ones by lowest index."""
    kept = np.zeros(z.size, dtype=bool)
    kept[np.argsort(-z, kind="stable")[:count]] = True
    return kept


def per_token(z: Array, k: int) -> NDArray[np.bool_]:
    return np.stack([largest(row, k) for row in z]) & (z > 0)


def of_batch(z: Array, k: int) -> NDArray[np.bool_]:
    return largest(z.ravel(), k * len(z)).reshape(z.shape) & (z > 0)


class Pass:
    """One forward and backward pass: terms are added, then the chain rule runs back from z to the encoder."""

    def __init__(
        self,
        x: Array,
        p: Parameters,
        v: float,
        centred: bool,
        bias: str = "b_enc",
        y: Array | None = None,
        centre: Array | None = None,
    ) -> None:
        assert (y is None) == (centre is None) and not (centred and y is not None)
        self.x, self.p, self.v, self.centred, self.bias = x, p, v, centred, bias
        self.y = x if y is None else y
        self.xc = x - p["b_dec"] if centred else x if centre is None else x - centre
        self.beside = p["b_dec"] + (self.xc @ p["W_skip"] if "W_skip" in p else 0.0)
        self.h = self.xc @ p["W_enc"]
        self.z = self.h + p[bias]
        self.dz = np.zeros_like(self.z)
        self.grads = {name: np.zeros_like(value) for name, value in p.items()}
        self.loss = 0.0

    def squared(self, f: Array, *, weight: float = 1.0, latents: int | None = None) -> Array:
        """Adds weight * E||y - (f W_dec + b_dec + xc W_skip)||^2 / v over the first `latents`: d/df."""
        used = np.array(f)
        used[:, slice(latents, None) if latents else slice(0, 0)] = 0
        error = used @ self.p["W_dec"] + self.beside - self.y
        self.loss += weight * np.sum(error**2) / (len(self.x) * self.v)
        g = weight * 2 * error / (len(self.x) * self.v)
        self.grads["W_dec"] += used.T @ g
        self.grads["b_dec"] += g.sum(0)
        if "W_skip" in self.p:
            self.grads["W_skip"] += self.xc.T @ g
        df = g @ self.p["W_dec"].T
        if latents:
            df[:, latents:] = 0
        return df

    def residual(self, f: Array) -> Array:
        return self.y - f @ self.p["W_dec"] - self.beside

    def auxk(
        self,
        f: Array,
        dead: NDArray[np.bool_],
        *,
        alpha: float,
        relu: bool,
        by_residual: bool,
        k_aux: int | None,
    ) -> None:
        r = self.residual(f)
        n_dead = int(dead.sum())
        k = min(k_aux or 2 ** round(np.log2(self.y.shape[1] / 2)), n_dead)
        if k == 0:
            return
        masked = np.where(dead, self.z, -np.inf)
        kept = np.stack([largest(row, k) for row in masked])
        if relu:
            kept &= self.z > 0
        a = np.where(kept, self.z, 0.0)
        over = np.sum((r - r.mean(0)) ** 2) / len(r) if by_residual else self.v
        error = a @ self.p["W_dec"] - r
        self.loss += alpha * np.sum(error**2) / (len(r) * over)
        g = alpha * 2 * error / (len(r) * over)
        self.grads["W_dec"] += a.T @ g
        self.dz += np.where(kept, g @ self.p["W_dec"].T, 0.0)

    def result(self) -> Result:
        self.grads["W_enc"] += self.xc.T @ self.dz
        self.grads[self.bias] += self.dz.sum(0)
        if self.centred:
            self.grads["b_dec"] -= (self.dz @ self.p["W_enc"].T).sum(0)
        return float(self.loss), self.grads


def relu(
    x: Array,
    p: Parameters,
    v: float,
    centred: bool,
    *,
    sparsity: float,
    form: str,
    widths: Sequence[int] | None = None,
    **transcoder: Any,
) -> Result:
    """`widths`: of a crosscoder's sites, whose norms of a decoder row are summed."""
    run = Pass(x, p, v, centred, **transcoder)
    f = np.maximum(run.z, 0)
    df = run.squared(f)
    parts = np.split(p["W_dec"], np.cumsum(widths)[:-1] if widths else [], axis=1)
    by_site = [np.linalg.norm(part, axis=1, keepdims=True) for part in parts]
    norms = sum(by_site)[:, 0] if form == "april" else np.ones(f.shape[1])
    weight = sparsity / (len(x) * np.sqrt(v))
    run.loss += weight * np.sum(f * norms)
    df = df + weight * norms
    if form == "april":
        unit = np.concatenate([part / norm for part, norm in zip(parts, by_site, strict=True)], axis=1)
        run.grads["W_dec"] += weight * f.sum(0)[:, None] * unit
    run.dz += df * (run.z > 0)
    return run.result()


def topk(
    x: Array,
    p: Parameters,
    v: float,
    centred: bool,
    *,
    k: int,
    dead: NDArray[np.bool_],
    alpha: float = 1 / 32,
    relu: bool = False,
    by_residual: bool = True,
    k_aux: int | None = None,
    multi: bool = False,
    **transcoder: Any,
) -> Result:
    run = Pass(x, p, v, centred, **transcoder)
    kept = per_token(run.z, k)
    f = np.where(kept, run.z, 0)
    run.dz += run.squared(f) * kept
    if multi:
        wide = per_token(run.z, 4 * k)
        run.dz += run.squared(np.where(wide, run.z, 0), weight=1 / 8) * wide
    how = {"alpha": alpha, "relu": relu, "by_residual": by_residual, "k_aux": k_aux}
    run.auxk(f, dead, **how)  # type: ignore[arg-type]
    return run.result()


def batchtopk(
    x: Array,
    p: Parameters,
    v: float,
    centred: bool,
    *,
    k: int,
    dead: NDArray[np.bool_],
    alpha: float = 1 / 32,
    relu: bool = False,
    by_residual: bool = True,
    k_aux: int | None = None,
    sizes: Sequence[int | None] = (None,),
    **transcoder: Any,
) -> Result:
    """`sizes`: the nested prefixes of Matryoshka; None is the full width."""
    run = Pass(x, p, v, centred, **transcoder)
    kept = of_batch(run.z, k)
    f = np.where(kept, run.z, 0)
    for size in sizes:
        run.dz += run.squared(f, latents=size) * kept
    how = {"alpha": alpha, "relu": relu, "by_residual": by_residual, "k_aux": k_aux}
    run.auxk(f, dead, **how)  # type: ignore[arg-type]
    return run.result()


def gated(x: Array, p: Parameters, v: float, centred: bool, *, sparsity: float, **transcoder: Any) -> Result:
    run = Pass(x, p, v, centred, bias="b_gate", **transcoder)
    pi, scale = run.z, np.exp(p["r_mag"])
    mag = run.h * scale + p["b_mag"]
    df = run.squared(np.where((pi > 0) & (mag > 0), mag, 0))
    dmag = df * (pi > 0) * (mag > 0)
    run.grads["b_mag"] += dmag.sum(0)
    run.grads["r_mag"] += (dmag * run.h * scale).sum(0)
    through_mag = dmag * scale  # reaches h, not b_gate
    gate = np.maximum(pi, 0)
    weight = sparsity / (len(x) * np.sqrt(v))
    run.loss += weight * gate.sum()
    error = gate @ p["W_dec"] + run.beside - run.y  # the decoder is detached here
    run.loss += np.sum(error**2) / (len(x) * v)
    run.dz += (weight + 2 * error / (len(x) * v) @ p["W_dec"].T) * (pi > 0)
    run.grads["W_enc"] += run.xc.T @ through_mag
    if centred:
        run.grads["b_dec"] -= (through_mag @ p["W_enc"].T).sum(0)
    return run.result()


def jumprelu(
    x: Array,
    p: Parameters,
    v: float,
    centred: bool,
    *,
    sparsity: float,
    eps: float,
    target: float | None = None,
    form: str = "log",
    **transcoder: Any,
) -> Result:
    run = Pass(x, p, v, centred, **transcoder)
    z, theta = run.z, p["theta"]
    open_ = z > theta
    kernel = np.abs((z - theta) / eps) < 0.5
    df = run.squared(np.where(open_, z, 0))
    run.dz += df * open_
    l0 = open_.sum() / len(x)
    if target is None:
        run.loss += sparsity * l0
        slope = sparsity
    elif form == "log" and l0 > target:
        run.loss += sparsity * np.log(l0 / target) ** 2
        slope = sparsity * 2 * np.log(l0 / target) / l0
    else:
        run.loss += sparsity * (l0 / target - 1) ** 2
        slope = sparsity * 2 * (l0 / target - 1) / target
    run.grads["theta"] += (-(theta / eps) * kernel * df).sum(0) - slope * kernel.sum(0) / (eps * len(x))
    return run.result()
