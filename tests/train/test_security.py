"""No setting and no file of another's making runs code: a canary stays unwritten, and one sentence says why."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode

from data.base.cli import CONF
from data.base.composing import GuardedLoader, refuse_calls, refuse_flags
from data.base.errors import UserError
from tests.helpers.runs import Broken, break_after
from train.resume import LAST, RUN
from train.run import train
from train.sae import load


@pytest.fixture
def run_folder(short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was broken off after step 20."""
    with monkeypatch.context() as patch, pytest.raises(Broken):
        break_after(patch, 20)
        train(short("sae=topk"))
    return tmp_path / "run"


def edit(folder: Path, *path: str, value: Any) -> None:
    """Set one entry of a run's record."""
    record = json.loads((folder / RUN).read_text())
    entry = record
    for name in path[:-1]:
        entry = entry[name]
    entry[path[-1]] = value
    (folder / RUN).write_text(json.dumps(record))


def go_on(short: Any, folder: Path) -> None:
    train(short(f"resume={folder}"), [f"resume={folder}"])


class Canary:
    """A pickled object that writes a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


TARGETS = [
    "torch.load",
    "numpy.load",
    "pandas.read_pickle",
    "pathlib.Path.write_text",
    "os.system",
    "torch.optim.LBFGS",
]


@pytest.mark.parametrize("target", TARGETS)
def test_a_run_s_optimizer_names_nothing_that_is_called(
    short: Any, tmp_path: Path, run_folder: Path, target: str
) -> None:
    canary = tmp_path / "canary"
    torch.save(Canary(canary), tmp_path / "hostile.pt")
    hostile = {
        "_target_": target,
        "f": str(tmp_path / "hostile.pt"),
        "weights_only": False,
        "data": "x",
        "self": str(canary),
    }
    for place in ("settings", "numbers"):
        edit(run_folder, place, "optimizer", value=hostile)
        with pytest.raises(UserError, match=rf"run\.json: optimizer\._target_={target} names code") as caught:
            go_on(short, run_folder)
        assert "\n" not in str(caught.value)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("settings", "optimizer", "name"), "os.system", r"optimizer\.name=os\.system is not allowed"),
        (("settings", "optimizer", "betas"), {"_target_": "os.system"}, r"optimizer\.betas=.* is not allowed"),
        (("settings", "sae", "_target_"), "os.system", r"sae\._target_=os\.system names code"),
        (("settings", "sae", "k"), {"_target_": "os.system", "command": "id"}, r"sae\.k"),
        (("settings", "logger"), {"_target_": "os.system"}, r"logger\._target_ is no setting"),
        (("settings", "trainer", "plugins"), {"_target_": "os.system"}, r"trainer\.plugins is no setting"),
        (("settings", "callbacks"), [{"_target_": "os.system"}], r"callbacks is no setting"),
        (("settings",), [1], r"run\.json is damaged"),
        (("numbers",), None, r"run\.json is damaged"),
        (("stored_chunks",), "all", r"run\.json is damaged"),
    ],
)
def test_a_hostile_record_is_one_sentence(
    short: Any, run_folder: Path, path: tuple[str, ...], value: Any, says: str
) -> None:
    edit(run_folder, *path, value=value)
    with pytest.raises(UserError, match=says) as caught:
        go_on(short, run_folder)
    assert "\n" not in str(caught.value)


def test_an_earlier_version_s_names_are_aliases(short: Any, run_folder: Path) -> None:
    record = json.loads((run_folder / RUN).read_text())
    for place in ("settings", "numbers"):
        optimizer = record[place]["optimizer"]
        del optimizer["name"]
        record[place]["optimizer"] = {k: v for k, v in optimizer.items() if v is not None}
        record[place]["optimizer"] |= {"_target_": "torch.optim.Adam", "_partial_": True, "_convert_": "all"}
        del record[place]["sae"]["variant"]
        record[place]["sae"]["_target_"] = "train.sae.topk.TopK"
    (run_folder / RUN).write_text(json.dumps(record))
    go_on(short, run_folder)
    assert load(run_folder).name == "topk"


def test_a_checkpoint_that_carries_code_is_refused(short: Any, tmp_path: Path, run_folder: Path) -> None:
    state = torch.load(run_folder / LAST, weights_only=True)
    state["figures"] = Canary(tmp_path / "canary")
    torch.save(state, run_folder / LAST)
    with pytest.raises(UserError, match=r"last\.ckpt is damaged"):
        go_on(short, run_folder)
    assert not (tmp_path / "canary").exists()


def test_an_sae_s_variant_is_one_of_the_table(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"format": 1, "variant": "os.system", "settings": {}}))
    with pytest.raises(UserError, match=r"names the variant 'os\.system'"):
        load(tmp_path)


def composed(*overrides: str) -> Any:
    """The whole configuration of train, Hydra's own group with it, as the command line composes it."""
    loader = GuardedLoader(create_config_search_path(str(CONF)))
    return loader.load_configuration("train", list(overrides), RunMode.RUN)


@pytest.mark.parametrize(
    "override",
    [
        "hydra.launcher._target_=os.system",
        "+hydra.launcher.also._target_=os.system",
        "+hydra.launcher.also=${tokens}",
        "hydra.sweeper._target_=os.system",
        "+hydra.callbacks.one._target_=os.system",
        "+hydra.callbacks.one=${tokens}",
        "hydra.job_logging.handlers.console.class=subprocess.Popen",
        "+hydra.job_logging.formatters.simple.class=os.system",
        "hydra.job_logging.handlers.console.stream=ext://os.system",
        "hydra.hydra_logging.handlers.console.class=os.system",
        "+hydra.job.env_set.LD_PRELOAD=evil.so",
    ],
)
def test_hydra_s_own_settings_call_nothing(override: str) -> None:
    with pytest.raises(UserError, match="leave it out") as caught:
        composed(override)
    assert "\n" not in str(caught.value)


def test_logging_s_own_way_to_name_a_factory_is_refused() -> None:
    with pytest.raises(UserError, match=r"hydra\.job_logging\.filters\.one\.\(\)=os\.system could call any code"):
        refuse_calls({"job_logging": {"filters": {"one": {"()": "os.system"}}}})


@pytest.mark.parametrize("launcher", ["together", "basic"])
def test_our_launcher_and_hydra_s_own_stay(launcher: str) -> None:
    assert composed(f"hydra/launcher={launcher}", "hydra.verbose=true").hydra.launcher._target_


@pytest.mark.parametrize(
    "arguments",
    [
        ["--experimental-rerun=job.pickle"],
        ["--exp", "job.pickle"],
        ["--config-path", "x"],
        ["hydra.searchpath=[pkg://x]"],
    ],
    ids=" ".join,
)
def test_flags_that_load_code_are_refused(arguments: list[str]) -> None:
    with pytest.raises(UserError):
        refuse_flags(arguments)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("lrr=1", "lrr is no setting: did you mean optimizer.lr?"),
        ("lr=1e-3", "lr is no setting: did you mean optimizer.lr?"),
        ("optimizer.beta=1", "optimizer.beta is no setting: did you mean optimizer.betas?"),
        ("~nothing", "nothing is no setting"),
        ("sae=topkk", "sae=topkk is unknown: choose one of batchtopk, gated"),
        ("batch={", "the settings cannot be read"),
        (
            "cache=<|a|>",
            "the settings cannot be read (cache=<|a|>): a value with special characters needs quotes",
        ),
    ],
)
def test_a_name_that_is_no_setting_gets_the_nearest_that_is(override: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        composed(override)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["sae=relu,gated", "sae.target_l0=8"],
            r"sae\.target_l0 is no setting of the sae .* write \+\+sae\.target_l0=<value>$",
        ),
        (["sae=relu,gated", "sae.target=8"], "sae.target is no setting: did you mean"),
    ],
)
def test_a_setting_that_only_the_swept_choices_have_is_told_from_a_misspelt_one(
    overrides: list[str], says: str
) -> None:
    loader = GuardedLoader(create_config_search_path(str(CONF)))
    with pytest.raises(UserError, match=f"^{says}"):
        loader.load_configuration("train", overrides, RunMode.MULTIRUN)
    loader.load_configuration("train", [overrides[0], "++sae.target_l0=8"], RunMode.MULTIRUN)
