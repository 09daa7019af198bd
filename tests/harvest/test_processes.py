"""python -m pytest tests/harvest/test_processes.py: several harvests at once, those that die, and disks that refuse."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data.base.errors import UserError, to_sentence
from data.storage import leases as claims
from data.storage.base import LeaseLost
from data.storage.local import LocalStorage
from data.store.manifest import TRAIN
from data.store.store import Store
from harvest import harvester, lm
from harvest.harvester import Harvester
from harvest.run import harvest
from tests.helpers.corpus import ROOT, build, config, contents, save_model, tokenizer, write_stories
from tests.helpers.slow import slow_unless

SITES = "sites=[resid_post.1,attn_out.0]"
MORE = ("tokens=600", "heldout_tokens=100")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stories(tmp_path_factory.mktemp("texts") / "stories.jsonl", range(80))


@pytest.fixture(scope="module")
def whole(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return harvest(config(model, text, tmp_path_factory.mktemp("whole"), SITES, *MORE))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harvester, "POLL_S", 0.01)


def same(store: Path, whole: Store) -> bool:
    """Equal in every name, those of folders included, and every byte."""
    names = [sorted(str(p.relative_to(root)) for p in root.rglob("*")) for root in (store, whole.path)]
    return names[0] == names[1] and contents(store) == contents(whole.path)


def claim(store: Path, unit: int, pid: int, host: str, made_by: dict[str, str], stage: str = SITES[7:19]) -> Path:
    """Make a claim as another process would, with a chunk half way; the store's manifest is written first."""
    path = store / "claims" / f"train.{unit:06d}"
    (path.parent / f"{path.name}.{stage}.0a1b").mkdir(parents=True)
    (path.parent / f"{path.name}.{stage}.0a1b/c.0.0").write_bytes(b"half a chunk")
    owner = {"host": host, "pid": pid, "token": "x", "names": [stage], "made_by": made_by}
    path.write_text(json.dumps(owner))
    return path


def begun(whole: Store, cache: Path) -> Path:
    """A store of the same name with nothing but its manifest."""
    path = cache / whole.path.name
    path.mkdir(parents=True)
    (path / "manifest.json").write_bytes((whole.path / "manifest.json").read_bytes())
    return path


def test_harvests_started_at_once_share_the_work(
    model: Path, text: Path, tmp_path: Path, whole: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads stand for processes: claims tell them apart by token."""
    real, made = Harvester.run_unit, Counter[tuple[str, int, str]]()

    def fill(self: Harvester, unit: Any, *rest: Any) -> None:
        made[unit.split, unit.index, threading.current_thread().name] += 1
        real(self, unit, *rest)

    monkeypatch.setattr(Harvester, "run_unit", fill)
    load, one = lm.load_model, threading.Lock()

    def load_alone(settings: Any) -> Any:
        """transformers can load one model at a time in a process."""
        with one:
            return load(settings)

    monkeypatch.setattr(lm, "load_model", load_alone)
    cfg = config(model, text, tmp_path, SITES, *MORE)
    threads = [threading.Thread(target=harvest, args=(cfg,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same(tmp_path / whole.path.name, whole)
    by_unit = Counter((split, unit) for split, unit, _ in made.elements())
    assert len(by_unit) == len(list(whole.path.glob("commits/*/*.tokens.json"))) > 20
    assert set(by_unit.values()) == {1}


def test_a_harvest_waits_for_a_unit_that_another_has(
    model: Path, text: Path, tmp_path: Path, whole: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    store = begun(whole, tmp_path)
    other = claim(store, 2, os.getppid(), claims.this_host(), harvester.made_by(build()))
    thread = threading.Thread(target=harvest, args=(config(model, text, tmp_path, SITES, *MORE),))
    thread.start()
    records = len(list(whole.path.glob("commits/*/*.json")))
    deadline = time.monotonic() + 60
    while len(list(store.glob("commits/*/*.json"))) < records - 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    thread.join(0.1)
    assert thread.is_alive() and not (store / "complete.json").exists()
    assert not list(store.glob(f"commits/{TRAIN}/000002.*"))
    other.unlink()
    thread.join(60)
    assert same(store, whole)
    units = len(list(whole.path.glob("commits/*/*.tokens.json")))
    assert re.search(rf"harvested {units} units in ", capsys.readouterr().out)


@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_the_claims_of_the_dead_are_taken_over(
    model: Path, text: Path, tmp_path: Path, whole: Store, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr(claims, "LEASE_S", 0.3 if host == "elsewhere" else 1e9)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    store = begun(whole, tmp_path)
    for unit in (0, 5):
        claim(store, unit, process.pid, host if host == "elsewhere" else claims.this_host(), harvester.made_by(build()))
    harvest(config(model, text, tmp_path, SITES, *MORE))
    assert same(store, whole)


def test_one_that_was_only_slow_goes_on_to_other_units(
    model: Path, text: Path, tmp_path: Path, whole: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the midst of its first unit a harvest stands still, is taken for dead, and another does all the work."""
    cfg = config(model, text, tmp_path, SITES, *MORE)
    commit, slow = LocalStorage.commit_staged, []

    def standing(self: LocalStorage, *staged: Any) -> bytes:
        if not slow:
            slow.append(self)
            monkeypatch.setattr(claims, "LEASE_S", -1.0)
            harvest(cfg)
        return commit(self, *staged)

    monkeypatch.setattr(LocalStorage, "commit_staged", standing)
    harvest(cfg)
    assert slow
    assert same(tmp_path / whole.path.name, whole)


def test_a_unit_lost_to_another_is_looked_at_again(
    model: Path, text: Path, tmp_path: Path, whole: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other cleared the stage away, and died before it had committed."""
    write, lost = Store.write, []

    def losing(self: Store, split: str, unit: int, site: str, *rest: Any) -> Any:
        if unit == 1 and not lost:
            lost.append(site)
            raise LeaseLost
        return write(self, split, unit, site, *rest)

    monkeypatch.setattr(Store, "write", losing)
    harvest(config(model, text, tmp_path, SITES, *MORE))
    assert lost
    assert same(tmp_path / whole.path.name, whole)


def test_a_run_with_nothing_to_do_clears_up(
    model: Path, text: Path, tmp_path: Path, whole: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(model, text, tmp_path, SITES, *MORE)
    store = harvest(cfg).path
    (store / "complete.json").unlink()
    (store / ".complete.json.tmp").write_text("{")
    claim(store, 3, os.getppid(), claims.this_host(), {})  # alive, and all it claims is committed
    capsys.readouterr()
    harvest(cfg)
    assert "nothing to do" in capsys.readouterr().out
    assert same(store, whole)


def test_a_finished_store_may_be_read_only(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(model, text, tmp_path)
    harvest(cfg)
    monkeypatch.setattr("data.storage.local.alone", None)
    harvest(cfg)
    assert "nothing to do" in capsys.readouterr().out


def test_two_kinds_of_device_do_not_begin_a_store_together(
    model: Path, text: Path, tmp_path: Path, whole: Store
) -> None:
    store = begun(whole, tmp_path)
    claim(store, 0, os.getppid(), claims.this_host(), {**harvester.made_by(build()), "device": "an abacus"})
    before = contents(store)
    with pytest.raises(UserError, match=r'was begun elsewhere \(device: "an abacus" here, "cpu .*" asked'):
        harvest(config(model, text, tmp_path, SITES, *MORE))
    assert contents(store) == before


def test_of_two_kinds_that_begin_at_once_the_later_is_refused(
    model: Path, text: Path, tmp_path: Path, whole: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, require = begun(whole, tmp_path), Harvester.make_arrays

    def late(self: Harvester, units: Any) -> None:
        """The other makes its claim after this one has looked."""
        require(self, units)
        claim(store, 1, os.getppid(), claims.this_host(), {**self.made_by, "device": "an abacus"})

    monkeypatch.setattr(Harvester, "make_arrays", late)
    with pytest.raises(UserError, match="an abacus"):
        harvest(config(model, text, tmp_path, SITES, *MORE))
    assert not list(store.glob("commits"))
    assert sorted(path.name[:12] for path in (store / "claims").glob("*")) == ["train.000001"] * 2


def refusing(error: int, after: int) -> Callable[[int], None]:
    """An fsync that fails from its `after`th call on."""
    count = iter(range(after))

    def fsync(fd: int) -> None:
        if next(count, None) is None:
            raise OSError(error, os.strerror(error))

    return fsync


@pytest.mark.parametrize("after", slow_unless({0, 33}.__contains__, [0, 1, 20, 33, 60]))
@pytest.mark.parametrize(
    ("error", "told"),
    [(errno.ENOSPC, "the disk is full (/"), (errno.EROFS, " is on a file system that can only be read")],
)
def test_a_disk_that_refuses_is_a_sentence_and_a_run_later_goes_on(
    model: Path,
    text: Path,
    tmp_path: Path,
    whole: Store,
    monkeypatch: pytest.MonkeyPatch,
    error: int,
    told: str,
    after: int,
) -> None:
    cfg = config(model, text, tmp_path, SITES, *MORE)
    with monkeypatch.context() as patch, pytest.raises(OSError) as raised:
        patch.setattr(os, "fsync", refusing(error, after))
        harvest(cfg)
    assert told in (to_sentence(raised.value) or "")
    assert str(tmp_path) in (to_sentence(raised.value) or "")
    names = [str(path) for path in tmp_path.rglob("*")]
    assert not [name for name in names if "claims" in name or name.endswith((".tmp", ".partial"))]
    harvest(cfg)
    assert same(tmp_path / whole.path.name, whole)


def test_a_nan_in_the_model_ends_the_harvest_by_name(text: Path, tmp_path: Path) -> None:
    """One weight of the second block, so that what lies before it could be harvested."""
    broken = build()
    with torch.no_grad():
        broken.transformer.h[1].mlp.c_proj.weight[3, 5] = float("nan")
    broken.save_pretrained(tmp_path / "tiny")
    tokenizer().save_pretrained(tmp_path / "tiny")
    whose = r"site resid_post.1 has \|x\| = nan at token 1 \('s'\) of train sequence 0, document .*set model.dtype"
    with pytest.raises(UserError, match=whose):
        harvest(config(tmp_path / "tiny", text, tmp_path / "cache", SITES))
    store = next((tmp_path / "cache").glob("tiny-*"))
    assert not list(store.glob("commits")) and not (store / "claims").exists()
    assert harvest(config(tmp_path / "tiny", text, tmp_path / "cache", "sites=[resid_post.0]")).path == store


def test_only_the_first_rank_speaks(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    cfg = config(model, text, tmp_path)
    harvest(cfg)
    harvest(cfg)
    told = capsys.readouterr()
    assert told.out == "" and "harvest:" not in told.err
    monkeypatch.setenv("RANK", "0")
    harvest(cfg)
    assert "nothing to do" in capsys.readouterr().out


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_torchrun_makes_the_same_store(model: Path, text: Path, tmp_path: Path, whole: Store) -> None:
    asked = [
        *("-m", "harvest", f"model.name={model}", "model.device=cpu", "text=files", f"text.paths=[{text}]", SITES),
        *(f"cache={tmp_path / 'cache'}", "lm_batch=2", "packing.context=16", "packing.heldout=0.3", *MORE),
        *("store.chunk_rows=8", "store.chunks_per_unit=4", f"hydra.run.dir={tmp_path}/run"),
    ]
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", *asked)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^harvested \d+ units ", done.stdout, re.M)) == 1
    assert same(tmp_path / "cache" / whole.path.name, whole)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_the_same() -> None:
    """20 kills; THRESHER_KILLS=100 for the long form."""
    kills = os.environ.get("THRESHER_KILLS", "20")
    done = run("-m", "benchmarks.kill", "--kills", kills)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    last = re.search(r"^(\d+) kills over (\d+) stores, 0 stores wrong", done.stdout, re.M)
    assert last and int(last[1]) >= int(kills) and int(last[2]) >= 5


@pytest.mark.slow
def test_killed_at_random_requests_to_a_bucket_it_ends_the_same() -> None:
    done = run("-m", "benchmarks.kill", "--bucket", "--kills", "6")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ kills over \d+ stores, 0 stores wrong", done.stdout, re.M)
