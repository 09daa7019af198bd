"""Where stores lie: a folder, or a prefix of an object store."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from data.base.errors import UserError

SCHEMES = ("s3", "memory")
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://([^/]*)/*(.*)", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class Url:
    """`s3://bucket/prefix`, or `memory://name/prefix` within this process; joined and named as a Path is."""

    scheme: str
    bucket: str
    key: str = ""  # without / at either end

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.key}" if self.key else "")

    def __truediv__(self, below: str) -> Url:
        return Url(self.scheme, self.bucket, f"{self.key}/{below}" if self.key else below)

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2] or self.bucket

    @property
    def parent(self) -> Url:
        return Url(self.scheme, self.bucket, self.key.rpartition("/")[0])


Location = Path | Url


def refuse_credentials(text: str) -> None:
    """Refuse a URL in `text` with what must not be written down; the UserError does not repeat it."""
    if re.search(r"\w://[^/\s]*@", text) or re.search(r"\b(s3|memory)://\S*[?#]", text):
        raise UserError(
            "a URL is given as s3://bucket/prefix and nothing more: take the credentials or parameters out of it and "
            "set them in the environment, as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )


def parse_location(text: str | Location) -> Location:
    """Parse a setting such as `cache` into the location it names;
    UserError for a URL of another kind or one with credentials in it."""
    if text == "":
        raise UserError("an empty name is no place for a store: name a folder, or give s3://bucket/prefix")
    found = None if isinstance(text, Path | Url) else _URL.fullmatch(str(text))
    if found is None:
        return text if isinstance(text, Url) else Path(text)
    refuse_credentials(str(text))
    if found[1] not in SCHEMES or not found[2]:
        kinds = " or ".join(f"{scheme}://bucket/prefix" for scheme in SCHEMES)
        raise UserError(f"{text} is no place for a store: name a folder, or give {kinds}")
    return Url(found[1], found[2], "/".join(part for part in found[3].split("/") if part))
