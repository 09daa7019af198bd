"""Every error of the system that a user can cause is one sentence that names the file and says what to do."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.base.errors import UserError, to_sentence
from data.base.files import atomic_file, open_plain, write_atomic

ROOT = Path(__file__).resolve().parents[3]
REMEDIES = (
    "choose another folder",
    "name another path",
    "run the same command again",
    "choose a shorter one",
    "check how it is spelled",
    "ask for less",
)


NAMES = "ENOSPC EDQUOT EACCES EPERM EROFS EMFILE ENFILE EFBIG ENAMETOOLONG EISDIR ENOTDIR ELOOP ENOENT ENOMEM EIO"


@pytest.mark.parametrize("name", NAMES.split())
def test_errors_of_the_system(name: str) -> None:
    number = getattr(errno, name)
    told = to_sentence(OSError(number, os.strerror(number), "/some/file"))
    assert told is not None and "/some/file" in told and "\n" not in told
    assert any(remedy in told for remedy in REMEDIES) or "check its health" in told
    assert to_sentence(OSError(number, os.strerror(number))) is not None


def test_what_is_no_user_s_doing_keeps_its_traceback() -> None:
    assert to_sentence(KeyError("x")) is None and to_sentence(RuntimeError("x")) is None
    assert to_sentence(OSError(errno.EBADF, "Bad file descriptor")) is None
    assert to_sentence(UserError("do this")) == "do this"
    assert "less at once" in (to_sentence(MemoryError()) or "")


def failing(act: object) -> str:
    assert callable(act)
    with pytest.raises(OSError) as error:
        act()
    told = to_sentence(error.value)
    assert told is not None
    return told


def test_files_that_are_something_else(tmp_path: Path) -> None:
    """Real ones: a loop, a pipe, a folder, a file in the place of a folder, a name that is too long."""
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    assert "leads back to itself" in failing(lambda: open_plain(tmp_path / "loop"))
    assert "is a pipe or device" in failing(lambda: open_plain(tmp_path / "pipe"))
    assert "is a pipe or device" in failing(lambda: open_plain(Path("/dev/null")))
    assert "is a folder where a file" in failing(lambda: open_plain(tmp_path / "folder"))
    assert "is below a file" in failing(lambda: write_atomic(tmp_path / "file" / "x", b""))
    assert "is too long" in failing(lambda: write_atomic(tmp_path / ("x" * 300), b""))
    assert "is a folder where a file" in failing(lambda: write_atomic(tmp_path / "folder", b""))
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp") and path.name != ".folder.tmp"]


def test_a_full_disk_inside_a_checkpoint(tmp_path: Path) -> None:
    """A limit on a file's size stands for the disk: torch.save hides what the system said."""
    code = f"""
import resource, signal, torch
from pathlib import Path
from data.base.errors import to_sentence
from data.base.files import atomic_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with atomic_file(Path({str(tmp_path / "last.ckpt")!r})) as file:
        torch.save({{"x": torch.zeros(1_000_000)}}, file)
except Exception as error:
    print(to_sentence(error))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "would be larger than" in done.stdout or "could not be written whole" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write_atomic(path, b"whole")

    class Failed(Exception): ...

    with pytest.raises(Failed), atomic_file(path) as file:
        torch.save(torch.zeros(3), file)
        raise Failed
    assert path.read_bytes() == b"whole" and [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_too_many_open_files() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            for _ in range(100):
                files.append(os.open(__file__, os.O_RDONLY))
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "too many open files" in (to_sentence(error.value) or "") and "test_errors.py" in str(error.value)


def test_hydra_s_own_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for bad, said in ((f"{tmp_path}/file/run", "is below a file"), (f"{tmp_path}/{'x' * 300}", "is too long")):
        done = subprocess.run(
            [sys.executable, "-m", "train", f"hydra.run.dir={bad}", f"cache={tmp_path}/none"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert done.stderr.startswith("error: ") and said in done.stderr, done.stderr


def test_an_override_that_is_none(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train", "no.such=1", f"hydra.run.dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "no.such" in done.stderr
