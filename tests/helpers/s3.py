"""An S3 server on loopback for tests: moto's, made to do one request at a time, as conditions on writes need."""

from __future__ import annotations

import io
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

Refusal = tuple[str, str]  # "503 Slow Down", "SlowDown"


class Server:
    """The server. before: sees (method, path) of each request, and may delay, refuse or forget to answer it."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._app, self._one = DomainDispatcherApplication(create_backend_app), threading.Lock()
        self.before: Callable[[str, str], Refusal | None] = lambda method, path: None
        self.after: Callable[[str, str], Refusal | None] = lambda method, path: None
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        request = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if refused := self.before(*request):
            return self._refuse(refused, environ, start)
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        with self._one:
            answer: list[tuple[Any, ...]] = []
            content = [*self._app(environ, lambda *head: answer.append(head))]
        if lost := self.after(*request):
            return self._refuse(lost, environ, start)
        start(*answer[0])
        return content

    @staticmethod
    def _refuse(refusal: Refusal, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        status, code = refusal
        start(status, [("Content-Type", "application/xml")])
        return [f"<Error><Code>{code}</Code></Error>".encode()]

    def make(self, bucket: str) -> None:
        from moto.core import DEFAULT_ACCOUNT_ID
        from moto.s3.models import s3_backends

        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].create_bucket(bucket, "us-east-1")

    def environment(self) -> dict[str, str]:
        keys = {"AWS_ACCESS_KEY_ID": "a-key", "AWS_SECRET_ACCESS_KEY": "a-secret"}
        return {**keys, "AWS_REGION": "us-east-1", "AWS_ENDPOINT_URL": self.url}


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    try:
        yield server
    finally:
        server._server.shutdown()
        server._server.server_close()


if (
    __name__ == "__main__"
):  # python -m tests.helpers.s3 <bucket>: serve until killed; prints the environment to use it with
    running = Server()
    running.make(sys.argv[1])
    print(*(f"{name}={value}" for name, value in running.environment().items()), flush=True)
    threading.Event().wait()
