"""What the feature metrics are taken of: an SAE's latents, and the baselines they must on_forward.

A unit of a basis reads one number on each token (`values`), is active where that is large enough (`active`) and adds
something to the site's tensor (`part`). Letters: N tokens, D width of the site, H MLP neurons, F units.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import ExitStack

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from data.base.sites import INPUT_KINDS, Site
from harvest.hooks import capture, locate, run_to
from train.sae.base import SAE

UNITS_AT_ONCE = 256


class Basis(ABC):
    """F units over the rows of the site, or over the MLP neurons where `of_neurons`."""

    of_neurons = False

    def __init__(self, name: str, width: int) -> None:
        self.name, self.width = name, width

    @abstractmethod
    def values(self, x_ND: Float[Tensor, "N X"], units: slice) -> Float[Tensor, "N units"]:
        """Compute what a probe reads."""

    @abstractmethod
    def active(self, x_ND: Float[Tensor, "N X"]) -> Float[Tensor, "N F"]:
        """Compute the activations, 0 where a unit is not active."""

    @abstractmethod
    def part(
        self, x_ND: Float[Tensor, "N X"], f_N: Float[Tensor, " N"], unit_N: Int64[Tensor, " N"]
    ) -> Float[Tensor, "N D"]:
        """Return what unit_N, active with f_N, adds to each token's tensor at the site, in model units."""


class SAEBasis(Basis):
    """An SAE's latents: pre-activations (Gated: pi), activations and decoder rows, in the inference form."""

    def __init__(self, name: str, sae: SAE) -> None:
        super().__init__(name, sae.width)
        self.sae = sae

    def values(self, x_ND: Tensor, units: slice) -> Tensor:
        bias_F = self.sae.get_parameter(self.sae.bias_names[0])
        xc_ND = self.sae.input_centred(self.sae.norm.normalise(x_ND))
        return torch.addmm(bias_F[units], xc_ND, self.sae.W_enc[:, units])

    def active(self, x_ND: Tensor) -> Tensor:
        return self.sae.encode_normalised(self.sae.norm.normalise(x_ND))

    def part(self, x_ND: Tensor, f_N: Tensor, unit_N: Tensor) -> Tensor:
        added_ND, norm = f_N[:, None] * self.sae.W_dec[unit_N], self.sae.norm
        return norm.denormalise(added_ND, x_ND) - norm.denormalise(torch.zeros_like(added_ND), x_ND)


class Directions(Basis):
    """z = (x - centre) R^T, active above each unit's threshold, a unit adding z times its row of A.

    read_FX: R. centre_X. add_FD: A; what is taken away by an ablation is the whole z A. sample_MX: tokens on which the
    thresholds make each unit active on a share `density`.
    """

    def __init__(
        self,
        name: str,
        read_FX: Tensor | None,
        centre_X: Tensor,
        add_FD: Tensor,
        sample_MX: Tensor,
        density: float,
        *,
        of_neurons: bool = False,
    ) -> None:
        super().__init__(name, len(add_FD))
        self.read_FX, self.centre_X, self.add_FD, self.of_neurons = read_FX, centre_X, add_FD, of_neurons
        rank = max(1, round((1 - density) * len(sample_MX)))
        blocks = (slice(first, first + UNITS_AT_ONCE) for first in range(0, self.width, UNITS_AT_ONCE))
        self.threshold_F = torch.cat([self.values(sample_MX, block).kthvalue(rank, 0).values for block in blocks])

    def values(self, x_ND: Tensor, units: slice) -> Tensor:
        moved_NX = x_ND - self.centre_X
        return moved_NX[:, units] if self.read_FX is None else moved_NX @ self.read_FX[units].t()

    def active(self, x_ND: Tensor) -> Tensor:
        z_NF = self.values(x_ND, slice(None))
        return torch.where((z_NF > self.threshold_F) & (z_NF > 0), z_NF, 0.0)

    def part(self, x_ND: Tensor, f_N: Tensor, unit_N: Tensor) -> Tensor:
        return f_N[:, None] * self.add_FD[unit_N]


class Neurons:
    """The neurons of the MLP whose output is the last that was added to the stream at a site.

    linear: the module whose input they are. out_HD: what each adds to the stream.
    """

    def __init__(self, linear: nn.Module, out_HD: Tensor) -> None:
        self.linear, self.out_HD = linear, out_HD


def neurons_before(model: nn.Module, site: Site, ids_BT: Tensor) -> Neurons | None:
    """Find the MLP's neurons before the site; None where it is no MLP's output, or not just its last linear map.

    That it is, is checked on these tokens to the bit.
    """
    from transformers.pytorch_utils import Conv1D

    layer = None if site.layer is None else site.layer - (site.kind in ("resid_pre", "resid_mid", *INPUT_KINDS))
    if layer is None or layer < 0 or site.kind == "attn_out":
        return None
    mlp_out = Site("mlp_out", layer)
    place = locate(model, mlp_out)
    width = run_to(model, [mlp_out], ids_BT)[str(mlp_out)].shape[-1]
    outs = [m for m in place.module.modules() if isinstance(m, nn.Linear | Conv1D) and _out(m) == width]
    if not outs:
        return None
    linear, seen = outs[-1], list[Tensor]()
    handle = linear.register_forward_hook(lambda module, args, out: seen.append(out))
    try:
        put_out = run_to(model, [mlp_out], ids_BT)[str(mlp_out)]
    finally:
        handle.remove()
    # Not by its name: a dropout, a norm or a bias after the last map would make the neurons' parts not add up.
    if len(seen) != 1 or not torch.equal(seen[0].reshape(put_out.shape), put_out):
        return None
    weight = linear.weight.detach()
    return Neurons(linear, (weight if isinstance(linear, Conv1D) else weight.t()).float())


def _out(module: nn.Module) -> int:
    return int(module.out_features if isinstance(module, nn.Linear) else module.nf)  # type: ignore[arg-type]


class BasisReader:
    """Runs the LM and gives what the bases read at a site: {False: the site's rows, True: neurons}, float32."""

    def __init__(self, model: nn.Module, site: Site, neurons: Neurons | None) -> None:
        self.model, self.site, self.neurons = model, site, neurons

    @torch.inference_mode()
    def read(self, ids_BT: Int64[Tensor, "B T"]) -> dict[bool, Tensor]:
        """Read each tensor [B, T, X] by one forward as far as the site."""
        reads: dict[bool, Tensor] = {}
        with ExitStack() as stack:
            seen = stack.enter_context(capture(self.model, [self.site]))
            if self.neurons is not None:

                def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                    reads[True] = args[0]

                stack.callback(self.neurons.linear.register_forward_pre_hook(keep).remove)
            self.model(input_ids=ids_BT, use_cache=False)
            reads[False] = seen[str(self.site)]
        return {name: x.reshape(*ids_BT.shape, -1).float() for name, x in reads.items()}

    @torch.inference_mode()
    def whole(self, ids_BT: Int64[Tensor, "B T"]) -> Tensor:
        """Compute the logits of one plain forward."""
        logits: Tensor = self.model(input_ids=ids_BT, use_cache=False).logits
        return logits
