"""python -m benchmarks.kill --kills 100: the harvest under SIGKILL, with ever another number of processes.

Each store is harvested by processes that come and are killed at random (seeded) until its share of the kills is spent:
by the clock, or from within at a random change to the file system, so that the moments between two renames are met as
well. Then a random number of processes ends the work. The store must equal the one that a single, uninterrupted process
made, byte for byte, with no file or folder beyond it. Prints a line a store and exits 1 where one differs. With
--bucket the stores lie in a bucket of an S3 server on loopback, and it is requests to it that processes die before.

Processes are forked from this one after the imports, so a kill costs a fraction of a second. fsync does nothing here:
what a killed process has written stays. This one never asks the server itself: what asks cannot be forked.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.base.location import Location, parse_location
from data.storage.open import open_storage
from harvest import harvester, lm
from harvest.run import harvest
from tests.helpers.corpus import config, save_model, write_stories

WORKERS = (1, 2, 3, 4)
CALLS = ("open", "fsync", "mkdir", "replace", "unlink", "rmdir")  # of the module os, that writing a store goes through
REQUESTS = ("put", "get", "head", "copy", "delete", "list")  # of obstore
CALLS_TO_LIVE = 250
VARIANTS = (  # the settings of one store each, taken in turn
    ("sites=[resid_post.1]",),
    ("sites=[resid_post.1,attn_out.0]", "store.dtype=bfloat16"),
    ("sites=[resid_pre.0,mlp_out.2]", "packing.bos=context", "store.chunks_per_unit=8"),
    ("sites=[resid_mid.1]", "packing.keep_special=true", "store.chunk_rows=16"),
    ("sites=[resid_post.0,resid_post.1,resid_post.2]", "lm_batch=1"),
    ("sites=[resid_post.1,mlp_out.0]", "store.encoding=int8"),
    ("sites=[attn_out.1]", "store.encoding=int8", "store.shards=true"),
    ("sites=[resid_post.2]", "store.codec=blosc", "store.shards=true"),
)


def die_at(call: int, bucket: bool) -> None:
    """Let this process kill itself in front of its `call`th call of `CALLS`, or `REQUESTS`, from now."""
    left = iter(range(call))

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **options: Any) -> Any:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return wrapper

    if bucket:
        import obstore
    for name in REQUESTS if bucket else CALLS:
        module: Any = obstore if bucket else os
        setattr(module, name, counted(getattr(module, name)))


def start(cfg: dict[str, Any], call: int | None = None) -> int:
    """Fork a process that harvests `cfg`, and dies at its `call`th call; returns its number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        if call is not None:
            die_at(call, "://" in str(cfg["cache"]))
        harvest(cfg)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def reap(pids: set[int], *, wait: bool) -> Counter[str]:
    """Take out of `pids` the processes that ended, or all once they have: how many were killed, done, failed."""
    ended: Counter[str] = Counter()
    while True:
        for pid in sorted(pids):
            reaped, status = os.waitpid(pid, os.WNOHANG)
            if reaped:
                pids.discard(pid)
                killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
                ended["killed" if killed else "done" if status == 0 else "failed"] += 1
        if not (wait and pids):
            return ended
        time.sleep(0.01)


def snapshot(cache: Location) -> dict[str, bytes | None]:
    """Return every name below a place, with the bytes of those that are files."""
    if isinstance(cache, Path):
        return {str(p.relative_to(cache)): p.read_bytes() if p.is_file() else None for p in cache.rglob("*")}
    keys = [*open_storage(cache).sizes()]
    contents = open_storage(cache).read_many(keys)
    return {key: content if isinstance(content, bytes) else None for key, content in zip(keys, contents, strict=True)}


def differing(whole: str, cut: str) -> list[str]:
    """Return the names that one of two places lacks, or whose bytes differ."""
    here, there = snapshot(parse_location(whole)), snapshot(parse_location(cut))
    return sorted(name for name in here.keys() | there.keys() if here.get(name, "") != there.get(name, ""))


def litter(at: str) -> Counter[str]:
    """List what lies about that a finished store does not have."""
    remains, cache = Counter[str](), parse_location(at)
    if not isinstance(cache, Path):
        names = [key.rpartition("claims/")[2] for key in open_storage(cache).sizes() if "/claims/" in key]
        remains["stages"] = len({name.partition("/")[0] for name in names if "/" in name})
        remains["settled"] = sum(name.endswith(".settled") for name in names)
        remains["claims"] = sum(name.count(".") == 1 for name in names)
        return remains
    for folder, folders, files in os.walk(cache):  # which minds no folder that goes away meanwhile
        claims = os.path.basename(folder) == "claims"
        remains["stages"] += claims * len(folders)
        remains["claims"] += claims * len(files)
        remains["temporary files"] += sum(name.endswith((".tmp", ".partial")) for name in files)
    return remains


def aside(work: Callable[..., Any], *arguments: str) -> Any:
    """Do `work` in a process of its own and return what it gives."""
    with multiprocessing.get_context("fork").Pool(1) as process:
        return process.apply(work, arguments)


def torment(cfg: dict[str, Any], kills: int, patience: float, rng: random.Random) -> tuple[Counter[str], Counter[str]]:
    """Harvest `cfg` under about `kills` kills, then to its end; (how processes ended, litter met after kills)."""
    pids: set[int] = set()
    ended: Counter[str] = Counter()
    met: Counter[str] = Counter()
    while ended["killed"] < kills and not ended["done"] + ended["failed"]:
        workers = rng.choice(WORKERS)
        while len(pids) < workers:
            pids.add(start(cfg, rng.randrange(CALLS_TO_LIVE) if rng.random() < 0.5 else None))
        time.sleep(rng.uniform(0, patience))
        if rng.random() < 0.5:
            for pid in rng.sample(sorted(pids), rng.randint(1, len(pids))):
                os.kill(pid, signal.SIGKILL)
        now = reap(pids, wait=False)
        if now["killed"]:
            met += Counter({kind: 1 for kind, count in aside(litter, str(cfg["cache"])).items() if count})
        ended += now
    pids |= {start(cfg) for _ in range(rng.choice(WORKERS))}
    last = reap(pids, wait=True)
    if last["killed"]:  # by its count of calls, maybe after all others had gone: who is killed last cannot clean up
        last += reap({start(cfg)}, wait=True)
    return ended + last, met


@contextmanager
def places(bucket: bool) -> Iterator[tuple[Path, str]]:
    """Yield (a folder for the model and the text, where caches go)."""
    with tempfile.TemporaryDirectory() as folder:
        if not bucket:
            yield Path(folder), folder
            return
        with subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.s3", "kills"], stdout=subprocess.PIPE, text=True
        ) as server:
            try:
                assert server.stdout is not None
                for name, _, value in (item.partition("=") for item in server.stdout.readline().split()):
                    os.environ[name] = value
                yield Path(folder), "s3://kills"
            finally:
                server.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bucket", action="store_true", help="stores in a bucket, smaller ones and of two kinds only")
    options = parser.parse_args()
    os.environ["RANK"] = "1"  # no bars and summaries
    os.fsync = lambda fd: None
    # tqdm's own lock is one semaphore for all forked processes: who is killed while he holds it stops the others.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0  # nor a thread that may hold the lock while a process is forked
    harvester.POLL_S = 0.02
    rng, total, met, wrong = random.Random(options.seed), Counter[str](), Counter[str](), 0
    variants = VARIANTS[:2] if options.bucket else VARIANTS
    extent = ("tokens=300", "heldout_tokens=60") if options.bucket else ("tokens=2000", "heldout_tokens=300")
    share = -(-options.kills // len(variants))
    with places(options.bucket) as (folder, caches):
        path, text = save_model(folder / "tiny"), write_stories(folder / "stories.jsonl", range(200))
        model, tokenizer = lm.load_model({"name": str(path), "device": "cpu"}), lm.load_tokenizer({"name": str(path)})
        lm.load_model, lm.load_tokenizer = lambda model_cfg: model, lambda model_cfg: tokenizer
        number = 0
        while total["killed"] < options.kills or number < len(variants):
            variant = variants[number % len(variants)]
            whole, cut = (
                config(path, text, f"{caches}/{kind}{number}", *extent, *variant) for kind in ("whole", "cut")
            )
            began = time.monotonic()
            alone = reap({start(whole)}, wait=True)
            took = time.monotonic() - began
            ended, litters = torment(cut, share, took / 2, rng)
            differ = aside(differing, str(whole["cache"]), str(cut["cache"]))
            good = not differ and alone["done"] == 1 and not ended["failed"]
            wrong += not good
            print(
                f"store {number}: {ended['killed']} killed, {ended['done']} ended, "
                f"{'the same' if good else 'NOT THE SAME'} as in {took:.1f} s uninterrupted ({' '.join(variant)})",
                *differ[:5],
                flush=True,
            )
            total, met, number = total + ended, met + litters, number + 1
    moments = ", ".join(f"{kind} {count}" for kind, count in sorted(met.items()))
    print(f"{total['killed']} kills over {number} stores, {wrong} stores wrong; moments that met {moments}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
