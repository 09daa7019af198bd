"""Every variant on every backend against its dense form, in float64: values, loss and gradients.

Triton's backend runs on a GPU where there is one, else in Triton's interpreter, and is slow there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.helpers.cases import CASES, DEAD, Case, perturbed, tokens
from train.sae import SAE, TrainContext
from train.sae.sparse.backend import Backend, use_backend
from train.sae.sparse.cpu import CPUBackend
from train.sae.sparse.triton import TritonBackend

NO_TRITON = importlib.util.find_spec("triton") is None
CENTRED = [case for case in CASES if case.name != "relu"]
BACKENDS = [
    pytest.param(CPUBackend(dense_share=1.0), id="cpu"),
    pytest.param(CPUBackend(block_entries=32, dense_share=1.0, dense_dead=0), id="cpu in blocks, dead selected"),
    pytest.param(CPUBackend(dense_share=0.0), id="cpu, z whole"),
    *(
        pytest.param(
            backend,
            id=name,
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(NO_TRITON, reason="triton is not installed: pip install triton"),
            ],
        )
        for name, backend in {
            "triton": TritonBackend(dense_share=1.0),
            "triton, dead selected": TritonBackend(dense_dead=0, dense_share=1.0),
            "triton, z whole": TritonBackend(dense_share=0.0),
        }.items()
    ),
]


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where a backend computes."""
    backend: Backend = request.param
    on_gpu = isinstance(backend, TritonBackend) and torch.cuda.is_available()
    if isinstance(backend, TritonBackend) and not on_gpu:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    with use_backend(backend):
        yield "cuda" if on_gpu else "cpu"


def gradients(loss: Tensor, sae: SAE) -> dict[str, Tensor]:
    sae.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_sparse_step_equals_the_dense_form(case: Case, device: str) -> None:
    sae, x = perturbed(case, centred=True).to(device), tokens().to(device)
    torch.testing.assert_close(sae.encode_normalised(x), sae.dense_encode(x).detach())
    every_third = torch.from_numpy(DEAD).to(device)
    contexts = [TrainContext(sparsity_scale=0.7), TrainContext(every_third)]
    if device == "cuda":
        contexts = [TrainContext(every_third, torch.arange(sae.width, device=device))]
    for context in contexts:
        sparse, dense = sae.loss(x, context).loss, sae.dense_loss(x, context)
        torch.testing.assert_close(sparse, dense, rtol=1e-12, atol=1e-12)
        found, reference = gradients(sparse, sae), gradients(dense, sae)
        assert found.keys() == reference.keys()
        for name, grad in reference.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka"])
def test_latents_that_may_die_change_nothing(name: str, device: str) -> None:
    """With the mask's candidates named beforehand, some of them alive, the loss is that of the mask alone."""
    case = next(case for case in CASES if case.name == name)
    sae, x = perturbed(case, centred=True).to(device), tokens().to(device)
    dead_F = torch.from_numpy(DEAD).to(device)
    named = TrainContext(dead_F, torch.arange(0, 22, device=device))
    sparse, dense = sae.loss(x, named).loss, sae.dense_loss(x, named)
    torch.testing.assert_close(sparse, dense, rtol=1e-12, atol=1e-12)
