"""A prefix of an object store as the storage of a store, through obstore: S3 and what speaks like it, or memory.

Nothing can be locked or renamed here; puts that hold only while nothing else changed the object take that place. A unit
comes to its place so that writers that were paused, killed or taken for dead can do no harm at any later time:

    claims/<split>.<unit>.<site>.<id>/c...    staged chunks: only their writer writes them
    claims/<split>.<unit>.<site>.settled      made by create-if-absent: whose chunks, and the record they will have
    <split>/<site>/c...                       copies of those, by the server; whoever repeats it writes the same bytes
    commits/<split>/<unit>.<site>.json        made by create-if-absent, last; then the rest is removed

Whoever finds a `settled` does what it says; who makes one looks for the record after it, as another may have made both
and removed the first. So one attempt is ever copied, and a record is never of bytes that another attempt wrote.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import cache
from itertools import islice
from typing import Any

from data.base.errors import UserError
from data.base.location import Url
from data.storage.base import LEASES_FOLDER, MANIFEST, RECORD_FOLDERS
from data.storage.leases import UnitLeases

AT_ONCE = 8  # requests
_RETRY = {
    "max_retries": 3,
    "retry_timeout": timedelta(seconds=150),
    "backoff": {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=5), "base": 2},
}
_PIECE = 32 << 20  # bytes of one request, which has 60 s
_TIMEOUTS = {"connect_timeout": "5s", "timeout": "60s"}  # of one request
_OWN_CREDENTIALS = "http://169.254.169.254"  # where obstore looks for a machine's, when the environment has none


@cache
def open_bucket(scheme: str, bucket: str) -> Any:
    """Open obstore's store of a whole bucket; one a process, so that memory:// keeps what was put there."""
    try:
        from obstore.store import MemoryStore, S3Store
    except ImportError:
        raise UserError(f'{scheme}:// needs the extra s3: .venv/bin/pip install -e ".[s3]"') from None
    if scheme == "memory":
        return MemoryStore()
    # obstore refuses unencrypted endpoints unless it is told; a server on one's own network often is one.
    plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
    options = _TIMEOUTS | ({"allow_http": True} if plain else {})
    return S3Store(bucket, client_options=options, retry_config=_RETRY)  # type: ignore[arg-type]


@cache
def uploaders() -> ThreadPoolExecutor:
    """Return the threads of this process that put staged chunks."""
    return ThreadPoolExecutor(AT_ONCE, thread_name_prefix="upload")


def to_user_error(url: Url, error: Exception) -> UserError:
    """Return one sentence for what a request failed of."""
    text, bucket = str(error), f"{url.scheme}://{url.bucket}"
    # An endpoint's URL may hold a password.
    at = re.sub(r"//[^/]*@", "//", os.environ.get("AWS_ENDPOINT_URL", "AWS"))
    code = found[1] if (found := re.search(r"<Code>(\w+)</Code>", text)) else type(error).__name__
    status = found[1] if (found := re.search(r"status code: (\d+)", text)) else ""
    if _OWN_CREDENTIALS in text:
        return UserError(f"{bucket} needs credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if code == "NoSuchBucket":
        return UserError(f"the bucket {bucket} does not exist at {at}: create it, or name another")
    if status in ("301", "400", "401", "403"):
        return UserError(
            f"{at} refuses access to {bucket} ({code}): check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and "
            "what they are allowed to do"
        )
    if not status and re.search(r"HTTP error|error sending request|timed out|Connect", text):
        return UserError(f"{at} cannot be reached for {bucket}: check AWS_ENDPOINT_URL and the network")
    return UserError(f"{url} failed at {at} ({status} {code}): run the same command again to go on where it stopped")


@contextlib.contextmanager
def _asking(url: Url) -> Iterator[None]:
    """Say in a sentence what a request failed of; FileNotFoundError stays, unless the bucket itself is not there."""
    try:
        yield
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise to_user_error(url, error) from None
        raise FileNotFoundError(2, "No such object", str(url)) from None
    except Exception as error:
        if not type(error).__module__.startswith("obstore"):
            raise
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        # No failure but an answer: the condition of the put did not hold.
        if isinstance(error, AlreadyExistsError | PreconditionError):
            raise
        raise to_user_error(url, error) from None


def _name(key: str) -> str:
    return key.rpartition("/")[2]


class ObjectStorage:
    """What lies below a URL."""

    stages_are_private = False  # whoever finds them settled on copies them

    def __init__(self, path: Url, first: str = MANIFEST) -> None:
        self.path, self._first = path, first
        self._store = open_bucket(path.scheme, path.bucket)
        self.leases = UnitLeases(self)
        self._offered: set[Url] = set()
        self._uploads: dict[Url, list[Future[str | None]]] = {}

    def _key(self, key: str) -> str:
        return (self.path / key).key if key else self.path.key

    def read(self, key: str) -> bytes:
        return self.look(key)[0]

    def look(self, key: str) -> tuple[bytes, str]:
        """Read (content, what changes with it)."""
        import obstore

        with _asking(self.path / key):
            found = obstore.get(self._store, self._key(key))
            return bytes(found.bytes()), str(found.meta["e_tag"])

    def read_into(self, key: str, start: int, out: memoryview) -> int:
        import obstore

        if not len(out):
            return self._length(key)
        with _asking(self.path / key):
            try:
                found = obstore.get(self._store, self._key(key), options={"range": (start, start + len(out))})
                content, length = memoryview(found.bytes()), int(found.meta["size"])
            except Exception:
                if (length := self._length(key)) > start:
                    raise
                return length  # which such a range is refused for
        assert len(content) == min(len(out), length - start)
        out[: len(content)] = content
        return length

    def _length(self, key: str) -> int:
        if (size := self.size(key)) is None:
            raise FileNotFoundError(2, "No such object", str(self.path / key))
        return size

    def read_many(self, keys: Sequence[str]) -> Iterator[bytes | OSError]:
        def read(key: str) -> bytes | OSError:
            try:
                return self.read(key)
            except FileNotFoundError as error:
                return error

        with ThreadPoolExecutor(AT_ONCE) as threads:
            # A window that moves: some requests are under way at any time, and no more answers wait in memory than
            # that.
            left = iter(keys)
            waiting = deque(threads.submit(read, key) for key in islice(left, AT_ONCE))
            try:
                while waiting:
                    yield waiting.popleft().result()
                    waiting.extend(threads.submit(read, key) for key in islice(left, 1))
            finally:
                for future in waiting:
                    future.cancel()

    def size(self, key: str) -> int | None:
        import obstore

        try:
            with _asking(self.path / key):
                return int(obstore.head(self._store, self._key(key))["size"])
        except FileNotFoundError:
            return None

    def list_files(self, folder: str) -> list[str]:
        return sorted(key for key in self.below(folder) if "/" not in key)

    def folders(self) -> list[str]:
        import obstore

        with _asking(self.path):
            prefixes = obstore.list_with_delimiter(self._store, self.path.key or None)["common_prefixes"]
        return sorted(prefix.rpartition("/")[2] for prefix in prefixes)

    def sizes(self) -> dict[str, int]:
        return {key: int(meta["size"]) for key, meta in self.below("").items()}

    def seconds_since_write(self) -> float:
        # Hours are meant here, so that the store's clock and this host's may be some minutes apart.
        return time.time() - max((meta["last_modified"].timestamp() for meta in self.below("").values()), default=0.0)

    def below(self, folder: str) -> dict[str, Any]:
        """Return {path below the folder: what obstore says of it} of every object in it."""
        import obstore

        prefix = self._key(folder)
        with _asking(self.path / folder if folder else self.path):
            metas = [meta for page in obstore.list(self._store, prefix or None) for meta in page]
        return {str(meta["path"])[len(prefix) + 1 if prefix else 0 :]: meta for meta in metas}

    def put(self, key: str, data: bytes, tag: str | None = None, *, new: bool = False) -> str | None:
        """Put an object: over one that `tag` is of, where none is (`new`), or whatever is there; None: it is not so.

        A request that was repeated after its answer was lost says None too, though it was done.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        mode: Any = "create" if new else {"e_tag": tag} if tag is not None else "overwrite"
        pieces = None if mode == "overwrite" else False  # None: several requests where it is longer than one piece
        try:
            with _asking(self.path / key):
                found = obstore.put(
                    self._store, self._key(key), data, mode=mode, use_multipart=pieces, chunk_size=_PIECE
                )
                return str(found["e_tag"])
        except (AlreadyExistsError, PreconditionError):
            return None
        except FileNotFoundError:
            if tag is not None:  # what it was of is gone
                return None
            raise

    def put_if(self, key: str, data: bytes, tag: str | None) -> str | None:
        return self.put(key, data, tag, new=tag is None)

    def delete_if(self, key: str, tag: str) -> None:
        # No store of objects removes on a condition: one that changes in this moment is lost, and made again.
        with contextlib.suppress(FileNotFoundError):
            if self.look(key)[1] == tag:
                self.remove([key])

    def entries(self, folder: str) -> list[str]:
        return sorted({key.partition("/")[0] for key in self.below(folder)})

    def make_stage(self, stage: Url) -> None:
        """Do nothing: a prefix is there as soon as an object has it."""

    def discard_entries(self, names: Collection[str]) -> None:
        if names:
            keys = self.below(LEASES_FOLDER)
            self.remove([f"{LEASES_FOLDER}/{key}" for key in keys if key.partition("/")[0] in names])

    def put_if_absent(self, key: str, data: bytes) -> bytes:
        """Put an object where there is none; returns the content of the one that stands."""
        while True:
            if self.put(key, data, new=True) is not None:
                return data
            with contextlib.suppress(FileNotFoundError):  # it was removed in between
                return self.read(key)

    def create(self, key: str, data: bytes) -> None:
        """Write a new file; also make sure that the store minds conditions, on which all else hangs."""
        # The second put of the same key must fail. Servers that ignore the condition exist, and there two writers would
        # each believe that they were first.
        self.put_if_absent(key, data)
        if self.put(key, data, new=True) is not None:
            raise UserError(
                f"{self.path} ignores the condition If-None-Match of a put, so writers would harm each other there: "
                "use a store that minds it"
            )

    def update(self, key: str, change: Callable[[bytes | None], bytes]) -> None:
        while True:
            try:
                old, tag = self.look(key)
            except FileNotFoundError:
                old, tag = None, None
            new = change(old)
            # Read, change, put if nobody else did meanwhile, else again: an object store's way to a lock.
            if new == old or self.put(key, new, tag, new=tag is None) is not None:
                return

    def put_staged(self, stage: Url, name: str, pieces: Iterable[bytes]) -> None:
        """Begin to put it; AT_ONCE are under way at a time, and `settle` waits for all."""
        uploads = self._uploads.setdefault(stage, [])
        if len(uploads) >= AT_ONCE:
            # Waits for the eldest that may still be under way, so memory holds at most AT_ONCE chunks.
            uploads[-AT_ONCE].result()
        uploads.append(uploaders().submit(self.put, self._below(stage / name), b"".join(pieces)))

    def _below(self, url: Url) -> str:
        """Return the key of a URL below this place."""
        assert not self.path.key or url.key.startswith(self.path.key + "/")
        return url.key[len(self.path.key) + 1 if self.path.key else 0 :]

    def commit_staged(self, stage: Url, keys: Sequence[str], record: str, data: bytes) -> bytes:
        for upload in self._uploads.pop(stage, []):
            upload.result()
        self._offered.add(stage)  # from here on others may do what it says
        settled = f"{self._below(stage).rpartition('.')[0]}.settled"
        plan = json.dumps({"stage": stage.name, "keys": [*keys], "record": data.decode()})
        # Another's plan may stand there already: then its chunks are the unit, and ours are removed below.
        chosen = json.loads(self.put_if_absent(settled, plan.encode()))
        # The record is looked for after the plan stands: another may have settled, committed and removed its plan since
        # our unit was found free, and ours would be a second copy.
        standing = self._get(record) or self._bring(chosen, record)
        stages = dict.fromkeys((chosen["stage"], stage.name))
        staged = [f"{LEASES_FOLDER}/{at}/{_name(key)}" for at in stages for key in chosen["keys"]]
        self.remove([settled, *staged])
        return standing

    def _get(self, key: str) -> bytes | None:
        try:
            return self.read(key)
        except FileNotFoundError:
            return None

    def _bring(self, chosen: dict[str, Any], record: str) -> bytes:
        """Copy the chunks that were settled on, then put their record; returns the record that stands."""
        import obstore

        def copy(key: str) -> None:
            source = f"{LEASES_FOLDER}/{chosen['stage']}/{_name(key)}"
            with _asking(self.path / source):
                obstore.copy(self._store, self._key(source), self._key(key))

        try:
            with ThreadPoolExecutor(AT_ONCE) as threads:
                [*threads.map(copy, chosen["keys"])]
        except FileNotFoundError as error:
            if (standing := self._get(record)) is not None:  # another was here, and has removed them
                return standing
            raise UserError(
                f"{error.filename} was removed by hand: remove all of {self.path}/{LEASES_FOLDER} and run the same "
                "command again"
            ) from None
        return self.put_if_absent(record, chosen["record"].encode())

    def discard(self, stage: Url) -> None:
        """Remove what was staged, unless it may be committed yet: by `commit_staged`, or `UnitLeases.sweep`."""
        for upload in self._uploads.pop(stage, []):
            with contextlib.suppress(Exception):  # why the write ended, or will be told of by the next request
                upload.result()
        if stage in self._offered:
            self._offered.remove(stage)
        else:
            folder = self._below(stage)
            self.remove([f"{folder}/{name}" for name in self.list_files(folder)])

    def remove(self, keys: Collection[str]) -> None:
        import obstore

        if keys:
            with _asking(self.path):
                obstore.delete(self._store, [self._key(key) for key in keys])

    def remove_all(self) -> None:
        keys = self.below("")
        records = [key for key in keys if key.partition("/")[0] in RECORD_FOLDERS]
        # As for a folder: first the claims to be whole, the manifest last, so that what is left is still known for a
        # store.
        for some in (["complete.json"], records, keys.keys() - {self._first}, [self._first]):
            self.remove(some)

    def zarr(self, key: str) -> dict[str, Any]:
        from zarr.storage import ObjectStore

        return {"store": ObjectStore(self._store, read_only=True), "path": self._key(key)}
