"""Models by their hub name: from the cache where it holds them whole, else asked for and downloaded."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from data.base.errors import UserError
from harvest.model_files import check_folder, has_tokenizer

TIMEOUT = 6.0  # seconds until the hub counts as out of reach, name look-up and proxies included
_BESIDE_WEIGHTS = ["*.json", "*.model", "*.txt", "*.jinja"]
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


def cached(name: str, revision: str | None) -> Path | None:
    """Find the cache's folder of this model and revision where it is whole;
    it is taken without asking the network."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            local_files_only=True,
            allow_patterns=_BESIDE_WEIGHTS,
            ignore_patterns=["*/*"],
        )
        check_folder(Path(folder))
        if not has_tokenizer(Path(folder)):
            return None  # it may be there and not be downloaded yet
    except (OSError, ValueError):  # not cached, or cached in part (UserError is a ValueError)
        return None
    return Path(folder)


def ask(name: str, revision: str | None) -> list[str]:
    """List the model's files on the hub; UserError where it is unknown there,
    or the hub out of reach."""
    from huggingface_hub import HfApi, constants, errors

    wanted = f"{name!r} at revision {revision!r}" if revision else repr(name)
    nowhere = f"model {wanted} is no folder here and not whole in the hub's cache"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{nowhere}, and HF_HUB_OFFLINE forbids to ask the hub: name a local folder, or `embedded`")
    told: list[Any] = []

    def call() -> None:
        try:
            info = HfApi().model_info(name, revision=revision, timeout=TIMEOUT)
            told.append([file.rfilename for file in info.siblings or []])
        except Exception as error:
            told.append(error)

    # In a thread, since looking up a host's name has no timeout of its own.
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(TIMEOUT + 1)
    answer = told[0] if told else TimeoutError(f"no answer within {TIMEOUT:g} seconds")
    if isinstance(answer, errors.GatedRepoError):
        raise UserError(f"model {wanted} is gated: accept its terms on the hub and log in with `hf auth login`")
    if isinstance(answer, errors.RepositoryNotFoundError | errors.RevisionNotFoundError | errors.HFValidationError):
        raise UserError(f"{nowhere}, and the hub has none of that name and revision that you may read: check both")
    if isinstance(answer, Exception):
        raise UserError(
            f"{nowhere}, and the hub cannot be reached ({first_line(answer)}): name a local folder, or `embedded`"
        )
    assert isinstance(answer, list)
    return answer


def download(name: str, revision: str | None) -> Path:
    """Download the model's config, tokenizer and weights if need be; return its folder in the cache."""
    names = ask(name, revision)
    weights = next((glob for glob in _WEIGHTS if any(Path(file).match(glob) for file in names)), _WEIGHTS[0])
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=[*_BESIDE_WEIGHTS, weights], ignore_patterns=["*/*"]
        )
    except Exception as error:
        raise UserError(f"model {name!r} cannot be downloaded ({first_line(error)}): run it again") from error
    check_folder(Path(folder))
    return Path(folder)


def first_line(error: Exception) -> str:
    """Say an error of another library in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
