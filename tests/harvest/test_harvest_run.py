"""python -m pytest tests/harvest/test_harvest_run.py: the stage from its configuration to a store on disk."""

from __future__ import annotations

import collections
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from data.base.errors import UserError
from data.loading.reader import open_reader
from data.store.find import find
from data.store.manifest import HELDOUT, TRAIN, store_settings
from data.store.store import Store
from data.tools.verify import verify
from harvest import lm
from harvest.harvester import Harvester
from harvest.request import HarvestRequest
from harvest.run import harvest, main
from tests.helpers.corpus import ROOT, config, contents, save_model, story, write_stories


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stories(tmp_path_factory.mktemp("texts") / "stories.jsonl", range(40))


class Interrupted(Exception):
    """Stands for a crash."""


def interrupt_after(monkeypatch: pytest.MonkeyPatch, writes: int, error: BaseException) -> None:
    """Fail in the midst of the write that follows `writes` whole ones: a chunk is at its place, its record is not."""
    real, left = Store.write, iter(range(writes))

    def write(self: Store, split: str, unit: int, site: str, rows: Any, *rest: Any) -> Any:
        if next(left, None) is None:
            key = f"{split}/{site}/c.{unit * self.layout.files_per_unit}" + ".0" * (rows.ndim - 1)
            self._write_chunk((self.path / key).parent, key, [rows[:3].tobytes()])
            raise error
        return real(self, split, unit, site, rows, *rest)

    monkeypatch.setattr(Store, "write", write)


def test_the_store_holds_what_was_asked_and_says_so(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(model, text, tmp_path, "sites=[resid_post.1,blocks.0.hook_mlp_out,transformer.h.2.ln_1]")
    store = harvest(cfg)
    names = {"resid_post.1", "mlp_out.0", "transformer.h.2.ln_1"}
    assert set(store.sites(TRAIN)) == set(store.sites(HELDOUT)) == names
    assert min(store.rows(TRAIN, site) for site in names) >= 200
    assert min(store.rows(HELDOUT, site) for site in names) >= 40
    assert store.path.name.startswith("tiny-")
    assert [found.path for found in find(tmp_path, store_settings(cfg))] == [store.path]
    assert store.complete == {split: {site: store.rows(split, site) for site in names} for split in (TRAIN, HELDOUT)}
    told = capsys.readouterr().out
    written = sum(len(data) for name, data in contents(store.path).items() if "/c." in name)
    assert f"on disk: {written / 1000:.1f} kB to write" in told
    assert re.search(r"harvested \d+ units in .* s into ", told)


@pytest.mark.parametrize(("amx", "dtype", "said"), [(True, "float32", 1), (True, "bfloat16", 0), (False, "float32", 0)])
def test_a_cpu_that_is_faster_in_bfloat16_is_named(
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    amx: bool,
    dtype: str,
    said: int,
) -> None:
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    harvest(config(model, text, tmp_path, f"model.dtype={dtype}"))
    assert capsys.readouterr().out.count("this CPU has AMX: with model.dtype=bfloat16") == said


def test_progress_is_a_few_lines_where_nobody_watches(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harvest(config(model, text, tmp_path, "tokens=600"))  # some 20 units
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("harvest  ")]
    assert len(lines) == 10 and "\r" not in said
    assert lines[-1].startswith("harvest  100%") and " written" in lines[-1]


def test_a_second_run_does_nothing_and_says_so(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(model, text, tmp_path)
    store = harvest(cfg)
    before = {name: (store.path / name).stat().st_mtime_ns for name in contents(store.path)}
    capsys.readouterr()
    monkeypatch.setattr("harvest.lm.load_model", None)  # not even the model is loaded
    harvest(cfg)
    assert capsys.readouterr().out.startswith(f"nothing to do: {store.path} holds all of it (train: resid_post.1 ")
    assert {name: (store.path / name).stat().st_mtime_ns for name in contents(store.path)} == before


SITES = "sites=[resid_post.1,attn_out.0]"
UNITS = 9  # of a harvest of 200 and 40 tokens


@pytest.fixture(scope="module")
def whole(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return harvest(config(model, text, tmp_path_factory.mktemp("whole"), SITES))


@pytest.mark.parametrize("writes", [0, 1, 6, 17, 30])
def test_interrupted_and_resumed_is_the_same_store(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Store, writes: int
) -> None:
    cfg = config(model, text, tmp_path / "cut", SITES)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, writes, Interrupted())
        harvest(cfg)
    cut = find(tmp_path / "cut", store_settings(cfg))[0]
    assert cut.complete is None
    assert len(list(cut.path.glob("commits/*/*.json"))) == writes
    harvest(cfg)
    assert contents(cut.path) == contents(whole.path)


def committed(store: Store) -> dict[str, tuple[bytes, int]]:
    """Records and chunks, with the time they were written."""
    names = [name for name in contents(store.path) if name.startswith("commits/") or "/c." in name]
    return {name: ((store.path / name).read_bytes(), (store.path / name).stat().st_mtime_ns) for name in names}


def test_another_site_and_more_tokens_touch_nothing_committed(model: Path, text: Path, tmp_path: Path) -> None:
    store = harvest(config(model, text, tmp_path / "grown"))
    first = committed(store)
    harvest(config(model, text, tmp_path / "grown", "sites=[resid_mid.2]"))
    second = committed(Store.open(store.path))
    assert second.items() > first.items()
    assert {name for name in second if name not in first} == {
        name.replace("resid_post.1", "resid_mid.2") for name in first if "resid_post.1" in name
    }
    everything = ("sites=[resid_post.1,resid_mid.2]", "tokens=500", "heldout_tokens=100")
    grown = harvest(config(model, text, tmp_path / "grown", *everything))
    assert grown.path == store.path
    assert committed(grown).items() > second.items()
    at_once = harvest(config(model, text, tmp_path / "at_once", *everything))
    assert contents(grown.path) == contents(at_once.path)


def test_the_layout_of_a_store_is_adopted_and_another_refused(model: Path, text: Path, tmp_path: Path) -> None:
    store = harvest(config(model, text, tmp_path))
    chosen = ("store.chunk_rows=null", "store.chunks_per_unit=null", "tokens=600")
    assert harvest(config(model, text, tmp_path, *chosen)).path == store.path
    for change, told in {
        "store.chunk_rows=16": "layout.chunk_rows: 8 here, 16 asked",
        "store.dtype=bfloat16": 'layout.dtype: "float32" here, "bfloat16" asked',
        "store.mixing_seed=5": "layout.mixing_seed: 0 here, 5 asked",
        "lm_batch=3": "lm_batch: 2 here, 3 asked",
    }.items():
        with pytest.raises(UserError, match=f"{store.path} has these settings but was made otherwise .{told}"):
            harvest(config(model, text, tmp_path, change))
    assert len(find(tmp_path, store_settings(config(model, text, tmp_path)))) == 1


FORMS = ("store.encoding=int8", "store.codec=zstd", "store.shards=true")


def test_the_form_of_a_store_is_adopted_and_another_refused(model: Path, text: Path, tmp_path: Path) -> None:
    plain = harvest(config(model, text, tmp_path / "plain"))
    assert plain.manifest.identity["layout"].keys() == {
        *("dtype", "context", "chunk_rows", "chunks_per_unit", "mixing_seed"),
    }
    for number, forms in enumerate((FORMS[:1], FORMS[1:])):
        store = harvest(config(model, text, tmp_path / str(number), *forms))
        grown = config(model, text, tmp_path / str(number), "tokens=300", "sites=[resid_mid.1]")
        assert harvest(grown).path == store.path
        assert verify(store.path, quiet=True) == []
    for form in FORMS:
        name = form.removeprefix("store.").split("=")[0]
        with pytest.raises(UserError, match=rf"layout\.{name}: absent here, .* asked"):
            harvest(config(model, text, tmp_path / "plain", form))


@pytest.mark.slow
def test_int8_of_any_number_of_harvests_is_the_same_store(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pilot is of the first rows of train/, whatever is there when a site is added and however often it stops."""
    both = ("sites=[resid_post.1,attn_out.0]", "store.encoding=int8", "store.shards=true", "tokens=300")
    whole = harvest(config(model, text, tmp_path / "whole", *both))
    grown = (*both[1:3], "tokens=100", "heldout_tokens=40")
    harvest(config(model, text, tmp_path / "cut", "sites=[attn_out.0]", *grown))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 3, Interrupted())
        harvest(config(model, text, tmp_path / "cut", *both))
    cut = harvest(config(model, text, tmp_path / "cut", *both))
    assert contents(cut.path) == contents(whole.path)
    kind, width = cut.rows_of("attn_out.0"), cut.decoder(TRAIN, "attn_out.0").width
    assert kind.standard is not None and width == 32
    plain = harvest(config(model, text, tmp_path / "plain", both[0], both[3]))
    first = open_reader(plain, TRAIN, "attn_out.0")
    unit = np.zeros((plain.committed(TRAIN, "attn_out.0")[0].rows, 32), np.float32)
    for chunk in range(4):
        first.read(chunk, unit[8 * chunk :])
    np.testing.assert_allclose(kind.standard.mean, unit.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(kind.standard.std, unit.std(0), rtol=1e-4)
    a, b = (store.stats(TRAIN, "attn_out.0") for store in (cut, plain))
    assert 0 < abs(a.sum_sq / b.sum_sq - 1) < 1e-3


@pytest.mark.parametrize("form", ["", *FORMS[:2]])
def test_the_size_line_says_what_int8_takes(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    store = harvest(config(model, text, tmp_path, *([form] if form else [])))
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("on disk: "))
    chunks = sum(
        -(-commit.rows // 8) for split in (TRAIN, HELDOUT) for commit in store.committed(split, "resid_post.1").values()
    )
    plain, int8 = (f"{8 * chunks * (row + 12) / 1000:.1f} kB" for row in (4 * 32, 32 + 4))
    said = {
        "store.encoding=int8": f"on disk: {int8} to write as int8, ",
        "store.codec=zstd": f"on disk: {plain} to write before store.codec=zstd ({int8} with store.encoding=int8), ",
    }
    assert told.startswith(said.get(form, f"on disk: {plain} to write ({int8} with store.encoding=int8), "))


def test_other_settings_make_another_store(model: Path, text: Path, tmp_path: Path) -> None:
    stores = {harvest(config(model, text, tmp_path, f"packing.bos={bos}")).path for bos in ("document", "context")}
    assert len(stores) == 2


def test_changed_text_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    text = write_stories(tmp_path / "a.jsonl", range(40))
    harvest(config(model, text, tmp_path / "cache"))
    write_stories(text, range(41))
    with pytest.raises(UserError, match=r"text\.documents: 40 here, 41 asked; text\.sha256: "):
        harvest(config(model, text, tmp_path / "cache"))


def test_a_changed_model_is_refused_by_name(model: Path, text: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(model, tmp_path / "tiny"))
    harvest(config(mine, text, tmp_path / "cache"))
    weights = bytearray((mine / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (mine / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"model\.files\.model\.safetensors: "):
        harvest(config(mine, text, tmp_path / "cache"))


def test_a_resume_elsewhere_needs_leave(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = harvest(config(model, text, tmp_path))
    made = {"device": "an abacus", "torch": "0", "transformers": "0"}
    monkeypatch.setattr("harvest.harvester.made_by", lambda *_: made)
    with pytest.raises(UserError, match=r'was begun elsewhere \(device: "cpu .*" here, "an abacus" asked'):
        harvest(config(model, text, tmp_path, "tokens=400"))
    harvest(config(model, text, tmp_path, "tokens=400", "allow_mixed_devices=true"))
    devices = [commit.made_by["device"] for commit in Store.open(store.path).committed(TRAIN, "resid_post.1").values()]
    assert devices[-1] == "an abacus" != devices[0]


def test_a_disk_too_small_is_told_before_anything_is_written(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**8, 0, 10**6))
    with pytest.raises(UserError, match=r"the harvest needs .* kB in .* and 1\.0 MB is free there"):
        harvest(config(model, text, tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sites=[resid_past.1]", "site 'resid_past.1' is not"),
        ("sites=[]", "sites is empty"),
        ("sites=[resid_post.1,resid_post.3]", r"site resid_post\.3: model .*tiny has layers 0 to 2, choose one"),
        ("tokens=0", "tokens=0 is not allowed: it should be greater than or equal to 1"),
        ("tokens=2.5", "tokens=2.5 is not allowed: it should be a whole number"),
        ("heldout_tokens=-1", "heldout_tokens=-1 is not allowed: it should be greater than or equal to 0"),
        ("store.chunk_rows=abc", "store.chunk_rows=abc is not allowed: it should be a whole number"),
        ("lm_batch=many", "lm_batch=many is not allowed: it should be a whole number"),
        ("tokens=1e6", "tokens=1,000,000 is more than the files text's train split holds"),
        ("packing.context=65", r"packing\.context=65 is longer than the model reads \(64 tokens\)"),
        ("packing.heldout=0", r"packing\.heldout=0 leaves no held-out text"),
        ("packing.bos=once", r"packing\.bos=once is not allowed: it should be 'context', 'document' or 'none'"),
        ("store.chunk_rows=7", r"store\.chunk_rows 7 times"),
        ("store.dtype=int8", r"store\.dtype=int8 is not allowed: it should be 'bfloat16', 'float16' or 'float32'"),
        ("text.paths=[none.txt]", "no file matches 'none.txt'"),
        ("text.kind=book", r"text\.kind=book is unknown"),
        ("model.name=/no/such/folder", "/no/such/folder"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence(
    model: Path, text: Path, tmp_path: Path, override: str, told: str
) -> None:
    with pytest.raises(UserError, match=told) as error:
        harvest(config(model, text, tmp_path / "cache", override))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").glob("tiny-*"))


@pytest.mark.parametrize("told_by_config", [True, False])
def test_a_layer_out_of_range_is_told_before_the_weights_are_loaded(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told_by_config: bool
) -> None:
    mine = Path(shutil.copytree(model, tmp_path / "tiny"))
    if not told_by_config:  # then it has GPT-2's own 12
        said = json.loads((mine / "config.json").read_text())
        del said["n_layer"]
        (mine / "config.json").write_text(json.dumps(said))
    monkeypatch.setattr("harvest.lm.load_model", None)
    last = 2 if told_by_config else 11
    with pytest.raises(UserError, match=rf"site attn_out\.{last + 1}: .* has layers 0 to {last}, choose one"):
        harvest(config(mine, text, tmp_path / "cache", f"sites=[resid_post.1,attn_out.{last + 1}]"))
    HarvestRequest.from_config(config(mine, text, tmp_path / "cache", f"sites=[resid_post.{last}]"))


def test_no_logits_are_computed(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = lm.load_model

    def without_head(settings: Any) -> Any:
        loaded = load(settings)
        loaded.get_output_embeddings().forward = None
        with pytest.raises(TypeError):
            loaded(input_ids=torch.zeros(1, 1, dtype=torch.long))
        return loaded

    monkeypatch.setattr(lm, "load_model", without_head)
    assert harvest(config(model, text, tmp_path, "sites=[resid_post.2]")).rows(TRAIN, "resid_post.2") >= 200


def test_whole_numbers_may_be_written_as_floats(model: Path, text: Path, tmp_path: Path) -> None:
    request = HarvestRequest.from_config(config(model, text, tmp_path, "tokens=2e2", "heldout_tokens=0"))
    assert request.rows == {TRAIN: 200}
    store = harvest(config(model, text, tmp_path, "tokens=2e2", "heldout_tokens=0"))
    assert store.sites(HELDOUT) == []


@pytest.mark.parametrize("packing", sorted(p.stem for p in (ROOT / "conf/packing").glob("*.yaml")))
def test_every_packing_harvests(model: Path, text: Path, tmp_path: Path, packing: str) -> None:
    assert harvest(config(model, text, tmp_path, f"packing={packing}")).rows(TRAIN, "resid_post.1") >= 200


def test_the_standard_library_harvests(model: Path, text: Path, tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"module_{number}.py").write_text(story(number))
    cfg: Mapping[str, Any] = config(model, text, tmp_path / "cache", "~text.paths", "~text.field")
    cfg = {**cfg, "text": {"kind": "stdlib", "root": str(tmp_path)}}
    store = harvest(cfg)
    assert store.manifest.identity["text"]["documents"] == 40
    assert store.manifest.settings["text"] == cfg["text"]


def test_an_interrupt_says_how_to_go_on(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_after(monkeypatch, 5, KeyboardInterrupt())
    with pytest.raises(SystemExit) as stop:
        main(OmegaConf.create(config(model, text, tmp_path)))
    assert stop.value.code == 130
    assert "run the same command again to go on" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/claims"))


def test_an_interrupt_lets_the_unit_that_is_written_be_finished(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill, write, units = Harvester.run_unit, Harvester.write_unit, []

    def filled(self: Harvester, unit: Any, *rest: Any) -> None:
        units.append(unit)
        if len(units) == 4:
            raise KeyboardInterrupt
        fill(self, unit, *rest)

    def written(self: Harvester, unit: Any, held: Any) -> None:
        while len(units) < 4 and units[2:3] == [unit]:
            time.sleep(0.001)
        write(self, unit, held)

    monkeypatch.setattr(Harvester, "run_unit", filled)
    monkeypatch.setattr(Harvester, "write_unit", written)
    cfg = config(model, text, tmp_path, SITES)
    with pytest.raises(SystemExit):
        main(OmegaConf.create(cfg))
    assert "run the same command again to go on" in capsys.readouterr().err
    store = find(tmp_path, store_settings(cfg))[0]
    for name in ("resid_post.1", "attn_out.0", "tokens", "origin"):
        done = {(split, unit) for split in (TRAIN, HELDOUT) for unit in store.committed(split, name)}
        assert done == {(unit.split, unit.index) for unit in units[:3]}
    assert not (store.path / "claims").exists()


def test_every_unit_is_committed_before_the_next_but_one_is_run(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, units, seen = Harvester.run_unit, [], []

    def fill(self: Harvester, unit: Any, *rest: Any) -> None:
        real(self, unit, *rest)
        units.append((unit.split, unit.index))
        seen.append({at for at in units if self.store.is_committed(*at, "origin")})  # the last to be written

    monkeypatch.setattr(Harvester, "run_unit", fill)
    harvest(config(model, text, tmp_path))
    assert len(units) > 5
    assert all(set(units[: i - 1]) <= seen[i] for i in range(1, len(units)))


def test_the_next_unit_is_run_while_one_is_written(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each write waits for the forward of the next unit, which would be for ever were they done by turns."""
    fill, write, run, last = Harvester.run_unit, Harvester.write_unit, [], []

    def filled(self: Harvester, unit: Any, *rest: Any) -> None:
        fill(self, unit, *rest)
        run.append(unit)

    def written(self: Harvester, unit: Any, held: Any) -> None:
        deadline = time.monotonic() + 30
        while run[-1] is unit and len(run) < UNITS:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        last.append(run[-1].index)
        write(self, unit, held)

    monkeypatch.setattr(Harvester, "run_unit", filled)
    monkeypatch.setattr(Harvester, "write_unit", written)
    harvest(config(model, text, tmp_path))
    assert len(last) == UNITS


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_stopped_goes_on(model: Path, text: Path, tmp_path: Path, number: signal.Signals) -> None:
    long = write_stories(tmp_path / "long.jsonl", range(150))
    command = [
        *(sys.executable, "-m", "harvest", f"model.name={model}", "text=files", f"text.paths=[{long}]"),
        *("tokens=4000", "heldout_tokens=500", "sites=[resid_post.1]", "packing.context=16", "model.device=cpu"),
        *("store.chunk_rows=16", "store.chunks_per_unit=4", f"hydra.run.dir={tmp_path}/run"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(cache: str) -> subprocess.Popen[str]:
        # A shell has its background jobs ignore SIGINT, and processes inherit that: here it must be heard.
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        options: dict[str, Any] = {"cwd": ROOT, "env": environment, "text": True, "preexec_fn": heard}
        return subprocess.Popen(
            [*command, f"cache={tmp_path / cache}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
        )

    cut = start("cut")
    while len(list((tmp_path / "cut").glob("*/commits/train/*.json"))) < 9:
        assert cut.poll() is None
        time.sleep(0.02)
    cut.send_signal(number)
    _, told = cut.communicate(timeout=60)
    assert cut.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert ("run the same command again" in told) == (number == signal.SIGINT)
    assert "Traceback" not in told
    assert not list((tmp_path / "cut").glob("*/complete.json"))
    for cache in ("cut", "whole"):
        process = start(cache)
        process.communicate(timeout=300)
        assert process.returncode == 0
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
