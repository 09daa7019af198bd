"""The whole of it in a folder, in memory and in a bucket: harvested, trained on, verified, shown, collected."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.__main__ import main as look_after
from data.base.location import parse_location
from data.loading.loader import ActivationLoader
from data.loading.reader import DirectReader, RangeReader, ZarrReader, open_reader
from data.storage import leases as claims
from data.storage.base import Storage
from data.storage.open import open_storage
from data.store.manifest import HELDOUT, TRAIN
from data.store.store import ORIGIN, TOKENS
from data.store.token_store import TOKENS_FOLDER
from harvest import harvester, lm
from harvest.run import harvest
from tests.helpers.corpus import ROOT, config, contents, save_model, write_stories
from tests.helpers.runs import composed
from tests.helpers.s3 import Server
from tests.helpers.slow import slow_unless
from train.run import train

SITES = "sites=[resid_post.1,attn_out.0]"
MORE = ("tokens=150", "heldout_tokens=40", "store.chunk_rows=16", "store.chunks_per_unit=2")


SLOW_IN_A_BUCKET = ["folder", "memory", pytest.param("s3", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stories(tmp_path_factory.mktemp("texts") / "stories.jsonl", range(80))


@pytest.fixture(scope="module")
def whole(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a folder holds after an uninterrupted harvest by one process."""
    store = harvest(config(model, text, tmp_path_factory.mktemp("whole"), SITES, *MORE))
    assert isinstance(store.path, Path)
    return contents(store.path)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """And transformers can load one model at a time in a process."""
    monkeypatch.setattr(harvester, "POLL_S", 0.01)
    load, one = lm.load_model, threading.Lock()

    def load_alone(settings: Any) -> Any:
        with one:
            return load(settings)

    monkeypatch.setattr(lm, "load_model", load_alone)


def held(cache: str) -> dict[str, bytes]:
    """What the one store of a cache holds."""
    (name,) = set(open_storage(parse_location(cache)).folders()) - {TOKENS_FOLDER}
    place = open_storage(parse_location(cache) / name)
    keys = sorted(place.sizes())
    return {key: data for key, data in zip(keys, place.read_many(keys), strict=True) if isinstance(data, bytes)}


def bit_flipped(place: Storage, key: str) -> bytes:
    """Plant a flipped bit past the middle; what was there."""
    was = place.read(key)
    at = len(was) // 2
    place.update(key, lambda _: was[:at] + bytes([was[at] ^ 4]) + was[at + 1 :])
    return was


@pytest.mark.parametrize("anywhere", SLOW_IN_A_BUCKET, indirect=True)
def test_harvest_to_gc(
    model: Path, text: Path, anywhere: str, tmp_path: Path, whole: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(model, text, anywhere, "sites=[attn_out.0]", *MORE, "tokens=80")
    store = harvest(cfg)
    store = harvest(config(model, text, anywhere, SITES, *MORE))
    assert held(anywhere) == whole, "not the bytes of a folder harvested at once"
    harvest(config(model, text, anywhere, SITES, *MORE))
    told = capsys.readouterr().out
    assert "nothing to do" in told
    for content in (told.encode(), *held(anywhere).values()):
        assert b"a-secret" not in content and b"a-key" not in content

    small = ["batch=16", "tokens=64", "calibration_tokens=32", "heldout_tokens=32", "trainer=cpu"]
    run = tmp_path / "run"
    asked = [f"out={run}", f"store={store.path}", "site=resid_post.1", "sae=topk", "sae.width=64", "sae.k=4"]
    train(composed(*small, *asked))
    assert json.loads((run / "config.json").read_text())["fingerprint"] == store.manifest.fingerprint

    assert look_after(["verify", anywhere]) == 0
    assert f"{store.path}: sound, complete; {len(whole)} files" in capsys.readouterr().out
    assert look_after(["info", str(store.path)]) == 0
    assert "train resid_post.1: norms of all" in capsys.readouterr().out
    assert look_after(["list", anywhere]) == 0
    assert f"{store.path}  complete" in capsys.readouterr().out

    collect = ["gc", anywhere, "--outputs", str(tmp_path), "--yes"]
    store.storage.create("claims/train.000009.attn_out.0.0a1b/c.36.0", b"left")
    assert look_after(collect) == 0 and "written to in the last 60 minutes" in capsys.readouterr().out
    assert look_after([*collect, "--idle", "0"]) == 0 and "1 files in" in capsys.readouterr().out
    assert held(anywhere) == whole, "an SAE is of it"
    (run / "config.json").unlink()
    (run / "run.json").unlink()
    assert look_after([*collect, "--idle", "0"]) == 0
    assert open_storage(store.path).sizes() == {}


@pytest.mark.parametrize("anywhere", SLOW_IN_A_BUCKET, indirect=True)
def test_damage_is_found(
    model: Path, text: Path, anywhere: str, whole: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    store = harvest(config(model, text, anywhere, SITES, *MORE))
    chunks = ["train/attn_out.0/c.0.0", "train/resid_post.1/c.3.0", "train/tokens/c.1"]
    keys = [*chunks, "commits/train/000002.resid_post.1.json", "complete.json", "heldout/origin/zarr.json"]
    for some in (keys, ["manifest.json"]):
        were = {key: bit_flipped(store.storage, key) for key in some}
        assert look_after(["verify", anywhere]) == 1
        told = capsys.readouterr().out
        assert all(f"damaged: {store.path / key} " in told for key in some)
        for key, was in were.items():
            store.storage.update(key, lambda _, was=was: was)  # type: ignore[misc]
    store.storage.remove(keys[:1])
    assert look_after(["verify", anywhere]) == 1
    assert f"damaged: {store.path / keys[0]} is missing" in capsys.readouterr().out


@pytest.mark.parametrize("anywhere", SLOW_IN_A_BUCKET, indirect=True)
def test_readers_give_what_a_folder_s_give(model: Path, text: Path, anywhere: str, tmp_path: Path) -> None:
    store = harvest(config(model, text, anywhere, *MORE))
    local = harvest(config(model, text, tmp_path / "local", *MORE))
    for split, site in ((TRAIN, "resid_post.1"), (HELDOUT, "resid_post.1"), (TRAIN, ORIGIN), (TRAIN, TOKENS)):
        expected = DirectReader(local, split, site)
        plain = RangeReader(store, split, site)
        for reader in (plain, open_reader(store, split, site), ZarrReader(store, split, site)):
            assert reader.sizes.tolist() == expected.sizes.tolist()
            for chunk, rows in enumerate(expected.sizes):
                for start in {0, 1, int(rows) - 1}:
                    found, wanted = (np.empty((rows - start, *r.row_shape), r.dtype) for r in (reader, expected))
                    reader.read(chunk, found, start)
                    expected.read(chunk, wanted, start)
                    np.testing.assert_array_equal(found, wanted)
    loaders = [
        ActivationLoader(open_reader(s, TRAIN, "resid_post.1"), batch=32, pool_chunks=8, threads=4)
        for s in (store, local)
    ]
    for ours, theirs in zip(*loaders, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("anywhere", SLOW_IN_A_BUCKET, indirect=True)
@pytest.mark.parametrize(
    "form",
    slow_unless({"store.shards=true"}.__contains__, ["store.encoding=int8", "store.codec=zstd", "store.shards=true"]),
)
def test_every_form_of_rows_is_the_same_bytes(
    model: Path, text: Path, anywhere: str, tmp_path: Path, form: str
) -> None:
    store = harvest(config(model, text, anywhere, *MORE, form))
    local = harvest(config(model, text, tmp_path / "local", *MORE, form))
    assert held(anywhere) == held(str(tmp_path / "local"))
    ours, theirs = (open_reader(s, TRAIN, "resid_post.1") for s in (store, local))
    for chunk, rows in enumerate(ours.sizes):
        found, wanted = (np.empty((rows, r.width), r.dtype) for r in (ours, theirs))
        ours.read(chunk, found)
        theirs.read(chunk, wanted)
        np.testing.assert_array_equal(found, wanted)
    assert look_after(["verify", anywhere]) == 0


@pytest.mark.parametrize("anywhere", SLOW_IN_A_BUCKET, indirect=True)
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_harvests_into_one_place_share_the_work(
    model: Path, text: Path, anywhere: str, whole: dict[str, bytes], count: int
) -> None:
    """Threads stand for processes: claims tell them apart by token."""
    cfg = config(model, text, anywhere, SITES, *MORE)
    threads = [threading.Thread(target=harvest, args=(cfg,)) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held(anywhere) == whole


@pytest.fixture
def patient(server: Server) -> Iterator[Server]:
    yield server
    server.before = server.after = lambda method, path: None


@pytest.mark.slow
def test_a_harvest_that_was_paused_and_overtaken_changes_nothing(
    model: Path, text: Path, bucket: str, patient: Server, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sleeps before the copy of a chunk, another takes its unit over and ends the store, then it wakes."""
    monkeypatch.setattr(claims, "LEASE_S", 0.2)
    monkeypatch.setattr(claims, "BEAT_S", 1e9)
    asleep, awake = threading.Event(), threading.Event()

    def sleep_once(method: str, path: str) -> None:
        if method == "PUT" and path.endswith("train/attn_out.0/c.3.0") and not asleep.is_set():
            asleep.set()
            assert awake.wait(30)

    patient.before = sleep_once
    cfg = config(model, text, bucket, SITES, *MORE)
    paused = threading.Thread(target=harvest, args=(cfg,))
    paused.start()
    assert asleep.wait(30)
    harvest(cfg)
    assert paused.is_alive() and "complete.json" in held(bucket)
    awake.set()
    paused.join(30)
    assert not paused.is_alive() and held(bucket) == whole


def command(model: Path, text: Path, cache: str, folder: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "harvest", f"model.name={model}", "model.device=cpu", "text=files", f"cache={cache}"),
        *(f"text.paths=[{text}]", "lm_batch=2", "packing.context=16", "packing.heldout=0.3", SITES),
        *(*MORE, f"hydra.run.dir={folder / 'run'}"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("at", ["train.000002.attn_out.0", "commits/train/000003"])
def test_a_killed_harvest_is_taken_over(
    model: Path, text: Path, bucket: str, patient: Server, tmp_path: Path, whole: dict[str, bytes], at: str
) -> None:
    """SIGKILL in the middle of a unit: with a chunk staged, or at the first record that it would write."""
    done = subprocess.Popen(
        command(model, text, bucket, tmp_path), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True
    )

    def kill(method: str, path: str) -> tuple[str, str] | None:
        if method == "PUT" and at in path and done.poll() is None:
            done.send_signal(signal.SIGKILL)
            done.wait()
        return None

    patient.before = kill
    assert done.wait(60) == -signal.SIGKILL
    assert any(key.startswith("claims/") for key in held(bucket))
    harvest(config(model, text, bucket, SITES, *MORE))
    assert held(bucket) == whole


def test_credentials_on_the_command_line_are_refused_before_anything_is_written(
    model: Path, text: Path, tmp_path: Path
) -> None:
    asked = command(model, text, "s3://a-key:a-secret@bucket/a", tmp_path)
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: a URL is given as s3://bucket/prefix")
    assert "a-secret" not in done.stderr + done.stdout and not (tmp_path / "run").exists()
