"""Transcoders in the report: one that is the MLP itself costs nothing, the others what plain hooks say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.base.errors import UserError
from evaluate.features.make import make
from evaluate.inputs import HeldoutText, open_text
from evaluate.run import evaluate
from harvest.hooks import Site, run_to
from tests.helpers.settings import stage_config
from tests.helpers.tiny_lm import WIDTH, harvest_of, mlp_transcoder
from train.sae.base import SAE
from train.sae.io import save
from train.sae.variants.relu import ReLU

NEURONS = "in.transformer.h.1.mlp.c_proj"
SITES = ("mlp_in.0", "mlp_out.0", "mlp_in.1", "mlp_out.1", NEURONS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, relu_lm: Any) -> dict[str, Any]:
    """The store of the MLPs' inputs and outputs of a model whose MLPs are of relu, and its held-out text."""
    found = harvest_of(relu_lm, tmp_path_factory.mktemp("mlps"), sites=SITES)
    return {**found, "heldout": open_text(found["store"], {"tokens": 250, "device": "cpu", "device_map": None})}


@pytest.fixture
def saved(made: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, sae: SAE, site: str, target: str | None = None, **training: Any) -> Path:
        manifest = made["store"].manifest
        record = {"site": site, "fingerprint": manifest.fingerprint, "store": "s", "training": training}
        save(sae, tmp_path / "saes" / name, record if target is None else record | {"target": target})
        return tmp_path / "saes" / name

    return write


@pytest.fixture
def report(made: dict[str, Any], tmp_path: Path) -> Callable[..., tuple[dict[str, Any], str]]:
    def run(**settings: Any) -> tuple[dict[str, Any], str]:
        own = {"saes": str(tmp_path / "saes"), "cache": made["config"]["cache"], "out": str(tmp_path / "out")}
        written = evaluate(stage_config("evaluate", **own, tokens=250, bootstrap=20, device="cpu", **settings))
        return written.content, written.path.read_text()

    return run


def rough(seed: int, d_out: int = WIDTH) -> ReLU:
    """A transcoder with an error, its skip included."""
    g = torch.Generator().manual_seed(seed)
    sae = ReLU(WIDTH, 3 * WIDTH, d_out, sparsity=0.0, input_norm="none", skip=True)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.2)
    return sae


def rows_of(text: HeldoutText, site: str) -> Tensor:
    ids = torch.from_numpy(text.packed.contexts).long()
    return run_to(text.model, [Site.parse(site)], ids)[site][torch.from_numpy(text.packed.keep)]


@contextmanager
def by_hand(text: HeldoutText, layers: dict[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """The MLP of each layer another function of what it reads, at the kept tokens, by plain hooks."""
    keep = torch.from_numpy(text.packed.keep)[..., None]
    with ExitStack() as stack:
        for layer, function in layers.items():

            def hook(module: Any, args: Any, out: Tensor, function: Callable[[Tensor], Tensor] = function) -> Tensor:
                return torch.where(keep, function(args[0]), out)

            stack.callback(text.model.transformer.h[layer].mlp.register_forward_hook(hook).remove)
        yield


def cross_entropy(text: HeldoutText) -> float:
    """Of every kept token that is not the first of its context, in nats."""
    ids = torch.from_numpy(text.packed.contexts).long()
    with torch.no_grad():
        logp = text.model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    ce = -logp[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    return float(ce[torch.from_numpy(text.packed.keep)[:, 1:]].mean())


def value(row: dict[str, Any], name: str) -> float:
    return float(row["metrics"][name]["value"])


def test_the_mlp_itself_as_a_transcoder_costs_nothing(
    saved: Callable[..., Path], report: Callable[..., tuple[dict[str, Any], str]], relu_lm: Any, made: dict[str, Any]
) -> None:
    transcoder = mlp_transcoder(relu_lm, 1)
    saved("mlp", transcoder, "mlp_in.1", "mlp_out.1")
    found, text = report()
    (site,) = found["sites"]
    (row,) = site["saes"]
    assert site["site"] == "mlp_out.1" and site["inputs"] == ["mlp_in.1"] and row["input"] == "mlp_in.1"
    assert value(row, "nmse") < 1e-10 and abs(value(row, "ce_increase")) < 1e-5
    assert value(row, "recovered_zero") == pytest.approx(1, abs=1e-4)
    active = (transcoder.encode(rows_of(made["heldout"], "mlp_in.1")) > 0).sum(1).double().mean()
    assert value(row, "l0") == pytest.approx(float(active))
    assert "| 1 relu transcoder |" in text and "Transcoders read mlp_in.1" in text


def test_a_transcoder_and_an_sae_of_its_target_stand_side_by_side(
    saved: Callable[..., Path],
    report: Callable[..., tuple[dict[str, Any], str]],
    made: dict[str, Any],
    rough_sae: Callable[[int], ReLU],
) -> None:
    """Zero and mean ablation, NMSE and CE are of the target, and each reads its own site."""
    transcoder, sae, text = rough(1), rough_sae(WIDTH), made["heldout"]
    saved("transcoder", transcoder, "mlp_in.1", "mlp_out.1")
    saved("sae", sae, "mlp_out.1")
    found, _ = report(baseline="sae")
    (site,) = found["sites"]
    rows = {Path(row["folder"]).name: row for row in site["saes"]}
    assert rows["transcoder"]["variant"] == "relu skip transcoder" and rows["sae"]["variant"] == "relu"
    x, y = rows_of(text, "mlp_in.1"), rows_of(text, "mlp_out.1")
    variance = (y.double() - y.double().mean(0)).square().sum()
    for name, y_hat in (("transcoder", transcoder(x)), ("sae", sae(y))):
        expected = float((y - y_hat.detach()).double().square().sum() / variance)
        assert value(rows[name], "nmse") == pytest.approx(expected, rel=1e-4)
    clean = cross_entropy(text)
    with by_hand(text, {1: lambda x_BTD: transcoder(x_BTD)}):
        assert value(rows["transcoder"], "ce_increase") == pytest.approx(cross_entropy(text) - clean, abs=1e-5)
    with by_hand(text, {1: torch.zeros_like}):
        zero = cross_entropy(text)
    assert value(rows["sae"], "ce_zero") == value(rows["transcoder"], "ce_zero") == pytest.approx(zero, abs=1e-5)
    delta = rows["transcoder"]["delta"]["nmse"]["value"]
    assert delta == pytest.approx(value(rows["transcoder"], "nmse") - value(rows["sae"], "nmse"))


def test_what_the_skip_gives_is_no_shrinkage_of_the_latents(
    saved: Callable[..., Path], report: Callable[..., tuple[dict[str, Any], str]], relu_lm: Any
) -> None:
    """The last linear map of the MLP, which a skip is by itself: its latents add nothing, so gamma c is not known."""
    linear = relu_lm.transformer.h[1].mlp.c_proj
    sae = ReLU(4 * WIDTH, 8, WIDTH, sparsity=0.0, input_norm="none", skip=True)
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.W_skip.copy_(linear.weight)
        sae.b_dec.copy_(linear.bias)
    saved("skip", sae, NEURONS, "mlp_out.1")
    ((row,),) = (site["saes"] for site in report()[0]["sites"])
    assert value(row, "nmse") < 1e-10 and value(row, "gamma") == pytest.approx(1)
    assert row["metrics"]["gamma_c"]["value"] is None


@pytest.mark.slow
def test_all_transcoders_together_are_the_replacement_model(
    saved: Callable[..., Path], report: Callable[..., tuple[dict[str, Any], str]], relu_lm: Any, made: dict[str, Any]
) -> None:
    """Each reads behind the replacements below it; the MLPs themselves cost nothing, the rough ones what they cost by
    hand."""
    text = made["heldout"]
    for layer in (0, 1):
        saved(f"mlp-{layer}", mlp_transcoder(relu_lm, layer), f"mlp_in.{layer}", f"mlp_out.{layer}")
    found, markdown = report(together=True)
    (together,) = found["together"]
    assert abs(value(together, "ce_increase")) < 1e-5 and value(together, "kl") < 1e-6
    assert [part["target"] for part in together["saes"]] == ["mlp_out.0", "mlp_out.1"]
    assert "## All 2 together" in markdown

    parts = {layer: rough(layer) for layer in (0, 1)}
    for layer, sae in parts.items():
        saved(f"mlp-{layer}", sae, f"mlp_in.{layer}", f"mlp_out.{layer}")
    found, _ = report(together=True)
    (together,) = found["together"]
    clean = cross_entropy(text)
    with by_hand(text, {layer: sae.__call__ for layer, sae in parts.items()}):
        expected = cross_entropy(text) - clean
    assert value(together, "ce_increase") == pytest.approx(expected, abs=1e-5)
    with by_hand(text, dict.fromkeys(parts, torch.zeros_like)):
        assert value(together, "ce_zero") == pytest.approx(cross_entropy(text), abs=1e-5)
    alone = sum(value(site["saes"][0], "ce_increase") for site in found["sites"])
    assert abs(expected - alone) > 1e-3  # the second reads what the first changed


def test_together_takes_one_of_a_target_and_what_is_read_before_it(
    saved: Callable[..., Path], report: Callable[..., tuple[dict[str, Any], str]], relu_lm: Any
) -> None:
    folder = saved("a", mlp_transcoder(relu_lm, 1), "mlp_in.1", "mlp_out.1")
    saved("b", rough(1), "mlp_out.1", "mlp_in.1")
    with pytest.raises(UserError, match=r"needs mlp_out\.1 before mlp_in\.1 in the forward"):
        report(together=True)
    saved("b", rough(1), "mlp_in.0", "mlp_out.1")
    with pytest.raises(UserError, match=rf"one SAE or transcoder at each site, and both {folder} and .* are for mlp_o"):
        report(together=True)


@pytest.mark.slow
def test_the_rule_for_massive_rows_is_that_of_the_input(
    saved: Callable[..., Path], report: Callable[..., tuple[dict[str, Any], str]], relu_lm: Any, made: dict[str, Any]
) -> None:
    norms = {site: rows_of(made["heldout"], site).norm(dim=1) for site in ("mlp_in.1", "mlp_out.1")}
    limits = {site: float(norms_N.quantile(0.75)) for site, norms_N in norms.items()}
    rules = {site: {"times": 1.0, "median": limit} for site, limit in limits.items()}
    transcoder = mlp_transcoder(relu_lm, 1)
    saved("transcoder", transcoder, "mlp_in.1", "mlp_out.1", outliers=rules["mlp_in.1"])
    found, _ = report()
    massive = norms["mlp_in.1"] > limits["mlp_in.1"]
    assert found["sites"][0]["massive"]["left_out"] == int(massive.sum())
    # Beside an SAE of the target with a rule of its own a row goes by either.
    saved("sae", rough_sae_of_width(), "mlp_out.1", outliers=rules["mlp_out.1"])
    found, text = report()
    (site,) = found["sites"]
    either = massive | (norms["mlp_out.1"] > limits["mlp_out.1"])
    assert site["massive"]["left_out"] == int(either.sum()) > int(massive.sum())
    assert site["tokens"] == int((~either).sum())
    assert set(site["massive"]["sites"]) == set(rules) and "at mlp_in.1 one above 1 times the median" in text


def rough_sae_of_width() -> ReLU:
    return ReLU(WIDTH, 2 * WIDTH, sparsity=0.0, input_norm="none")


def test_feature_metrics_are_of_saes(
    saved: Callable[..., Path], report: Callable[..., tuple[dict[str, Any], str]]
) -> None:
    folder = saved("transcoder", rough(1), "mlp_in.1", "mlp_out.1")
    with pytest.raises(UserError, match=f"feature_metrics are of SAEs, and {folder} is a transcoder"):
        report(feature_metrics="all")


def test_feature_pages_of_a_transcoder(
    saved: Callable[..., Path], made: dict[str, Any], relu_lm: Any, tmp_path: Path
) -> None:
    """It fires on its input, and its decoder writes to the target: logits by the direct path from there."""
    folder = saved("mlp", mlp_transcoder(relu_lm, 1), "mlp_in.1", "mlp_out.1")
    own = {"folder": str(folder), "cache": made["config"]["cache"], "out": str(tmp_path / "pages")}
    page = make(stage_config("features", **own, tokens=250, device="cpu")).read_text()
    assert "mlp_in.1 to mlp_out.1" in page
