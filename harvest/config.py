"""The settings of a harvest: conf/harvest.yaml with its groups model, text and packing, each key described here once.

The groups are classes beside what they configure: `harvest.lm.ModelSettings`, the sources of `harvest.documents`,
`harvest.packing.Packing`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from data.base.config import Flag, Settings, Text, Whole
from data.base.errors import UserError
from data.base.records import Json
from data.base.sites import Site
from harvest.documents import TextSource, source_from
from harvest.lm import LanguageModel
from harvest.packing import Packing

MOST_ROWS = 10**15  # far beyond any text; keeps arithmetic on sizes exact


def parse_sites(given: Any) -> tuple[Site, ...]:
    """Read one name or a list of them, each site once; UserError for a name that is none, and for an empty list."""
    names = given if isinstance(given, list | tuple) else [given] if given else []
    if not names:
        raise UserError("sites is empty: name at least one, as in sites=[resid_post.3]")
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"sites: {name!r} is no name of a site: give names, as in sites=[resid_post.3]")
    return tuple(dict.fromkeys(Site.parse(name) for name in names))


class StoreSettings(Settings):
    """The layout of a store yet to be made; null: chosen from the size of the run, or as the store that exists has it.

    What the values mean together, `data.store.manifest.Layout` knows.
    """

    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of the stored values; null: the model's."""
    chunk_rows: Whole | None = Field(default=None, ge=1, le=MOST_ROWS)
    """Rows of a chunk, which is read at once."""
    chunks_per_unit: Whole | None = Field(default=None, ge=1, le=MOST_ROWS)
    """Chunks of a unit, which is written at once and mixed within."""
    mixing_seed: Whole | None = Field(default=None, ge=0)
    """Of the order of rows within a unit; null: 0."""
    encoding: Literal["int8"] | None = None
    """int8: half of bfloat16's bytes; null: plain floats."""
    codec: Literal["zstd", "blosc"] | None = None
    """Compresses each chunk."""
    shards: Flag | None = None
    """Whether a unit is one file."""

    @property
    def chosen(self) -> Json:
        """Return the fields that are set."""
        return self.model_dump(exclude_none=True)


class HarvestSettings(Settings):
    """`python -m harvest`."""

    model: Annotated[LanguageModel, PlainValidator(LanguageModel.of)]
    """The language model."""
    text: Annotated[TextSource, PlainValidator(source_from)]
    """Where documents come from."""
    packing: Packing = Packing()
    """How documents become contexts."""
    sites: Annotated[tuple[Site, ...], PlainValidator(parse_sites)] = (Site.parse("resid_post.3"),)
    """resid_pre.N, resid_mid.N, resid_post.N, attn_out.N, mlp_out.N, a TransformerLens name or a module path."""
    tokens: Whole = Field(default=1_100_000, ge=1, le=MOST_ROWS)
    """Rows of the training split."""
    heldout_tokens: Whole = Field(default=100_000, ge=0, le=MOST_ROWS)
    """Rows of the held-out split; 0: none."""
    lm_batch: Whole = Field(default=16, ge=1, le=MOST_ROWS)
    """Contexts the model reads at a time; part of the store's identity, as rounding depends on it."""
    cache: Text = "outputs/cache"
    """The folder that holds one folder a store, or s3://bucket/prefix."""
    store: StoreSettings = StoreSettings()
    """The store's layout."""
    allow_mixed_devices: Flag = False
    """Go on with a store that another device or other library versions began."""
