"""python -m pytest -m slow tests/harvest/test_hostile.py: hundreds of bad settings and texts, by a seeded generator.

Each is refused in one sentence, or, of the texts, read; none ends in a traceback, and no bad setting is accepted.
"""

from __future__ import annotations

import copy
import gzip
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.base.errors import UserError, to_sentence
from data.store.manifest import TRAIN
from harvest.documents import FilesText
from harvest.packing import Packing, pack
from harvest.request import HarvestRequest
from harvest.run import harvest
from tests.helpers.corpus import config, save_model, story, tokenizer, write_stories

pytestmark = pytest.mark.slow

NO_NUMBERS: list[Any] = [
    "x",
    "5",
    1.5,
    math.nan,
    math.inf,
    -math.inf,
    -1,
    True,
    False,
    [],
    [1],
    {},
    {"a": 1},
    "",
    "nan",
]
NO_FLAGS: list[Any] = ["no", "yes", "true", 0, 1, 0.0, math.nan, [], {}, ""]
NO_CHOICES: list[Any] = ["X", "", 3, True, [], {}, "int9", " ", "float32 "]
NO_TEXTS: list[Any] = [3, True, 1.5, [], [1], {}, math.nan]
BAD_BY_SETTING: dict[str, list[Any]] = {
    "tokens": [*NO_NUMBERS, None, 0, 1e300],
    "heldout_tokens": [*NO_NUMBERS, None, 1e300],
    "lm_batch": [*NO_NUMBERS, None, 0],
    "cache": [*NO_TEXTS, None, "", "  ", "s4://x/y", "s3://"],
    "allow_mixed_devices": [*NO_FLAGS, None],
    "sites": ["", [], None, {}, 3, True, ["resid_post.-1"], ["resid_post"], [""], [None], ["resid_post.99"], [[1]]],
    "packing.context": [*NO_NUMBERS, None, 0, 1, 65, 10**9],
    "packing.bos": [*NO_CHOICES, None],
    "packing.separator": [*NO_FLAGS, None],
    "packing.keep_special": [*NO_FLAGS, None],
    "packing.shuffle": ["x", "5", 1.5, math.nan, math.inf, True, [], {}],
    "packing.heldout": ["x", 1, 1.0, 2, -0.1, math.nan, math.inf, True, [], {}, None, 0],
    "packing": [None, 3, "default", []],
    "model": [None, 3, "gpt2", []],
    "text": [None, 3, "files", []],
    "store": [None, 3, "x", []],
    "model.name": [3, True, [], {}, None, "", "/no/such/folder", "x" * 5000, "a\0b", "./none.gguf", "../.."],
    "model.revision": [*NO_TEXTS, "main"],
    "model.dtype": NO_CHOICES,
    "model.device": [*NO_TEXTS, "tpu", "cuda:99", "cpu:1", "mps:x", ""],
    "model.device_map": [3, True, [], 1.5],
    "model.attn_implementation": NO_TEXTS,
    "text.kind": [*NO_CHOICES, None, "os.system", "harvest.text_files.FilesText"],
    "text.paths": [None, [], "", [""], [3], [None], 3, {}, True, "none*.txt", "a\0b", "x" * 5000, ["/dev/null"]],
    "text.field": [*NO_TEXTS, None, "words", ""],
    "store.dtype": NO_CHOICES,
    "store.chunk_rows": [*NO_NUMBERS, 0, 7],
    "store.chunks_per_unit": [*NO_NUMBERS, 0],
    "store.mixing_seed": NO_NUMBERS,
    "store.encoding": [*NO_CHOICES, "float32"],
    "store.codec": [*NO_CHOICES, "gzip"],
    "store.shards": NO_FLAGS,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A configuration that is good."""
    root = tmp_path_factory.mktemp("hostile")
    text = write_stories(root / "stories.jsonl", range(40))
    return config(save_model(root / "tiny"), text, root / "cache")


def changed(plain: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    found = copy.deepcopy(plain)
    *groups, last = name.split(".")
    inner = found
    for group in groups:
        inner = inner[group]
    inner[last] = value
    return found


def refused(cfg: dict[str, Any]) -> bool:
    """Whether it is refused before anything is written; then in one sentence."""
    try:
        request = HarvestRequest.from_config(cfg)
        # What only a look at the text shows.
        request.identity(tokenizer())
        request.new_manifest({"compute_dtype": "float32"}, 32)
    except Exception as error:
        said = to_sentence(error)
        assert said is not None, error
        assert "\n" not in said and len(said) < 2000, said[:200]
        return True
    return False


def test_no_bad_value_of_a_setting_is_accepted(plain: dict[str, Any]) -> None:
    HarvestRequest.from_config(plain)
    cases = [(name, value) for name, values in BAD_BY_SETTING.items() for value in values]
    assert len(cases) > 250
    accepted = [f"{name}={value!r}"[:99] for name, value in cases if not refused(changed(plain, name, value))]
    assert not accepted


def typos(name: str, rng: random.Random) -> Iterator[str]:
    at = rng.randrange(len(name))
    yield name[:at] + name[at + 1 :]
    yield name[:at] + rng.choice("abcxyz") + name[at:]
    yield name + "s"
    yield name.upper()


def test_no_key_that_nothing_reads_is_accepted(plain: dict[str, Any]) -> None:
    rng = random.Random(0)
    groups = {"": plain, **{f"{name}.": plain[name] for name in ("model", "text", "packing", "store")}}
    accepted, count = [], 0
    for group, settings in groups.items():
        for known in [*settings, "_target_", "_partial_", "foo"]:
            for typo in [known] if known.startswith(("_", "foo")) else typos(known, rng):
                if typo and typo not in settings:
                    if not refused(changed(plain, f"{group}{typo}", rng.choice([1, "x", None]))):
                        accepted.append(f"{group}{typo}")
                    count += 1
    assert not accepted and count > 100


WHOLE = [story(number) for number in range(30)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in WHOLE).encode()


def parquet_bytes(folder: Path) -> bytes:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": WHOLE}), folder / "whole.parquet")
    return (folder / "whole.parquet").read_bytes()


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Cut, flipped, doubled or with something else put in."""
    at = rng.randrange(len(data))
    kind = rng.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + rng.randbytes(rng.randrange(1, 40)) + data[at:]
    if kind == 3:
        return data[at:] + data[:at]
    return rng.randbytes(rng.randrange(200))


ODD_LINES = [
    "[" * 100_000,
    '{"text": ' + "9" * 5000 + "}",
    '{"text": "a", "text": 5}',
    '{"text": NaN}',
    '{"text": [[1]]}',
    '{"text": [1, true]}',
    '{"text": [99999999999]}',
    '{"text": [-1]}',
    '{"text": ["a", 1]}',
    '{"text": {"text": "a"}}',
    '{"text": "\\ud800\\udfff\\udfff"}',
    '{"text": "' + "\\u0000" * 100 + '"}',
    '{"text": "\\udcff1 2 3"}',
    "null",
    "5",
    '"text"',
    "[]",
    "{}",
    "",
    "\ufeff",
    '{"text": "a"} {"text": "b"}',
]


def hostile_files(folder: Path, rng: random.Random) -> Iterator[Path]:
    """Files by name and content that somebody may have."""
    parquet = parquet_bytes(folder)
    sources = {".jsonl": LINES, ".json": LINES, ".txt": LINES, ".parquet": parquet, ".jsonl.gz": gzip.compress(LINES)}
    import pyarrow

    sources[".jsonl.zst"] = bytes(pyarrow.compress(LINES, codec="zstd", asbytes=True))
    for number in range(300):
        suffix = rng.choice(list(sources))
        path = folder / f"damaged {number}{suffix}"
        path.write_bytes(damaged(sources[suffix], rng))
        yield path
    for number, line in enumerate(ODD_LINES):
        for suffix in (".jsonl", ".json"):
            path = folder / f"odd[{number}]{suffix}"
            path.write_text("\n".join([LINES.decode().splitlines()[0], line]) if number % 2 else line)
            yield path
    (folder / "folder.txt").mkdir()
    (folder / "loop.txt").symlink_to(folder / "loop.txt")
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    (folder / "utf16.txt").write_bytes("abc".encode("utf-16"))
    (folder / "two.tar.gz").write_bytes(gzip.compress(b"a"))
    (folder / "no suffix").write_text("a")
    for name in ("folder.txt", "loop.txt", "gone.txt", "utf16.txt", "two.tar.gz", "no suffix"):
        yield folder / name


def test_no_text_ends_in_a_traceback(tmp_path: Path) -> None:
    packing = Packing.of({"context": 4, "heldout": 0.0})
    rng, counts = random.Random(1), {"read": 0, "refused": 0}
    for path in hostile_files(tmp_path, rng):
        source = FilesText(paths=[str(path)])
        try:
            first = source.identity()
            packed = pack(source, tokenizer(), packing, TRAIN, 1, vocabulary=42)
            assert source.identity() == first and packed.contexts.max() < 42
            counts["read"] += 1
        except Exception as error:
            said = to_sentence(error)
            assert said is not None, path.name
            assert "\n" not in said, path.name
            assert isinstance(error, UserError), path.name
            counts["refused"] += 1
    assert min(counts.values()) > 50


def test_what_is_read_of_a_damaged_text_is_harvested(tmp_path: Path) -> None:
    model, rng, done = save_model(tmp_path / "tiny"), random.Random(2), 0
    small = ("tokens=8", "heldout_tokens=0", "packing.heldout=0", "packing.context=8", "text.field=text")
    for number in range(12):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(damaged(LINES, rng))
        try:
            store = harvest(config(model, path, tmp_path / f"cache {number}", *small))
            assert store.rows(TRAIN, "resid_post.1") >= 8
            done += 1
        except UserError as error:
            assert "\n" not in str(error)
    assert done
