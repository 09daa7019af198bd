"""What every SAE variant is: parameters, the inference form, a pure loss, and what the training step does around it.

Letters: B tokens in a batch, D model width, F latents, N tokens of a set, d chosen latents; `...` any leading shape.
x is in model units, x' ("xn") normalised, z pre-activations, f the latents' activations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from data.base.errors import UserError
from train.sae.config import SAEConfig
from train.sae.parts.groups import ALONE, Group
from train.sae.parts.init import SAMPLES, directions, geometric_median
from train.sae.parts.norm import InputNorm
from train.sae.parts.ranks import Mesh
from train.sae.parts.split import WHOLE, LatentSplit
from train.sae.parts.threshold import L0Calibration
from train.sae.sparse.codes import Codes
from train.sae.sparse.encode import encode
from train.sae.sparse.rules import Selection

_SCALING_ROWS = 1024  # tokens the first scale of the encoder is measured on
_WARM = 0.999  # share of the sparsity coefficient from which on the warm-up counts as over


@dataclass(frozen=True, eq=False)
class TrainContext:
    """What a loss depends on beside its batch."""

    dead_F: Bool[Tensor, " F"] | None = None
    """Latents that AuxK revives, where the variant uses it."""
    may_die_d: Int[Tensor, " d"] | None = None
    """Latents, ascending, outside of which `dead_F` marks none: with it no device is waited for to find the dead."""
    sparsity_scale: float = 1.0
    """Share of the sparsity coefficient in the warm-up, from 0 to 1; only variants with a coefficient use it."""
    data: Group = ALONE
    """Processes, each with as many tokens, that have one batch together."""

    @property
    def warmed_up(self) -> bool:
        """Return whether the coefficient's warm-up is over."""
        return self.sparsity_scale >= _WARM


PLAIN = TrainContext()
"""No dead latents, and the whole sparsity coefficient."""


@dataclass(frozen=True, eq=False)
class StepOutput:
    """What a loss returns."""

    loss: Float[Tensor, ""]
    """The scalar to differentiate."""
    metrics: dict[str, Tensor]
    """Detached scalars, already weighted where they are terms of the loss; always `nmse` and `l0`."""
    codes: Codes
    """f of the training form, detached."""
    xn_hat_BD: Float[Tensor, "B D"]
    """x_hat' of the training form, detached."""
    min_kept: Float[Tensor, ""] | None = None
    """The smallest z kept of the batch, 0 where fewer than k * B are positive; of BatchTopK and Matryoshka."""
    coefficient: Float[Tensor, ""] | None = None
    """The sparsity coefficient of this step, of the variants with an L1."""
    warmed_up: bool = True
    """Whether the coefficient's warm-up is over."""

    @property
    def tokens(self) -> int:
        """Return the tokens of the batch."""
        return self.codes.shape[0]

    @property
    def fired_F(self) -> Bool[Tensor, " F"]:
        """Return the latents that fired on any token of the batch."""
        return self.codes.fired(self.codes.values)

    @property
    def figures(self) -> dict[str, Tensor]:
        """Return all scalars that are logged of the step."""
        typed = {"min_kept": self.min_kept, "coefficient": self.coefficient}
        return self.metrics | {name: value for name, value in typed.items() if value is not None}


class SAE(nn.Module, ABC):
    """x_hat' = f W_dec + b_dec with z = (x' - b_dec) W_enc + b_enc and f a variant's function of z.

    W_enc [D, F] (a view: the parameter is W_enc_FD), W_dec [F, D], b_dec [D], float32. Buffers: `norm.scale`,
    `variance` (Vx = E||x' - E x'||^2) and `mean_sq` (E||x'||^2), of the training tokens. Squared errors are summed over
    D, averaged over tokens and divided by Vx; an L1 is divided by sqrt(Vx). So the reconstruction's term reads as an
    NMSE.

    `encode`, `decode`, `encode_decode` and `forward` are the inference form, in training too: they take any leading
    shape and give no gradient. The trainer's order: `step = loss(norm.normalise(x), context)`, backward,
    `project_gradient_(W_dec)` where `unit_rows`, clipping, the optimizer's step, `renormalise_(W_dec)` where
    `unit_rows`, `after_step(step)`. Nothing else moves any state.

    `split` says which latents this process has, where several hold one dictionary: then `width` is that of the whole,
    what has one row a latent (all parameters but `replicated`, f, dead latents) has those of this process alone, and
    x_hat is the whole dictionary's.
    """

    name: ClassVar[str]
    Config: ClassVar[type[SAEConfig]]
    bias_names: ClassVar[tuple[str, ...]] = ("b_enc",)  # the latents' biases, that of z first
    replicated: ClassVar[frozenset[str]] = frozenset({"b_dec"})  # parameters without a row for each latent
    needs_calibration: ClassVar[bool] = False
    uses_auxk: ClassVar[bool] = False

    config: SAEConfig
    variance: Tensor
    mean_sq: Tensor

    def __init__(self, d_in: int, width: int, *, split: LatentSplit = WHOLE, **settings: Any) -> None:
        """Make an SAE of `width` latents over `d_in` entries; `settings` are those of the variant's `Config`.

        Raises UserError for settings that do not fit.
        """
        super().__init__()
        self.config = self.Config.of({"width": width, **settings})
        if d_in < 1:
            raise UserError(f"an SAE over {d_in} entries is impossible: there must be at least 1")
        if split.size > self.config.width:
            raise UserError(
                f"{self.config.width} latents cannot be split over {split.size} processes: lower trainer.latent_ranks"
            )
        self.d_in, self.width, self.split = d_in, self.config.width, split
        self.own_width = split.own(self.width)  # latents that are here
        self.site: str | None = None  # where the activations are from, once it is known
        self.unit_rows = True
        self.matmul = "float32"  # of the encoder's product in training; bf16: its factors rounded to bfloat16
        self.norm = InputNorm(self.config.input_norm, d_in)
        # Any values will do here, as `initialise` or a state dict sets others; unit rows make an untrained SAE a sane
        # one.
        rows_FD = directions(self.width, d_in, seed=0, split=split)
        self.W_enc_FD = nn.Parameter(rows_FD.clone())  # latent by latent, as its gradients come and optimizers walk
        self.W_dec = nn.Parameter(rows_FD)
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        for name in self.bias_names:
            self.register_parameter(name, nn.Parameter(torch.zeros(self.own_width)))
        # Buffers, so that they are saved with the weights: a loss can be repeated later from the SAE alone.
        self.register_buffer("variance", torch.ones(()))
        self.register_buffer("mean_sq", torch.tensor(float(d_in)))
        # Last, so that a variant may build on all of the above.
        self.add_state()

    # What a variant defines

    def add_state(self) -> None:
        """Register what the variant has beside; default nothing."""

    @abstractmethod
    def encode_sparse(self, xn_BD: Float[Tensor, "B D"]) -> tuple[Codes, Tensor]:
        """Compute codes of normalised input and their f, in the inference form; differentiable."""

    @abstractmethod
    def loss(self, xn_BD: Float[Tensor, "B D"], context: TrainContext = PLAIN) -> StepOutput:
        """Compute the training loss of normalised input; changes no state."""

    @abstractmethod
    def dense_encode(self, xn_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B F"]:
        """Compute f of normalised input in the inference form, as the formula reads; `encode_sparse` must equal it."""

    @abstractmethod
    def dense_loss(self, xn_BD: Float[Tensor, "B D"], context: TrainContext = PLAIN) -> Float[Tensor, ""]:
        """Compute the training loss as the formula reads; `loss` must equal it in value and gradients."""

    def after_step(self, step: StepOutput) -> None:
        """Follow an optimizer's step, in training only: `step` is what `loss` gave for this batch; default nothing."""

    def start_variant(self, xn_ND: Float[Tensor, "N D"]) -> None:
        """Set what a variant takes from normalised samples, last in `initialise`; default nothing."""

    def calibrate_l0(self, batches: Sequence[Float[Tensor, "_ D"]], data: Group = ALONE) -> L0Calibration | None:
        """Bring the mean L0 on `batches` (model units, not trained on) to its target; None where there is none.

        Each process of `data` has batches of its own, equally many.
        """
        return None

    def start_encoder(self) -> None:
        """Change the encoder that `initialise` has set to the decoder's transpose; default nothing."""

    # What an optimizer takes

    @property
    def rate_shares(self) -> Mapping[str, float]:
        """Shares of the learning rate, of the parameters that do not take all of it."""
        return {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Group the parameters as optimizers take them; `rate_share` of a group is its part of the learning rate."""
        plain = [parameter for name, parameter in self.named_parameters() if name not in self.rate_shares]
        groups: list[dict[str, Any]] = [{"params": plain}]
        for name, share in self.rate_shares.items():
            groups.append({"params": [self.get_parameter(name)], "rate_share": share})
        return groups

    # What describes it

    def settings(self) -> dict[str, Any]:
        """Give the constructor's arguments as plain JSON: `type(sae)(**sae.settings())` is an SAE of the same form."""
        return {"d_in": self.d_in, **self.config.model_dump(mode="json")}

    def extra_repr(self) -> str:
        site = "" if self.site is None else f", site={self.site}"
        return f"{self.name}, d={self.d_in}, F={self.width}, {self.config.aim}{site}"

    def __repr__(self) -> str:
        return f"SAE({self.extra_repr()})"

    @property
    def input_norm(self) -> str:
        """Return how x' is made from x."""
        return self.config.input_norm

    @property
    def apply_b_dec_to_input(self) -> bool:
        """Return whether the encoder reads x' - b_dec."""
        return self.config.apply_b_dec_to_input

    @property
    def W_enc(self) -> Float[Tensor, "D F"]:
        """Return the encoder's weights as the formula has them."""
        return self.W_enc_FD.t()

    @property
    def bias_F(self) -> Float[Tensor, " F"]:
        """Return the bias of z."""
        bias_F: Tensor = getattr(self, self.bias_names[0])
        return bias_F

    # The inference form, in model units

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... F"]:
        """Compute f of model-unit input."""
        x_BD = self._rows(x)
        return self.encode_normalised(self.norm.normalise(x_BD)).reshape(*x.shape[:-1], self.own_width)

    @torch.no_grad()
    def decode(self, f: Float[Tensor, "... F"], x: Float[Tensor, "... D"] | None = None) -> Float[Tensor, "... D"]:
        """Compute x_hat of activations, in model units.

        `x` is the input that f came from, which input_norm=token needs: it gives each token's mean and spread back.
        """
        f_BF = f.reshape(-1, f.shape[-1]).to(self.W_dec.dtype)
        if f.shape[-1] != self.own_width:
            raise UserError(f"the SAE has {self.own_width} latents and decode got {f.shape[-1]}: give all of them")
        if x is None and self.input_norm == "token":
            raise UserError("input_norm=token gives each token its own mean and spread back: call decode(f, x)")
        x_hat_BD = self.decode_normalised(f_BF)
        x_BD = x_hat_BD if x is None else self._rows(x)
        return self.norm.denormalise(x_hat_BD, x_BD).reshape(*f.shape[:-1], self.d_in)

    @torch.no_grad()
    def encode_decode(self, x: Float[Tensor, "... D"]) -> tuple[Float[Tensor, "... F"], Float[Tensor, "... D"]]:
        """Compute f and x_hat of model-unit input; x_hat in model units and the parameters' dtype."""
        x_BD = self._rows(x)
        # By way of codes, also where all of f is asked for: the decoder's product then touches the k active rows of
        # W_dec and not all F.
        codes, f = self.encode_sparse(self.norm.normalise(x_BD))
        x_hat_BD = self.norm.denormalise(self.decode_sparse(codes, f), x_BD)
        return codes.dense(f).reshape(*x.shape[:-1], self.own_width), x_hat_BD.reshape(x.shape)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Compute x_hat in model units."""
        return self.encode_decode(x)[1]

    def _rows(self, x: Tensor) -> Float[Tensor, "B D"]:
        if x.dim() < 1 or x.shape[-1] != self.d_in:
            raise UserError(f"the SAE reads {self.d_in} entries a token and got {[*x.shape]}: the last must be them")
        return x.reshape(-1, self.d_in)

    # Normalised input

    @torch.no_grad()
    def encode_normalised(self, xn_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B F"]:
        """Compute f of normalised input, in the inference form."""
        codes, f = self.encode_sparse(xn_BD)
        return codes.dense(f)

    def decode_normalised(self, f_BF: Float[Tensor, "B F"]) -> Float[Tensor, "B D"]:
        """Compute x_hat' = f W_dec + b_dec; differentiable."""
        if self.split.size > 1:
            return self.split.total(f_BF @ self.W_dec) + self.b_dec
        return torch.addmm(self.b_dec, f_BF, self.W_dec)

    def decode_sparse(self, codes: Codes, f: Tensor) -> Float[Tensor, "B D"]:
        """Compute x_hat' = f W_dec + b_dec of codes; differentiable."""
        return self.split.total(codes.decode(f, self.W_dec)[0]) + self.b_dec

    def input_centred(self, xn_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Give x' - b_dec, or x' where the variant's setting says so."""
        return xn_BD - self.b_dec if self.apply_b_dec_to_input else xn_BD

    def pre_activation(self, xn_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B F"]:
        """Compute z = (x' - b_dec) W_enc + b_enc (Gated: pi, with b_gate)."""
        return torch.addmm(self.bias_F, self.input_centred(xn_BD), self.W_enc)

    def select(
        self, xn_BD: Float[Tensor, "B D"], bias_F: Tensor | None, selections: Sequence[Selection]
    ) -> list[Codes]:
        """Compute what the selections keep of z with this bias; only training rounds the product's factors."""
        # Each process adds its latents' part to the gradient of the one b_dec.
        b_dec_D = self.split.shared(self.b_dec) if self.apply_b_dec_to_input else None
        # The scores of the inference form must not depend on how the training saved time.
        matmul = self.matmul if self.training else "float32"
        return encode(xn_BD, self.W_enc_FD, bias_F, b_dec_D, selections, matmul=matmul)

    def l0(self, codes: Codes, f: Tensor, data: Group = ALONE) -> Float[Tensor, ""]:
        """Compute the mean number of f above zero a token, of all latents and of the rows of `data`."""
        return self.mesh(data).sum_((f.detach() > 0).sum()) / (codes.shape[0] * data.size)

    # Terms of losses

    def mesh(self, data: Group) -> Mesh:
        """Return the processes that have a batch and this dictionary together."""
        return Mesh(data, self.split)

    def nmse(self, xn_hat_BD: Float[Tensor, "B D"], xn_BD: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
        """Compute E over tokens of ||x' - x_hat'||^2 / Vx."""
        # In bfloat16 a step of Adam is often smaller than the spacing of the weights, which then never move.
        if self.W_dec.dtype not in (torch.float32, torch.float64):
            raise UserError(f"parameters in {self.W_dec.dtype} cannot follow small gradients: train the SAE in float32")
        return (xn_hat_BD - xn_BD).square().sum() / (xn_BD.shape[0] * self.variance)

    def l1(self, f: Tensor, tokens: int) -> Float[Tensor, ""]:
        """Compute E over tokens of sum_j f_j / sqrt(Vx), for f at least 0, of the latents active on so many tokens."""
        # sqrt(Vx), not Vx: an L1 scales as x does, a squared error as its square. With both relative, one coefficient
        # means the same at every site.
        return f.sum() / (tokens * self.variance.sqrt())

    # The start

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
        self.W_dec.copy_(directions(self.width, self.d_in, seed, self.split))
        # c has no closed form, as it depends on which latents are chosen. But f grows in proportion to c (but for
        # thresholds of a variant's own): one forward at c = 1 says by how much x_hat' is too short.
        self._start_encoder(1.0)
        xn_BD = xn_ND[:_SCALING_ROWS]
        explained = (self.loss(xn_BD).xn_hat_BD - self.b_dec).square().sum()
        to_explain = (xn_BD - self.b_dec).square().sum()
        # Nothing to scale by where no latent fired, or all tokens are alike.
        if explained > 0 and to_explain > 0:
            self._start_encoder(float((to_explain / explained).sqrt()))
        self.start_variant(xn_ND)

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
        self.start_encoder()
