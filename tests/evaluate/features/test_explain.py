"""Labels from a stand-in for an OpenAI-compatible endpoint on the loopback: what is asked, scored, written and said."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from data.base.errors import UserError
from evaluate.config import ExplainSettings
from evaluate.features.chat_api import ChatApi
from evaluate.features.explain import detection_of, explain_latents, wilson
from evaluate.features.page_data import PageData
from tests.helpers.pages import HOSTILE, a_page, called
from tests.helpers.settings import stage_config

Answer = Callable[[dict[str, Any]], tuple[int, Any]]


def completion(text: str) -> tuple[int, Any]:
    return 200, {"choices": [{"message": {"content": text}}], "usage": {"total_tokens": 10}}


class Endpoint:
    """A server that answers as `answer` says, and keeps what it was sent."""

    def __init__(self) -> None:
        self.answer: Answer = lambda body: completion("a label")
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.seen.append({"path": self.path, **body})
                endpoint.headers.append(dict(self.headers))
                code, answer = endpoint.answer(body)
                self.send_response(code)
                self.end_headers()
                self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def config(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    a_page(tmp_path, 9)
    return stage_config("explain", pages=str(tmp_path), url=endpoint.url, chat_model="m", held_out=2, latents=[2, 3])


def test_conf_has_every_setting_with_the_default_of_the_schema() -> None:
    given = stage_config("explain")
    assert set(given) == set(ExplainSettings.model_fields)
    settings = ExplainSettings.of({**given, "pages": "p", "url": "u", "chat_model": "m"})
    for name, field in ExplainSettings.model_fields.items():
        assert field.description and (given[name] is None or getattr(settings, name) == field.default), name


def is_judge(body: dict[str, Any]) -> bool:
    return "Explanation: " in body["messages"][1]["content"]


def test_nothing_is_sent_before_the_cost_is_agreed_to(
    config: dict[str, Any], endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    explain_latents(config)
    said = capsys.readouterr().out
    assert "2 latents: 4 requests of about " in said and "give spend=true" in said
    assert endpoint.seen == []


def test_a_judge_that_knows_scores_1_and_one_that_says_none_scores_a_half(
    config: dict[str, Any], endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = PageData(tmp_path)
    detections = {i: detection_of(data, i, ExplainSettings.of(config)) for i in (2, 3)}
    right = {}
    for detection in detections.values():
        assert detection is not None and len(detection.contexts) == 4
        numbers = [str(i) for i, (_, fires) in enumerate(detection.contexts, 1) if fires]
        assert len(numbers) == 2
        right[detection.question("a label")] = ", ".join(numbers)
    endpoint.answer = lambda body: completion(right[body["messages"][1]["content"]] if is_judge(body) else " a\nlabel ")
    explain_latents({**config, "spend": True})
    (labels,) = called(tmp_path / "labels.js")
    assert set(labels) == {"2", "3"} and labels["2"]["label"] == "a label" and labels["2"]["accuracy"] == 1
    assert labels["2"]["score"] == "detection 1.00 [0.51, 1.00] on 4 contexts"
    said = capsys.readouterr().out
    assert "4 requests, 40 tokens by the server's count; mean detection 1.00 [1.00, 1.00] over 2 latents" in said
    endpoint.answer = lambda body: completion("none")
    explain_latents({**config, "spend": True, "chat_model": "other"})
    (labels,) = called(tmp_path / "labels.js")
    assert [labels[i]["accuracy"] for i in ("2", "3")] == [0.5, 0.5]


def test_the_label_is_made_from_other_contexts_than_it_is_tried_on(
    config: dict[str, Any], endpoint: Endpoint, tmp_path: Path
) -> None:
    data = PageData(tmp_path)
    top, drawn = data.examples(2)
    detection = detection_of(data, 2, ExplainSettings.of(config))
    assert detection is not None
    own = {context.place for context in top}
    tried = [(context.place, fires) for context, fires in detection.contexts]
    assert not own & {place for place, _ in tried}
    assert {place for place, fires in tried if fires} <= {context.place for context in drawn}
    firing = {context.place[0] for context in (*top, *drawn)}
    assert all(place[0] not in firing for place, fires in tried if not fires)
    explain_latents({**config, "spend": True})
    asked = [body["messages"][1]["content"] for body in endpoint.seen]
    assert "<<" in asked[0] and ">>" in asked[0] and endpoint.seen[0]["path"] == "/v1/chat/completions"
    assert endpoint.seen[0]["model"] == "m" and asked[1].startswith("Explanation: a label\n")


def test_what_is_labelled_is_not_asked_for_again(config: dict[str, Any], endpoint: Endpoint, tmp_path: Path) -> None:
    explain_latents({**config, "spend": True})
    count = len(endpoint.seen)
    explain_latents({**config, "spend": True, "latents": [2, 3, 4]})
    assert len(endpoint.seen) == count + 2
    assert set(called(tmp_path / "labels.js")[0]) == {"2", "3", "4"}


def test_a_hostile_answer_is_no_markup(config: dict[str, Any], endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.answer = lambda body: completion(HOSTILE[2])
    explain_latents({**config, "spend": True})
    assert "<" not in (tmp_path / "labels.js").read_text()
    assert called(tmp_path / "labels.js")[0]["2"]["label"] == HOSTILE[2]


def test_a_busy_server_is_asked_again(endpoint: Endpoint) -> None:
    codes = iter([503, 429])
    endpoint.answer = lambda body: (code, {}) if (code := next(codes, 200)) != 200 else completion("yes")
    api = ChatApi(endpoint.url, "m", "NO_SUCH_KEY", wait=0.0)
    assert api.ask("system", "question") == "yes" and (api.requests, api.tokens) == (3, 10)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [((401, {}), "answers 401 Unauthorized: check url, chat_model"), ((200, b"<html>"), "gives no chat completion")],
)
def test_what_a_server_gets_wrong_is_a_sentence(endpoint: Endpoint, answer: tuple[int, Any], sentence: str) -> None:
    endpoint.answer = lambda body: answer
    with pytest.raises(UserError, match=sentence):
        ChatApi(endpoint.url, "m", "NO_SUCH_KEY", wait=0.0).ask("system", "question")


def test_the_key_is_of_the_environment_and_goes_nowhere_in_the_clear(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    ChatApi(endpoint.url, "m", "A_KEY").ask("system", "question")
    assert endpoint.headers[0]["Authorization"] == "Bearer secret"
    with pytest.raises(UserError, match="would send the key in A_KEY unencrypted") as caught:
        ChatApi("http://example.org/v1", "m", "A_KEY")
    assert "secret" not in str(caught.value) and "secret" not in repr(ChatApi(endpoint.url, "m", "A_KEY"))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"url": None}, "url is empty: give pages=<folder>"),
        ({"url": "ftp://host"}, "is no address"),
        ({"pages": "nowhere"}, "holds no feature pages"),
        ({"latents": [99]}, "latents=99 is beyond the last of 9"),
    ],
)
def test_what_a_user_can_get_wrong(config: dict[str, Any], wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        explain_latents({**config, **wrong})


def test_wilsons_interval_by_hand() -> None:
    """Of 8 of 10: centre (0.8 + 0.19208) / 1.38416, half width 1.96 / 1.38416 * sqrt(0.016 + 0.009604)."""
    low, high = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(4, 4)[1] == 1.0
