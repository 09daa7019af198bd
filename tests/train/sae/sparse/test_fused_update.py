"""python -m pytest -m slow tests/train/sae/sparse/test_fused_update.py: one kernel's Adam against torch's own.

On a GPU where there is one, else in Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from train.sae import SAE, VARIANTS
from train.sae.parts.fused_update import is_fused_adam
from train.sae.parts.update import update
from train.sae.sparse.backend import use_backend
from train.sae.sparse.cpu import CPUBackend
from train.sae.sparse.triton import TritonBackend

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton"
    ),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Exact in float32, as which a kernel takes its settings: so a float64 step is held to float64's last digits.
EXACT: dict[str, Any] = {"lr": 2.0**-7, "betas": (0.875, 1 - 2.0**-10), "eps": 2.0**-30, "fused": True}
USUAL: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.999), "eps": 6.25e-10, "fused": True}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    yield


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def moved(
    backend: CPUBackend | TritonBackend,
    *,
    d: int,
    variant: str = "topk",
    dtype: torch.dtype = torch.float64,
    kind: type[torch.optim.Adam] = torch.optim.Adam,
    clip: float | None = 1.0,
    steps: int = 3,
    zero_row: bool = False,
    sites: list[int] | None = None,
    **options: Any,
) -> tuple[SAE, dict[str, Any]]:
    """An SAE of 6 latents after some steps with drawn gradients, and its optimizer's state by the parameters' names."""
    settings = {"k": 2} if variant == "topk" else {"sparsity": 1.0, "form": "april"}
    sae = VARIANTS[variant](d, 6, site_widths=sites, **settings).to(DEVICE, dtype)
    optimizer = kind(sae.parameters(), **options)
    with use_backend(backend):
        for step in range(steps):
            for seed, parameter in enumerate(sae.parameters()):
                parameter.grad = draw(*parameter.shape, seed=10 * step + seed).to(dtype)
                if zero_row:
                    parameter.grad[0] = 0
            update(sae, optimizer, clip)
    return sae, {name: optimizer.state[parameter] for name, parameter in sae.named_parameters()}


def assert_same_step(d: int, tolerance: dict[str, float], **how: Any) -> None:
    (found, states), (wanted, others) = moved(TritonBackend(), d=d, **how), moved(CPUBackend(), d=d, **how)
    for name, parameter in wanted.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
        assert states[name]["step"] == others[name]["step"]
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(states[name][moment], others[name][moment], **tolerance)


@pytest.mark.parametrize("d", [1, 5, 300, 5000])
def test_three_steps_are_those_of_the_plain_order_in_float64(d: int) -> None:
    """Widths that are no power of two, and one beyond what a program holds at a time."""
    assert_same_step(d, {"rtol": 1e-12, "atol": 1e-13}, **EXACT)


@pytest.mark.parametrize("clip", [None, 1e-3, 1e6], ids=["no clip", "a clip", "one that is not reached"])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("variant", ["topk", "relu"], ids=["unit rows", "free rows"])
def test_every_form_of_the_step(variant: str, kind: type[torch.optim.Adam], clip: float | None) -> None:
    how = {"variant": variant, "kind": kind, "clip": clip, "weight_decay": 0.25}
    assert_same_step(5, {"rtol": 1e-12, "atol": 1e-13}, **how, **EXACT)


def test_a_crosscoders_rows_keep_their_own_length() -> None:
    """The sum of the norms by site, which the kernels do not know."""
    how = {"sites": [2, 3], **EXACT}
    assert_same_step(5, {"rtol": 1e-12, "atol": 1e-13}, **how)
    sae, _ = moved(TritonBackend(), d=5, **how)
    parts = [part.detach().norm(dim=1) for part in sae.W_dec.split_with_sizes([2, 3], dim=1)]
    torch.testing.assert_close(parts[0] + parts[1], torch.ones_like(parts[0]))


@pytest.mark.parametrize("d", [5, 5000])
def test_usual_settings_in_float32_give_torchs_numbers_to_its_last_digits(d: int) -> None:
    assert_same_step(d, {"rtol": 2e-6, "atol": 1e-8}, dtype=torch.float32, **USUAL)


@pytest.mark.parametrize("d", [5, 5000])
def test_a_row_without_gradient_stays_where_it_is(d: int) -> None:
    how = {"zero_row": True, **EXACT}
    sae, _ = moved(TritonBackend(), d=d, **how)
    start, _ = moved(CPUBackend(), d=d, steps=0, **how)
    torch.testing.assert_close(sae.W_enc_FD[0], start.W_enc_FD[0])
    torch.testing.assert_close(sae.W_dec[0], start.W_dec[0])
    assert_same_step(d, {"rtol": 1e-12, "atol": 1e-13}, **how)


def test_one_nan_in_a_gradient_reaches_every_parameter_as_torchs_clip_lets_it() -> None:
    for backend in (TritonBackend(), CPUBackend()):
        sae = VARIANTS["topk"](5, 6, k=2).to(DEVICE)
        optimizer = torch.optim.Adam(sae.parameters(), **USUAL)
        for parameter in sae.parameters():
            parameter.grad = torch.ones_like(parameter)
        assert sae.W_dec.grad is not None
        sae.W_dec.grad[3, 1] = torch.nan
        with use_backend(backend):
            update(sae, optimizer, 1.0)
        assert all(bool(parameter.isnan().all()) for parameter in sae.parameters())


def test_what_the_kernel_does_not_know_is_left_to_torch() -> None:
    weights = [nn.Parameter(torch.ones(3))]
    assert is_fused_adam(torch.optim.Adam(weights, fused=True)) and is_fused_adam(
        torch.optim.AdamW(weights, fused=True)
    )
    for other in (
        torch.optim.Adam(weights),
        torch.optim.Adam(weights, fused=True, amsgrad=True),
        torch.optim.Adam(weights, fused=True, maximize=True),
        torch.optim.SGD(weights, lr=0.1, fused=True),
    ):
        assert not is_fused_adam(other)


def test_a_state_goes_from_one_order_to_the_other() -> None:
    """A run that began on a GPU goes on elsewhere, and the reverse: the state has torch's own names and shapes."""
    sae, state = moved(TritonBackend(), d=5, **EXACT)
    optimizer = torch.optim.Adam(sae.parameters(), **EXACT)
    plain = torch.optim.Adam(sae.parameters(), **EXACT)
    for parameter in sae.parameters():
        parameter.grad = torch.ones_like(parameter)
    plain.step()
    for name, parameter in sae.named_parameters():
        assert {key: value.shape for key, value in state[name].items()} == {
            key: value.shape for key, value in plain.state[parameter].items()
        }
    optimizer.load_state_dict(plain.state_dict())
    for parameter in sae.parameters():
        parameter.grad = torch.ones_like(parameter)
    with use_backend(TritonBackend()):
        update(sae, optimizer, 1.0)
    assert {float(kept["step"]) for kept in optimizer.state.values()} == {2.0}
