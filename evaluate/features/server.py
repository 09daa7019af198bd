"""A page on this machine in which texts are typed and seen shaded by latents: `python -m evaluate.features serve=true`.

It answers this machine alone: it listens on the loopback address, and refuses a request that names another host or was
sent by another site's page, which a browser here could be made to send. It reads and writes no file for a request.
"""

from __future__ import annotations

from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from urllib.parse import parse_qs

from data.base.errors import UserError
from evaluate.config import FeaturesSettings
from evaluate.features.own_text import OwnTextReader, own_text_html
from evaluate.inputs import SavedSAE

ADDRESS = "127.0.0.1"
MOST_BYTES = 1 << 20  # of a request: many times what a context holds
PATIENCE = 30  # seconds that a browser may take to send what it began


class OwnTextServer(ThreadingHTTPServer):
    """Answers with the page of whatever text is typed, for one SAE; threads, as browsers open connections ahead."""

    daemon_threads = True

    def __init__(self, settings: FeaturesSettings, trained: SavedSAE) -> None:
        self.first = {"text": settings.own_text or "", "latent": ""}
        self.reader, self.one_at_a_time = OwnTextReader(settings, trained), Lock()
        self.about = self.reader.about  # loads the model: whoever opens the page need not wait for it
        try:
            super().__init__((ADDRESS, settings.port), _Handler)
        except OSError as error:
            raise UserError(
                f"port={settings.port} cannot be opened ({error.strerror}): give another, or port=0 for any free one"
            ) from error
        self.hosts = {f"{name}:{self.server_port}" for name in (ADDRESS, "localhost")}

    @property
    def url(self) -> str:
        """Return the address to open in a browser."""
        return f"http://{ADDRESS}:{self.server_port}/"

    def page(self, text: str, latent: str) -> tuple[HTTPStatus, str]:
        """Return the page of a text, shaded by a latent where its number is given; what is wrong stands in it."""
        form = {"text": text, "latent": latent, "say": ""}
        try:
            number = self._number(latent)
            if not text and number is None:
                return HTTPStatus.OK, own_text_html(None, self.about, form)
            with self.one_at_a_time:
                page, about = self.reader.read(text)
        except UserError as error:
            return HTTPStatus.UNPROCESSABLE_ENTITY, own_text_html(None, self.about, {**form, "say": str(error)})
        return HTTPStatus.OK, own_text_html({**page, "latent": number}, about, form)

    def _number(self, latent: str) -> int | None:
        digits = latent.strip().removeprefix("#")
        if not digits:
            return None
        width = self.reader.sae.width
        if not (digits.isascii() and digits.isdigit() and len(digits) < 10 and int(digits) < width):
            raise UserError(f"there is no latent {latent.strip()[:20]}: they are numbered from 0 to {width - 1}")
        return int(digits)


class _Handler(BaseHTTPRequestHandler):
    """One request: the page with nothing typed yet, or of what was typed."""

    server: OwnTextServer
    timeout = PATIENCE

    def do_GET(self) -> None:
        if self._refused():
            return
        self._send(*self.server.page(**self.server.first))

    def do_POST(self) -> None:
        if self._refused():
            return
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            return self.send_error(HTTPStatus.LENGTH_REQUIRED)
        if len(length) > 9 or int(length) > MOST_BYTES:
            return self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        typed = parse_qs(self.rfile.read(int(length)).decode(errors="replace"), keep_blank_values=True)
        # A form sends line ends as CR LF, whatever was typed.
        text = typed.get("text", [""])[0].replace("\r\n", "\n")
        self._send(*self.server.page(text, typed.get("latent", [""])[0]))

    def _refused(self) -> bool:
        """Refuse what did not come from this server's own page."""
        origin = self.headers.get("Origin")
        own = {f"http://{host}" for host in self.server.hosts}
        if self.headers.get("Host") not in self.server.hosts or (origin is not None and origin not in own):
            self.send_error(HTTPStatus.FORBIDDEN, "This page answers its own machine alone")
        elif self.path != "/":
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            return False
        return True

    def _send(self, status: HTTPStatus, html: str) -> None:
        body = html.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", "frame-ancestors 'none'")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: a line for each request would only hide the address."""


def serve(settings: FeaturesSettings, trained: SavedSAE) -> None:
    """Answer until Ctrl-C. Raises UserError where the port cannot be opened."""
    with OwnTextServer(settings, trained) as server:
        print(f"type a text at {server.url} and see what fires on it; Ctrl-C ends this", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("")
