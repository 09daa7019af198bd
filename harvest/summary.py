"""What a harvest says when it ends: what the store holds, which sites need care, how to train on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from data.base.command import override
from data.base.sites import Site
from data.store.files import extent
from data.store.manifest import HELDOUT, TRAIN
from data.store.massive import TIMES_MEDIAN, has_massive_rows, massive_line
from data.store.store import Store

# Training's own defaults (conf/train.yaml), which need not be given where the store has that much.
_TRAIN_TOKENS, _CALIBRATION, _HELDOUT, _BATCH = 1_000_000, 65_536, 50_000, 1024
_ORDINARY = 0.9  # of the rows are surely left where massive ones, at most a few a context, are left out
_OUTPUT_OF = {"mlp_in": "mlp_out", "attn_in": "attn_out"}


def summary(store: Store) -> str:
    """Say in a line what a store holds."""
    return "; ".join(
        f"{split}: " + ", ".join(f"{site} {rows:,}" for site, rows in sites.items())
        for split, sites in extent(store).items()
        if sites
    )


def advice(store: Store, sites: Sequence[Site]) -> Iterator[str]:
    """Yield a line for each site that has massive activations, then the command that trains on the store, and one for a
    transcoder where it holds what a module reads and puts out."""
    for site in map(str, sites):
        if store.rows(TRAIN, site):
            line = massive_line(site, store.stats(TRAIN, site))
            if line is not None:
                yield f"note: {line}"
    yield f"train on it: {train_command(store, str(sites[0]))}"
    pair = module_pair(store, sites)
    if pair is not None:
        yield f"or a transcoder: {train_command(store, *pair)}"


def module_pair(store: Store, sites: Sequence[Site]) -> tuple[str, str] | None:
    """Name the first input and output of one module that the store holds, one of them among `sites`;
    None where there are none."""
    names = [str(site) for site in sites]
    for name in store.sites(TRAIN):
        site = Site.parse(name)
        if site.kind in _OUTPUT_OF:
            target = str(Site(_OUTPUT_OF[site.kind], site.layer))
            harvested = store.rows(TRAIN, name) and store.rows(TRAIN, target)
            if harvested and (name in names or target in names):
                return name, target
    return None


def train_command(store: Store, site: str, target: str | None = None) -> str:
    """Return the command for a training on a site, as long as its rows allow; with `target` for a transcoder."""
    sites = [site] if target is None else [site, target]
    parts = [override("store", str(store.path)), override("site", site)]
    parts += [override("target", target)] if target is not None else []
    rows = min(store.rows(TRAIN, name) for name in sites)
    heldout = min(store.rows(HELDOUT, name) for name in sites)
    if rows and any(has_massive_rows(store.stats(TRAIN, name)) for name in sites):
        parts.append(f"outliers={TIMES_MEDIAN:g}")
        rows, heldout = (int(n * _ORDINARY) for n in (rows, heldout))
    calibration = min(_CALIBRATION, rows // 10)
    # A chunk is not divided between training and calibration, and the last batch has to be whole.
    spare = rows - calibration - 2 * store.layout.chunk_rows
    batch = _BATCH if spare >= 16 * _BATCH else max(1, spare // 16)
    tokens = min(_TRAIN_TOKENS, max(1, spare - batch) // batch * batch)
    given = {"tokens": (tokens, _TRAIN_TOKENS), "batch": (batch, _BATCH)}
    given |= {"calibration_tokens": (calibration, _CALIBRATION), "heldout_tokens": (min(heldout, _HELDOUT), _HELDOUT)}
    parts += [f"{name}={value}" for name, (value, default) in given.items() if value != default]
    return f".venv/bin/python -m train {' '.join(parts)}"
