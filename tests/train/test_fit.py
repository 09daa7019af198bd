"""Short runs of every variant and option, and the known mistakes a trainer can make."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.base.cli import CONF
from data.base.errors import UserError
from data.loading.loader import ActivationLoader
from data.loading.reader import open_reader
from data.store.manifest import HELDOUT, TRAIN
from tests.helpers.runs import make_store, plan_of
from train import datamodule, lit
from train.messages import slow_bf16
from train.resume import LAST
from train.run import train
from train.sae import VARIANTS, load, load_config
from train.sae.parts import update
from train.sae.variants.topk import TopK
from train.sae_trainer import SAETrainer

RUNS = {
    "relu": ["sae=relu"],
    "relu bricken": ["sae=relu", "sae.form=bricken"],
    "topk": ["sae=topk"],
    "batchtopk": ["sae=batchtopk"],
    "matryoshka": ["sae=matryoshka"],
    "gated": ["sae=gated"],
    "jumprelu": ["sae=jumprelu"],
}


def rows_of(short: Any, split: str, chunks: Any) -> Tensor:
    """Rows of the chunks in float64, read by themselves."""
    plan = plan_of(short())
    reader = open_reader(plan.store, split, plan.site)
    loader = ActivationLoader(reader, batch=64, chunks=chunks, shuffle=False, drop_last=False)
    return torch.cat([batch.double() for batch in loader])


@pytest.mark.parametrize("name", RUNS)
def test_every_variant_trains_and_ships(short: Any, tmp_path: Path, name: str) -> None:
    train(short(*RUNS[name]))
    folder = tmp_path / "run"
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoints",
        "config.json",
        "metrics.csv",
        "run.json",
        "sae.safetensors",
    ]
    sae, config = load(folder), load_config(folder)
    assert config["variant"] == name.split()[0] == sae.name
    assert (config["site"], config["training"]["tokens"], config["training"]["steps"]) == ("resid_post.3", 1920, 30)
    store = plan_of(short()).store
    assert (config["fingerprint"], config["store"]) == (store.manifest.fingerprint, store.path.name)

    # Known mistake 11: what is reported is the form that ships, scored here from the saved folder in float64.
    x = rows_of(short, HELDOUT, np.arange(8))
    with torch.no_grad():
        f, x_hat = sae.double().encode_decode(x)
    nmse = float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())
    reported = config["training"]["heldout"]
    assert reported["nmse"] == pytest.approx(nmse, rel=1e-4)
    assert reported["l0"] == pytest.approx(float((f > 0).sum(1).double().mean()), rel=1e-2)
    assert reported["tokens"] == 512

    # Known mistake 7: rows are unit after the step, not before it; only relu's April form leaves them free.
    lengths = torch.linalg.vector_norm(sae.W_dec, dim=1)
    assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-6) == (name != "relu")

    # Known mistake 3 at this level: the scale and the variance are those of the training rows, and saved.
    rows = rows_of(short, TRAIN, np.arange(64))
    scale = math.sqrt(16 / float(rows.square().sum(1).mean()))
    assert float(sae.norm.scale) == pytest.approx(scale, rel=1e-4)
    spread = float((rows - rows.mean(0)).square().sum(1).mean())
    assert float(sae.variance) == pytest.approx(scale**2 * spread, rel=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_lowers_the_loss(short: Any, tmp_path: Path, variant: str) -> None:
    train(short(f"sae={variant}", "tokens=6400", "epochs=2", "optimizer.lr=0.003", "validate_every=20"))
    with (tmp_path / "run" / "metrics.csv").open() as file:
        nmse = [float(row["val/nmse"]) for row in csv.DictReader(file) if row["val/nmse"]]
    assert nmse[-1] < nmse[0]


@pytest.mark.parametrize("name", ["none", "dataset", "token"])
def test_every_input_norm(short: Any, tmp_path: Path, name: str) -> None:
    train(short("sae=topk", f"sae.input_norm={name}"))
    sae = load(tmp_path / "run")
    assert sae.input_norm == name
    assert math.isfinite(load_config(tmp_path / "run")["training"]["heldout"]["nmse"])
    if name == "token":  # Vx of the sample, in the token-normalised space
        x = rows_of(short, TRAIN, plan_of(short()).chunks)
        xn = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
        assert float(sae.variance) == pytest.approx(float(xn.var(0, correction=0).sum()), rel=1e-4)


@pytest.mark.parametrize(
    "overrides",
    [
        ["clip=null", "sae.width=40", "loader.pool_chunks=1", "loader.threads=2"],
        ["heldout_tokens=0", "dead_after=64", "lr_warmup=0", "lr_decay=1", "sparsity_warmup=0.5"],
        ["trainer=auto", "trainer.accelerator=cpu", "trainer.deterministic=true", "matmul=bf16"],
        ["sae.auxk_norm=variance", "sae.auxk_k=2", "dead_after=64"],
    ],
    ids=" ".join,
)
def test_every_option_runs(short: Any, tmp_path: Path, overrides: list[str]) -> None:
    try:
        train(short(*overrides))
    finally:
        torch.use_deterministic_algorithms(False)
    training = load_config(tmp_path / "run")["training"]
    assert training["steps"] == 30
    assert bool(training["heldout"]) == ("heldout_tokens=0" not in overrides)


OPTIONS = [f"{group}={path.stem}" for group in ("optimizer", "trainer", "logger") for path in (CONF / group).iterdir()]


@pytest.mark.parametrize("option", sorted(OPTIONS))
def test_every_file_of_the_groups_runs(short: Any, tmp_path: Path, option: str) -> None:
    """Or says in its sentence what this machine lacks."""
    try:
        train(short("sae=relu", option, *(["trainer=cpu"] if "trainer" not in option else [])))
    except UserError as error:
        assert option in ("trainer=gpu", "logger=tensorboard", "logger=wandb")
        assert "finds no GPU" in str(error) or "is not installed" in str(error)
    else:
        assert load_config(tmp_path / "run")["training"]["steps"] == 30


def test_a_product_that_the_device_lacks_is_refused(short: Any) -> None:
    with pytest.raises(UserError, match="matmul=tf32 is for a CUDA GPU, and this run is on cpu"):
        train(short("matmul=tf32"))


def test_a_cpu_without_units_for_bf16_says_so() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    said = slow_bf16("bf16", cpu, False)
    assert said is not None and "has neither AMX nor AVX512-BF16" in said
    quiet = [("bf16", cpu, True), ("bf16", gpu, False), ("float32", cpu, False)]
    assert [slow_bf16(*case) for case in quiet] == [None, None, None]


def test_preloaded_rows_train_the_same_sae(short: Any, tmp_path: Path) -> None:
    for preload in ("null", "ram", "device"):
        train(short("sae=topk", "epochs=2", "tokens=4096", f"loader.preload={preload}", f"out={tmp_path / preload}"))
        assert 0 < load_config(tmp_path / preload)["training"]["waited"] < 1
    weights = [(tmp_path / name / "sae.safetensors").read_bytes() for name in ("null", "ram", "device")]
    assert weights[0] == weights[1] == weights[2]


@pytest.mark.parametrize("preload", ["ram", "device"])
def test_rows_that_do_not_fit_are_refused_with_both_sizes(
    short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preload: str
) -> None:
    free = [114_687]  # one byte less than 3,584 rows of 32
    monkeypatch.setattr(datamodule, "free_bytes", lambda device: free[0])
    with pytest.raises(UserError, match=r"keep 114\.7 kB of training rows on cpu, where 114\.7 kB are free"):
        train(short("sae=topk", f"loader.preload={preload}"))
    free[0] += 1
    train(short("sae=topk", f"loader.preload={preload}"))


def test_outliers_are_left_out_of_training_statistics_threshold_and_validation(
    short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = [float(x) for x in torch.linalg.vector_norm(rows_of(short, TRAIN, np.arange(64)), dim=1)]
    limit = 1.3 * float(np.median(norms))
    seen: list[float] = []

    def noting(plain: Any) -> Any:
        def noted(self: Any) -> Any:
            for batch in plain(self):
                seen.append(float(torch.linalg.vector_norm(batch.double(), dim=1).max()))
                yield batch

        return noted

    monkeypatch.setattr(ActivationLoader, "__iter__", noting(ActivationLoader.__iter__))
    train(short("sae=batchtopk", "outliers=1.3"))
    assert max(norms) > limit >= max(seen) and len(seen) > 30
    training, sae = load_config(tmp_path / "run")["training"], load(tmp_path / "run")
    kept = rows_of(short, TRAIN, np.arange(64))[torch.tensor(norms) <= limit]
    assert training["outliers"]["left_out"]["train"] == 4096 - len(kept) > 0
    assert (training["outliers"]["times"], 1.3 * training["outliers"]["median"]) == (1.3, pytest.approx(limit))
    assert training["heldout"]["tokens"] >= 512
    scale = math.sqrt(16 / float(kept.square().sum(1).mean()))
    assert float(sae.norm.scale) == pytest.approx(scale, rel=1e-4)
    spread = float((kept - kept.mean(0)).square().sum(1).mean())
    assert float(sae.variance) == pytest.approx(scale**2 * spread, rel=1e-4)


def test_massive_rows_are_left_out_unless_they_are_asked_for(
    short: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = short("sae=topk", f"cache={tmp_path / 'cache'}")
    make_store(tmp_path / "cache", settings, sink_every=64)
    assert settings["outliers"] == "auto"
    train(settings)
    training = load_config(tmp_path / "run")["training"]
    assert (training["outliers"]["times"], training["outliers"]["left_out"]) == (10.0, {"train": 64, "heldout": 16})
    assert "rows above 10 times the median norm are left out (64 of train, 16 of heldout)" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["outliers"] == 10.0
    # With the sinks the variance is theirs, and what reconstructs them alone reads as a nearly perfect SAE.
    train({**settings, "outliers": None, "out": str(tmp_path / "all")})
    everything = load_config(tmp_path / "all")["training"]
    assert everything["outliers"] is None
    ordinary, of_all = load(tmp_path / "run"), load(tmp_path / "all")
    norms = [float(sae.variance) / float(sae.norm.scale) ** 2 for sae in (ordinary, of_all)]
    assert norms[1] > 100 * norms[0]


def test_nothing_is_left_out_of_a_store_without_massive_rows(short: Any, tmp_path: Path) -> None:
    train(short("sae=topk"))
    assert load_config(tmp_path / "run")["training"]["outliers"] is None
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["outliers"] is None


def test_free_memory_is_a_plausible_number() -> None:
    assert 10**6 < datamodule.free_bytes(torch.device("cpu")) < 10**15


def test_a_gpu_asked_for_and_absent(short: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="finds no GPU"):
        train(short("trainer=gpu"))


def test_logging_and_validating_change_nothing(short: Any, tmp_path: Path) -> None:
    """Known mistake 2: counters, threshold and weights are the same however often one looks."""
    for name, every in (("often", 1), ("never", 1000)):
        paces = (f"validate_every={every}", f"log_every={every}", f"checkpoint_every={every}")
        train(short("sae=batchtopk", *paces, f"out={tmp_path / name}"))
    often, never = (torch.load(tmp_path / name / LAST, weights_only=True) for name in ("often", "never"))
    often, never = ({**state["sae"], **state["dead"]} for state in (often, never))
    assert often.keys() == never.keys()
    assert all(torch.equal(often[name], never[name]) for name in often)
    assert {"since_F", "threshold", "norm.scale"} <= often.keys()


def test_parameters_and_moments_are_float32(short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known mistake 12; the batches come in the storage dtype."""
    seen = set()
    step = lit.MultiSAEModule.training_step

    def note(self: Any, batch_BD: Tensor, batch_idx: int) -> None:
        seen.add(batch_BD.dtype)
        step(self, batch_BD, batch_idx)

    monkeypatch.setattr(lit.MultiSAEModule, "training_step", note)
    train(short("sae=jumprelu"))
    assert seen == {torch.bfloat16}
    state = torch.load(tmp_path / "run" / LAST, weights_only=True)
    moments = [v for s in state["optimizer"]["state"].values() for v in s.values()]
    weights = [v for name, v in state["sae"].items() if v.is_floating_point()]
    assert len(moments) > 10 and {v.dtype for v in moments + weights} == {torch.float32}


def test_the_order_of_a_step(short: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Projection before clipping, renormalisation after the optimizer's step, the variant's counters last."""
    calls: list[str] = []

    def spy(owner: Any, name: str, label: str) -> None:
        plain = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls.append(label)
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    spy(TopK, "loss", "loss")
    spy(update, "project_gradient_", "project")
    spy(torch.nn.utils, "clip_grad_norm_", "clip")
    spy(torch.optim.Adam, "step", "step")
    spy(update, "renormalise_", "renormalise")
    spy(TopK, "after_step", "after")
    train(short("sae=topk", "tokens=128"))
    assert calls[-12:] == ["loss", "project", "clip", "step", "renormalise", "after"] * 2


def test_the_gradient_that_is_clipped_has_no_parallel_part(short: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[float] = []
    rows: list[Tensor] = []
    clip, project = torch.nn.utils.clip_grad_norm_, update.project_gradient_

    def note(parameters: Any, norm: float) -> Any:
        W_dec = rows[-1]
        assert W_dec.grad is not None
        along = torch.linalg.vecdot(W_dec.grad, W_dec.detach()).abs().max()
        found.append(float(along / W_dec.grad.norm()))
        return clip(parameters, norm)

    monkeypatch.setattr(update, "project_gradient_", lambda W_dec, sites: (rows.append(W_dec), project(W_dec, sites)))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", note)
    train(short("sae=gated"))
    assert len(found) == 30 and max(found) < 1e-5


def test_dead_latents_are_counted_in_training_tokens(short: Any, tmp_path: Path) -> None:
    train(short("sae=topk", "dead_after=640"))
    state = torch.load(tmp_path / "run" / LAST, weights_only=True)["dead"]["since_F"]
    assert set((state % 64).tolist()) == {0} and int(state.max()) <= 1920
    training = load_config(tmp_path / "run")["training"]
    assert (training["dead"], training["dead_after"]) == (int((state >= 640).sum()), 640)


def test_the_learning_rate_follows_the_schedule(short: Any, tmp_path: Path) -> None:
    rates = ["optimizer.lr=0.01", "lr_warmup=0.2", "lr_decay=0.5", "log_every=1"]
    train(short("sae=topk", "tokens=640", *rates))
    with (tmp_path / "run" / "metrics.csv").open() as file:
        used = [float(row["train/lr"]) for row in csv.DictReader(file) if row["train/lr"]]
    assert used == pytest.approx([0.005, 0.01, 0.01, 0.01, 0.01, 0.01, 0.008, 0.006, 0.004, 0.002])


@pytest.mark.parametrize(("width", "factor"), [(16, 1.0), (64, 0.5)])
def test_the_learning_rate_falls_with_the_square_root_of_the_width(
    short: Any, tmp_path: Path, width: int, factor: float
) -> None:
    train(short("sae=topk", "tokens=640", "optimizer.lr=0.01", "lr_at_width=16", f"sae.width={width}", "lr_warmup=0"))
    with (tmp_path / "run" / "metrics.csv").open() as file:
        first = next(float(row["train/lr"]) for row in csv.DictReader(file) if row["train/lr"])
    assert first == pytest.approx(0.01 * factor * 0.5)  # the last but one step of lr_decay=0.2


@pytest.mark.parametrize("variant", ["batchtopk", "jumprelu"])
def test_the_mean_of_the_weights_ships(
    short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    plain, after = SAETrainer.training_step, []

    def note(self: SAETrainer, *batch: Any) -> None:
        plain(self, *batch)
        after.append({name: p.detach().double().clone() for name, p in self.sae.named_parameters()})

    monkeypatch.setattr(SAETrainer, "training_step", note)
    train(short(f"sae={variant}", "ema=0.9", f"out={tmp_path / 'mean'}"))
    decays = 0.9 ** torch.arange(29, -1, -1, dtype=torch.float64)
    sae = load(tmp_path / "mean")
    for name, shipped in sae.named_parameters():
        mean = sum(d * weights[name] for d, weights in zip(decays, after, strict=True)) / decays.sum()
        if name == "W_dec":
            mean = torch.nn.functional.normalize(mean, dim=1)
        torch.testing.assert_close(shipped.double(), mean, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(shipped.double(), after[-1][name])
    # The training goes on from the weights themselves, validated or not; the same as without a mean.
    states = [torch.load(tmp_path / "mean" / LAST, weights_only=True)["sae"]]
    train(short(f"sae={variant}", f"out={tmp_path / 'last'}"))
    states.append(torch.load(tmp_path / "last" / LAST, weights_only=True)["sae"])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    if variant != "jumprelu":  # a threshold that is followed is another midway
        return
    # What is validated midway is the mean too.
    with (tmp_path / "mean" / "metrics.csv").open() as file:
        reported = next(float(row["val/nmse"]) for row in csv.DictReader(file) if row["val/nmse"])
    x = rows_of(short, HELDOUT, np.arange(8)).float()
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(sum(d * weights[name] for d, weights in zip(decays[15:], after[:15], strict=True)))
            parameter.div_(decays[15:].sum())
        sae.W_dec.copy_(torch.nn.functional.normalize(sae.W_dec, dim=1))
        error = float((sae(x) - x).double().square().sum() / (x - x.mean(0)).double().square().sum())
    assert reported == pytest.approx(error, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_with_its_step(
    short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, steps = TopK.after_step, iter(range(1000))

    def poison(self: TopK, step: Any) -> None:
        plain(self, step)
        if next(steps) == 11:
            with torch.no_grad():
                self.b_dec.fill_(math.nan)

    monkeypatch.setattr(TopK, "after_step", poison)
    with pytest.raises(UserError, match=r"variant topk was not finite at step 12 .*lower optimizer\.lr"):
        train(short("sae=topk", "validate_every=14"))
    state = torch.load(tmp_path / "run" / LAST, weights_only=True)
    assert state["step"] == 10 and state["sae"]["b_dec"].isfinite().all()
    assert not (tmp_path / "run" / "config.json").exists()


def test_the_threshold_that_ships_is_calibrated(short: Any, tmp_path: Path) -> None:
    train(short("sae=batchtopk"))
    sae, training = load(tmp_path / "run"), load_config(tmp_path / "run")["training"]
    found = training["calibration"]
    assert (found["tokens"], found["batches"] + found["skipped"]) == (512, 8)
    assert float(sae.threshold) == pytest.approx(found["threshold"])
    assert math.isfinite(training["running_threshold"]) and training["running_threshold"] > 0
