"""`--help`: complete, at once, and its examples are commands that work."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from data.base.cli import CONF
from data.base.errors import UserError
from data.base.help import ConfigFile, group_options, help_text, preset_lines

MODULES = {
    "harvest": "harvest",
    "train": "train",
    "evaluate": "evaluate",
    "features": "evaluate.features",
    "explain": "evaluate.features.explain",
    "neuronpedia": "evaluate.features.neuronpedia",
    "delphi": "evaluate.features.delphi",
    "saebench": "benchmarks.saebench",
    "export": "train.interop.export",
    "adopt": "train.interop.import_sae",
    "publish": "train.publish",
    "claims": "benchmarks.claims",
}


def examples() -> list[tuple[str, str]]:
    stages = [(stage, ConfigFile.read(CONF / f"{stage}.yaml").examples) for stage in MODULES]
    return [(stage, example) for stage, lines in stages for example in lines]


@pytest.mark.parametrize("stage", MODULES)
def test_it_says_what_the_stage_does_and_all_there_is_to_set(stage: str) -> None:
    said = help_text(stage)
    first, *_ = said.splitlines()
    assert first.startswith(f"python -m {MODULES[stage]}: ")
    assert len(ConfigFile.read(CONF / f"{stage}.yaml").examples) >= 3
    whole = OmegaConf.to_container(OmegaConf.load(CONF / f"{stage}.yaml"))
    assert isinstance(whole, dict)
    for name in whole.keys() - {"defaults", "hydra"}:
        assert re.search(rf"^  {name}:", said, re.M), name
    of_settings = (CONF / f"{stage}.yaml").read_text().split("\nhydra:")[0].split("- _self_")[1]
    comments = [line.partition("  # ")[2] for line in of_settings.splitlines()]
    assert [comment for comment in comments if comment not in said] == []


def test_groups_show_the_chosen_option_and_name_the_others() -> None:
    said = help_text("train", ["sae=gated", "model=gemma-2-2b"])
    assert "sae=gated   or batchtopk, jumprelu, matryoshka, relu, topk" in said
    assert "  sae.sparsity: 0.2" in said
    assert "optimizer=gated" in said  # it follows the variant
    # A file that builds on another shows both, each setting once.
    assert "  model.name: google/gemma-2-2b" in said
    assert said.count("  model.dtype:") == said.count("  model.revision:") == 1
    with pytest.raises(UserError, match="sae=gatd is unknown: choose one of batchtopk, gated"):
        help_text("train", ["sae=gatd"])


def test_launchers_are_named_and_the_chosen_one_shows_its_settings() -> None:
    plain, chosen = help_text("train"), help_text("train", ["hydra/launcher=slurm"])
    for name in group_options("hydra/launcher"):
        assert re.search(rf"^  {name} +\w", plain, re.M), name
    assert "hydra.launcher.partition: null" in chosen
    assert "hydra.launcher." not in plain


@pytest.mark.parametrize("stage", ["harvest", "train"])
def test_every_preset_is_named_and_described(stage: str) -> None:
    lines = help_text(stage).splitlines()
    for name in group_options("experiment"):
        assert [line for line in lines if re.match(rf"  {name} +\w", line)], name
    assert all(preset_lines().values())


@pytest.mark.parametrize(("stage", "example"), examples())
def test_its_examples_compose(stage: str, example: str) -> None:
    command = shlex.split(example)
    assert command[:2] == ["python", "-m"]
    if command[2] != MODULES[stage]:  # a later command that goes on from this one
        stage = command[2]
    overrides = [item for item in command[3:] if item != "-m"]
    # Of a sweep the first value of each.
    first = [item if "[" in item else item.split(",")[0] for item in overrides]
    quoted = [re.sub(r"=(.*[<*].*)", r"='\1'", item) if "[" not in item else item.split("=")[0] for item in first]
    plain = [item for item in quoted if "=" in item]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert compose(stage, plain) is not None


@pytest.mark.parametrize("module", [*MODULES.values(), "data"])
def test_it_imports_nothing_heavy(module: str) -> None:
    code = (
        f"import runpy, sys; sys.argv = ['{module}', '--help']\n"
        f"try: runpy.run_module('{module}', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'pandas', 'matplotlib'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=CONF.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"python -m {module}" in done.stdout
    assert "xamples" in done.stdout


def test_bash_completes_settings() -> None:
    line = f"{sys.executable} -m train sae=b"
    typed = f"COMP_LINE='{line}' COMP_POINT={len(line)}"
    code = f"source docs/complete.bash; {typed}; _thresher_complete; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", code], cwd=CONF.parent, capture_output=True, text=True)
    assert done.stdout.split() == ["sae=batchtopk"], done.stderr
