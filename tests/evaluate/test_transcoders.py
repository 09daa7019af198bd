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
from tests.helpers.pages import called
from tests.helpers.settings import stage_config
from tests.helpers.tiny_lm import WIDTH, harvest_of, mlp_transcoder, tiny_gpt2
from train.sae.base import SAE
from train.sae.io import save
from train.sae.variants.relu import ReLU

NEURONS = "in.transformer.h.1.mlp.c_proj"
SINK = 3  # the position in a context of 16 that is massive where a test plants one
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
def test_a_rule_of_the_input_alone_still_holds_for_an_older_transcoder(
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


def test_rows_massive_at_the_target_alone_are_left_out_by_a_transcoder_s_own_rule(
    saved: Callable[..., Path], report: Callable[..., tuple[dict[str, Any], str]], relu_lm: Any, made: dict[str, Any]
) -> None:
    norms = {site: rows_of(made["heldout"], site).norm(dim=1) for site in ("mlp_in.1", "mlp_out.1")}
    limits = {site: float(norms_N.quantile(0.75)) for site, norms_N in norms.items()}
    rule = {"times": 1.0, "median": limits["mlp_in.1"], "target_median": limits["mlp_out.1"]}
    saved("transcoder", mlp_transcoder(relu_lm, 1), "mlp_in.1", "mlp_out.1", outliers=rule)
    found, text = report()
    (site,) = found["sites"]
    either = (norms["mlp_in.1"] > limits["mlp_in.1"]) | (norms["mlp_out.1"] > limits["mlp_out.1"])
    assert site["massive"]["left_out"] == int(either.sum()) and site["tokens"] == int((~either).sum())
    assert "or at mlp_out.1 one above 1 times the median" in text


def test_a_planted_sink_of_the_target_is_told_apart_where_there_is_no_rule(tmp_path: Path) -> None:
    """A model whose MLP answers one position of a context a hundred times as loud as the others, though its norm lets
    no input be massive."""
    model = tiny_gpt2(activation_function="relu")
    with torch.no_grad():
        model.transformer.wpe.weight[SINK, 5] = 1000.0  # behind the norm x_5 is then near sqrt(15), and the rest near 0
        model.transformer.h[1].ln_2.weight.fill_(1.0)
        model.transformer.h[1].ln_2.bias.zero_()
        mlp = model.transformer.h[1].mlp
        mlp.c_fc.weight[:, 0] = 0.0
        mlp.c_fc.weight[5, 0] = 100.0
        mlp.c_fc.bias[0] = -370.0  # relu(100 (x_5 - 3.7)): of no other position
        mlp.c_proj.weight[0] = 100.0
    found = harvest_of(model, tmp_path, sites=("mlp_in.1", "mlp_out.1"))
    transcoder = rough(3)
    record = {"site": "mlp_in.1", "target": "mlp_out.1", "fingerprint": found["store"].manifest.fingerprint}
    save(transcoder, tmp_path / "saes" / "rough", {**record, "store": "s", "training": {}})
    own = {"saes": str(tmp_path / "saes"), "cache": found["config"]["cache"], "out": str(tmp_path / "out")}
    content = evaluate(stage_config("evaluate", **own, tokens=250, bootstrap=20, device="cpu")).content
    (site,) = content["sites"]
    text = open_text(found["store"], {"tokens": 250, "device": "cpu", "device_map": None})
    ordinary = text.packed.keep.copy()
    ordinary[:, SINK] = False
    assert site["massive"]["rows"] == int(text.packed.keep[:, SINK].sum()) > 0
    chosen = torch.from_numpy(ordinary[text.packed.keep])
    x, y = rows_of(text, "mlp_in.1")[chosen], rows_of(text, "mlp_out.1")[chosen]
    expected = (y - transcoder(x)).double().square().sum() / (y.double() - y.double().mean(0)).square().sum()
    (row,) = site["saes"]
    assert value(row, "nmse") == pytest.approx(float(expected), rel=1e-4)
    assert row["all_rows"]["nmse"]["value"] != pytest.approx(value(row, "nmse"), rel=0.2)


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
    """Its encoder reads token embeddings behind the norm before the MLP, and its decoder writes to the target: logits
    by the direct path from there."""
    transcoder = mlp_transcoder(relu_lm, 1)
    folder = saved("mlp", transcoder, "mlp_in.1", "mlp_out.1")
    own = {"folder": str(folder), "cache": made["config"]["cache"], "out": str(tmp_path / "pages")}
    page = make(stage_config("features", **own, tokens=250, device="cpu"))
    assert "mlp_in.1 to mlp_out.1" in page.read_text()
    assert "what a token's embedding" in page.read_text()
    piece = called(page.parent / "part-000.js")[1]
    with torch.no_grad():
        read_VD = relu_lm.transformer.h[1].ln_2(relu_lm.transformer.wte.weight)
        z_VF = transcoder.pre_activation(read_VD)
    tokenizer = made["heldout"].tokenizer
    for number in (0, 7):
        gained_V = (z_VF[:, number] - z_VF[:, number].mean())[: len(tokenizer)]
        found = piece["latents"][number]
        assert piece["tokens"][found["rm"][0][0]] == tokenizer.decode([int(gained_V.argmax())])
        assert piece["tokens"][found["rl"][0][0]] == tokenizer.decode([int(gained_V.argmin())])
        assert found["rm"][0][1] == pytest.approx(float(gained_V.max()), rel=1e-2)  # three digits
        assert found["rl"][0][1] == pytest.approx(float(gained_V.min()), rel=1e-2)
        assert "r" in found and "l" in found


def test_feature_pages_of_an_sae_say_nothing_of_an_input(
    saved: Callable[..., Path], made: dict[str, Any], rough_sae: Callable[[int], ReLU], tmp_path: Path
) -> None:
    folder = saved("sae", rough_sae(WIDTH), "mlp_out.1")
    own = {"folder": str(folder), "cache": made["config"]["cache"], "out": str(tmp_path / "pages")}
    page = make(stage_config("features", **own, tokens=250, device="cpu"))
    assert "<dt>Input</dt>" not in page.read_text() and '"reads"' not in page.read_text()
    assert "rm" not in called(page.parent / "part-000.js")[1]["latents"][0]
