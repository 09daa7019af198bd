"""`python -m data`: what it prints, its exit codes, and what gc removes and leaves alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data.__main__ import main
from data.store.manifest import HELDOUT, TRAIN
from data.store.store import ORIGIN, TOKENS, Store
from data.tools.gc import references
from data.tools.info import Norms
from data.tools.verify import verify
from tests.data.conftest import SITE, manifest
from tests.helpers.damage import harvested

ROOT = Path(__file__).resolve().parents[2]


def told(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    """Exit code and standard output of a verb."""
    code = main([str(arg) for arg in args])
    return code, capsys.readouterr().out


def age(folder: Path, minutes: float) -> None:
    then = time.time() - 60 * minutes
    for path in folder.rglob("*"):
        os.utime(path, (then, then))


def sae(outputs: Path, store: Store, name: str = "run") -> None:
    (outputs / name).mkdir(parents=True)
    (outputs / name / "config.json").write_text(json.dumps({"fingerprint": store.manifest.fingerprint}))


def test_verify_of_sound_and_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = harvested(tmp_path)
    code, out = told(capsys, "verify", store.path)
    assert (code, out.count("\n")) == (0, 1) and "sound, complete" in out
    path = store.path / HELDOUT / SITE / "c.4.0"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    (store.path / "writer.lock").write_text("x")
    code, out = told(capsys, "verify", tmp_path)
    assert code == 1 and f"damaged: {path} is damaged (its crc32c is" in out
    assert f"leftover: {store.path / 'writer.lock'}" in out and ": 1 damaged; " in out and "1 left over" in out


def test_a_leftover_alone_is_exit_code_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = harvested(tmp_path)
    (store.path / "x").write_text("x")
    assert told(capsys, "verify", store.path)[0] == 0


def test_progress_has_a_rate_and_the_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harvested(tmp_path)
    main(["verify", str(tmp_path)])
    assert "bytes/s" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["verify", "none"], ["info", "none"], ["list", "none"], ["gc", "none"]])
def test_mistakes_are_sentences(args: list[str]) -> None:
    command = [sys.executable, "-m", "data", *args]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert found.returncode == 1 and found.stderr.startswith("error: ") and found.stderr.count("\n") == 1


def test_an_empty_folder_verifies_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 1
    assert "no store in" in capsys.readouterr().err


def test_list_tells_what_made_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = harvested(tmp_path / "a")
    begun = Store.create_or_open(tmp_path / "b/c", manifest(name="other"))
    broken = Store.create_or_open(tmp_path, manifest(name="broken"))
    (broken.path / "manifest.json").write_text("{}")
    code, out = told(capsys, "list", tmp_path)
    assert code == 0 and out.endswith("\n") and "3 stores" in out
    assert f"{store.path}  complete, " in out and f"{begun.path}  unfinished, " in out
    assert f"{broken.path}  damaged, 2 bytes" in out
    assert "model.name=tiny" in out and "train resid_post.1 41 rows" in out and "made by device cpu" in out


def known(cache: Path) -> tuple[Store, np.ndarray]:
    """Rows of norm 1 + position, but position 0 has 300; as a harvest permutes them. And the norms, permuted."""
    store = Store.create_or_open(cache, manifest("float32"))
    for name, width in ((SITE, 2), (TOKENS, 1), (ORIGIN, 2)):
        store.require(TRAIN, name, width, 32)
    for unit, n in enumerate((16, 8)):
        order = store.permutation(TRAIN, unit, n)
        position = (np.arange(n) % 8)[order]
        norms = np.where(position == 0, 300.0, 1.0 + position)
        rows = np.stack([0.6 * norms, -0.8 * norms], 1).astype(np.float32)
        store.write(TRAIN, unit, SITE, rows, {"device": "cpu" if unit else "gpu"})
        store.write(TRAIN, unit, ORIGIN, np.stack([position, position], 1).astype(np.int32), {"device": "cpu"})
        store.write(TRAIN, unit, TOKENS, position.astype(np.int32), {"device": "cpu"})
    return store, norms


def test_norms_by_position_and_outliers(tmp_path: Path) -> None:
    store, _ = known(tmp_path)
    found = Norms.of(store, TRAIN, SITE, 10**6)
    assert len(found.norms) == 24
    by_position = found.by_position()
    assert [label for label, _ in by_position] == ["0", "1", "2", "3", "4-7"]
    np.testing.assert_allclose([norm for _, norm in by_position], [300, 2, 3, 4, 6.5], rtol=1e-6)
    assert found.positions[found.outliers(10.0)].tolist() == [0, 0, 0]  # the median is 5.5
    assert found.outliers(1.4).sum() == 6 and found.outliers(100.0).sum() == 0


def test_norms_of_some_rows_are_whole_chunks(tmp_path: Path) -> None:
    store, _ = known(tmp_path)
    assert len(Norms.of(store, TRAIN, SITE, 5).norms) == 8


def test_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, _ = known(tmp_path)
    code, out = told(capsys, "info", store.path)
    assert code == 0 and f"fingerprint {store.manifest.fingerprint}" in out
    assert "devices and libraries: mixed" in out and "1 records by device gpu" in out
    assert "packing.context: 8" in out and "layout.chunk_rows: 4" in out and "unfinished" in out
    assert "norms of all 24 rows" in out and "0: 300  1: 2  2: 3  3: 4  4-7: 6.5" in out
    assert "outliers above 10 times it: 3 (12.500%), at positions 0 (3)" in out
    _, out = told(capsys, "info", store.path, "--outlier", "100", "--rows", "5")
    assert "norms of 8 of 24 rows" in out and "outliers above 100 times it: 0 (0.000%)" in out
    assert main(["info", str(store.path), "--rows", "0"]) == 1


def test_info_without_origin_leaves_positions_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, _ = known(tmp_path)
    for path in (store.path / "commits" / TRAIN).glob(f"*.{ORIGIN}.json"):
        path.unlink()
    _, out = told(capsys, "info", store.path)
    assert "mean by position" not in out and "outliers above 10 times it: 3" in out


class Caches:
    """A referenced store with leftovers, an unreferenced one, an unfinished one, a damaged one; all old enough."""

    def __init__(self, folder: Path) -> None:
        self.cache, self.outputs = folder / "cache", folder / "out"
        self.needed = harvested(self.cache / "a")
        self.loose = harvested(self.cache / "b", "float32")
        self.begun = Store.create_or_open(self.cache, manifest(name="begun", files=1))
        self.broken = Store.create_or_open(self.cache, manifest(name="broken", files=2))
        (self.broken.path / "manifest.json").write_text("{}")
        sae(self.outputs, self.needed)
        (self.outputs / "other").mkdir()
        (self.outputs / "other/config.json").write_text('["of something else"]')
        self.left = [self.needed.path / ".x.json.1.tmp", self.needed.path / TRAIN / SITE / "c.77.0"]
        for path in self.left:
            path.write_text("x")
        age(self.cache, 120)

    @property
    def args(self) -> tuple[object, ...]:
        return ("gc", self.cache, "--outputs", self.outputs)

    def there(self) -> list[bool]:
        return [store.path.exists() for store in (self.needed, self.loose, self.begun, self.broken)]


@pytest.fixture
def caches(tmp_path: Path) -> Caches:
    return Caches(tmp_path)


def test_gc_removes_nothing_unasked(
    caches: Caches, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    before = sorted(caches.cache.rglob("*"))
    code, out = told(capsys, *caches.args)
    assert code == 0 and sorted(caches.cache.rglob("*")) == before and "nothing was removed" in out
    assert out.count("may go: ") == 3 and f"2 files in {caches.needed.path}  left over, 2 bytes" in out
    assert f"may go: {caches.loose.path}  no SAE in" in out and f"may go: {caches.begun.path}  unfinished" in out
    assert f"left alone: {caches.broken.path}" in out


def test_gc_with_yes(caches: Caches, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = told(capsys, *caches.args, "--yes")
    assert code == 0 and "removed 3 of 3" in out
    assert caches.there() == [True, False, False, True]
    assert not any(path.exists() for path in caches.left)
    assert verify(caches.needed.path, quiet=True) == []
    assert "nothing to remove" in told(capsys, *caches.args, "--yes")[1]


def test_gc_asks_for_each(caches: Caches, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(question: str) -> str:
        asked.append(question)
        return "y" if "begun" in question else "" if "/b/" in question else "no"

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", answer)
    assert "removed 1 of 3" in told(capsys, *caches.args)[1]
    assert len(asked) == 3 and caches.there() == [True, True, False, True]
    assert all(path.exists() for path in caches.left)


def test_gc_spares_what_is_being_written(caches: Caches, capsys: pytest.CaptureFixture[str]) -> None:
    """An unfinished store may be a harvest's at this moment, its chunks not yet in any record."""
    age(caches.cache, 20)
    code, out = told(capsys, *caches.args, "--yes")
    assert code == 0 and all(caches.there()) and out.count("written to in the last 60 minutes") == 3
    assert told(capsys, *caches.args, "--yes", "--idle", "10")[0] == 0
    assert caches.there() == [True, False, False, True]


def test_gc_guesses_nothing_about_what_is_needed(caches: Caches, capsys: pytest.CaptureFixture[str]) -> None:
    (caches.outputs / "other/config.json").write_text("{")
    assert main(["gc", str(caches.cache), "--outputs", str(caches.outputs), "--yes"]) == 1
    assert "other/config.json cannot be read" in capsys.readouterr().err and all(caches.there())
    assert main(["gc", str(caches.cache), "--outputs", str(caches.outputs / "typo"), "--yes"]) == 1
    assert all(caches.there())


def test_gc_counts_a_training_that_has_not_ended(tmp_path: Path) -> None:
    store = harvested(tmp_path / "cache")
    run = tmp_path / "outputs" / "run"
    run.mkdir(parents=True)
    assert references(tmp_path / "outputs") == set()
    (run / "run.json").write_text(json.dumps({"numbers": {"store": store.manifest.fingerprint}}))
    assert references(tmp_path / "outputs") == {store.manifest.fingerprint}


@pytest.mark.parametrize("bad", ["nan", "-1", "inf", "-0.001"])
def test_gc_refuses_an_idle_time_that_spares_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str
) -> None:
    """No time is older than NaN: a store that was written a second ago would be removed."""
    store = harvested(tmp_path / "cache")
    (tmp_path / "outputs").mkdir()
    args = ["gc", str(tmp_path / "cache"), "--outputs", str(tmp_path / "outputs"), f"--idle={bad}", "--yes"]
    assert main(args) == 1
    assert f"error: --idle={float(bad)} is no number of minutes" in capsys.readouterr().err
    assert verify(store.path, quiet=True) == []


@pytest.mark.parametrize(
    "args, said",
    [
        (["info", "STORE", "--outlier=nan"], "--outlier=nan is no multiple"),
        (["info", "STORE", "--outlier=inf"], "--outlier=inf is no multiple"),
        (["info", "STORE", "--outlier=0"], "--outlier=0.0 is no multiple"),
        (["info", "STORE", "--rows=0"], "--rows=0 is no number of rows"),
        (["info", "STORE", "--rows=-5"], "--rows=-5 is no number of rows"),
        (["gc", "", "--yes"], "an empty name is no place for a store"),
        (["gc", "STORE", "--outputs=", "--yes"], "an empty name is no place"),
        (["gc", "STORE", "--outputs=s3://bucket/a", "--yes"], "--outputs=s3://bucket/a is no folder"),
        (["verify", ""], "an empty name is no place"),
        (["list", "ftp://x/y"], "ftp://x/y is no place for a store"),
    ],
)
def test_arguments_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], said: str) -> None:
    store = harvested(tmp_path)
    assert main([arg.replace("STORE", str(store.path)) for arg in args]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert verify(store.path, quiet=True) == []


def test_verify_goes_on_after_a_store_that_cannot_be_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = harvested(tmp_path / "b")
    for name in ("a", "c"):
        (tmp_path / name / "commits").mkdir(parents=True)
    os.mkfifo(tmp_path / "a" / "manifest.json")
    (tmp_path / "c" / "manifest.json").symlink_to("manifest.json")
    code, out = told(capsys, "verify", tmp_path)
    assert code == 1 and f"{store.path}: sound, complete" in out
    assert f"damaged: {tmp_path / 'a' / 'manifest.json'} is a pipe or device" in out
    assert f"damaged: {tmp_path / 'c' / 'manifest.json'} is a link" in out


@pytest.fixture
def trained(tmp_path: Path) -> Store:
    """A store with two trainings of it below `outputs`: one that has ended and one that has not."""
    store = harvested(tmp_path / "cache")
    for name, ended in (("done", True), ("begun", False)):
        run = tmp_path / "outputs" / name
        (run / "checkpoints").mkdir(parents=True)
        (run / "checkpoints" / "last.ckpt").write_bytes(bytes(3000 if ended else 500))
        (run / "run.json").write_text(json.dumps({"numbers": {"store": store.manifest.fingerprint}}))
        if ended:
            (run / "config.json").write_text(json.dumps({"fingerprint": store.manifest.fingerprint, "variant": "topk"}))
            (run / "sae.safetensors").write_bytes(bytes(2000))
    age(tmp_path, 120)
    return store


def test_list_names_the_saes_of_each_store_and_what_checkpoints_take(
    trained: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = told(capsys, "list", tmp_path / "cache", "--outputs", tmp_path / "outputs")
    assert code == 0
    assert f"  SAE topk  {tmp_path / 'outputs' / 'done'}  2.0 kB, checkpoint 3.0 kB\n" in out
    assert f"  training that has not ended  {tmp_path / 'outputs' / 'begun'}  checkpoint 500 bytes\n" in out
    assert f"1 SAE in {tmp_path / 'outputs'}, 2.0 kB" in out
    assert "checkpoints of trainings that have ended: 3.0 kB (python -m data gc removes those an hour old)" in out
    assert "checkpoints of trainings that go on from them: 500 bytes" in out


def test_gc_removes_the_checkpoints_of_trainings_that_have_ended(
    trained: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = told(capsys, "gc", tmp_path / "cache", "--outputs", tmp_path / "outputs", "--yes")
    assert code == 0 and f"may go: 1 files in {tmp_path / 'outputs'}  checkpoints of trainings that have ended" in out
    left = sorted(path.relative_to(tmp_path / "outputs").as_posix() for path in (tmp_path / "outputs").rglob("*.*"))
    expected = ["begun/checkpoints/last.ckpt", "begun/run.json", "done/config.json", "done/run.json"]
    assert left == [*expected, "done/sae.safetensors"]
    assert trained.path.exists()


def test_the_files_of_a_split_dictionary_are_counted_and_removed_together(
    trained: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shards of the weights beside their index, and the checkpoint's parts beside its own."""
    done = tmp_path / "outputs" / "done"
    (done / "sae.safetensors").unlink()
    (done / "sae.safetensors.index.json").write_text("{}")
    for number in (1, 2):
        (done / f"sae-0000{number}-of-00002.safetensors").write_bytes(bytes(4000))
        (done / "checkpoints" / f"last.9.{number - 1}-of-2.ckpt").write_bytes(bytes(6000))
    age(tmp_path, 120)
    _, out = told(capsys, "list", tmp_path / "cache", "--outputs", tmp_path / "outputs")
    assert f"  SAE topk  {done}  8.0 kB, checkpoint 15.0 kB\n" in out
    code, out = told(capsys, "gc", tmp_path / "cache", "--outputs", tmp_path / "outputs", "--yes")
    assert code == 0 and "may go: 3 files" in out
    assert not list((done / "checkpoints").iterdir()) and len(list(done.glob("*.safetensors"))) == 2


def test_rm_says_what_depends_on_a_store_and_asks(
    trained: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("rm", trained.path, "--outputs", tmp_path / "outputs")  # pytest's standard input is no terminal
    code, out = told(capsys, *args)
    assert code == 0 and "nothing was removed: run it in a terminal, or with --yes" in out and trained.path.exists()
    assert f"SAE topk  {tmp_path / 'outputs' / 'done'}" in out and "can still be used, but not evaluated" in out
    code, out = told(capsys, *args, "--yes")
    assert code == 0 and f"removed {trained.path}" in out and not trained.path.exists()
    assert main(["rm", str(trained.path)]) == 1
    assert "is no store" in capsys.readouterr().err


def test_rm_refuses_what_is_no_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert main(["rm", str(tmp_path / "mine"), "--yes"]) == 1
    assert "is no store" in capsys.readouterr().err and (tmp_path / "mine" / "thesis.txt").exists()
    store = harvested(tmp_path / "cache")
    (tmp_path / "link").symlink_to(store.path)
    assert main(["rm", str(tmp_path / "link"), "--yes"]) == 1
    assert "is a link" in capsys.readouterr().err and store.path.exists()
