"""python -m pytest tests/benchmarks/test_parity.py: ours, a reference by hand and the peers' recorded figures.

The peers' figures are in benchmarks/parity.json (`python -m benchmarks.parity` in their environment writes it).
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.parity import (
    BANDWIDTH,
    CASES,
    DEAD,
    PREFIXES,
    RECORD,
    SPARSITY,
    B,
    D,
    F,
    K,
    batch,
    ours,
    parameters,
    scale,
    target_rows,
)
from tests.helpers import reference
from tests.helpers.reference import Parameters, Pass, Result

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".venv-peers" / "bin" / "python"
RECORDED: dict[str, Any] = json.loads(RECORD.read_text())
RIGHT = [name for name, case in CASES.items() if not case.departs]
WRONG = [name for name, case in CASES.items() if case.departs]


def by_hand(name: str, **changed: Any) -> Result:
    """The paper's loss and gradients."""
    case = CASES[name]
    x, p, v = batch(), parameters(case), scale(name)
    centred = case.settings.get("apply_b_dec_to_input", True)
    if case.variant == "relu":
        return reference.relu(x, p, v, centred, sparsity=SPARSITY, form="april")
    if case.variant == "gated":
        return reference.gated(x, p, v, centred, sparsity=SPARSITY)
    if case.variant == "jumprelu":
        s = case.settings
        target, form = s.get("k"), s.get("target_form", "log")
        return reference.jumprelu(x, p, v, centred, sparsity=s["sparsity"], eps=BANDWIDTH, target=target, form=form)
    if case.transcodes:
        of_target = {"y": target_rows(), "centre": np.zeros(D)}
        return reference.topk(x, p, v, False, k=K, dead=DEAD, alpha=0.0, **of_target)
    options: dict[str, Any] = {
        "k": K,
        "dead": DEAD,
        "k_aux": case.settings["auxk_k"],
        "alpha": case.settings.get("auxk_alpha", 1 / 32),
        "relu": case.settings.get("auxk_relu", False),
        "by_residual": case.settings.get("auxk_norm") == "residual",
        **changed,
    }
    if case.variant == "topk":
        return reference.topk(x, p, v, centred, **{"multi": case.settings.get("multi_topk", False), **options})
    sizes = [round(share * F) for share in PREFIXES] if case.variant == "matryoshka" else (None,)
    return reference.batchtopk(x, p, v, centred, sizes=sizes, **options)


def same(found: Any, wanted: Any, what: str, *, rtol: float = 1e-6) -> None:
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=rtol * np.abs(wanted).max(), err_msg=what)


def theirs(name: str) -> tuple[float, Parameters]:
    arrays = {key: np.asarray(value) for key, value in RECORDED[name].items()}
    return float(arrays.pop("loss")), arrays


def test_the_record_holds_every_case_and_each_peer_is_wrong_somewhere_or_right_throughout() -> None:
    assert RECORDED.keys() == CASES.keys()
    assert len(WRONG) == 4 and {name.split()[0] for name in CASES} == {"dictionary_learning", "sae-lens", "sparsify"}


@pytest.mark.parametrize("name", CASES)
def test_ours_is_the_formula(name: str) -> None:
    loss, arrays = ours(name)
    wanted, grads = by_hand(name)
    same(loss, wanted, "loss", rtol=1e-12)
    assert arrays.keys() - {"x_hat"} == grads.keys()
    for key, grad in grads.items():
        same(arrays[key], grad, key, rtol=1e-9)
        assert np.abs(grad).max() > 1e-3, f"the case does not exercise {key}"


@pytest.mark.parametrize("name", RIGHT)
def test_a_peer_that_follows_the_paper_has_our_loss_reconstruction_and_gradients(name: str) -> None:
    (loss, arrays), (recorded, found) = ours(name), theirs(name)
    same(recorded, loss, "loss")
    assert found.keys() == arrays.keys()
    for key, value in arrays.items():
        same(found[key], value, key)


@pytest.mark.parametrize("name", WRONG)
def test_a_peer_that_departs_reconstructs_alike(name: str) -> None:
    same(theirs(name)[1]["x_hat"], ours(name)[1]["x_hat"], "x_hat")


def test_a_skip_is_a_part_of_the_loss_it_is_compared_in() -> None:
    """The two transcoders differ by W_skip alone, whose gradient is of the error and the input."""
    (plain, _), (skipped, grads) = ours("sparsify transcoder"), ours("sparsify skip transcoder")
    assert plain != pytest.approx(skipped, rel=0.01) and grads["W_skip"].shape == (D, D)


def test_mistake_06_dictionary_learning_loses_half_of_the_kernel() -> None:
    name = "dictionary_learning jumprelu"
    (loss, grads), (recorded, found) = by_hand(name), theirs(name)
    same(recorded, loss, "loss")
    p, k = parameters(CASES[name]), CASES[name].settings["k"]
    run = Pass(batch(), p, 1.0, centred=False)
    lost = (np.abs(run.z - p["theta"]) < BANDWIDTH / 2) & (run.z <= p["theta"])
    l0 = (run.z > p["theta"]).sum() / B
    slope = 2 * (l0 / k - 1) / k
    # f is 0 there, which lies inside the kernel of a theta below half of the bandwidth.
    near_zero = (run.z <= p["theta"]) & (p["theta"] < BANDWIDTH / 2)
    wrong = grads["theta"] + slope * (lost.sum(0) - near_zero.sum(0)) / (BANDWIDTH * B)
    same(found["theta"], wrong, "theta")
    assert np.abs(found["theta"] - grads["theta"]).max() > 0.1 * np.abs(grads["theta"]).max()
    for key in grads.keys() - {"theta"}:
        same(found[key], grads[key], key)


def test_mistake_08_sae_lens_detaches_no_decoder() -> None:
    name = "sae-lens gated"
    (loss, grads), (recorded, found) = by_hand(name), theirs(name)
    same(recorded, loss, "loss")  # rows are unit here: their lengths weigh nothing but the gradient
    x, p = batch(), parameters(CASES[name])
    run = Pass(x, p, 1.0, centred=True, bias="b_gate")
    gate = np.maximum(run.z, 0)
    error = 2 * (gate @ p["W_dec"] + p["b_dec"] - x) / B
    same(found["W_dec"], grads["W_dec"] + gate.T @ error + SPARSITY * gate.mean(0)[:, None] * p["W_dec"], "W_dec")
    same(found["b_dec"], grads["b_dec"] + error.sum(0), "b_dec")
    for key in grads.keys() - {"W_dec", "b_dec"}:
        same(found[key], grads[key], key)


def test_mistake_04_sparsify_trains_no_encoder_by_auxk_and_multi_topk() -> None:
    name = "sparsify topk"
    (loss, grads), (recorded, found) = by_hand(name), theirs(name)
    _, plain = by_hand(name, alpha=0.0, multi=False)
    same(recorded, loss, "loss")
    same(found["W_dec"], grads["W_dec"], "W_dec")
    same(found["W_enc"], plain["W_enc"], "W_enc")
    same(found["b_enc"], plain["b_enc"], "b_enc")
    unseen = parameters(CASES[name])["W_enc"] @ (grads["b_enc"] - plain["b_enc"])  # what reaches b_dec through z
    same(found["b_dec"], grads["b_dec"] + unseen, "b_dec")
    assert np.abs(grads["W_enc"] - plain["W_enc"]).max() > 0.1 * np.abs(grads["W_enc"]).max()


def test_dictionary_learning_averages_matryoshka_s_prefixes_twice() -> None:
    name = "dictionary_learning matryoshka"
    (loss, grads), (recorded, found) = by_hand(name), theirs(name)
    alone, plain = by_hand(name, alpha=0.0)  # without AuxK, which it does not average
    same(recorded, loss - alone + alone / len(PREFIXES) ** 2, "loss")
    for key, grad in grads.items():
        same(found[key], grad - plain[key] + plain[key] / len(PREFIXES) ** 2, key)


@pytest.mark.slow
@pytest.mark.skipif(not PEERS.exists(), reason="the peers' environment is not there: make peers")
def test_the_record_is_what_the_peers_give() -> None:
    command = "import json; from benchmarks.parity import record; print(json.dumps(record()))"
    done = subprocess.run([PEERS, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == RECORDED.keys()
    for name, recorded in RECORDED.items():
        for key, value in recorded.items():
            same(found[name][key], value, f"{name}: {key}")
