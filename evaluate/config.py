"""The settings of `python -m evaluate` and of the commands in `features/`: types, ranges, defaults and meanings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from data.base.config import Flag, Real, Settings, Text, Whole

FEATURE_METRICS = ("probe", "patterns", "ablation")
OLDER_NAMES = {"gao": "feature_metrics", "gao_with": "feature_metrics_with"}


def _as_list(value: Any) -> Any:
    """Return one name as a list of one, and none as an empty list."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


Names = Annotated[list[Text], BeforeValidator(_as_list)]
"""A text, or a list of texts."""
Baseline = Literal["channels", "neurons", "random", "pca"]
BASELINES: tuple[Baseline, ...] = ("channels", "neurons", "random", "pca")


def _all_metrics(value: Any) -> Any:
    return list(FEATURE_METRICS) if value == "all" else _as_list(value)


class OwnText(Settings):
    """Held-out text of the user's own, scored instead of the store's."""

    paths: Names = Field(default_factory=list)
    """Files or globs: .txt is one document, .jsonl and .parquet have one a row; empty: the store's held-out text."""
    field: Text = "text"
    """The column of .jsonl and .parquet files that holds the text."""


class HeldoutTextSettings(Settings):
    """The settings of whatever reads held-out text through its language model."""

    cache: Text
    """The folder of the stores that the SAEs were trained from; each SAE's is found by its fingerprint."""
    text: OwnText = OwnText()
    """Held-out text of one's own in place of the store's."""
    tokens: Whole = Field(50_000, ge=1)
    """Held-out tokens to read, special ones not counted; whole contexts, so a few more."""
    lm_batch: Annotated[Whole, Field(ge=1)] | None = None
    """Contexts the language model reads at a time; null: as the harvest did."""
    device: Text = "auto"
    """The device of the language model and the SAEs: auto, cpu, cuda, cuda:1, mps."""
    device_map: Any = None
    """How the model is spread over devices (accelerate's `device_map`), or null."""
    out: Text
    """The folder that the results are written into."""

    @model_validator(mode="after")
    def _plain_device_map(self) -> Self:
        by_module = isinstance(self.device_map, dict) and all(
            isinstance(name, str) and isinstance(device, str | int) and not isinstance(device, bool)
            for name, device in self.device_map.items()
        )
        if not (self.device_map is None or by_module or (isinstance(self.device_map, str) and self.device_map)):
            raise ValueError(
                f"device_map={self.device_map} is not allowed: give null, a name such as auto, or a device by module"
            )
        return self


class HeldoutSettings(HeldoutTextSettings):
    """The settings that evaluate and features share."""

    seed: Whole = Field(0, ge=0)
    """The seed of everything drawn at random."""


class FeatureMetricsSettings(Settings):
    """How the feature metrics of Gao et al. (2406.04093) are measured."""

    tasks: Text | None = None
    """A YAML file of binary tasks for the probes; null: conf/probes.yaml, which says how one is written."""
    probe_tokens: Whole = Field(8192, ge=1)
    """Tokens of each half of the contexts that probes are fitted and scored on."""
    units: Whole = Field(64, ge=1)
    """Latents of each basis that patterns are built for."""
    examples: Whole = Field(8, ge=1)
    """Firing tokens that each latent's patterns are built from."""
    places: Whole = Field(64, ge=1)
    """Tokens at which latents are ablated, one a context."""
    ablations: Whole = Field(8, ge=1)
    """Active latents ablated at each of these tokens."""
    baselines: Annotated[list[Baseline], BeforeValidator(_as_list)] = Field(default_factory=lambda: list(BASELINES))
    """What the SAEs are compared with."""


class EvaluateSettings(HeldoutSettings):
    """The settings of conf/evaluate.yaml."""

    saes: Names
    """Folders or globs; every SAE in or below them is scored."""
    bootstrap: Whole = Field(1000, ge=2)
    """Samples of documents behind each standard error."""
    form: Literal["shipped", "batch"] = "shipped"
    """shipped: every SAE's inference form; batch: BatchTopK and Matryoshka by the k largest of each batch."""
    together: Flag = False
    """Put all SAEs and transcoders of a store to work in one forward too: the replacement model's cross-entropy."""
    baseline: Text | None = None
    """The folder of one of the SAEs, or its last part: the report gives each one's difference from it."""
    feature_metrics: Annotated[list[Literal["probe", "patterns", "ablation"]], BeforeValidator(_all_metrics)] = Field(
        default_factory=list
    )
    """Which feature metrics are measured: all, or some of probe, patterns, ablation; null: none."""
    feature_metrics_with: FeatureMetricsSettings = Field(default_factory=lambda: FeatureMetricsSettings.of({}))
    """How the feature metrics are measured."""
    features: Text | None = None
    """The SAE whose feature pages are made beside the report: its folder's name, or best (evaluate/pareto.py)."""
    tp_plan: Literal["auto"] | None = None
    """auto: the language model is split over the processes that torchrun started, in place of device."""

    @model_validator(mode="before")
    @classmethod
    def _take_older_names(cls, given: Any) -> Any:
        """Read `gao` and `gao_with` where the settings use the older names."""
        return with_newer_names(given) if isinstance(given, Mapping) else given

    @model_validator(mode="after")
    def _metrics_are_of_the_inference_form(self) -> Self:
        if self.feature_metrics and self.form != "shipped":
            raise ValueError(
                f"feature_metrics are measured in the inference form: leave them out with form={self.form}"
            )
        return self

    @model_validator(mode="after")
    def _split_models_are_scored_only(self) -> Self:
        if self.tp_plan is not None and (self.feature_metrics or self.features is not None):
            raise ValueError(
                "tp_plan is for scores: leave out features and feature_metrics, or use device_map=auto in one process"
            )
        return self


class FeaturesSettings(HeldoutSettings):
    """The settings of conf/features.yaml."""

    folder: Text | None = None
    """The folder of one trained SAE."""
    compare: Text | None = None
    """The folder of another SAE of the same site: nearest latents by the cosine of decoder rows, side by side."""
    own_text: Text | None = None
    """A text to shade by the latents that fire on it, in place of the pages: text="..." on the command line."""
    serve: Flag = False
    """Show texts that are typed in a browser on this machine, shaded likewise, until Ctrl-C; in place of the pages."""
    port: Whole = Field(8765, ge=0, le=65535)
    """The port that `serve` listens at, on 127.0.0.1 alone; 0: any free one."""
    top: Whole = Field(8, ge=1)
    """Contexts shown with a latent's largest activations."""
    sample: Whole = Field(48, ge=1)
    """Firings of each latent drawn at random, of which some are shown at the quantiles."""
    quantiles: list[Annotated[Real, Field(ge=0, le=1)]] = Field(default_factory=lambda: [0.9, 0.75, 0.5, 0.25])
    """Quantiles of the drawn firings that examples are shown at, falling."""
    at_a_quantile: Whole = Field(2, ge=1)
    """Examples at each quantile."""
    before: Whole = Field(20, ge=0)
    """Tokens shown before an example's token."""
    after: Whole = Field(10, ge=0)
    """Tokens shown after an example's token."""
    logits: Whole = Field(10, ge=1)
    """Tokens whose logits a latent raises most, and lowers most."""
    neighbours: Whole = Field(8, ge=1)
    """Latents shown whose decoder rows are nearest."""

    @model_validator(mode="after")
    def _falling_quantiles(self) -> Self:
        if sorted(set(self.quantiles), reverse=True) != self.quantiles:
            raise ValueError(
                f"quantiles={self.quantiles} must be falling numbers from 1 to 0, as in [0.9,0.75,0.5,0.25]"
            )
        return self


class ExplainSettings(Settings):
    """The settings of conf/explain.yaml."""

    pages: Text | None = None
    """The folder of feature pages."""
    url: Text | None = None
    """The address of an OpenAI-compatible endpoint, up to and with /v1."""
    chat_model: Text | None = None
    """The name of the language model there."""
    key_env: Text = "OPENAI_API_KEY"
    """The environment variable that holds the key; where it is not set none is sent."""
    spend: Flag = False
    """Ask; else only say what it would cost."""
    latents: list[Annotated[Whole, Field(ge=0)]] | None = None
    """Numbers of latents to label; null: the most interesting ones."""
    count: Whole = Field(20, ge=1)
    """Latents to label where `latents` names none."""
    held_out: Whole = Field(8, ge=2)
    """Contexts of each latent that its label is tried on, and as many of other latents."""
    seed: Whole = Field(0, ge=0)
    """The seed of what is drawn at random."""

    @model_validator(mode="after")
    def _all_named(self) -> Self:
        for name in ("pages", "url", "chat_model"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: give pages=<folder> url=http://localhost:8000/v1 chat_model=<name>")
        return self


class NeuronpediaSettings(Settings):
    """The settings of conf/neuronpedia.yaml."""

    pages: Text | None = None
    """The folder of feature pages."""
    out: Text | None = None
    """The folder to write, which must be empty."""
    model_id: Text | None = None
    """The model as Neuronpedia names it, such as gpt2-small; null: its name in the pages."""
    source_set: Text | None = None
    """The name of the set of SAEs there, such as res-jb; null: made of variant, kind of site and width."""
    dataset: Text = ""
    """The data set of the text as the hub names it, for readers of the files."""


class DelphiSettings(HeldoutTextSettings):
    """The settings of conf/delphi.yaml."""

    folder: Text | None = None
    """The folder of one trained SAE."""
    hookpoint: Text | None = None
    """The name of the folder that the SAE's files go into, which Delphi takes for its hook point; null: the site."""
    splits: Whole = Field(5, ge=1)
    """Files that the latents are spread over, each a range of them."""


def with_newer_names(given: Mapping[str, Any]) -> dict[str, Any]:
    """Move the settings `gao` and `gao_with` to `feature_metrics` and `feature_metrics_with`.

    Of the older names null means "not given", for conf/evaluate.yaml has both. Raises ValueError where the two
    disagree.
    """
    settings = dict(given)
    older = settings.pop("gao", None)
    if older is not None:
        newer = settings.get("feature_metrics")
        if newer not in (None, [], older):
            raise ValueError(f"gao={older} is the older name of feature_metrics={newer}: give one of the two")
        settings["feature_metrics"] = older
    older_group = settings.pop("gao_with", None)
    if isinstance(older_group, Mapping):
        chosen = {str(name): value for name, value in older_group.items() if value is not None}
        newer_group = settings.get("feature_metrics_with", {})
        if chosen and isinstance(newer_group, Mapping):
            settings["feature_metrics_with"] = {**newer_group, **chosen}
    elif older_group is not None:
        settings["feature_metrics_with"] = older_group
    return settings
