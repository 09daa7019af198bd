"""A language model behind an OpenAI-compatible endpoint: one question, one answer."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from data.base.errors import UserError

MOST_TRIES = 4
AGAIN = (408, 409, 429, 500, 502, 503, 504)  # what a server says that may answer the next time
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass
class ChatApi:
    """Asks `model` at `url` (up to and with /v1); `key_env` names the environment variable with the key, if any.

    wait: seconds before the second try, doubled for each further one. requests, tokens: what was used so far, tokens as
    the server counts them. Raises UserError for a URL that is none, and where a key would cross a network in the clear.
    """

    url: str
    model: str
    key_env: str
    wait: float = 1.0
    timeout: float = 120.0
    requests: int = 0
    tokens: int = 0
    key: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"url={self.url} is no address: give one such as http://localhost:8000/v1")
        self.key = os.environ.get(self.key_env, "")
        if self.key and parts.scheme == "http" and parts.hostname not in LOOPBACK:
            raise UserError(f"url={self.url} would send the key in {self.key_env} unencrypted: use https, or unset it")

    def ask(self, system: str, question: str) -> str:
        """Return the answer; UserError where there is none after a few tries."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        body = json.dumps({"model": self.model, "messages": messages, "temperature": 0}).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
        for attempt in range(MOST_TRIES):
            self.requests += 1
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return self._read(answer.read())
            except urllib.error.HTTPError as error:
                why = f"answers {error.code} {error.reason}"
                if error.code not in AGAIN:
                    break
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                why = f"does not answer ({getattr(error, 'reason', error)})"
            if attempt < MOST_TRIES - 1:
                time.sleep(self.wait * 2**attempt)
        raise UserError(f"{self.url} {why}: check url, chat_model and the key in {self.key_env}")

    def _read(self, body: bytes) -> str:
        try:
            answer = json.loads(body)
            text = answer["choices"][0]["message"]["content"]
            self.tokens += int((answer.get("usage") or {}).get("total_tokens", 0))
        except (ValueError, KeyError, IndexError, TypeError):
            raise UserError(f"{self.url} gives no chat completion: is it an OpenAI-compatible endpoint?") from None
        return str(text)
