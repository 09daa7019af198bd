"""Hundreds of bad settings and hostile run folders, seeded: one sentence each, no traceback, no code run."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict
from pydantic import BaseModel

from data.base.cli import CONF
from data.base.composing import GuardedLoader
from data.base.config import Settings
from data.base.errors import to_sentence
from tests.helpers.runs import Broken, break_after
from train.config import TrainSettings
from train.interop import export, import_sae
from train.interop.config import ExportSettings, ImportSettings
from train.resume import LAST, RUN
from train.run import TrainRequest, prepare, train

pytestmark = pytest.mark.slow

# No setting may be any of these. `inf` and `nan` are floats on Hydra's command line.
NEVER = ["nan", "inf", "-inf", "[]", "[1,a]", "{a:1}", "{_target_:os.system,command:id}", "''"]
BY_KIND = {
    "number": ["abc", "true", "-1", "1e400", "'3'", "None"],
    "whole": ["0.5", "1e-3"],
    "flag": ["no", "1", "0", "maybe"],
    "choice": ["nonsense", "true", "3", "os.system"],
    "text": ["true", "3", "1.5"],
}


def kind_of(annotation: Any) -> str:
    """What sort of value a field takes, by its annotation."""
    if get_origin(annotation) is Literal:
        return "choice"
    names = str(annotation)
    if "Literal" in names and "float" in names:  # a word or a number
        return "number"
    for word, kind in (("bool", "flag"), ("Literal", "choice"), ("int", "whole"), ("float", "number"), ("str", "text")):
        if word in names:
            return kind
    return "group"


def fields(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Dotted name, annotation and whether null is allowed, of every setting."""
    for name, field in cls.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from fields(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, inner, type(None) in get_args(inner)


def of_kind(kind: str) -> list[str]:
    """Values that no setting of a kind may have."""
    own = [*BY_KIND["number"], *BY_KIND["whole"]] if kind == "whole" else BY_KIND[kind]
    return [*NEVER, *own]


def bad_values(annotation: Any, nullable: bool) -> list[str]:
    kind = kind_of(annotation)
    if kind == "group":
        return ["3", "true", "[1]", "abc"]
    values = of_kind(kind)
    if "list" in str(annotation) and kind == "text":
        values.remove("[1,a]")
        values.remove("[]")
    return values if nullable else [*values, "null"]


def compose(stage: str, overrides: list[str]) -> Any:
    """Settings as the command line composes them, less Hydra's own group."""
    loader = GuardedLoader(create_config_search_path(str(CONF)))
    config = loader.load_configuration(stage, overrides, RunMode.RUN)
    with open_dict(config):
        del config["hydra"]
    return config


def outcome(act: Callable[[], object]) -> str:
    """`accepted`, the sentence a user reads, or `traceback: ...`."""
    try:
        act()
    except Exception as error:
        told = to_sentence(error)
        if told is None:
            return f"traceback: {type(error).__name__}: {error}"
        return told if "\n" not in told else f"traceback: several lines: {told}"
    return "accepted"


def wrong(outcomes: dict[str, str]) -> dict[str, str]:
    return {given: said for given, said in outcomes.items() if said.startswith(("accepted", "traceback"))}


def misspelled(name: str, chance: random.Random) -> str:
    """A name with one letter doubled, dropped or exchanged."""
    at = chance.randrange(len(name))
    return chance.choice([name[:at] + name[at] * 2 + name[at + 1 :], name[:at] + name[at + 1 :], f"{name}x"])


SAE_SETTINGS = {
    "sae.width": "whole",
    "sae.expansion": "number",
    "sae.k": "whole",
    "sae.input_norm": "choice",
    "sae.apply_b_dec_to_input": "flag",
    "sae.auxk_alpha": "number",
    "sae.auxk_relu": "flag",
    "sae.auxk_norm": "choice",
    "sae.auxk_k": "whole",
    "sae.variant": "choice",
}


def test_no_bad_setting_of_train_is_accepted(short: Any, cache: Path, tmp_path: Path) -> None:
    base = [f"cache={cache}", f"out={tmp_path / 'run'}", "batch=64", "tokens=1920", "calibration_tokens=512"]
    base += ["heldout_tokens=512", "sae.k=4", "sae.expansion=4", "trainer=cpu"]

    def prepared(override: str) -> object:
        config = OmegaConf.to_container(compose("train", [*base, override]), resolve=True)
        assert isinstance(config, dict)
        return prepare(TrainRequest({str(name): value for name, value in config.items()}, [override]))

    assert outcome(lambda: prepared("seed=1")) == "accepted"
    chance = random.Random(0)
    given = []
    for name, annotation, nullable in fields(TrainSettings):
        given += [f"++{name}={value}" for value in bad_values(annotation, nullable)]
        given.append(f"+{misspelled(name, chance)}=1")
    for name, kind in SAE_SETTINGS.items():
        values = [
            *NEVER,
            *BY_KIND["number" if kind == "whole" else kind],
            *(BY_KIND["whole"] if kind == "whole" else []),
        ]
        given += [f"++{name}={value}" for value in values]
        given.append(f"+{misspelled(name, chance)}=1")
    given = [item for item in given if item not in HARMLESS]
    some = chance.sample(given, 400)  # composing a configuration is most of the time
    assert wrong({item: outcome(lambda item=item: prepared(item)) for item in some}) == {}  # type: ignore[misc]


# What looks bad and is not: a list or group of theirs that may be empty, null where it says something.
HARMLESS = {
    "++model={a:1}",  # another model, for which no store is found: a sentence of its own
}


@pytest.mark.parametrize(
    ("stage", "schema", "main"),
    [("export", ExportSettings, export.main), ("adopt", ImportSettings, import_sae.main)],
)
def test_no_bad_setting_of_the_exchange_is_accepted(
    tmp_path: Path, stage: str, schema: type[Settings], main: Callable[[Any], None]
) -> None:
    (tmp_path / "sae").mkdir()
    base = [f"saes={tmp_path / 'sae'}", f"out={tmp_path / 'out'}"]
    chance = random.Random(1)
    given = []
    for name, annotation, nullable in fields(schema):
        given += [f"++{name}={value}" for value in bad_values(annotation, nullable)]
        given.append(f"+{misspelled(name, chance)}=1")
    assert len(given) > 40
    outcomes = {item: outcome(lambda item=item: main(compose(stage, [*base, item]))) for item in given}  # type: ignore[misc]
    assert wrong(outcomes) == {}


JUNK = [
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    "",
    "x",
    "../..",
    [],
    [1],
    {},
    {"_target_": "os.system", "command": "touch CANARY"},
]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every entry of nested mappings and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield (*path, key)
        yield from leaves(part, (*path, key))


@pytest.fixture
def broken_off(short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patch, pytest.raises(Broken):
        break_after(patch, 20)
        train(short("sae=topk"))
    return tmp_path / "run"


def test_a_hostile_run_folder_runs_no_code_and_gets_a_sentence(short: Any, tmp_path: Path, broken_off: Path) -> None:
    """Random entries of run.json replaced; what changes no number may go on, all else is refused."""
    chance, canary = random.Random(2), tmp_path / "CANARY"
    record = json.loads((broken_off / RUN).read_text())
    paths = list(leaves(record))
    outcomes = {}
    for trial in range(80):
        hostile, path = json.loads(json.dumps(record).replace("CANARY", str(canary))), chance.choice(paths)
        entry = hostile
        for key in path[:-1]:
            entry = entry[key]
        value = json.loads(json.dumps(chance.choice(JUNK)).replace("CANARY", str(canary)))
        entry[path[-1]] = value
        folder = tmp_path / f"trial{trial}"
        shutil.copytree(broken_off, folder)
        (folder / RUN).write_text(json.dumps(hostile))
        said = outcome(lambda folder=folder: train(short(f"resume={folder}"), [f"resume={folder}"]))  # type: ignore[misc]
        if said == "accepted":
            same = (folder / "sae.safetensors").exists()
            assert same, (path, value)
        else:
            outcomes[f"{path} = {value}"] = said
        shutil.rmtree(folder)
    assert wrong(outcomes) == {}
    assert not canary.exists() and len(outcomes) > 40


def test_random_damage_to_a_checkpoint_gets_a_sentence(short: Any, tmp_path: Path, broken_off: Path) -> None:
    chance, whole = random.Random(3), (broken_off / LAST).read_bytes()
    outcomes = {}
    for trial in range(40):
        data = bytearray(whole)
        if trial % 4 == 0:
            data = data[: chance.randrange(len(data))]
        else:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        (broken_off / LAST).write_bytes(data)
        for name in ("config.json", "sae.safetensors"):
            if (broken_off / name).exists():
                os.remove(broken_off / name)
        outcomes[f"trial {trial}"] = outcome(lambda: train(short("sae=topk")))
    # A bit of the zip's padding or of a field that nothing reads changes no number.
    tracebacks = {name: said for name, said in outcomes.items() if said.startswith("traceback")}
    assert tracebacks == {} and sum(said == "accepted" for said in outcomes.values()) < 15
