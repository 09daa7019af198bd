"""What every SAE variant is: parameters, the inference form, a pure loss, and what the training step does around it.

Letters: B tokens in a batch, D model width, E width of what is predicted (D but for a transcoder), F latents, N tokens
of a set, S sites, d chosen latents; `...` any leading shape. x is in model units, x' ("xn") normalised, z
pre-activations, f the latents' activations, y and y' what a transcoder predicts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data.base.errors import UserError
from train.sae.config import SAEConfig, transcoder_settings
from train.sae.parts.groups import ALONE, RankGroup
from train.sae.parts.init import SAMPLES, StartRows, directions, finite, fit_moments, fit_norm, geometric_median
from train.sae.parts.norm import InputNorm
from train.sae.parts.ranks import Mesh
from train.sae.parts.sites import SiteNorms, checked_widths, norms_by_site
from train.sae.parts.split import WHOLE, LatentSplit
from train.sae.parts.threshold import L0Calibration
from train.sae.parts.unit_rows import renormalise_
from train.sae.sparse.codes import Codes
from train.sae.sparse.encode import encode
from train.sae.sparse.error import squared_error
from train.sae.sparse.rules import Selection
from train.sae.step import PLAIN, StepOutput, TrainContext

_SCALING_ROWS = 1024  # tokens the first scale of the encoder is measured on


class SAE(nn.Module, ABC):
    """x_hat' = f W_dec + b_dec with z = (x' - b_dec) W_enc + b_enc and f a variant's function of z.

    W_enc [D, F] (a view: the parameter is W_enc_FD), W_dec [F, D], b_dec [D], float32. Buffers: `norm.scale`,
    `variance` (Vx = E||x' - E x'||^2) and `mean_sq` (E||x'||^2), of the training tokens. Squared errors are summed over
    D, averaged over tokens and divided by Vx; an L1 is divided by sqrt(Vx). So the reconstruction's term reads as an
    NMSE.

    Given `d_out`, it is a transcoder (Dunefsky et al. 2406.11944): x_hat' stands for y', the activations of another
    site at the same tokens, normalised by `norm_out`. W_dec [F, E] and b_dec [E] belong to them, as do Vx, `mean_sq`
    and every squared error. In its encoder a constant takes the place of b_dec: z = (x' - centre) W_enc + b_enc with
    the buffer `centre`, the geometric median of x' at the start; it can be folded into b_enc, but in training keeps a
    step of W_enc from moving each z by a large mean. With the setting `skip`, y_hat' has (x' - centre) W_skip beside
    (Paulo et al. 2501.18823), W_skip [D, E] zero at the start.

    Given `site_widths`, it is a crosscoder (Lindsey et al. 2024): x = [x_1 | ... | x_S] are S sites' activations at the
    same tokens, each normalised apart, Vx and the squared errors are sums over them, and a decoder row's length is the
    sum of its parts' norms: that is 1 where rows are unit, and the weight of f in the L1 where they are free.

    `encode`, `decode`, `encode_decode` and `forward` are the inference form, in training too: they take any leading
    shape and give no gradient. The trainer's order: `step = loss(norm.normalise(x), context)`, backward,
    `project_gradient_(W_dec)` where `unit_rows`, clipping, the optimizer's step, `renormalise_(W_dec)` where
    `unit_rows`, `after_step(step)`; then dead latents' biases rise (`dead_raise`). Nothing else moves any state.

    `split` says which latents this process has, where several hold one dictionary: then `width` is that of the whole,
    what has one row a latent (all parameters but `replicated`, f, dead latents) has those of this process alone, and
    x_hat is the whole dictionary's.
    """

    name: ClassVar[str]
    Config: ClassVar[type[SAEConfig]]
    bias_names: ClassVar[tuple[str, ...]] = ("b_enc",)  # the latents' biases, that of z first
    replicated: ClassVar[frozenset[str]] = frozenset({"b_dec", "W_skip"})  # parameters without a row for each latent
    needs_calibration: ClassVar[bool] = False
    uses_auxk: ClassVar[bool] = False

    config: SAEConfig
    variance: Tensor
    mean_sq: Tensor
    centre: Tensor  # of a transcoder alone
    W_skip: nn.Parameter | None

    def __init__(
        self,
        d_in: int,
        width: int,
        d_out: int | None = None,
        *,
        site_widths: Sequence[int] | None = None,
        split: LatentSplit = WHOLE,
        **settings: Any,
    ) -> None:
        """Make an SAE of `width` latents over `d_in` entries; `settings` are those of the variant's `Config`.

        With `d_out` it is a transcoder, which predicts so many entries of another site; with `site_widths`, which sum
        to `d_in`, a crosscoder of those sites. Raises UserError for settings that do not fit.
        """
        super().__init__()
        self.transcodes = d_out is not None
        self.site_widths = None if site_widths is None else checked_widths(site_widths, d_in, d_out)
        if self.transcodes:
            settings = transcoder_settings(settings)
        self.config = self.Config.of({"width": width, **settings})
        if d_in < 1 or (d_out is not None and d_out < 1):
            raise UserError(f"an SAE from {d_in} to {d_out or d_in} entries is impossible: there must be at least 1")
        if self.config.skip and not self.transcodes:
            raise UserError(
                "sae.skip is a path from a transcoder's input to its target: give target, or sae.skip=false"
            )
        if split.size > self.config.width:
            raise UserError(
                f"{self.config.width} latents cannot be split over {split.size} processes: lower trainer.latent_ranks"
            )
        self.d_in, self.width, self.split = d_in, self.config.width, split
        self.own_width = split.own(self.width)  # latents that are here
        self.d_out = d_in if d_out is None else d_out
        self.site: str | None = None  # where the activations are from, once it is known; a crosscoder's sites joined
        self.record: dict[str, Any] | None = None  # its config.json, where it was loaded from a folder
        self.target: str | None = None  # of a transcoder, where those are from that it predicts
        self.unit_rows = True
        self.matmul = "float32"  # of the encoder's product in training; bf16: its factors rounded to bfloat16
        kind = self.config.input_norm
        self.norm = InputNorm(kind, d_in) if self.site_widths is None else SiteNorms(kind, self.site_widths)
        # Any values will do here, as `initialise` or a state dict sets others; unit rows make an untrained SAE a sane
        # one. The encoder's lie latent by latent, as its gradients come and optimizers walk.
        self.W_enc_FD = nn.Parameter(directions(self.width, d_in, seed=0, split=split))
        self.W_dec = nn.Parameter(directions(self.width, self.d_out, seed=0, split=split))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        for name in self.bias_names:
            self.register_parameter(name, nn.Parameter(torch.zeros(self.own_width)))
        # Buffers, so that they are saved with the weights: a loss can be repeated later from the SAE alone.
        self.register_buffer("variance", torch.ones(()))
        self.register_buffer("mean_sq", torch.tensor(float(self.d_out)))
        if self.transcodes:
            self.norm_target = InputNorm(self.config.input_norm, self.d_out)
            self.register_buffer("centre", torch.zeros(d_in))
        self.W_skip = nn.Parameter(torch.zeros(d_in, self.d_out)) if self.config.skip else None
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

    def calibrate_l0(self, batches: Sequence[Float[Tensor, "_ D"]], data: RankGroup = ALONE) -> L0Calibration | None:
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
        if self.transcodes:
            return {"d_in": self.d_in, "d_out": self.d_out, **self.config.model_dump(mode="json")}
        sites = {} if self.site_widths is None else {"site_widths": [*self.site_widths]}
        return {"d_in": self.d_in, **sites, **self.config.model_dump(mode="json", exclude={"skip"})}

    def extra_repr(self) -> str:
        places = "".join(
            f", {name}={place}" for name, place in (("site", self.site), ("target", self.target)) if place is not None
        )
        out = f", d_out={self.d_out}" if self.transcodes else ""
        skip = ", skip" if self.config.skip else ""
        return f"{self.name}, d={self.d_in}{out}, F={self.width}, {self.config.aim}{skip}{places}"

    def __repr__(self) -> str:
        return f"SAE({self.extra_repr()})"

    @property
    def input_norm(self) -> str:
        """Return how x' is made from x."""
        return self.config.input_norm

    @property
    def skip(self) -> bool:
        """Return whether it has a linear path beside its latents."""
        return self.config.skip

    @property
    def apply_b_dec_to_input(self) -> bool:
        """Return whether the encoder reads x' - b_dec."""
        return self.config.apply_b_dec_to_input

    @property
    def norm_out(self) -> InputNorm:
        """Return the norm of what is predicted: that of the input, but for a transcoder."""
        return self.norm_target if self.transcodes else self.norm

    @property
    def encoder_centre(self) -> Float[Tensor, " D"] | None:
        """Return what the encoder subtracts from x': b_dec, a transcoder's own `centre`, or nothing."""
        if self.transcodes:
            return self.centre
        return self.b_dec if self.apply_b_dec_to_input else None

    @property
    def W_enc(self) -> Float[Tensor, "D F"]:
        """Return the encoder's weights as the formula has them."""
        return self.W_enc_FD.t()

    @property
    def row_norms_F(self) -> Float[Tensor, " F"]:
        """Return the lengths of W_dec's rows, a crosscoder's as sums over its sites."""
        return norms_by_site(self.W_dec, self.norm_out.widths).sum(0)

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
    def decode(self, f: Float[Tensor, "... F"], x: Float[Tensor, "... D"] | None = None) -> Float[Tensor, "... E"]:
        """Compute x_hat of activations, in model units; of a transcoder those of its target.

        `x` is the input that f came from. input_norm=token needs it, as it gives each token's mean and spread back, and
        so does a transcoder's skip.
        """
        f_BF = f.reshape(-1, f.shape[-1]).to(self.W_dec.dtype)
        if f.shape[-1] != self.own_width:
            raise UserError(f"the SAE has {self.own_width} latents and decode got {f.shape[-1]}: give all of them")
        if x is None and self.input_norm == "token":
            raise UserError("input_norm=token gives each token its own mean and spread back: call decode(f, x)")
        x_BD = None if x is None else self._rows(x)
        x_hat_BE = self.decode_normalised(f_BF, None if x_BD is None else self.norm.normalise(x_BD))
        x_hat_BE = self.norm_out.denormalise(x_hat_BE, x_hat_BE if x_BD is None else x_BD)
        return x_hat_BE.reshape(*f.shape[:-1], self.d_out)

    @torch.no_grad()
    def encode_decode(self, x: Float[Tensor, "... D"]) -> tuple[Float[Tensor, "... F"], Float[Tensor, "... E"]]:
        """Compute f and x_hat of model-unit input; x_hat in the model units of its site, in the parameters' dtype."""
        x_BD = self._rows(x)
        xn_BD = self.norm.normalise(x_BD)
        # By way of codes, also where all of f is asked for: the decoder's product then touches the k active rows of
        # W_dec and not all F.
        codes, f = self.encode_sparse(xn_BD)
        x_hat_BE = self.norm_out.denormalise(self.decode_sparse(codes, f, xn_BD), x_BD)
        leading = x.shape[:-1]
        return codes.dense(f).reshape(*leading, self.own_width), x_hat_BE.reshape(*leading, self.d_out)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... E"]:
        """Compute x_hat in model units; of a transcoder the prediction of its target, in the target's."""
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

    def decode_normalised(
        self, f_BF: Float[Tensor, "B F"], xn_BD: Float[Tensor, "B D"] | None = None
    ) -> Float[Tensor, "B E"]:
        """Compute x_hat' = f W_dec + b_dec; differentiable. A skip needs x'."""
        if self.W_skip is None:
            if self.split.size > 1:
                return self.split.total(f_BF @ self.W_dec) + self.b_dec
            return torch.addmm(self.b_dec, f_BF, self.W_dec)
        if xn_BD is None:
            raise UserError("the transcoder has a skip from its input to its output: call decode(f, x)")
        return self.split.total(f_BF @ self.W_dec) + self.beside_latents(xn_BD)

    def decode_sparse(self, codes: Codes, f: Tensor, xn_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B E"]:
        """Compute x_hat' = f W_dec + b_dec of codes, and the skip's part; differentiable."""
        return self.split.total(codes.decode(f, self.W_dec)[0]) + self.beside_latents(xn_BD)

    def beside_latents(self, xn_BD: Float[Tensor, "B D"]) -> Tensor:
        """Compute what is added to f W_dec: b_dec [E], or with a skip b_dec + (x' - centre) W_skip [B, E]."""
        return self.b_dec if self.W_skip is None else torch.addmm(self.b_dec, xn_BD - self.centre, self.W_skip)

    def input_centred(self, xn_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Give x' - b_dec, or x' where the variant's setting says so; of a transcoder x' - centre."""
        return xn_BD if self.encoder_centre is None else xn_BD - self.encoder_centre

    def pre_activation(self, xn_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B F"]:
        """Compute z = (x' - b_dec) W_enc + b_enc (Gated: pi, with b_gate)."""
        return torch.addmm(self.bias_F, self.input_centred(xn_BD), self.W_enc)

    def select(
        self, xn_BD: Float[Tensor, "B D"], bias_F: Tensor | None, selections: Sequence[Selection]
    ) -> list[Codes]:
        """Compute what the selections keep of z with this bias; only training rounds the product's factors."""
        # Each process adds its latents' part to the gradient of the one b_dec.
        centre_D = None if self.encoder_centre is None else self.split.shared(self.encoder_centre)
        # The scores of the inference form must not depend on how the training saved time.
        matmul = self.matmul if self.training else "float32"
        return encode(xn_BD, self.W_enc_FD, bias_F, centre_D, selections, matmul=matmul)

    def l0(self, codes: Codes, f: Tensor, data: RankGroup = ALONE) -> Float[Tensor, ""]:
        """Compute the mean number of f above zero a token, of all latents and of the rows of `data`."""
        return self.mesh(data).sum_((f.detach() > 0).sum()) / (codes.shape[0] * data.size)

    # Terms of losses

    def reconstruct_sparse(
        self,
        codes: Codes,
        f: Tensor,
        xn_BD: Float[Tensor, "B D"],
        target_BE: Float[Tensor, "B E"],
        *,
        learns: bool = True,
        through_zeros: bool = False,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "B E"]]:
        """Compute the NMSE of x_hat' = f W_dec + b_dec (and a skip's part), and x_hat' detached.

        In one pass over the rows of W_dec where the backend has a kernel for it; f = 0 has a gradient there only
        with `through_zeros`. Without `learns` what decodes is detached.
        """
        W_dec_FE: Tensor = self.W_dec
        beside, support = self.beside_latents(xn_BD), codes.support
        if not learns:
            W_dec_FE, beside = W_dec_FE.detach(), beside.detach()
        if support is None or support.backend.fused is None or self.split.size > 1:
            xn_hat_BE = self.split.total(codes.decode(f, W_dec_FE)[0]) + beside
            return self.nmse(xn_hat_BE, target_BE), xn_hat_BE.detach()
        total, error_BE, _ = squared_error(f, W_dec_FE, beside, target_BE, support, through_zeros=through_zeros)
        return self.nmse_of(total, len(xn_BD)), error_BE + target_BE

    def mesh(self, data: RankGroup) -> Mesh:
        """Return the processes that have a batch and this dictionary together."""
        return Mesh(data, self.split)

    def nmse(self, xn_hat_BD: Float[Tensor, "B E"], xn_BD: Float[Tensor, "B E"]) -> Float[Tensor, ""]:
        """Compute E over tokens of ||x' - x_hat'||^2 / Vx; a transcoder's of y' in place of x'."""
        return self.nmse_of((xn_hat_BD - xn_BD).square().sum(), xn_BD.shape[0])

    def nmse_of(self, squares: Float[Tensor, ""], tokens: int) -> Float[Tensor, ""]:
        """Compute the NMSE of so many tokens from the sum of their squared errors."""
        # In bfloat16 a step of Adam is often smaller than the spacing of the weights, which then never move.
        if self.W_dec.dtype not in (torch.float32, torch.float64):
            raise UserError(f"parameters in {self.W_dec.dtype} cannot follow small gradients: train the SAE in float32")
        return squares / (tokens * self.variance)

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
        mean_sq_norm: float | Sequence[float] | None = None,
        variance: float | Sequence[float] | None = None,
        seed: int = 0,
        target: StartRows | None = None,
    ) -> None:
        """Start from data, `sample_ND` in model units; a transcoder's `target` of the same tokens.

        `mean_sq_norm` E||x||^2 and `variance` E||x - E x||^2 of the training tokens in model units, a crosscoder's of
        each site; measured on the sample where None. W_dec random unit rows; W_enc = c W_dec^T with c such that
        x_hat' - b_dec has the norm of x' - b_dec; b_dec the geometric median of up to 32,768 samples (Gao et al. 2024).
        Where b_dec is not subtracted at the encoder, the biases start at -b_dec W_enc, so that the SAE starts as the
        same function.

        A transcoder's W_enc has random directions of its own, as the tie to W_dec means nothing between two sites;
        b_dec is the median of y', `centre` that of x', and W_skip zero.
        """
        assert self.transcodes == (target is not None), "a transcoder starts from its target too, an SAE from x alone"
        own = StartRows(finite(sample_ND.to(self.W_dec)), mean_sq_norm, variance)
        out = own if target is None else replace(target, rows_ND=finite(target.rows_ND.to(self.W_dec)))
        assert len(own.rows_ND) == len(out.rows_ND), "the rows of site and target are of the same tokens"
        fit_norm(self.norm, own)
        mean_sq, spread = fit_moments(self.norm_out, out)
        self.mean_sq.fill_(mean_sq)
        self.variance.fill_(spread)
        xn_ND = self.norm.normalise(own.rows_ND[:SAMPLES])
        target_NE = xn_ND if target is None else self.norm_out.normalise(out.rows_ND[:SAMPLES])
        self.b_dec.copy_(geometric_median(target_NE))
        self.W_dec.copy_(directions(self.width, self.d_out, seed, self.split))
        if len(self.norm_out.widths) > 1:
            renormalise_(self.W_dec, self.norm_out.widths)
        rows_FD: Tensor = self.W_dec
        if self.transcodes:
            self.centre.copy_(geometric_median(xn_ND))
            # Of another seed: the same one would tie the two where the widths are equal.
            rows_FD = directions(self.width, self.d_in, seed + 1, self.split).to(self.W_dec)
        if self.W_skip is not None:
            self.W_skip.zero_()
        # c has no closed form, as it depends on which latents are chosen. But f grows in proportion to c (but for
        # thresholds of a variant's own): one forward at c = 1 says by how much x_hat' is too short.
        self._start_encoder(rows_FD, 1.0)
        target_BE = target_NE[:_SCALING_ROWS]
        step = self.loss(xn_ND[:_SCALING_ROWS], TrainContext(target_BE=target_BE if self.transcodes else None))
        explained = (step.xn_hat_BD - self.b_dec).square().sum()
        to_explain = (target_BE - self.b_dec).square().sum()
        # Nothing to scale by where no latent fired, or all tokens are alike.
        if explained > 0 and to_explain > 0:
            self._start_encoder(rows_FD, float((to_explain / explained).sqrt()))
        self.start_variant(xn_ND)

    def _start_encoder(self, rows_FD: Tensor, scale: float) -> None:
        self.W_enc.copy_(rows_FD.t() * scale)
        for name in self.bias_names:
            bias_F = self.get_parameter(name)
            bias_F.zero_() if self.encoder_centre is not None else bias_F.copy_(-(self.b_dec @ self.W_enc))
        self.start_encoder()
