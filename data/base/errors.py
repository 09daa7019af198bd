"""What a user can get wrong or run into, and the one place where such an error becomes a sentence."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """A mistake a user can fix; the message is one sentence that names the thing and says what to do."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `did you mean X?` for the known name nearest to `name`, or nothing where none is near."""
    near = difflib.get_close_matches(name, list(known), 1, 0.7)
    return f"did you mean {near[0]}?" if near else ""


_AGAIN = "and run the same command again"
# What the system says, as a sentence about `at`: a file, or "the disk" where no call named one.
_SENTENCES = {
    errno.ENOSPC: f"the disk is full ({{at}}): free some space {_AGAIN}",
    errno.EDQUOT: f"your quota on the disk is used up ({{at}}): remove what is not needed {_AGAIN}",
    errno.EACCES: "{at} cannot be written or read with your permissions: change them or choose another folder",
    errno.EPERM: "{at} cannot be written or read with your permissions: change them or choose another folder",
    errno.EROFS: "{at} is on a file system that can only be read: choose another folder",
    errno.EMFILE: f"this process has too many open files ({{at}}): raise the limit (ulimit -n 4096) {_AGAIN}",
    errno.ENFILE: f"the system has too many open files ({{at}}): close other programs {_AGAIN}",
    errno.EFBIG: "{at} would be larger than this file system or your limit (ulimit -f) allows: choose another folder, "
    "or store smaller chunks",
    errno.ENAMETOOLONG: "the name {at} is too long for this file system: choose a shorter one",
    errno.EISDIR: "{at} is a folder where a file is needed: remove it, or name another path",
    errno.ENOTDIR: "{at} is below a file where a folder is needed: remove that file, or name another path",
    errno.EEXIST: "{at} is there already and cannot take its place: remove it, or name another path",
    errno.ENOTEMPTY: "{at} is a folder with something in it where a file is needed: remove it, or name another path",
    errno.ELOOP: "{at} is a link that leads back to itself: remove it, or name another path",
    errno.ENOENT: "{at} does not exist: check how it is spelled, or make it first",
    errno.ENXIO: "{at} is a pipe or device and no file: name another path",
    errno.ENODEV: "{at} is a pipe or device and no file: name another path",
    errno.ENOMEM: "there is not enough memory ({at}): close other programs, or ask for less at once",
    errno.EIO: f"the disk failed to read or write {{at}}: check its health {_AGAIN}",
    errno.ESTALE: f"{{at}} is gone from the network's file system: mount it anew {_AGAIN}",
    errno.ETIMEDOUT: f"the network's file system does not answer ({{at}}): check it {_AGAIN}",
}


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error, what it was raised from, and so on."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        yield at
        at = at.__cause__ or at.__context__


def to_sentence(error: BaseException) -> str | None:
    """Return what to tell a user of this error, or None where it is a fault of the program and deserves its
    traceback."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return _of_os_error(error)
    if isinstance(error, MemoryError):
        return "there is not enough memory: close other programs, or ask for less at once (a smaller batch or width)"
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return "the GPU has not enough memory: ask for less at once (a smaller batch or width), or use another device"
    if isinstance(error, RuntimeError) and ("inline_container" in text or "PytorchStreamWriter" in text):
        # torch.save hides what the disk said behind an error of its own.
        for cause in _causes(error):
            if isinstance(cause, OSError) and (told := _of_os_error(cause)):
                return told
        return f"a checkpoint could not be written whole, as on a full disk: free some space {_AGAIN}"
    if isinstance(error, RuntimeError) and "can't allocate memory" in text:  # of torch on a CPU
        return "there is not enough memory: close other programs, or ask for less at once (a smaller batch or width)"
    return None


def _of_os_error(error: OSError) -> str | None:
    sentence = _SENTENCES.get(error.errno or 0)
    if sentence is None:
        return None
    names = [_text(name) for name in (error.filename, error.filename2) if name is not None]
    return sentence.format(at=" and ".join(names) or "while writing or reading")


def _text(name: object) -> str:
    """Return a file's name on one line, shortened where it is longer than a sentence can carry."""
    text = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
    text = text.replace("\n", "\\n")
    return text if len(text) <= 200 else f"{text[:90]}...{text[-90:]}"
