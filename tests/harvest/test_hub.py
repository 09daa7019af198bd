"""python -m pytest tests/harvest/test_hub.py: a hub name with and without a network, on a hub of our own."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

import pytest
import torch

from data.base.errors import UserError
from harvest import hub, lm

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "hub"


def fill(cache: Path, saved: Path) -> Path:
    """Put a model into the cache as org/tiny, the way the hub's client lays it out."""
    snapshot = cache / "models--org--tiny" / "snapshots" / COMMIT
    shutil.copytree(saved, snapshot)
    refs = cache / "models--org--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    return snapshot


def test_a_model_in_the_cache_needs_no_network(cache: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = fill(cache, saved)
    monkeypatch.setattr(hub, "ask", lambda *_: pytest.fail("the network was asked"))
    cfg = {"name": "org/tiny", "device": "cpu"}
    lm.check_model(cfg)
    assert lm.identify(cfg) == {"name": "org/tiny", "commit": COMMIT, "files": {}, "attn_implementation": None}
    assert lm.identify(cfg | {"revision": COMMIT})["commit"] == COMMIT
    assert lm.load_model(cfg).config.n_positions == 24 and lm.load_tokenizer(cfg).eos_token_id == 1
    assert hub.cached("org/tiny", None) == snapshot


def test_a_model_cached_in_part_is_asked_for(cache: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fill(cache, saved) / "model.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match="'org/tiny' is no folder here and not whole in the hub's cache, and HF_HUB_OFFLINE"
    ):
        lm.check_model({"name": "org/tiny"})


class FakeHub(BaseHTTPRequestHandler):
    """As much of the hub as a client needs that looks for org/tiny: its files, or the error set in `refusal`."""

    folder: Path
    refusal: tuple[int, str] | None = None
    served: list[str]

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        files = sorted(file for file in self.folder.iterdir())
        if self.refusal is not None:
            self.answer(self.refusal[0], b"refused", {"X-Error-Code": self.refusal[1]} if self.refusal[1] else {})
        elif "/tree/" in path:
            tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": etag(f)} for f in files]
            self.answer(200, json.dumps(tree).encode())
        elif path.startswith("/api/models/org/tiny"):
            info = {"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": file.name} for file in files]}
            self.answer(200, json.dumps(info).encode())
        else:
            file = self.folder / path.rpartition("/")[2]
            assert path == f"/org/tiny/resolve/{COMMIT}/{file.name}"
            self.served.append(file.name)
            self.answer(200, file.read_bytes(), {"ETag": f'"{etag(file)}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture
def fake_hub(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    """A hub on this machine that has `folder` as org/tiny."""
    from huggingface_hub import constants

    class Hub(FakeHub):
        served: ClassVar[list[str]] = []

    Hub.folder = folder
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield Hub
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_download_takes_one_kind_of_weights(fake_hub: type[FakeHub], folder: Path, kind: str) -> None:
    for other in ("consolidated.safetensors", "model.onnx", "flax_model.msgpack"):
        (folder / other).write_bytes(b"0")
    torch.save({"a": torch.zeros(2)}, folder / "pytorch_model.bin")
    if kind == "bin":
        (folder / "model.safetensors").unlink()
        (folder / "consolidated.safetensors").unlink()
    cfg = {"name": "org/tiny", "device": "cpu"}
    lm.check_model(cfg)
    assert not fake_hub.served
    assert lm.identify(cfg)["commit"] == COMMIT
    weights = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[kind]
    assert {name for name in fake_hub.served if not name.endswith(".json")} == {weights}
    fake_hub.refusal = (500, "")
    assert lm.LanguageModel.of(cfg).context_limit == 24  # now from the cache
    if kind == "safetensors":
        assert torch.equal(lm.load_model(cfg).lm_head.weight, lm.load_model({"name": str(folder)}).lm_head.weight)


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [
        ((401, "RepoNotFound"), "the hub has none of that name and revision"),
        ((404, "RevisionNotFound"), "'org/tiny' at revision 'v9' is no folder here .* the hub has none of that name"),
        ((403, "GatedRepo"), "is gated: accept its terms"),
        ((500, ""), r"the hub cannot be reached \(HfHubHTTPError: .*500"),
    ],
)
def test_what_the_hub_says_is_one_sentence(fake_hub: type[FakeHub], refusal: tuple[int, str], sentence: str) -> None:
    fake_hub.refusal = refusal
    with pytest.raises(UserError, match=sentence) as caught:
        lm.check_model({"name": "org/tiny", "revision": "v9"})
    assert "\n" not in str(caught.value)


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def in_a_fresh_process(name: str, endpoint: str, cache: Path, timeout: float) -> str:
    """Return what check_model says of a hub name where the hub is at `endpoint`; a look that hangs fails the test."""
    code = (
        "import sys; from harvest import hub, lm\n"
        f"hub.TIMEOUT = {timeout}\n"
        f"try: lm.check_model({{'name': {name!r}}})\n"
        "except ValueError as error: print(type(error).__name__, error)\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout


def test_without_a_network_a_hub_name_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    told = in_a_fresh_process("org/tiny", "http://127.0.0.1:9", tmp_path, timeout=hub.TIMEOUT)
    assert told.startswith("UserError model 'org/tiny' is no folder here and not whole in the hub's cache, and the hub")
    assert told.endswith("name a local folder, or `embedded`\n[]\n")


@pytest.mark.slow
def test_a_hub_that_never_answers_is_given_up(silent_port: int, tmp_path: Path) -> None:
    told = in_a_fresh_process("org/tiny", f"http://127.0.0.1:{silent_port}", tmp_path, timeout=0.5)
    assert "the hub cannot be reached" in told


def test_a_name_look_up_that_hangs_is_given_up(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()  # the look-up hangs until this is set
    monkeypatch.setattr(hub, "TIMEOUT", -0.9)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: released.wait(60))
    with pytest.raises(UserError, match=r"the hub cannot be reached \(TimeoutError: no answer within"):
        lm.check_model({"name": "org/tiny"})
    assert not released.is_set()
    released.set()
