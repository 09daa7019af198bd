"""What a job asks of the cluster, and what is refused before anything is submitted."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from data.base.cli import CONF
from data.base.errors import UserError
from data.slurm.settings import SlurmSettings


def settings(**given: Any) -> SlurmSettings:
    return SlurmSettings.of_launcher(given)


def test_the_configuration_has_each_setting_at_its_default() -> None:
    launcher = OmegaConf.load(CONF / "hydra" / "launcher" / "slurm.yaml")
    assert SlurmSettings.of_launcher(launcher) == SlurmSettings.of({})
    assert set(launcher) - {"_target_"} == set(SlurmSettings.model_fields)


def test_settings_become_parameters_of_sbatch() -> None:
    asked = settings(partition="gpu", hours=1.5, gpus=2, cpus=4, memory_gb=1.5, at_once=3, sbatch={"exclude": "n[1-2]"})
    parameters = asked.parameters("name", "7", 9)
    expected = {"partition": "gpu", "time": 90, "gpus_per_node": 2, "cpus_per_task": 4, "mem": "1536MB"}
    assert expected.items() <= parameters.items()
    assert parameters["array_parallelism"] == 3
    assert parameters["additional_parameters"] == {"requeue": True, "exclude": "n[1-2]"}
    assert "qos" not in parameters


def test_jobs_run_together_and_without_gpus_where_nothing_else_is_asked() -> None:
    parameters = settings(gpus=0).parameters("name", "7", 9)
    assert parameters["array_parallelism"] == 9
    assert "gpus_per_node" not in parameters


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"partition": "p\nrm -rf ~"}, "is no value for sbatch: give one line of text"),
        ({"sbatch": {"mail-user": "a\nb"}}, "is no value for sbatch: give one line of text"),
        ({"sbatch": {"x=1\nrm": "y"}}, "is no parameter: write it as sbatch does"),
        ({"sbatch": {"array": "0-9"}}, r"sbatch\.array is set by this program: leave it out"),
        ({"cpus": 0}, r"hydra\.launcher\.cpus=0 is not allowed"),
        ({"partitions": "p"}, r"hydra\.launcher\.partitions .*did you mean .*partition"),
    ],
)
def test_what_sbatch_must_not_be_given_is_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        settings(**given)
