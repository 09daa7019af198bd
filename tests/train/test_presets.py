"""conf/experiment: each preset composes for both stages, says where it is from, and trains a few steps."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from data.base.cli import CONF, preset_settings
from data.base.errors import UserError
from harvest.request import HarvestRequest
from tests.helpers.runs import SITE, D
from train.run import build, train
from train.sae import load_config

DEMO = "smollm2"  # what `make demo-real` runs; of no paper
PRESETS = sorted({path.stem for path in (CONF / "experiment").glob("*.yaml")} - {DEMO})
HERE = ["model=embedded", "text=stdlib", "packing.context=64", "lm_batch=16"]
# A few steps over the small store.
SMALL = [
    *("text=stdlib", "model=embedded", f"site={SITE}", "tokens=1920", "batch=64", "sae.width=64"),
    *("calibration_tokens=512", "heldout_tokens=512", "trainer=cpu", "dead_after=128"),
    *("log_every=10", "validate_every=15", "checkpoint_every=10", "loader.pool_chunks=4", "loader.threads=1"),
]


def composed(stage: str, preset: str, *overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return preset_settings(compose(stage, [f"+experiment={preset}", *overrides]), stage)


def commands(preset: str, stage: str) -> list[list[str]]:
    """The overrides of the commands a preset opens with."""
    text = (CONF / "experiment" / f"{preset}.yaml").read_text()
    return [line.split()[4:] for line in text.splitlines() if line.startswith(f"# python -m {stage} ")]


def test_there_is_one_for_each_source() -> None:
    of_papers = ["batchtopk-gemma", "batchtopk-gpt2", "gao", "gated", "gated-baseline", "jumprelu"]
    assert [*of_papers, "saebench-pythia"] == PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_opens_with_its_commands_its_source_and_what_it_takes(preset: str) -> None:
    head = (CONF / "experiment" / f"{preset}.yaml").read_text().split("\ndefaults:")[0]
    assert commands(preset, "harvest") and commands(preset, "train")
    assert all(word in head for word in ("# Source: ", "# Disk: ", "not run", "# Units"))
    assert "arXiv" in head or "github.com" in head


@pytest.mark.parametrize("preset", PRESETS)
def test_its_commands_compose_into_saes_that_can_be_built(preset: str) -> None:
    """With each of a sweep's values."""
    for overrides in commands(preset, "train"):
        asked = [item.split("=") for item in overrides if item != "-m"]
        assert asked.pop(0) == ["+experiment", preset]
        values = [value.split(",") for _, value in asked]
        for i in range(max(map(len, values), default=1)):
            given = [f"{name}={value[i % len(value)]}" for (name, _), value in zip(asked, values, strict=True)]
            settings = composed("train", preset, *given, "out=x", "sae.width=1024")
            assert build(settings["sae"], 16).name == settings["sae"]["variant"]
            for name, value in (item.split("=") for item in given):
                if name not in ("sae", "sae.width"):
                    assert float(settings["sae"][name.removeprefix("sae.")]) == float(value)


@pytest.mark.parametrize("preset", PRESETS)
def test_what_it_harvests_is_enough_for_what_it_trains(preset: str) -> None:
    (asked,) = commands(preset, "harvest")
    harvests, trains = composed("harvest", preset, *asked[1:]), composed("train", preset, "out=x")
    assert [trains["site"]] == harvests["sites"]
    assert all(harvests[name] == trains[name] for name in ("model", "text", "packing", "heldout_tokens"))
    chunk = 6 * 2**20 // 2 // 512  # rows of the narrowest chunk
    assert harvests["tokens"] >= trains["tokens"] + trains["calibration_tokens"] + trains["batch"] + 2 * chunk
    assert not {"sae", "optimizer", "site", "batch"} & harvests.keys()
    assert not {"sites", "lm_batch"} & trains.keys()
    HarvestRequest.from_config(composed("harvest", preset, *HERE, f"sites=[{SITE}]", "cache=x"))


@pytest.mark.parametrize("preset", PRESETS)
def test_it_trains_a_few_steps(preset: str, cache: Path, tmp_path: Path) -> None:
    (store,) = cache.iterdir()
    asked = composed("train", preset, *SMALL, f"store={store}", f"out={tmp_path}")
    if asked["sae"].get("k"):
        asked["sae"]["k"] = 4
    train(asked)
    config = load_config(tmp_path)
    assert (config["training"]["steps"], config["settings"]["d_in"], config["settings"]["width"]) == (30, D, 64)
    kept = {name: value for name, value in asked["sae"].items() if name in config["settings"] and value is not None}
    assert {name: config["settings"][name] for name in kept} == kept | {"width": 64}
    assert config["training"]["optimizer"]["betas"] == asked["optimizer"]["betas"]
    if preset == "gao":
        assert (config["training"]["ema"], config["training"]["lr_at_width"]) == (0.999, 32768)


def test_the_post_s_setting_is_its_authors_code_s() -> None:
    """bartbussmann/BatchTopK, config.py at b454c16."""
    settings = composed("train", "batchtopk-gpt2", "out=x")
    assert (settings["site"], settings["tokens"], settings["batch"]) == ("resid_pre.8", 10**9, 4096)
    assert (settings["packing"]["context"], settings["dead_after"]) == (128, 5 * 4096)
    adam, sae = settings["optimizer"], settings["sae"]
    assert (adam["lr"], adam["betas"]) == (3e-4, [0.9, 0.99])
    assert (sae["width"], sae["k"], sae["input_norm"], sae["auxk_k"], sae["auxk_alpha"]) == (
        12288,
        32,
        "token",
        512,
        1 / 32,
    )
    (widths, ks) = (dict(item.split("=") for item in one[1:]) for one in commands("batchtopk-gpt2", "train"))
    assert [int(width) // 768 for width in widths["sae.width"].split(",")] == [4, 8, 16, 32]
    assert (ks["sae.k"], ks["sae"]) == ("16,32,64", "topk,batchtopk")


def test_the_suite_s_setting_is_its_authors_code_s() -> None:
    """adamkarvonen/dictionary_learning_demo, demo_config.py at 41a8ae2: steps of a run of 500M tokens."""
    settings = composed("train", "saebench-pythia", "out=x")
    steps = settings["tokens"] // settings["batch"]
    assert steps == int(500_000_000 / 2048)
    assert round(settings["lr_warmup"] * steps) == pytest.approx(1000, abs=2)
    assert (settings["model"]["name"], settings["site"]) == ("EleutherAI/pythia-160m-deduped", "resid_post.8")
    assert (settings["packing"]["context"], settings["packing"]["bos"]) == (1024, "none")
    assert (settings["optimizer"]["lr"], settings["sae"]["width"]) == (3e-4, 2**14)
    (asked,) = commands("saebench-pythia", "train")
    assert asked[-2:] == ["sae=topk,batchtopk", "sae.k=20,40,80,160,320,640"]


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"tokenz": 1}, "sets tokenz, which no stage has"),
        ({"batch": {"harvest": 1}}, r"sets batch for other stages only: give batch=\.\.\. to train too"),
    ],
)
def test_a_preset_s_mistake_is_named(extra: dict[str, Any], says: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", ["+experiment=gao", "out=x"])
        assert isinstance(config, DictConfig)
        with pytest.raises(UserError, match=says):
            preset_settings(OmegaConf.merge(OmegaConf.to_container(config), extra), "train")  # type: ignore[arg-type]


@pytest.mark.slow
def test_one_preset_serves_both_commands(tmp_path: Path) -> None:
    """With another model in its place: `+experiment=` harvests, trains a sweep, and names itself where rows lack."""
    common = ["+experiment=batchtopk-gpt2", "text=stdlib", "model=embedded"]
    common += [f"cache={tmp_path / 'cache'}", "heldout_tokens=512"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", *arguments, *common]
        return subprocess.run(command, cwd=CONF.parent, capture_output=True, text=True)

    harvest = ("harvest", f"sites=[{SITE}]", "tokens=6000", "lm_batch=4", f"hydra.run.dir={tmp_path / 'h'}")
    done = run(*harvest)
    assert done.returncode == 0, done.stderr
    few = [item for item in SMALL if item.split("=")[0] not in ("text", "model", "heldout_tokens")]
    sweep = (f"hydra.sweep.dir={tmp_path / 's'}", "hydra.sweep.subdir=${hydra:job.num}")  # a short name
    done = run("train", "-m", *few, "sae=topk,batchtopk", "sae.k=4", *sweep)
    assert done.returncode == 0 and "2 SAEs in one pass" in done.stdout, done.stderr
    short = [item for item in few if not item.startswith("tokens=")]
    done = run("train", *short, "tokens=1e6", f"hydra.run.dir={tmp_path / 't'}")
    assert done.returncode == 1
    assert re.search(r'make harvest ARGS="\+experiment=batchtopk-gpt2 .*sites=\[resid_post\.3\] tokens=', done.stderr)
