"""The page to type texts into, over HTTP: what it shows, and whom it does not answer."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlencode

import pytest

from data.base.errors import UserError
from evaluate.config import FeaturesSettings
from evaluate.features.make import make, one_sae
from evaluate.features.server import MOST_BYTES, OwnTextServer
from tests.helpers.settings import stage_config
from train.sae.io import save
from train.sae.variants.relu import ReLU


@pytest.fixture
def config(harvested: dict[str, Any], rough_sae: Callable[[int], ReLU], tmp_path: Path) -> dict[str, Any]:
    manifest = harvested["store"].manifest
    record = {"site": "resid_post.0", "fingerprint": manifest.fingerprint, "store": manifest.folder}
    save(rough_sae(16), tmp_path / "saes" / "rough", record)
    own = {"device": "cpu", "folder": str(tmp_path / "saes" / "rough"), "out": str(tmp_path / "out"), "port": 0}
    return stage_config("features", cache=harvested["config"]["cache"], **own)


@pytest.fixture
def server(config: dict[str, Any]) -> Iterator[OwnTextServer]:
    settings = FeaturesSettings.of(config)
    with OwnTextServer(settings, one_sae(settings.folder)) as running:
        thread = Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def answer(
    server: OwnTextServer, method: str = "GET", path: str = "/", body: bytes | None = None, **headers: str
) -> tuple[int, str]:
    """The status and text of one request; `Host` and `Content_Length` in `headers` take the place of the true ones."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.putrequest(method, path, skip_host="Host" in headers)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None:
        given = {"Content-Length": str(len(body))} | given
    for name, value in given.items():
        connection.putheader(name, value)
    connection.endheaders(body)
    response = connection.getresponse()
    said = response.read().decode()
    connection.close()
    return response.status, said


def typed(server: OwnTextServer, text: str, latent: str = "") -> tuple[int, str]:
    return answer(server, "POST", body=urlencode({"text": text, "latent": latent}).encode())


def page_of(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="page">(.*?)</script>', html)
    assert found
    return dict(json.loads(found[1]))


def test_a_text_is_shaded_as_the_command_shades_it(server: OwnTextServer, config: dict[str, Any]) -> None:
    status, empty = answer(server)
    assert status == 200 and "<textarea" in empty and "<script" not in empty
    status, html = typed(server, "w3 w14 w15 w9", "#2")
    by_command = page_of(make({**config, "own_text": "w3 w14 w15 w9"}).read_text(encoding="utf-8"))
    assert status == 200 and page_of(html) == {**by_command, "latent": 2}
    assert page_of(typed(server, "w3")[1])["latent"] is None


def test_what_is_typed_is_text_and_markup_nowhere(server: OwnTextServer) -> None:
    said = '</textarea><script>window.hacked=1</script> w1 "'
    for status, html in (typed(server, said), typed(server, said, '"><script>')):
        assert status in (200, 422)
        assert "<script>window" not in html and '"><script>' not in html.replace('page"><script>', "")
        assert html.count("</textarea>") == 1


def test_mistakes_stand_in_the_page_with_what_was_typed(server: OwnTextServer) -> None:
    for text, latent, sentence in (
        ("w1 " * 16, "", "text fills 2 contexts of 16 tokens"),
        ("", "1", "no token that the SAE would read"),
        ("w1", "99999", "there is no latent 99999: they are numbered from 0 to"),
        ("w1", "-1", "there is no latent -1"),
    ):
        status, html = typed(server, text, latent)
        assert status == 422 and sentence in html
        assert f">\n{text}</textarea>" in html
    assert typed(server, "w1")[0] == 200


@pytest.mark.parametrize(
    ("status", "method", "path", "headers"),
    [
        (403, "GET", "/", {"Host": "example.com"}),
        (403, "GET", "/", {"Host": "127.0.0.1"}),
        (403, "POST", "/", {"Origin": "http://example.com"}),
        (403, "POST", "/", {"Origin": "null"}),
        (404, "GET", "/../../etc/passwd", {}),
        (404, "GET", "/report.html", {}),
        (411, "POST", "/", {"Content_Length": "x"}),
        (413, "POST", "/", {"Content_Length": str(MOST_BYTES + 1)}),
        (413, "POST", "/", {"Content_Length": "9" * 5000}),
        (501, "DELETE", "/", {}),
    ],
)
def test_whom_it_does_not_answer(
    server: OwnTextServer, status: int, method: str, path: str, headers: dict[str, str]
) -> None:
    body = b"text=w1" if method == "POST" else None
    said, html = answer(server, method, path, body, **headers)
    assert said == status and "w1" not in html
    own = f"localhost:{server.server_port}"
    assert answer(server, "POST", body=b"text=w1", Host=own, Origin=f"http://{own}")[0] == 200


def test_it_listens_on_this_machine_alone_and_names_a_port_in_use(
    server: OwnTextServer, config: dict[str, Any]
) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.server_port}/"
    settings = FeaturesSettings.of({**config, "port": server.server_port})
    with pytest.raises(UserError, match=rf"port={server.server_port} cannot be opened .* give another, or port=0"):
        OwnTextServer(settings, one_sae(settings.folder))
