"""The settings of evaluate and features: what conf/ says is what the schema says, and bad values are one sentence."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic_core import PydanticUndefined

from data.base.cli import CONF
from data.base.config import Settings
from data.base.errors import UserError
from evaluate.config import EvaluateSettings, FeaturesSettings
from evaluate.feature_metrics.tasks import load_tasks
from evaluate.features.make import make
from evaluate.run import evaluate
from tests.helpers.settings import stage_config
from train.sae.io import save
from train.sae.variants.relu import ReLU

SCHEMAS: dict[str, type[Settings]] = {"evaluate": EvaluateSettings, "features": FeaturesSettings}
OLDER = {"gao", "gao_with"}


@pytest.mark.parametrize("stage", SCHEMAS)
def test_conf_has_every_setting_with_the_default_of_the_schema(stage: str) -> None:
    given, schema = stage_config(stage), SCHEMAS[stage]
    assert set(given) - OLDER == set(schema.model_fields)
    settings = schema.of(given | {"out": "out"})
    for name, field in schema.model_fields.items():
        assert field.description, f"{stage}.{name} has no docstring"
        default = field.get_default(call_default_factory=True)
        if default is not PydanticUndefined and name != "seed":
            assert getattr(settings, name) == default, name


def test_the_older_names_mean_the_newer_ones() -> None:
    plain = stage_config("evaluate", out="out")
    older = EvaluateSettings.of(plain | {"gao": ["probe"], "gao_with": {"units": 3, "tasks": None}})
    newer = EvaluateSettings.of(
        plain | {"feature_metrics": "probe", "feature_metrics_with": {**plain["feature_metrics_with"], "units": 3}}
    )
    assert older == newer and older.feature_metrics_with.units == 3
    assert EvaluateSettings.of(plain | {"gao": "all"}).feature_metrics == ["probe", "patterns", "ablation"]
    assert EvaluateSettings.of(plain | {"gao": "all", "feature_metrics": "all"}).feature_metrics
    with pytest.raises(UserError, match="gao=probe is the older name of feature_metrics=patterns: give one"):
        EvaluateSettings.of(plain | {"gao": "probe", "feature_metrics": "patterns"})


@pytest.mark.parametrize(
    ("stage", "given", "sentence"),
    [
        ("evaluate", {"token": 3}, "token is no setting: did you mean tokens?"),
        ("evaluate", {"feature_metrics_with": {"unit": 3}}, r"did you mean feature_metrics_with.units\?"),
        ("evaluate", {"gao_with": {"unit": 3}}, r"did you mean feature_metrics_with.units\?"),
        ("evaluate", {"lr": 3}, "lr is no setting"),
        ("features", {"neighbors": 3}, "neighbors is no setting: did you mean neighbours?"),
        ("evaluate", {"text": {"path": ["a"]}}, r"text.path is no setting: did you mean text.paths\?"),
        ("evaluate", {"tokens": True}, "tokens=true is not allowed"),
        ("evaluate", {"seed": -1}, "seed=-1 is not allowed"),
        ("evaluate", {"device_map": 3}, "device_map=3 is not allowed"),
        ("evaluate", {"tp_plan": "auto", "features": "best"}, "tp_plan is for scores: leave out features"),
        ("features", {"quantiles": [0.5, 1.5]}, r"quantiles.1=1.5 is not allowed"),
        ("features", {"quantiles": [0.5, 0.5]}, "must be falling numbers"),
    ],
)
def test_mistakes_are_named_with_the_remedy(stage: str, given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        SCHEMAS[stage].of(stage_config(stage, out="out") | given)


def test_large_counts_may_be_written_as_yaml_has_them() -> None:
    assert EvaluateSettings.of(stage_config("evaluate", out="out", tokens=2e6)).tokens == 2_000_000


# The fuzz: values that a person or a script may write, and for each setting which of them can be meant.

VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, -1, 3.5, 1e3, 1e30, -0.5, float("nan"), float("inf"), float("-inf"), 10**30),
    *("", " ", "all", "best", "nowhere", "shipped", "3", "null", "a" * 5000, "\0", "*", "[", "🙂", "../..", "probe"),
    *([], [1], ["probe"], [None], [[]], ["nowhere"], [0.5, 0.25], [float("nan")], {}, {"a": 1}, {"units": 3}),
]


def is_whole(value: Any, least: int) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and value == value and abs(value) != float("inf") and value == int(value) and value >= least


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_texts(value: Any) -> bool:
    return value is None or is_text(value) or (isinstance(value, list) and all(map(is_text, value)))


def counts(least: int) -> Callable[[Any], bool]:
    return lambda value: is_whole(value, least)


def are_quantiles(value: Any) -> bool:
    return value in ([], [1], [0.5, 0.25])


ALLOWED: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("tokens", "top", "sample", "at_a_quantile", "logits", "neighbours"), counts(1)),
    **dict.fromkeys(("seed", "before", "after"), counts(0)),
    "bootstrap": counts(2),
    "lm_batch": lambda value: value is None or is_whole(value, 1),
    **dict.fromkeys(("cache", "out", "device"), is_text),
    **dict.fromkeys(
        ("baseline", "features", "folder", "compare", "own_text"), lambda value: value is None or is_text(value)
    ),
    **dict.fromkeys(("together", "serve"), lambda value: isinstance(value, bool)),
    "port": lambda value: is_whole(value, 0) and value < 2**16,
    "saes": is_texts,
    "form": lambda value: value == "shipped",
    **dict.fromkeys(("feature_metrics", "gao"), lambda value: value in (None, [], "all", "probe", ["probe"])),
    "feature_metrics_with": lambda value: value in ({}, {"units": 3}),
    "gao_with": lambda value: value in (None, {}, {"units": 3}),
    "text": lambda value: value == {},
    "device_map": lambda value: (
        value is None or (is_text(value) and value != "") or value in ({}, {"a": 1}, {"units": 3})
    ),
    "tp_plan": lambda value: value is None,
    "quantiles": are_quantiles,
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", SCHEMAS)
def test_no_bad_value_is_accepted_and_none_ends_in_a_traceback(stage: str) -> None:
    accepted, refused = 0, 0
    for name, value in itertools.product(stage_config(stage), VALUES):
        given = stage_config(stage, **{"out": "out", "folder": "f"} if stage == "features" else {"out": "out"})
        try:
            SCHEMAS[stage].of(given | {name: value})
        except UserError as error:
            refused += 1
            assert not ALLOWED[name](value), (name, value, str(error))
            assert "\n" not in str(error) or "\n" in str(value), (name, value)
        else:
            accepted += 1
            assert ALLOWED[name](value), (name, value)
    assert accepted > 50 and refused > 300


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_bad_runs_end_in_a_sentence(
    seed: int, harvested: dict[str, Any], rough_sae: Callable[[int], ReLU], tmp_path: Path
) -> None:
    """Texts and paths that the schema takes and the stage cannot use: 40 seeded runs, each a UserError."""
    rng = random.Random(seed)
    record = {"site": "resid_post.0", "fingerprint": harvested["store"].manifest.fingerprint, "store": "s"}
    save(rough_sae(16), tmp_path / "saes" / "rough", record)
    known = {"cache": harvested["config"]["cache"], "tokens": 100, "device": "cpu", "out": str(tmp_path / "out")}
    texts = [value for value in VALUES if is_text(value) and value not in ("best", "all", "probe", "shipped", "*")]
    for _ in range(10):
        stage = rng.choice(list(SCHEMAS))
        bad: dict[str, Any] = {
            "cache": {"cache": rng.choice(texts)},
            "device": {"device": rng.choice(texts)},
            "text": {"text": {"paths": [rng.choice(texts)], "field": "text"}},
            "saes": {"saes": rng.choice(texts)} if stage == "evaluate" else {"folder": rng.choice(texts)},
            "baseline": {"baseline": rng.choice(texts)} if stage == "evaluate" else {"tokens": 10**7},
            "tasks": {"gao": "probe", "gao_with": {"tasks": rng.choice(texts)}} if stage == "evaluate" else {"top": 0},
        }[rng.choice(["cache", "device", "text", "saes", "baseline", "tasks"])]
        named = {"saes": str(tmp_path / "saes")} if stage == "evaluate" else {"folder": str(tmp_path / "saes")}
        run: Callable[[dict[str, Any]], Path] = evaluate if stage == "evaluate" else make
        with pytest.raises(UserError):
            run(stage_config(stage, **{**known, **named, **bad}))
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_damaged_task_files_end_in_a_sentence(tmp_path: Path) -> None:
    """300 seeded damages of conf/probes.yaml: tasks that can be asked, or a sentence."""
    rng = random.Random(0)
    whole = (CONF / "probes.yaml").read_text()
    pieces = [
        "!!python/object/apply:os.system ['true']",
        "[",
        "{",
        "&a [*a]",
        "${oc.env:HOME}",
        "\t",
        "\0",
        ": :",
        "(",
        "é",
    ]
    refused = 0
    for _ in range(300):
        at = rng.randrange(len(whole))
        cut = whole[:at] + rng.choice(pieces) + whole[at + rng.randrange(12) :]
        (tmp_path / "tasks.yaml").write_text(cut)
        try:
            tasks = load_tasks(tmp_path / "tasks.yaml")
        except UserError:
            refused += 1
        else:
            assert all(isinstance(task.asks, tuple | re.Pattern) for task in tasks)
    assert refused > 100
