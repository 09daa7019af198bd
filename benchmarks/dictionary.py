"""A store of activations with known features, and how many of them an SAE has found.

    python -m benchmarks.dictionary cache=outputs/dictionary [d=128] [features=512] [l0=8] [tokens=1_100_000]

x = sum_j c_j v_j + m + noise: v_j random unit directions, c_j active with a probability that falls as j^-1/2 (so that
the rarest feature is 1 / sqrt(features) as frequent as the first) and uniform between 1/2 and 3/2, m a mean shared by
all rows, noise of 1% of the variance. Train on it with store=<the folder printed>.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from omegaconf import OmegaConf
from torch import Tensor

from data.base.errors import UserError
from data.store.layout import Layout
from data.store.manifest import HELDOUT, TRAIN, Manifest
from data.store.store import Store
from data.store.zarr_bfloat16 import from_float32

SITE = "resid_post.0"
CHUNK_ROWS = 8192
NOISE = 0.01  # of the variance that the features make
FOUND = 0.9  # cosine from which a decoder row is a feature


@dataclass(frozen=True)
class Dictionary:
    """`features` unit directions in `d` dimensions, `l0` of them active on a row on average.

    offset: ||m||^2 in units of l0, near that of the share of the mean in what a language model carries.
    """

    d: int = 128
    features: int = 512
    l0: float = 8.0
    offset: float = 0.5
    seed: int = 0

    @property
    def directions(self) -> Float[np.ndarray, "features d"]:
        rows: NDArray[np.float64] = np.random.default_rng([self.seed, 0]).normal(size=(self.features, self.d))
        unit: NDArray[np.float64] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return unit

    @property
    def rates(self) -> Float[np.ndarray, " features"]:
        """Return the probability of each feature."""
        falling = np.arange(1, self.features + 1) ** -0.5
        rates: NDArray[np.float64] = self.l0 * falling / falling.sum()
        return rates

    def rows(self, count: int, part: int) -> Float[np.ndarray, "count d"]:
        """Return the rows of the part-th block, the same whenever it is asked for."""
        rng = np.random.default_rng([self.seed, 1, part])
        mean = np.random.default_rng([self.seed, 2]).normal(size=self.d) * np.sqrt(self.offset * self.l0 / self.d)
        active = rng.random((count, self.features), np.float32) < self.rates
        codes = np.where(active, rng.random((count, self.features), np.float32) + np.float32(0.5), np.float32(0))
        signal = codes @ self.directions.astype(np.float32)
        spread = np.sqrt(NOISE * self.l0 * 13 / 12 / self.d)  # E c^2 = 13/12
        noise = rng.standard_normal((count, self.d), np.float32) * np.float32(spread)
        x: NDArray[np.float32] = (signal + noise + mean.astype(np.float32)).astype(np.float32)
        return x

    def write(self, cache: Path, tokens: int, heldout: int) -> Store:
        """Write a bfloat16 store with so many rows of each split, rounded up to whole units."""
        layout = Layout("bfloat16", context=128, chunk_rows=CHUNK_ROWS, chunks_per_unit=1, mixing_seed=0)
        name = f"dictionary-{self.d}-{self.features}-{self.l0:g}-{self.offset:g}-{self.seed}"
        settings = {"model": {"name": name}, "text": {}, "packing": {}}
        identity = {"format": 1, "layout": layout.json, "model": {"name": name}}
        store = Store.create_or_open(cache, Manifest(identity, settings, name, self.d))
        for number, (split, count) in enumerate({TRAIN: tokens, HELDOUT: heldout}.items()):
            units = -(-count // layout.unit_rows)
            store.require(split, SITE, self.d, units * layout.unit_rows)
            for unit in range(units):
                if not store.is_committed(split, unit, SITE):
                    rows = self.rows(layout.unit_rows, 1_000_000 * number + unit)
                    store.write(split, unit, SITE, from_float32(rows), {"device": "cpu"})
        return store

    def found(self, W_dec_FD: Float[Tensor, "F D"]) -> float:
        """Return the share of the features that some decoder row has to a cosine of at least 0.9."""
        rows = torch.nn.functional.normalize(W_dec_FD.detach().double(), dim=1)
        best = (torch.from_numpy(self.directions) @ rows.T).amax(1)
        return float((best >= FOUND).double().mean())


def main() -> None:
    settings = OmegaConf.from_cli(sys.argv[1:])
    known = {"cache", "d", "features", "l0", "offset", "tokens", "heldout", "seed"}
    if unknown := sorted(set(map(str, settings)) - known):
        raise UserError(f"{unknown[0]} is no setting of the dictionary: choose from {', '.join(sorted(known))}")
    shape = {name: settings[name] for name in ("d", "features", "l0", "offset", "seed") if name in settings}
    store = Dictionary(**shape).write(
        Path(settings.get("cache", "outputs/dictionary")),
        int(settings.get("tokens", 1_100_000)),
        int(settings.get("heldout", 60_000)),
    )
    print(store.path)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
