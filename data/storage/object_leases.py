"""Claims in an object store: `data.storage.file_leases` where nothing can be locked.

    claims/<split>.<unit>    who has it; its owner's heartbeat is a put that changes it, and only if it is still his

A claim is made by create-if-absent and ends with its unit. It is taken over, by a put over just the version that was
judged, where its owner's process is gone from this host, or the object stood still for LEASE_S by the watcher's own
clock: no two clocks have to agree. Claims save work, and no more hangs on them: `data.storage.object_store` says what a
store holds.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from data.base.errors import UserError
from data.storage import file_leases as claims
from data.store.manifest import Json

if TYPE_CHECKING:
    from data.storage.local import Url
    from data.storage.object_store import ObjectStorage

FOLDER = "claims"


class ObjectLeases:
    """The claims of one store."""

    def __init__(self, bucket: ObjectStorage) -> None:
        self._bucket = bucket
        self._seen: dict[str, tuple[str, float]] = {}  # a claim's last version, and when it was first seen

    @contextlib.contextmanager
    def take(self, split: str, unit: int, names: Sequence[str], made_by: Json) -> Iterator[bool]:
        """Hold the claim to `names` of a unit for the `with` block; False, and nothing held, where another has it."""
        key = f"{FOLDER}/{split}.{unit:06d}"
        with claims.owning(names, made_by) as owner:
            tag = self._create(key, owner)
            if tag is None:
                yield False
                return
            try:
                with self._beating(key, owner, tag):
                    yield True
            finally:
                if self._still(key, owner):
                    self._bucket.remove([key])

    def stage(self, split: str, unit: int, site: str) -> Url:
        """A new prefix for the chunks of one write."""
        return self._bucket.path / f"{FOLDER}/{split}.{unit:06d}.{site}.{uuid.uuid4().hex}"

    def unstage(self, stage: Url) -> None:
        """Remove what is left of a write."""
        self._bucket.discard(stage)

    def owners(self) -> list[Json]:
        """What the claims say of their owners."""
        found = self._bucket.reads([f"{FOLDER}/{name}" for name in self._claims()])
        return [json.loads(text) for text in found if text is not None]

    def any(self) -> bool:
        """Whether anything is claimed or staged, or left of either."""
        return bool(self._bucket.below(FOLDER))

    def sweep(self, is_committed: Callable[[str, int, str], bool]) -> None:
        """Remove what dead processes left, and whatever belongs to names committed by now.

        What is staged and not committed stays: it may be settled on at any time.
        """
        gone, claimed = [], {}  # and by what a claim was judged
        for name in self._bucket.below(FOLDER):
            split, unit, *rest = name.partition("/")[0].split(".", 2)
            if rest:
                done = is_committed(split, int(unit), rest[0].rpartition(".")[0])
            elif (found := self._look(f"{FOLDER}/{name}")) is None:
                continue
            else:
                owner, claimed[f"{FOLDER}/{name}"] = json.loads(found[0]), found[1]
                done = self._is_free(f"{FOLDER}/{name}", *found) or all(
                    is_committed(split, int(unit), site) for site in owner["names"]
                )
            if done:
                gone.append(f"{FOLDER}/{name}")
        now = {key: self._look(key) for key in claimed if key in gone}  # one may have been taken over since
        self._bucket.remove([key for key in gone if (found := now.get(key)) is None or found[1] == claimed[key]])

    def _claims(self) -> list[str]:
        return [name for name in self._bucket.names(FOLDER) if name.count(".") == 1]

    def _look(self, key: str) -> tuple[bytes, str] | None:
        try:
            return self._bucket.look(key)
        except FileNotFoundError:
            return None

    def _is_free(self, key: str, text: bytes, tag: str) -> bool:
        """Whether the owner of a claim is dead."""
        now = time.monotonic()
        if self._seen.get(key, ("", 0.0))[0] != tag:
            self._seen[key] = (tag, now)
        return claims.is_gone(json.loads(text)) or now - self._seen[key][1] > claims.LEASE_S

    def _create(self, key: str, owner: Json) -> str | None:
        """Make a claim, or take a dead owner's over; its version, or None where a living one has it."""
        text, found = json.dumps(owner).encode(), self._look(key)
        if found is not None and not self._is_free(key, *found):
            return None
        tag = self._bucket.put(key, text, found[1] if found else None, new=found is None)
        return tag or self._still(key, owner)

    def _still(self, key: str, owner: Json) -> str | None:
        """The version of a claim that is the owner's after all: the answer to his last put was lost."""
        found = self._look(key)
        return found[1] if found and json.loads(found[0])["token"] == owner["token"] else None

    @contextlib.contextmanager
    def _beating(self, key: str, owner: Json, tag: str) -> Iterator[None]:
        """Show every BEAT_S that the owner of a claim lives, for as long as it is his."""
        done = threading.Event()

        def beat(tag: str | None) -> None:
            count = 0
            while tag is not None and not done.wait(claims.BEAT_S):
                count += 1
                with contextlib.suppress(UserError):  # the next beat will tell
                    text = json.dumps(owner | {"beat": count}).encode()
                    tag = self._bucket.put(key, text, tag) or self._still(key, owner)

        thread = threading.Thread(target=beat, args=(tag,), name=f"heartbeat {key}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
