"""What other tools' classes can hold of an SAE: the same function of x in model units.

Letters: B tokens in a batch, D model width, F latents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train.sae.base import SAE
from train.sae.variants.relu import ReLU
from train.sae.weights_file import pieces_of

_UNIT = 1e-5  # rows of W_dec this close to length 1 are unit rows in float32


def rebuilt(sae: SAE, state: dict[str, Tensor], **settings: Any) -> SAE:
    """Make an SAE of the same class with other settings and this state, whose tensors it shares."""
    with torch.device("meta"):
        new = type(sae)(**sae.settings() | settings)
    new.load_state_dict(state, assign=True)
    new.site, new.target = sae.site, sae.target
    return new


def unit_rows(W_dec_FD: Tensor) -> bool:
    """Return whether all rows are unit, to rounding."""
    return bool(((torch.linalg.vector_norm(W_dec_FD, dim=1) - 1).abs() < _UNIT).all())


@torch.no_grad()
def folded(sae: SAE) -> SAE:
    """Keep the x_hat of model-unit x with `dataset` folded in (`token` cannot be) and,
    for April's ReLU, unit rows.

    z, f, b_dec, the latents' biases, theta, T are divided by s; W_enc, W_dec and r_mag stay as they are. April's norms
    go from the rows of W_dec to W_enc and b_enc, and with them to f. What stays is shared with the SAE given: a large
    one is not copied.

    Of a transcoder both norms are folded in and its centre too, which becomes zero: y_hat of model-unit x stays, in
    the target's model units, with f in them.
    """
    if sae.transcodes:
        return _with_free_rows(sae, _folded_transcoder(sae), {"input_norm": "none"})
    state = dict(sae.state_dict())
    # x' = s x. z' = (x' - b') W + b' is s times (x - b'/s) W + b'/s, so everything that is added to z or compared with
    # it is divided by s and the weights stay: f and x_hat come out in the model's units.
    s = sae.norm.scale
    for name in ("b_dec", *sae.bias_names, "theta", "threshold"):
        if name in state:
            state[name] = state[name] / s
    for name in ("variance", "mean_sq"):
        state[name] = state[name] / s.square()
    state["norm.scale"] = torch.ones_like(s)
    return _with_free_rows(sae, state, {"input_norm": "token" if sae.input_norm == "token" else "none"})


def _folded_transcoder(sae: SAE) -> dict[str, Tensor]:
    """Give the state of a transcoder that does the same without norms and centre."""
    state = dict(sae.state_dict())
    # With x' = s x and y' = t y, and every z and f divided by t: z = x (s/t) W + (b - c W) / t, and
    # y_hat = f W_dec + x (s/t) W_skip + (b_dec - c W_skip) / t, c the centre. In float64, since a threshold may lie
    # close to z.
    s, t, centre_D = sae.norm.scale.double(), sae.norm_out.scale.double(), sae.centre.double()
    moved_F = _times(sae.W_enc_FD, centre_D)
    for name in sae.bias_names:
        by_F = moved_F * sae.get_parameter("r_mag").double().exp() if name == "b_mag" else moved_F
        state[name] = ((state[name].double() - by_F) / t).float()
    for name in ("theta", "threshold"):
        if name in state:
            state[name] = state[name] / sae.norm_out.scale
    state["W_enc_FD"] = torch.cat([(piece.double() * (s / t)).float() for piece in pieces_of(sae.W_enc_FD)])
    b_dec_E = state["b_dec"].double()
    if sae.W_skip is not None:
        b_dec_E = b_dec_E - centre_D @ sae.W_skip.double()
        state["W_skip"] = (sae.W_skip.double() * (s / t)).float()
    state["b_dec"] = (b_dec_E / t).float()
    for name in ("variance", "mean_sq"):
        state[name] = state[name] / sae.norm_out.scale.square()
    for name in ("norm.scale", "norm_target.scale"):
        state[name] = torch.ones_like(state[name])
    state["centre"] = torch.zeros_like(sae.centre)
    return state


def _times(W_FD: Tensor, vector_D: Tensor) -> Tensor:
    """Multiply a matrix by a vector in float64, a piece at a time, as the whole in float64 is twice as large."""
    return torch.cat([piece.double() @ vector_D for piece in pieces_of(W_FD)])


def _with_free_rows(sae: SAE, state: dict[str, Tensor], settings: dict[str, Any]) -> SAE:
    """Make the SAE of a folded state, the lengths of April's decoder rows moved to its encoder."""
    if isinstance(sae, ReLU):
        settings["form"] = "bricken"
        if not sae.unit_rows and not unit_rows(sae.W_dec):
            # relu(c z) = c relu(z) for c > 0: a row's length may move from the decoder to the encoder without any
            # change of x_hat.
            norm_F = torch.linalg.vector_norm(sae.W_dec, dim=1).clamp_min(1e-12)
            state["W_dec"] = state["W_dec"] / norm_F[:, None]
            state["W_enc_FD"] = state["W_enc_FD"] * norm_F[:, None]
            state["b_enc"] = state["b_enc"] * norm_F
    return rebuilt(sae, state, **settings)


@torch.no_grad()
def subtracting(sae: SAE, wanted: bool) -> SAE:
    """Keep the function, with or without b_dec subtracted at the encoder:
    what it adds to h goes into the biases."""
    if sae.apply_b_dec_to_input == wanted:
        return sae
    state = dict(sae.state_dict())
    # (x' - b_dec) W = x' W - b_dec W: a constant of each latent. In float64, since a threshold may lie close to z.
    moved_F = _times(sae.W_enc_FD, sae.b_dec.double()) * (1 if wanted else -1)
    for name in sae.bias_names:
        by_F = moved_F * sae.get_parameter("r_mag").double().exp() if name == "b_mag" else moved_F
        state[name] = (state[name].double() + by_F).to(state[name].dtype)
    return rebuilt(sae, state, apply_b_dec_to_input=wanted)
