"""The settings of `python -m train`, conf/train.yaml: types, ranges, defaults and meanings, checked at the boundary.

Each setting has a scope, which says what depends on it:

    sae     the numbers of one SAE; the others of its pass may have another value
    stream  the numbers of every SAE of a pass: what is read, in which order, on how many ranks
    store   which store is read; the numbers depend on the store itself, by its fingerprint
    pass    no number; one value for all SAEs of a pass (device, pace, threads)
    view    no number; may differ between the SAEs of a pass (folder, what is shown)
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from data.base.config import Flag, Real, Settings, Text, Whole
from data.base.errors import UserError

AUTO: Literal["auto"] = "auto"
Group = dict[str, Any]
Named = Annotated[Text, Field(min_length=1)]
"""A path or a name, not empty."""
Several = Annotated[list[Named], Field(min_length=1)]
"""A list of such names."""
Share = Annotated[Real, Field(ge=0, le=1)]
"""A share of the run."""


@dataclass(frozen=True)
class Scope:
    """What depends on a setting; see the head of this file."""

    name: Literal["sae", "stream", "store", "pass", "view"]

    @property
    def sets_numbers(self) -> bool:
        """Return whether another value trains another SAE."""
        return self.name in ("sae", "stream", "store")


OF_SAE, OF_STREAM, OF_STORE, OF_PASS, OF_VIEW = (
    Scope("sae"),
    Scope("stream"),
    Scope("store"),
    Scope("pass"),
    Scope("view"),
)

# What `_target_` named before there were names, in older run.json and users' YAML: exact matches, nothing is imported.
OPTIMIZER_ALIASES = {"torch.optim.Adam": "adam", "torch.optim.AdamW": "adamw", "torch.optim.SGD": "sgd"}
_HYDRA_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_")
_CLASSES = {
    "relu": "ReLU",
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "matryoshka": "Matryoshka",
    "gated": "Gated",
    "jumprelu": "JumpReLU",
}
VARIANT_ALIASES = {
    f"{folder}.{name}.{class_name}": name
    for name, class_name in _CLASSES.items()
    for folder in ("train.sae", "train.sae.variants")
}


def by_name(group: Mapping[str, Any], at: str, key: str, aliases: Mapping[str, str]) -> Group:
    """Write a group with `key` as its name, where it has the `_target_` of an earlier version:
    exact matches of `aliases`."""
    named = {str(name): value for name, value in group.items() if name not in _HYDRA_KEYS}
    target = group.get("_target_")
    if target is None:
        return named
    if not isinstance(target, str) or target not in aliases:
        choices = ", ".join(sorted(set(aliases.values())))
        raise UserError(f"{at}._target_={target} names code, which no setting may: give {at}.{key}, one of {choices}")
    if named.setdefault(key, aliases[target]) != aliases[target]:
        raise UserError(f"{at}._target_={target} and {at}.{key}={named[key]} differ: give {at}.{key} alone")
    return named


class OptimizerSettings(Settings):
    """conf/optimizer: one of torch's, or Adam with moments of 8 bits, by name."""

    name: Literal["adam", "adamw", "sgd", "adam8bit"] = "adam"
    """The optimizer: adam, adamw, sgd, or adam8bit (an extra), which holds 6 bytes an entry in place of Adam's 12."""
    lr: Literal["auto"] | Annotated[Real, Field(ge=0)] = AUTO
    """Learning rate at its highest, which schedule and lr_at_width multiply; auto: by the rule of train/rates.py."""
    betas: Annotated[list[Annotated[Real, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] | None = None
    """Decays of Adam's two moments; null: torch's own, 0.9 and 0.999."""
    eps: Real | None = Field(None, ge=0)
    """Added to Adam's root of the second moment; null: torch's own, 1e-8."""
    weight_decay: Real | None = Field(None, ge=0)
    """Decay of the weights; null: torch's own."""
    momentum: Real | None = Field(None, ge=0, lt=1)
    """SGD's; null: none."""
    fused: Flag | None = None
    """One kernel for all parameters; null: as torch decides; adam8bit has kernels of its own whatever is given."""

    @model_validator(mode="after")
    def _read_by_the_optimizer(self) -> Self:
        strangers = ("betas", "eps") if self.name == "sgd" else ("momentum",)
        for name in strangers:
            if getattr(self, name) is not None:
                raise ValueError(f"optimizer.{name} is not read by {self.name}: give optimizer.{name}=null")
        return self

    def arguments(self) -> Group:
        """Return the keyword arguments of the optimizer's constructor."""
        given = self.model_dump(exclude={"name", "fused"} if self.name == "adam8bit" else {"name"})
        return {name: value for name, value in given.items() if value is not None}


class LoaderSettings(Settings):
    """How the store is read."""

    pool_chunks: Annotated[Whole, OF_STREAM] = Field(62, ge=1)
    """Chunks permuted together in memory; two such pools of 6 MiB chunks are 0.8 GB."""
    threads: Annotated[Whole, OF_PASS] = Field(2, ge=1, le=1024)
    """Threads that read chunks."""
    preload: Annotated[Literal["ram", "device"] | None, OF_PASS] = None
    """ram, device: training rows that fit there are read once; the batches stay the same."""


class TrainerSettings(Settings):
    """conf/trainer: what a pass runs on."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    """auto: a GPU where there is one."""
    devices: Whole = Field(1, ge=1)
    """Devices of a node; for more than one: torchrun --nproc-per-node N -m train trainer.devices=N."""
    num_nodes: Whole = Field(1, ge=1)
    """Machines."""
    latent_ranks: Whole = Field(1, ge=1)
    """Processes that hold one dictionary together, each a part of its latents; they read the same rows."""
    deterministic: Flag | Literal["warn"] = False
    """Refuse operations that have no deterministic form; warn: only say so."""
    cuda_graph: Flag = False
    """Capture a step of TopK, BatchTopK or Matryoshka as a CUDA graph, one launch a step; no card has confirmed it."""
    precision: Text = "32-true"
    """Always 32-true: weights and reconstructions stay in float32."""

    @model_validator(mode="after")
    def _whole_meshes(self) -> Self:
        processes = self.devices * self.num_nodes
        if processes % self.latent_ranks:
            raise ValueError(
                f"trainer.latent_ranks={self.latent_ranks} does not divide the {processes} processes of "
                "trainer.devices and trainer.num_nodes: give a number that does"
            )
        return self

    @field_validator("precision")
    @classmethod
    def _in_float32(cls, value: str) -> str:
        if value != "32-true":
            raise ValueError(
                f"trainer.precision={value} would round weights or reconstructions, which stay 32-bit here: "
                "leave it out, and set matmul=bf16 for a faster encoder"
            )
        return value


class LoggerSettings(Settings):
    """conf/logger: what is written beside metrics.csv."""

    name: Literal["csv", "tensorboard", "wandb"] = "csv"
    """csv: metrics.csv alone, which every run has; tensorboard or wandb (extras) beside it."""
    project: Named = "thresher"
    """The project at Weights & Biases."""
    offline: Flag = False
    """Whether Weights & Biases only writes to the disk."""


class TrainSettings(Settings):
    """conf/train.yaml. The groups model, text and packing are harvest's; sae is checked by the variant's own Config."""

    model: Annotated[Group, OF_STORE] = Field(default_factory=dict)
    """The model of the store, as harvest had it."""
    text: Annotated[Group, OF_STORE] = Field(default_factory=dict)
    """The text of the store."""
    packing: Annotated[Group, OF_STORE] = Field(default_factory=dict)
    """How the text was packed."""
    sae: Annotated[Group, OF_SAE] = Field(default_factory=dict)
    """The variant by name, and its own settings."""
    optimizer: Annotated[OptimizerSettings, OF_SAE] = Field(default_factory=lambda: OptimizerSettings.of({}))
    """The optimizer by name, and its own settings."""
    trainer: Annotated[TrainerSettings, OF_PASS] = Field(default_factory=lambda: TrainerSettings.of({}))
    """What the pass runs on."""
    logger: Annotated[LoggerSettings, OF_VIEW] = Field(default_factory=lambda: LoggerSettings.of({}))
    """What is written beside metrics.csv."""
    cache: Annotated[Named, OF_STORE] = "outputs/cache"
    """The folder in which the store is found by model, text and packing."""
    store: Annotated[Named | Several | None, OF_STORE] = None
    """The folder of a store, in place of finding it; a list: stores of the same tokens, for one crosscoder."""
    site: Annotated[Named | Several, OF_STREAM] = "resid_post.3"
    """The site whose activations are read; a list, [resid_post.1,resid_post.3]: the sites of one crosscoder."""
    target: Annotated[Named | None, OF_STREAM] = None
    """The site that a transcoder predicts from `site`; a kind alone (mlp_out) is at its layer; null: an SAE."""
    tokens: Annotated[Whole, OF_STREAM] = Field(1_000_000, ge=1)
    """Training tokens."""
    epochs: Annotated[Whole, OF_STREAM] = Field(1, ge=1)
    """Passes over the store they may take."""
    batch: Annotated[Whole, OF_STREAM] = Field(1024, ge=1)
    """Tokens a step and a device."""
    seed: Annotated[Whole, OF_STREAM] = Field(0, ge=0, le=2**63 - 1)
    """Of the order of rows, the calibration rows and the first weights."""
    loader: LoaderSettings = Field(default_factory=lambda: LoaderSettings.of({}))
    """How the store is read."""
    lr_warmup: Annotated[Share, OF_SAE] = 0.05
    """Share of the run in which the learning rate rises."""
    lr_decay: Annotated[Share, OF_SAE] = 0.2
    """Share of the run, at its end, in which it falls linearly to zero."""
    sparsity_warmup: Annotated[Share, OF_SAE] = 0.0
    """Share of the run in which the sparsity coefficient rises."""
    clip: Annotated[Real | None, OF_SAE] = Field(1.0, gt=0)
    """Norm of the gradient over all parameters above which it is scaled down; null: no clipping."""
    ema: Annotated[Real | None, OF_SAE] = Field(None, gt=0, lt=1)
    """Decay of a bias-corrected mean of the weights over steps, which is then what is saved; null: the last weights."""
    lr_at_width: Annotated[Whole | None, OF_SAE] = Field(None, ge=1)
    """The width that optimizer.lr is for; it falls with the square root of the width; null: for any."""
    dead_after: Annotated[Whole | None, OF_SAE] = Field(None, ge=1, le=2**62)
    """Tokens of silence that make a latent dead; null: the smaller of 10M and a tenth of the run."""
    matmul: Annotated[Literal["float32", "tf32", "bf16"] | None, OF_STREAM] = None
    """The encoder's product; bf16 rounds its factors only; null: tf32 on a GPU, else float32.

    On a CPU bf16 is for one with AMX or AVX512-BF16; elsewhere it rounds the same and saves no time.
    """
    outliers: Annotated[Literal["auto"] | Annotated[Real, Field(ge=1)] | None, OF_STREAM] = AUTO
    """Leave out rows whose norm is above so many times the median; auto: 10 where the store has massive rows."""
    calibration_tokens: Annotated[Whole, OF_STREAM] = Field(65_536, ge=0)
    """Training rows set aside for thresholds; for all variants, so that all see the same batches."""
    heldout_tokens: Annotated[Whole, OF_STREAM] = Field(50_000, ge=0)
    """Held-out rows of the validation, in the inference form; 0: none."""
    log_every: Annotated[Whole, OF_VIEW] = Field(50, ge=1)
    """Steps between two rows of metrics.csv."""
    validate_every: Annotated[Whole, OF_PASS] = Field(1000, ge=1)
    """Steps between two validations."""
    checkpoint_every: Annotated[Whole, OF_PASS] = Field(1000, ge=1)
    """Steps between two checkpoints."""
    checkpoint_minutes: Annotated[Real | None, OF_PASS] = Field(5.0, gt=0)
    """Minutes after which a checkpoint is written before its step; null: only by steps."""
    lr_asked: Annotated[Literal["auto"] | Real | None, OF_VIEW] = None
    """What optimizer.lr was given as, recorded by a run once its rate is a number; not to be set."""
    start: Annotated[Named | None, OF_SAE] = None
    """The folder of an SAE, whose weights and norm to begin with."""
    resume: Annotated[Named | None, OF_VIEW] = None
    """The folder of a run to go on with, from its last checkpoint, with its own settings."""
    out: Annotated[Named, OF_VIEW]
    """The folder of the run."""

    @field_validator("site", "store")
    @classmethod
    def _one_is_no_list(cls, value: str | list[str] | None) -> str | list[str] | None:
        if not isinstance(value, list):
            return value
        if len(set(value)) < len(value):
            raise ValueError(f"[{','.join(value)}] names one of its entries twice: give each once")
        return value[0] if len(value) == 1 else value

    @model_validator(mode="after")
    def _target_of_one_site(self) -> Self:
        if self.crosses and self.target is not None:
            raise ValueError(
                f"target={self.target} is what a transcoder predicts from one site, and a crosscoder reconstructs all "
                "of its own: leave target out, or name one site"
            )
        return self

    @property
    def crosses(self) -> bool:
        """Return whether it is a crosscoder that is trained: one dictionary of several sites."""
        return isinstance(self.site, list) or isinstance(self.store, list)

    @classmethod
    def of(cls, settings: Mapping[str, Any], at: str = "") -> Self:
        """Check resolved settings; an earlier version's `_target_` of sae and optimizer becomes a name."""
        given = {str(name): value for name, value in settings.items()}
        return super().of(named_groups(given), at)

    @property
    def processes(self) -> int:
        """Return the processes of the run, one a device."""
        return self.trainer.devices * self.trainer.num_nodes

    @property
    def world(self) -> int:
        """Return the ranks that read rows of their own: those that hold one dictionary together count once."""
        return self.processes // self.trainer.latent_ranks


def named_groups(settings: Mapping[str, Any]) -> Group:
    """Write settings, or numbers of a run, with `sae` and `optimizer` by name."""
    given = dict(settings)
    for group, key, aliases in (("sae", "variant", VARIANT_ALIASES), ("optimizer", "name", OPTIMIZER_ALIASES)):
        if isinstance(given.get(group), Mapping):
            given[group] = by_name(given[group], group, key, aliases)
    return given


def scopes(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Scope]]:
    """Yield every setting that has a scope, by its dotted name; a group without one has it in its own settings."""
    for name, field in cls.model_fields.items():
        own = [mark for mark in field.metadata if isinstance(mark, Scope)]
        if own:
            yield prefix + name, own[0]
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from scopes(field.annotation, f"{prefix}{name}.")


SCOPES = dict(scopes(TrainSettings))


def of_scope(settings: TrainSettings, *names: str) -> Group:
    """Choose the settings whose scope is among `names`, nested as they were, as plain JSON."""
    whole = settings.model_dump(mode="json")
    chosen: Group = {}
    for dotted, scope in SCOPES.items():
        if scope.name in names:
            source, target = whole, chosen
            *groups, name = dotted.split(".")
            for group in groups:
                source, target = source[group], target.setdefault(group, {})
            target[name] = source[name]
    return chosen


def scope_of_override(override: str) -> Scope | None:
    """Return the scope of a command line's override, of a setting or a whole group;
    None for what is no setting of train."""
    name = override.lstrip("+~").split("=")[0].split("@")[0]
    for dotted in (name, name.rpartition(".")[0], name.split(".")[0]):
        if dotted in SCOPES:
            return SCOPES[dotted]
    return None


# Names that stand for an extra: their setting, the module they need, and what does without it.
EXTRAS = {
    "tensorboard": ("logger", "tensorboard", "logger=csv"),
    "wandb": ("logger", "wandb", "logger=csv"),
    "adam8bit": ("optimizer.name", "bitsandbytes", "optimizer.name=adam"),
}


def check_installed(name: str) -> None:
    """Refuse a logger or an optimizer whose extra is not installed."""
    if name not in EXTRAS:
        return
    setting, module, instead = EXTRAS[name]
    if importlib.util.find_spec(module) is None:
        raise UserError(f'{setting}={name} is not installed: .venv/bin/pip install -e ".[{name}]", or use {instead}')
