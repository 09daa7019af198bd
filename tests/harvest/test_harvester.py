"""python -m pytest tests/harvest/test_harvester.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.base.errors import UserError
from data.base.files import format_bytes
from data.base.sites import Site
from data.store.layout import Layout
from data.store.manifest import HELDOUT, TRAIN, Manifest
from data.store.store import ORIGIN, TOKENS, Store
from harvest.harvester import Harvester, made_by, widths_of
from harvest.packing import PackedTokens
from harvest.units import covered, plan, refuse_mixed
from tests.helpers.corpus import LAYERS, WIDTH, build, contents

T = 8
SITES = ("resid_pre.0", "resid_post.0", "resid_post.1", "mlp_out.1")


def text(n: int, seed: int) -> PackedTokens:
    """n contexts of random tokens, about one in six of them not kept."""
    rng = np.random.default_rng(seed)
    contexts = rng.integers(3, 40, (n, T), dtype=np.int32)
    contexts[rng.random((n, T)) < 0.16] = 1
    return PackedTokens(contexts, contexts != 1, np.array([0, 3 * T]), ("first", "second"), T)


PACKED = {TRAIN: text(11, 0), HELDOUT: text(3, 1)}


def store_in(folder: Path, dtype: str = "float32") -> Store:
    """Units of four contexts in four chunks of 8 rows."""
    layout = Layout(dtype, T, 8, 4, mixing_seed=3)
    return Store.create_or_open(folder, Manifest({"layout": vars(layout)}, {}, "tiny", WIDTH))


def harvest(
    store: Store, model: Any, *names: str, packed: dict[str, PackedTokens] = PACKED, lm_batch: int = 3
) -> Harvester:
    sites = [Site.parse(name) for name in names]
    worker = Harvester(store, model, packed, widths_of(model, sites, packed[TRAIN]), lm_batch)
    worker.run(plan(store, store.layout, packed, sites))
    return worker


def stored(store: Store, split: str, site: str) -> Tensor:
    """All committed rows by unit, read from the chunk files without the store's readers."""
    dtype = store.rows_of(site).dtype
    rows = []
    for _, commit in sorted(store.committed(split, site).items()):
        files = [np.frombuffer((store.path / chunk.key).read_bytes(), dtype) for chunk in commit.chunks]
        rows.append(np.concatenate(files).reshape(-1, *store.row_shape(split, site))[: commit.rows])
    whole = np.concatenate(rows)
    return torch.from_numpy(whole).view(torch.bfloat16) if dtype == np.uint16 else torch.from_numpy(whole)


def hidden(model: Any, contexts: np.ndarray) -> tuple[Tensor, ...]:
    """transformers' own hidden states, one context at a time: embedding, then each block's output but the last."""
    each = [
        model(input_ids=torch.from_numpy(row)[None].long(), output_hidden_states=True, use_cache=False).hidden_states
        for row in contexts
    ]
    return tuple(torch.cat(layer) for layer in zip(*each, strict=True))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_row_is_the_hidden_state_of_its_token(tmp_path: Path, name: str) -> None:
    model, store = build(name), store_in(tmp_path)
    harvest(store, model, *SITES)
    for split, packed in PACKED.items():
        states = hidden(model, packed.contexts)
        origin, tokens = stored(store, split, ORIGIN).long(), stored(store, split, TOKENS)
        sequence, position = origin.unbind(1)
        assert sorted(map(tuple, origin.tolist())) == [tuple(at) for at in np.argwhere(packed.keep).tolist()]
        assert (tokens == torch.from_numpy(packed.contexts)[sequence, position]).all()
        for site, layer in (("resid_pre.0", 0), ("resid_post.0", 1), ("resid_post.1", 2)):
            torch.testing.assert_close(stored(store, split, site), states[layer][sequence, position])
    assert LAYERS == 3


def test_rows_are_mixed_within_their_unit_and_alike_at_all_sites(tmp_path: Path) -> None:
    model, store = build(), store_in(tmp_path)
    harvest(store, model, *SITES)
    origin = stored(store, TRAIN, ORIGIN)
    at = 0
    for unit, commit in store.committed(TRAIN, ORIGIN).items():
        mine = origin[at : at + commit.rows]
        assert set((mine[:, 0] // 4).tolist()) == {unit}
        order = (mine[:, 0] * T + mine[:, 1]).tolist()
        assert order != sorted(order)
        at += commit.rows
        assert {store.committed(TRAIN, site)[unit].rows for site in (*SITES, TOKENS)} == {commit.rows}
    assert list(store.committed(TRAIN, ORIGIN)) == [0, 1, 2]
    assert list(store.committed(HELDOUT, ORIGIN)) == [0]


def test_a_site_does_not_depend_on_what_is_taken_with_it(tmp_path: Path) -> None:
    model = build()
    together, alone = store_in(tmp_path / "a"), store_in(tmp_path / "b")
    harvest(together, model, *SITES)
    for site in SITES:
        harvest(alone, model, site)
    assert contents(together.path) == contents(alone.path)


def test_bytes_planned_are_bytes_written(tmp_path: Path) -> None:
    model, store = build(), store_in(tmp_path, "bfloat16")
    sites = [Site.parse(site) for site in SITES]
    widths = widths_of(model, sites, PACKED[TRAIN])
    planned = sum(unit.bytes(widths, store.layout) for unit in plan(None, store.layout, PACKED, sites))
    harvest(store, model, *SITES)
    assert planned == sum(len(data) for name, data in contents(store.path).items() if "/c." in name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_storage_rounds_to_nearest(tmp_path: Path, dtype: str) -> None:
    model, exact, rounded = build(), store_in(tmp_path / "a"), store_in(tmp_path / "b", dtype)
    for store in (exact, rounded):
        harvest(store, model, "resid_post.1")
    wanted = stored(exact, TRAIN, "resid_post.1").to(getattr(torch, dtype))
    assert torch.equal(stored(rounded, TRAIN, "resid_post.1"), wanted)


def test_what_a_crash_left_out_of_a_unit_is_made_up_for(tmp_path: Path) -> None:
    model, whole, store = build(), store_in(tmp_path / "a"), store_in(tmp_path / "b")
    for each in (whole, store):
        harvest(each, model, "resid_post.0", "mlp_out.1")
    for lost in ("train/000001.tokens", "train/000001.origin", "train/000002.mlp_out.1", "heldout/000000.origin"):
        (store.path / "commits" / f"{lost}.json").unlink()
    store = Store.open(store.path)
    sites = [Site.parse("resid_post.0"), Site.parse("mlp_out.1")]
    left = [(u.split, u.index, u.sites, u.index_arrays) for u in plan(store, store.layout, PACKED, sites)]
    assert left == [
        (HELDOUT, 0, (), (ORIGIN,)),
        (TRAIN, 1, (), (TOKENS, ORIGIN)),
        (TRAIN, 2, ("mlp_out.1",), ()),
    ]
    harvest(store, model, "resid_post.0", "mlp_out.1")
    assert contents(store.path) == contents(whole.path)


def test_covered_counts_rows_without_a_gap_at_every_site(tmp_path: Path) -> None:
    model, store = build(), store_in(tmp_path)
    harvest(store, model, "resid_post.0")
    sites, rows = [Site.parse("resid_post.0")], int(PACKED[TRAIN].keep.sum())
    assert covered(store, sites, {TRAIN: rows, HELDOUT: 1})
    assert not covered(store, sites, {TRAIN: rows + 1})
    assert not covered(store, [*sites, Site.parse("resid_post.1")], {TRAIN: 1})
    first = store.committed(TRAIN, TOKENS)[0].rows
    (store.path / "commits/train/000001.tokens.json").unlink()
    assert covered(Store.open(store.path), sites, {TRAIN: first})
    assert not covered(Store.open(store.path), sites, {TRAIN: first + 1})


@pytest.mark.parametrize(
    ("dtype", "value", "told"),
    [
        ("float32", float("nan"), r"\|x\| = nan"),
        ("bfloat16", float("inf"), r"\|x\| = inf"),
        ("float16", 6.1e4, r"\|x\| = 6[01]\d{3}"),
        ("float16", -1e6, r"\|x\| = inf"),
    ],
)
def test_a_value_that_cannot_be_stored_is_traced(tmp_path: Path, dtype: str, value: float, told: str) -> None:
    model, store = build(), store_in(tmp_path, dtype)
    packed = {TRAIN: text(11, 0)}
    packed[TRAIN].contexts[packed[TRAIN].contexts == 17] = 18
    packed[TRAIN].contexts[6, 5], packed[TRAIN].keep[6, 5] = 17, True
    model.get_input_embeddings().weight[17, 4] = value
    with pytest.raises(
        UserError, match=f"site resid_pre.0 has {told} at token 5 .'17'. of train sequence 6, .* second"
    ):
        harvest(store, model, "resid_pre.0", packed=packed)
    assert list(store.committed(TRAIN, "resid_pre.0")) == [0]


def test_float16_takes_what_it_can_hold(tmp_path: Path) -> None:
    model, store = build(), store_in(tmp_path, "float16")
    model.get_input_embeddings().weight[17, 4] = 5.9e4
    harvest(store, model, "resid_pre.0")
    assert stored(store, TRAIN, "resid_pre.0").max() > 5.8e4


def test_a_value_at_a_token_left_out_does_not_matter(tmp_path: Path) -> None:
    model, store = build(), store_in(tmp_path)
    model.get_input_embeddings().weight[1, 4] = float("nan")
    harvest(store, model, "resid_pre.0")
    assert stored(store, TRAIN, "resid_pre.0").isfinite().all()


def test_another_device_or_library_is_refused(tmp_path: Path) -> None:
    model, store = build(), store_in(tmp_path)
    worker = harvest(store, model, "resid_post.0")
    mine = made_by(model)
    assert worker.made_by == mine == store.committed(HELDOUT, TOKENS)[0].made_by
    assert mine["device"].startswith("cpu ")
    assert mine["torch"] == torch.__version__
    refuse_mixed(store, mine)
    with pytest.raises(UserError, match=r'begun elsewhere \(torch: .* here, "0.1" asked\).*allow_mixed_devices=true'):
        refuse_mixed(store, {**mine, "torch": "0.1"})


def test_sizes_are_readable() -> None:
    assert [format_bytes(n) for n in (0, 999, 1500, 2.5e6, 3.21e9, 4e15)] == [
        *("0 bytes", "999 bytes", "1.5 kB", "2.5 MB", "3.2 GB", "4000.0 TB")
    ]
