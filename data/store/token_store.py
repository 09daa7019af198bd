"""The tokens of a text, made once for all stores of it: ranges of documents, each two files and a record.

    <cache>/tokens/<fingerprint[:12]>/
      tokens.json                         text, tokenizer and order of the documents; sizes of ranges; written first
      <split>.<number>.tokens             int32 ids of the range's documents, in the order in which they are packed
      <split>.<number>.documents          a row a document (its length, its name ...) and two bits a token
      records/<split>/<number>.json       counts, bytes and crc32c of both files; written last
      claims/                             there only while processes write: data/storage/leases.py

Both files are safetensors. BOS, EOS and contexts are no part of it: harvest/stored_text.py works them out when the
tokens are read, so that one token store serves every packing of the documents in this order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.base.errors import UserError
from data.base.location import Location
from data.base.records import Json, json_digest, seal, unseal
from data.storage.base import LeaseLost
from data.storage.open import open_storage
from data.store.commit import Chunk

TOKEN_FORMAT = 1
TOKENS_FOLDER, DESCRIPTION = "tokens", "tokens.json"
TOKEN_RECORD = re.compile(r"(\d{6,})\.json")
_SITE = "tokens"  # what leases and stages call the one thing that a range has

_ALSO_DECIDE_TOKENS = ("chat_template", "special_tokens")  # where an identity has them
# Of a text whose bytes are hashed in the identity: how it was reached, and which of its columns.
_WAYS_TO_A_TEXT = ("paths", "field", "root")


def text_content(text: Json) -> Json:
    """Take from a text's identity the names by which the same bytes were reached."""
    return {name: value for name, value in text.items() if "sha256" not in text or name not in _WAYS_TO_A_TEXT}


def tokens_identity(identity: Json) -> Json | None:
    """Return what decides the tokens, out of the identity of a store of activations; None where it names no text."""
    packing = identity.get("packing")
    if not isinstance(packing, dict) or not {"text", "tokenizer"} <= identity.keys():
        return None
    found: Json = {"text": text_content(identity["text"]), "tokenizer": identity["tokenizer"]}
    found |= {name: identity[name] for name in _ALSO_DECIDE_TOKENS if name in identity}
    return found | {"shuffle": packing.get("shuffle"), "heldout": float(packing.get("heldout", 0))}


def tokens_folder(identity: Json) -> str:
    """Return the path of an identity's token store below its cache."""
    return f"{TOKENS_FOLDER}/{json_digest(identity)[:12]}"


@dataclass(frozen=True)
class RangeSizes:
    """Where ranges end: with the document with which their text has as many characters as is due, or are so many.

    A range is due a quarter of what lies before it, between `first` and `most`: little text is tokenised beyond what is
    asked for, and a large text is no large number of files.
    """

    first: int = 1 << 18
    most: int = 1 << 23
    documents: int = 1 << 16

    def due(self, before: int) -> int:
        """Return the characters of a range that has `before` characters before it."""
        return min(max(self.first, before // 4), self.most)


@dataclass(frozen=True)
class DocumentTable:
    """The D documents of a range, whose tokens stand one after another: n tokens in all.

    lengths [D]: tokens of each. own [D]: it came as token ids or as a chat, and may begin with a BOS of its own.
    firsts, largest [D]: its first and its largest id, -1 of an empty one. wanted [n]: of a chat, whether the token's
    row may be harvested; of a text it always may. special [n]: whether the token stands for no text.
    """

    lengths: NDArray[np.int64]
    own: NDArray[np.bool_]
    firsts: NDArray[np.int32]
    largest: NDArray[np.int32]
    wanted: NDArray[np.bool_]
    special: NDArray[np.bool_]
    names: list[str]

    def to_bytes(self) -> bytes:
        """Write it as safetensors: a bit a flag, the names in UTF-8 one after another."""
        from safetensors.numpy import save

        encoded = [name.encode("utf-8", "surrogatepass") for name in self.names]
        return save(
            {
                "lengths": self.lengths,
                "firsts": self.firsts,
                "largest": self.largest,
                "own": np.packbits(self.own),
                "wanted": np.packbits(self.wanted),
                "special": np.packbits(self.special),
                "names": np.frombuffer(b"".join(encoded), np.uint8),
                "name_bytes": np.array([len(name) for name in encoded], np.int64),
            }
        )

    @classmethod
    def of(cls, data: bytes) -> DocumentTable:
        """Read what `to_bytes` wrote; ValueError or KeyError for anything else."""
        found = _loaded(data)
        lengths = found["lengths"]
        n_tokens, n_documents = int(lengths.sum()), len(lengths)
        names, ends = found["names"].tobytes(), np.cumsum(found["name_bytes"]).tolist()
        return cls(
            lengths=lengths,
            own=np.unpackbits(found["own"], count=n_documents).view(np.bool_),
            firsts=found["firsts"],
            largest=found["largest"],
            wanted=np.unpackbits(found["wanted"], count=n_tokens).view(np.bool_),
            special=np.unpackbits(found["special"], count=n_tokens).view(np.bool_),
            names=[
                names[start:end].decode("utf-8", "surrogatepass")
                for start, end in zip([0, *ends[:-1]], ends, strict=False)
            ],
        )


@dataclass(frozen=True)
class TokenRange:
    """The documents of one range and their ids [n].

    characters: of their text. last: whether the split ends with it. refused: why the document after it cannot be
    tokenised, in a sentence; such a range is its split's last.
    """

    table: DocumentTable
    tokens: NDArray[np.int32]
    characters: int
    last: bool
    refused: str = ""


@dataclass(frozen=True)
class TokenRecord:
    """What is true of one range; its JSON on disk. files: tokens, then documents."""

    split: str
    number: int
    documents: int
    tokens: int
    characters: int
    last: bool
    refused: str
    files: tuple[Chunk, ...]

    @classmethod
    def of(cls, data: bytes, path: Location) -> TokenRecord:
        """Read a record's content; a UserError names `path` where it is damaged or of another kind."""
        remedy = "delete this file and run the same harvest again, which tokenises its range anew"
        obj = unseal(data, path, remedy)
        try:
            return cls(**obj | {"files": tuple(Chunk(**file) for file in obj["files"])})
        except (TypeError, KeyError):  # sealed, but a file of another kind
            raise UserError(f"{path} is no record of tokens: {remedy}") from None

    def read_tokens(self, data: bytes) -> NDArray[np.int32]:
        """Read the content of its file of ids; ValueError where it is not of this record."""
        tokens = _loaded(data).get("tokens")
        if tokens is None or tokens.dtype != np.int32 or tokens.shape != (self.tokens,):
            raise ValueError("other tokens than the record has")
        return tokens

    def read_table(self, data: bytes) -> DocumentTable:
        """Read the content of its file of documents; ValueError where it is not of this record."""
        try:
            table = DocumentTable.of(data)
        except KeyError as error:
            raise ValueError(f"no {error}") from None
        if (len(table.lengths), len(table.wanted)) != (self.documents, self.tokens):
            raise ValueError("other documents than the record has")
        return table

    def wrong_name(self, split: str, number: int) -> str | None:
        """Say how the record does not fit its file's name; None where it does."""
        if (self.split, self.number) != (split, number):
            return f"is the record of range {self.number} of {self.split}"
        keys = [token_key(split, number), documents_key(split, number)]
        if [file.key for file in self.files] != keys:
            return f"does not name {' and '.join(keys)}"
        return None


def token_record_key(split: str, number: int) -> str:
    """Return the path of a range's record below its token store."""
    return f"records/{split}/{number:06d}.json"


def token_key(split: str, number: int) -> str:
    """Return the path of a range's ids."""
    return f"{split}.{number:06d}.tokens"


def documents_key(split: str, number: int) -> str:
    """Return the path of a range's table of documents."""
    return f"{split}.{number:06d}.documents"


def _loaded(data: bytes) -> dict[str, NDArray[Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(data)
    except SafetensorError as error:
        raise ValueError(str(error)) from None


@dataclass(frozen=True)
class TokenDescription:
    """The first file of a token store. made_for: model and text as they were called when it was made, for people."""

    identity: Json
    ranges: RangeSizes
    made_for: Json

    @cached_property
    def fingerprint(self) -> str:
        return json_digest(self.identity)

    def to_json(self) -> bytes:
        """Write the file's content."""
        return seal({"format": TOKEN_FORMAT, "fingerprint": self.fingerprint} | asdict(self), indent=2)

    @classmethod
    def from_json(cls, data: bytes, path: Location) -> TokenDescription:
        """Read it; a UserError naming the file where it is damaged or of a newer format."""
        remedy = "delete its folder, and the next harvest tokenises the text again"
        obj = unseal(data, path, remedy)
        if obj.pop("format", 0) > TOKEN_FORMAT:
            raise UserError(f"{path} is of a newer format than this version reads ({TOKEN_FORMAT}): update the program")
        try:
            fingerprint = obj.pop("fingerprint")
            found = cls(**obj | {"ranges": RangeSizes(**obj["ranges"])})
        except (TypeError, KeyError):  # sealed, but a file of another kind
            raise UserError(f"{path} is damaged: {remedy}") from None
        if found.fingerprint != fingerprint:
            raise UserError(f"{path} is damaged: {remedy}")
        return found


class TokenStore:
    """One token store, open: its ranges are made in any order, by any number of processes, and read in order."""

    def __init__(self, path: Location, description: TokenDescription) -> None:
        self.path, self.description = path, description
        self.storage = open_storage(path, DESCRIPTION)
        self.leases = self.storage.leases
        self._records: dict[tuple[str, int], TokenRecord] = {}  # a record never changes once it is there

    @classmethod
    def open(cls, path: Location) -> TokenStore:
        """Open a folder or URL; a UserError where it is no token store."""
        try:
            data = open_storage(path, DESCRIPTION).read(DESCRIPTION)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{path} is no store of tokens (it has no {DESCRIPTION}): give the folder of one") from None
        return cls(path, TokenDescription.from_json(data, path / DESCRIPTION))

    @classmethod
    def create_or_open(
        cls, cache: Location, identity: Json, made_for: Json, ranges: RangeSizes | None = None
    ) -> TokenStore:
        """Open the token store of an identity in a cache, or make it; one that is there has its own sizes of ranges."""
        description = TokenDescription(identity, ranges or RangeSizes(), made_for)
        path = cache / tokens_folder(identity)
        storage = open_storage(path, DESCRIPTION)
        if storage.size(DESCRIPTION) is None:
            storage.create(DESCRIPTION, description.to_json())
        found = cls.open(path)
        if found.description.identity != identity:
            raise UserError(
                f"{path / DESCRIPTION} is of another text: delete its folder and run the same command again"
            )
        return found

    @property
    def sizes(self) -> RangeSizes:
        return self.description.ranges

    def is_made(self, split: str, number: int) -> bool:
        """Return whether a range is committed."""
        return (split, number) in self._records or self.storage.size(token_record_key(split, number)) is not None

    def record(self, split: str, number: int) -> TokenRecord | None:
        """Read a range's record; None where there is none yet, a UserError where it is damaged."""
        if (split, number) not in self._records:
            key = token_record_key(split, number)
            try:
                record = TokenRecord.of(self.storage.read(key), self.path / key)
            except FileNotFoundError:
                return None
            if wrong := record.wrong_name(split, number):
                raise UserError(f"{self.path / key} {wrong}: {self.remedy(split, number)}")
            self._records[split, number] = record
        return self._records[split, number]

    def numbers(self, split: str) -> list[int]:
        """List the ranges of a split that have a record, in order."""
        names = (TOKEN_RECORD.fullmatch(name) for name in self.storage.list_files(f"records/{split}"))
        return sorted(int(match[1]) for match in names if match)

    def remedy(self, split: str, number: int) -> str:
        """Return the one remedy for a damaged range, as the end of a sentence."""
        record = self.path / token_record_key(split, number)
        return f"delete {record} and run the same harvest again, which tokenises the range anew"

    def table(self, split: str, number: int) -> DocumentTable:
        """Read the documents of a committed range; a UserError where the file is not as it was committed."""
        record = self._made(split, number)
        try:
            return record.read_table(self._content(record, 1))
        except ValueError:
            raise UserError(f"{self.path / record.files[1].key} is damaged: {self.remedy(split, number)}") from None

    def tokens(self, split: str, number: int) -> NDArray[np.int32]:
        """Read the ids of a committed range; a UserError where the file is not as it was committed."""
        record = self._made(split, number)
        try:
            return record.read_tokens(self._content(record, 0))
        except ValueError:
            raise UserError(f"{self.path / record.files[0].key} is damaged: {self.remedy(split, number)}") from None

    def _made(self, split: str, number: int) -> TokenRecord:
        record = self.record(split, number)
        if record is None:
            missing = self.path / token_record_key(split, number)
            raise UserError(f"{missing} is missing: run the same harvest again, which tokenises the range anew")
        return record

    def _content(self, record: TokenRecord, which: int) -> bytes:
        """Read one of a range's files and compare its checksum, each time it is read."""
        import google_crc32c

        file, remedy = record.files[which], self.remedy(record.split, record.number)
        try:
            data = self.storage.read(file.key)
        except FileNotFoundError:
            raise UserError(f"{self.path / file.key} is missing: {remedy}") from None
        if f"{google_crc32c.value(data):08x}" != file.crc32c:
            raise UserError(f"{self.path / file.key} is damaged: {remedy}")
        return data

    def write(self, split: str, number: int, made: TokenRange) -> TokenRecord:
        """Commit a range; where it is committed by the time, that record stands and is returned.

        LeaseLost tells that another process took the range over and removed what was staged.
        """
        import google_crc32c
        from safetensors.numpy import save

        files = {
            token_key(split, number): (len(made.tokens), save({"tokens": made.tokens})),
            documents_key(split, number): (len(made.table.lengths), made.table.to_bytes()),
        }
        chunks = tuple(
            Chunk(key, rows, len(data), f"{google_crc32c.value(data):08x}") for key, (rows, data) in files.items()
        )
        tokens, documents = (file.rows for file in chunks)
        record = TokenRecord(split, number, documents, tokens, made.characters, made.last, made.refused, chunks)
        stage, key = self.leases.stage(split, number, _SITE), token_record_key(split, number)
        try:
            for name, (_, data) in files.items():
                self.storage.put_staged(stage, name, [data])
            standing = self.storage.commit_staged(stage, list(files), key, seal(asdict(record)))
        except FileNotFoundError:
            # The stage is gone though the store is there: this process was taken for dead.
            if self.storage.size(DESCRIPTION) is not None:
                raise LeaseLost(f"range {number} of {split}") from None
            raise
        finally:
            self.leases.unstage(stage)
        return TokenRecord.of(standing, self.path / key)

    def clear_up(self) -> None:
        """Remove what killed processes left."""
        if self.leases.any():
            self.leases.sweep(lambda split, number, _: self.is_made(split, number))


def made_for(settings: Mapping[str, Any], model: str) -> Json:
    """Say for people which text a token store is of: the group `text` as it was asked for, and the model's name."""
    return {"model": model, "text": settings["text"]}
