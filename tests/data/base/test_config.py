"""Settings are checked once, and every mistake is one sentence that names the setting."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from data.base.config import Flag, Real, Settings, Text, Whole
from data.base.errors import UserError


class Loader(Settings):
    threads: Whole = Field(2, ge=1)
    """Reading threads."""
    preload: Literal["ram", "device"] | None = None
    """Where rows stay."""


class Example(Settings):
    tokens: Whole = Field(1000, ge=1)
    """How many."""
    lr: Real = Field(1e-3, gt=0)
    """Rate."""
    limit: Literal["auto"] | Annotated[Real, Field(ge=1)] | None = "auto"
    """A word or a number."""
    resume: Flag = False
    """Go on."""
    site: Text = "resid_post.3"
    """Where."""
    loader: Loader = Loader()
    """How it reads."""


def test_large_counts_may_be_written_as_floats() -> None:
    assert Example.of({"tokens": 2e6}).tokens == 2_000_000
    assert isinstance(Example.of({"tokens": 2e6}).tokens, int)
    assert Example.of({"lr": 1}).lr == 1.0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tokens": 1.5}, "tokens=1.5"),
        ({"tokens": True}, "tokens=true"),
        ({"tokens": "3"}, "tokens=3"),
        ({"tokens": 0}, "tokens=0 is not allowed: it should be greater than or equal to 1"),
        ({"tokens": None}, "tokens=null"),
        ({"tokens": float("nan")}, "tokens=nan"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": 0}, "lr=0"),
        ({"limit": 0.5}, "limit=0.5 is not allowed: it should be 'auto' or greater than or equal to 1"),
        ({"limit": "often"}, "limit=often is not allowed: it should be 'auto' or a valid number"),
        ({"resume": "no"}, "resume=no"),
        ({"resume": 1}, "resume=1"),
        ({"site": 3}, "site=3"),
        ({"loader": {"threads": 0}}, "loader.threads=0"),
        ({"loader": {"preload": "disk"}}, "loader.preload=disk is not allowed: it should be 'ram' or 'device'"),
        ({"loader": {"thread": 1}}, "loader.thread is no setting: did you mean loader.threads"),
        ({"threads": 1}, "threads is no setting: did you mean loader.threads"),
        ({"token": 1}, "token is no setting: did you mean tokens"),
        ({"zzz": 1}, "zzz is no setting: leave it out"),
    ],
)
def test_a_mistake_is_one_sentence(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        Example.of(given)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_a_group_is_named_in_front() -> None:
    with pytest.raises(UserError, match=r"^sae\.lr=0.0 is"):
        Example.of({"lr": 0}, "sae")
    with pytest.raises(UserError, match=r"^sae\.token is no setting: did you mean sae\.tokens"):
        Example.of({"token": 0}, "sae")


def test_every_field_has_its_meaning_beside_it() -> None:
    assert Example.model_fields["tokens"].description == "How many."
