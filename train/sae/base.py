"""What every SAE variant is: parameters, the shipping form, a pure loss, and what the training step does around it.

Letters: B tokens in a batch, D model width, F latents, N tokens of a set.
x is in model units, x' ("xn") normalised, f the latents' activations.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from data.base.errors import UserError
from train.sae.parts.init import SAMPLES, directions, geometric_median
from train.sae.parts.norm import InputNorm
from train.sae.sparse.encode import Codes, encode
from train.sae.sparse.select import Selector

_SCALING_ROWS = 1024  # tokens the first scale of the encoder is measured on


@dataclass(frozen=True)
class StepOutput:
    """What a loss returns.

    loss: the scalar to differentiate.
    parts: detached scalars, already weighted where they are terms of the loss; always `nmse` and `l0`.
    codes, xn_hat_BD: f and x_hat' of the training form, detached.
    """

    loss: Float[Tensor, ""]
    parts: dict[str, Tensor]
    codes: Codes
    xn_hat_BD: Float[Tensor, "B D"]

    @property
    def tokens(self) -> int:
        return self.codes.shape[0]

    @property
    def fired_F(self) -> Bool[Tensor, " F"]:
        """Latents that fired on any token of the batch."""
        return self.codes.fired(self.codes.values)


class SAE(nn.Module, ABC):
    """x_hat' = f W_dec + b_dec with z = (x' - b_dec) W_enc + b_enc and f a variant's function of z.

    W_enc [D, F] (a view: the parameter is W_enc_FD), W_dec [F, D], b_dec [D], float32. Buffers: `norm.scale`,
    `variance` (Vx = E||x' - E x'||^2) and `mean_sq` (E||x'||^2), of the training tokens. Squared errors are summed over
    D, averaged over tokens and divided by Vx; an L1 is divided by sqrt(Vx). So the reconstruction's term reads as an
    NMSE.

    The trainer's order: `step = loss(norm.normalise(x), dead_F=...)`, backward, `project_gradient_(W_dec)` where
    `unit_rows`, clipping, the optimizer's step, `renormalise_(W_dec)` where `unit_rows`, `after_step(step)`. Nothing
    else moves any state; `encode`, `forward` and `run` are the form that ships, in training too.
    """

    name: ClassVar[str]
    bias_names: ClassVar[tuple[str, ...]] = ("b_enc",)  # the latents' biases, that of z first
    needs_calibration: ClassVar[bool] = False
    uses_auxk: ClassVar[bool] = False

    variance: Tensor
    mean_sq: Tensor

    def __init__(
        self, d_in: int, width: int, *, input_norm: str = "dataset", apply_b_dec_to_input: bool = True
    ) -> None:
        super().__init__()
        if d_in < 1 or width < 1:
            raise UserError(f"an SAE of {width} latents over {d_in} entries is impossible: both must be at least 1")
        self.d_in, self.width = d_in, width
        self.input_norm, self.apply_b_dec_to_input = input_norm, apply_b_dec_to_input
        self.unit_rows = True
        self.matmul = "float32"  # of the encoder's product in training; bf16: its factors rounded to bfloat16
        self.norm = InputNorm(input_norm, d_in)
        rows_FD = directions(width, d_in, seed=0)
        self.W_enc_FD = nn.Parameter(rows_FD.clone())  # latent by latent, as its gradients come and optimizers walk
        self.W_dec = nn.Parameter(rows_FD)
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        for name in self.bias_names:
            self.register_parameter(name, nn.Parameter(torch.zeros(width)))
        self.register_buffer("variance", torch.ones(()))
        self.register_buffer("mean_sq", torch.tensor(float(d_in)))

    # What a variant defines.

    @abstractmethod
    def active(self, xn_BD: Float[Tensor, "B D"]) -> tuple[Codes, Tensor]:
        """Codes of normalised input and their f, in the form that ships."""

    @abstractmethod
    def loss(
        self,
        xn_BD: Float[Tensor, "B D"],
        *,
        dead_F: Bool[Tensor, " F"] | None = None,
        among_d: Int[Tensor, " d"] | None = None,
        sparsity_scale: float = 1.0,
    ) -> StepOutput:
        """The training loss of normalised input; changes no state.

        `dead_F` marks the latents AuxK revives (used where `uses_auxk`), all of them in `among_d`, ascending, where it
        is given: then no device is waited for to find them. `sparsity_scale` in [0, 1] multiplies the sparsity
        coefficient (warm-up) of the variants that have one.
        """

    # What all share.

    @property
    def W_enc(self) -> Float[Tensor, "D F"]:
        """The encoder's weights as the formula has them."""
        return self.W_enc_FD.t()

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON: `type(sae)(**sae.settings())` is an SAE of the same form."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def input_centred(self, xn_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """x' - b_dec, or x' where the variant's setting says so."""
        return xn_BD - self.b_dec if self.apply_b_dec_to_input else xn_BD

    def pre_activation(self, xn_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B F"]:
        """z = (x' - b_dec) W_enc + b_enc (Gated: pi, with b_gate)."""
        bias_F: Tensor = getattr(self, self.bias_names[0])
        return torch.addmm(bias_F, self.input_centred(xn_BD), self.W_enc)

    def encoded(self, xn_BD: Float[Tensor, "B D"], selector: Selector, *aside: Any) -> tuple[Codes, Codes | None]:
        """What `selector` keeps of z, and what `encode` gives of latents aside."""
        bias_F: Tensor = getattr(self, self.bias_names[0])
        return self.encode_with(bias_F, xn_BD, selector, *aside)

    def encode_with(
        self, bias_F: Tensor | None, xn_BD: Float[Tensor, "B D"], selector: Selector, *aside: Any
    ) -> tuple[Codes, Codes | None]:
        """`encoded` by this bias; only training rounds the product's factors."""
        b_dec_D, matmul = self.b_dec if self.apply_b_dec_to_input else None, self.matmul if self.training else "float32"
        return encode(xn_BD, self.W_enc_FD, bias_F, b_dec_D, selector, *aside, matmul=matmul)

    def decoded(self, codes: Codes, f: Tensor) -> Float[Tensor, "B D"]:
        """x_hat' = f W_dec + b_dec of codes."""
        return codes.decode(f, self.W_dec)[0] + self.b_dec

    def activate(self, xn_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B F"]:
        """f of normalised input, in the form that ships."""
        codes, f = self.active(xn_BD)
        return codes.dense(f)

    def decode_normalised(self, f_BF: Float[Tensor, "B F"]) -> Float[Tensor, "B D"]:
        """x_hat' = f W_dec + b_dec."""
        return torch.addmm(self.b_dec, f_BF, self.W_dec)

    def encode(self, x_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B F"]:
        """f of model-unit input, in the form that ships."""
        return self.activate(self.norm.normalise(x_BD))

    def run(self, x_BD: Float[Tensor, "B D"]) -> tuple[Float[Tensor, "B F"], Float[Tensor, "B D"]]:
        """f and x_hat of model-unit input, in the form that ships; x_hat in model units and the parameters' dtype."""
        codes, f = self.active(self.norm.normalise(x_BD))
        return codes.dense(f), self.norm.denormalise(self.decoded(codes, f), x_BD)

    def forward(self, x_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """x_hat in model units."""
        return self.run(x_BD)[1]

    def nmse(self, xn_hat_BD: Float[Tensor, "B D"], xn_BD: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
        """E over tokens of ||x' - x_hat'||^2 / Vx."""
        if self.W_dec.dtype not in (torch.float32, torch.float64):
            raise UserError(f"parameters in {self.W_dec.dtype} cannot follow small gradients: train the SAE in float32")
        return (xn_hat_BD - xn_BD).square().sum() / (xn_BD.shape[0] * self.variance)

    def l1(self, f: Tensor, tokens: int) -> Float[Tensor, ""]:
        """E over tokens of sum_j f_j / sqrt(Vx), for f at least 0, of the latents active on so many tokens."""
        return f.sum() / (tokens * self.variance.sqrt())

    def after_step(self, step: StepOutput) -> None:
        """After the optimizer's step, in training only: `step` is what `loss` gave for this batch."""

    @torch.no_grad()
    def initialise(
        self,
        sample_ND: Float[Tensor, "N D"],
        *,
        mean_sq_norm: float | None = None,
        variance: float | None = None,
        seed: int = 0,
    ) -> None:
        """Start from data, `sample_ND` in model units.

        `mean_sq_norm` E||x||^2 and `variance` E||x - E x||^2 of the training tokens in model units; measured on the
        sample where None. W_dec random unit rows; W_enc = c W_dec^T with c such that x_hat' - b_dec has the norm of
        x' - b_dec; b_dec the geometric median of up to 32,768 samples (Gao et al. 2024). Where b_dec is not
        subtracted at the encoder, the biases start at -b_dec W_enc, so that the SAE starts as the same function.
        """
        sample_ND = sample_ND.to(self.W_dec)
        if sample_ND.shape[0] < 2 or not bool(sample_ND.isfinite().all()):
            raise UserError("an SAE starts from at least 2 finite activations: check the site and the store")
        self._measure(sample_ND, mean_sq_norm, variance)
        xn_ND = self.norm.normalise(sample_ND[:SAMPLES])
        self.b_dec.copy_(geometric_median(xn_ND))
        self.W_dec.copy_(directions(self.width, self.d_in, seed))
        self._start_encoder(1.0)
        xn_BD = xn_ND[:_SCALING_ROWS]
        explained = (self.loss(xn_BD).xn_hat_BD - self.b_dec).square().sum()
        wanted = (xn_BD - self.b_dec).square().sum()
        if explained > 0 and wanted > 0:
            self._start_encoder(float((wanted / explained).sqrt()))
        self.start_variant(xn_ND)

    def start_variant(self, xn_ND: Float[Tensor, "N D"]) -> None:
        """The last of `initialise`: what a variant sets from normalised samples; default nothing."""

    def _measure(self, sample_ND: Tensor, mean_sq_norm: float | None, variance: float | None) -> None:
        """Set s, Vx and E||x'||^2."""
        if mean_sq_norm is None:
            mean_sq_norm = float(sample_ND.double().square().sum(1).mean())
        if not 0 < mean_sq_norm < float("inf"):
            raise UserError(
                f"the activations' mean squared norm is {mean_sq_norm}: an SAE needs finite ones that are not all zero"
            )
        self.norm.fit(mean_sq_norm)
        if self.input_norm == "token" or variance is None:
            xn_ND = self.norm.normalise(sample_ND).double()
            mean_sq, spread = float(xn_ND.square().sum(1).mean()), float(xn_ND.var(0, correction=0).sum())
        else:
            s_sq = float(self.norm.scale) ** 2
            mean_sq, spread = s_sq * mean_sq_norm, s_sq * variance
        if not 0 < spread < float("inf"):
            raise UserError(
                "the activations do not vary, so there is nothing to reconstruct: check the site and the store"
            )
        self.mean_sq.fill_(mean_sq)
        self.variance.fill_(spread)

    def _start_encoder(self, scale: float) -> None:
        self.W_enc.copy_(self.W_dec.t() * scale)
        for name in self.bias_names:
            bias_F = self.get_parameter(name)
            bias_F.zero_() if self.apply_b_dec_to_input else bias_F.copy_(-(self.b_dec @ self.W_enc))
