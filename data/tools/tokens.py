"""Look after stores of tokens: what they hold, which stores of activations are of their text, what is damaged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from data.base.errors import UserError, to_sentence
from data.base.files import format_bytes
from data.base.location import Location
from data.base.records import canonical, flatten
from data.storage.open import open_storage
from data.store.files import SPLITS, token_stores_below
from data.store.store import Store
from data.store.token_store import (
    DESCRIPTION,
    TOKEN_RECORD,
    TokenDescription,
    TokenRecord,
    TokenStore,
    documents_key,
    token_key,
    token_record_key,
    tokens_folder,
    tokens_identity,
)
from data.tools.inventory import DAMAGED
from data.tools.verify import Finding, read_sealed, unreadable, wrong_bytes

_AGAIN = "delete its folder, and the next harvest tokenises the text again"


@dataclass(frozen=True)
class TokenEntry:
    """One store of tokens. `store` is None, and `wrong` says why, where it cannot be read."""

    path: Location
    bytes: int
    store: TokenStore | None = None
    wrong: str = ""

    @classmethod
    def of(cls, path: Location) -> TokenEntry:
        """Open the store in a folder."""
        total = sum(open_storage(path).sizes().values())
        try:
            return cls(path, total, TokenStore.open(path))
        except (UserError, OSError) as error:
            return cls(path, total, wrong=to_sentence(error) or str(error))

    @property
    def line(self) -> str:
        state = DAMAGED if self.store is None else "tokens"
        return f"{self.path}  {state}, {format_bytes(self.bytes)}"

    @property
    def cache(self) -> Location:
        """Return the folder whose stores of activations are cut from these tokens."""
        return self.path.parent.parent


def token_entries(folder: Location) -> list[TokenEntry]:
    """Find every store of tokens at or below a folder."""
    return [TokenEntry.of(path) for path in token_stores_below(folder)]


def stores_of(entry: TokenEntry) -> list[Location]:
    """Find the stores of activations of the same text and tokenizer in the cache; a UserError for one not readable."""
    if entry.store is None:
        return []
    identity, found = entry.store.description.identity, []
    for path in (entry.cache / name for name in open_storage(entry.cache).folders()):
        if open_storage(path).size("manifest.json") is not None:
            store = Store.open(path)
            if tokens_identity(store.manifest.identity) == identity:
                found.append(store.path)
    return found


def tokens_of(store: Store) -> Location | None:
    """Find the store of tokens that a store of activations is cut from; None where it is not in its cache."""
    identity = tokens_identity(store.manifest.identity)
    if identity is None:
        return None
    path = store.path.parent / tokens_folder(identity)
    return path if open_storage(path).size(DESCRIPTION) is not None else None


def _records(store: TokenStore, split: str) -> list[TokenRecord]:
    records = (store.record(split, number) for number in store.numbers(split))
    return [record for record in records if record is not None]


def _extent(store: TokenStore) -> Iterator[str]:
    for split in SPLITS:
        if records := _records(store, split):
            tokens, documents = sum(r.tokens for r in records), sum(r.documents for r in records)
            in_order = list(takewhile(lambda pair: pair[0] == pair[1].number, enumerate(records)))
            ends = ", to the text's end" if in_order and in_order[-1][1].last else ""
            yield f"{split}: {tokens:,} tokens of {documents:,} documents in {len(records)} ranges{ends}"


def describe_tokens(entry: TokenEntry) -> list[str]:
    """Describe an entry in a few lines."""
    if entry.store is None:
        return [entry.line, f"  {entry.wrong}"]
    settings = (
        f"{name}={value if isinstance(value, str) else canonical(value)}"
        for name, value in sorted(flatten(entry.store.description.made_for).items())
    )
    try:
        extent = "; ".join(_extent(entry.store)) or "no tokens yet"
        stores = ", ".join(path.name for path in stores_of(entry)) or "no store"
    except UserError as error:
        return [entry.line, f"  {' '.join(settings)}", f"  {error}"]
    return [entry.line, f"  {' '.join(settings)}", f"  {extent}", f"  read by {stores}"]


def token_report(path: Location) -> Iterator[str]:
    """Yield the lines of `info` for a store of tokens."""
    store = TokenStore.open(path)
    yield from describe_tokens(TokenEntry.of(path))
    yield f"fingerprint {store.description.fingerprint}"
    yield "identity"
    for name, value in sorted(flatten(store.description.identity).items()):
        yield f"  {name}: {value if isinstance(value, str) else canonical(value)}"
    sizes = store.sizes
    yield f"ranges of {sizes.first:,} to {sizes.most:,} characters, and at most {sizes.documents:,} documents"


def verify_tokens(path: Location) -> list[Finding]:
    """Find what is wrong with a store of tokens, reading each file once: nothing, if the list is empty."""
    storage = open_storage(path)
    try:
        data = storage.read(DESCRIPTION)
        description = TokenDescription.from_json(data, path / DESCRIPTION)
        if data != description.to_json():
            return [Finding(path / DESCRIPTION, "is not as it was written", _AGAIN)]
    except OSError as error:
        return [Finding(path / DESCRIPTION, unreadable(error), _AGAIN)]
    except UserError:
        return [Finding(path / DESCRIPTION, "is not as it was written, or of a newer format", _AGAIN)]
    store, findings, known = TokenStore(path, description), list[Finding](), {DESCRIPTION}
    for split in SPLITS:
        names = (TOKEN_RECORD.fullmatch(name) for name in storage.entries(f"records/{split}"))
        for number in sorted(int(match[1]) for match in names if match):
            findings += _range_findings(store, split, number, known)
    for name in sorted(storage.sizes().keys() - known):
        findings.append(Finding(path / name, "is no part of the store", "`python -m data gc` removes it", True))
    return findings


def _range_findings(store: TokenStore, split: str, number: int, known: set[str]) -> Iterator[Finding]:
    """Yield what is wrong with a range; its files go to `known`."""
    key, remedy = token_record_key(split, number), store.remedy(split, number)
    known.update((key, token_key(split, number), documents_key(split, number)))
    try:
        data = store.storage.read(key)
        read_sealed(data, store.path / key)
        record = TokenRecord.of(data, store.path / key)
        wrong = record.wrong_name(split, number)
    except OSError as error:
        yield Finding(store.path / key, unreadable(error), remedy)
        return
    except UserError:
        yield Finding(store.path / key, "is not as it was written", remedy)
        return
    if wrong:
        yield Finding(store.path / key, wrong, remedy)
        return
    yield from _content_findings(store, record, remedy)


def _content_findings(store: TokenStore, record: TokenRecord, remedy: str) -> Iterator[Finding]:
    """Yield what is wrong with the files of a range: checksums, counts, and how they agree."""
    contents: list[bytes] = []
    for file in record.files:
        data = next(store.storage.read_many([file.key]))
        if isinstance(data, OSError):
            yield Finding(store.path / file.key, unreadable(data), remedy)
        elif (what := wrong_bytes(file, data)) is not None:
            yield Finding(store.path / file.key, what, remedy)
        else:
            contents.append(data)
    if len(contents) < len(record.files):
        return
    try:
        tokens, table = record.read_tokens(contents[0]), record.read_table(contents[1])
    except ValueError as error:
        yield Finding(store.path / token_record_key(record.split, record.number), f"names {error}", remedy)
        return
    some = table.lengths > 0
    firsts = tokens[(table.lengths.cumsum() - table.lengths)[some]]
    if (firsts != table.firsts[some]).any() or tokens.max(initial=-1) != table.largest.max(initial=-1):
        yield Finding(store.path / record.files[1].key, "does not agree with the tokens", remedy)


def token_leftovers(store: TokenStore) -> list[str]:
    """List a token store's files that belong to no range that has a record."""
    known = {DESCRIPTION}
    for split in SPLITS:
        for number in store.numbers(split):
            known |= {token_record_key(split, number), token_key(split, number), documents_key(split, number)}
    return sorted(store.storage.sizes().keys() - known)
