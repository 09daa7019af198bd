"""What a training says at its end, and what it says of names and sizes that are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.base.command import override
from data.base.errors import UserError, did_you_mean
from data.base.sites import Site
from train.closing import evaluate_line, ranked_lines


def test_the_end_ranks_saes_of_one_l0_by_nmse() -> None:
    held_out = {"a": (32.0, 0.2), "b": (33.0, 0.1), "c": (64.0, 0.05)}
    records = {name: {"heldout": {"l0": l0, "nmse": nmse}} for name, (l0, nmse) in held_out.items()}
    assert ranked_lines({**records, "d": {"heldout": None}}) == [
        "held-out NMSE of the SAEs at each L0 (within 5%), best first:",
        "  b  L0   33.0  NMSE 0.1000  best at its L0",
        "  a  L0   32.0  NMSE 0.2000",
        "  c  L0   64.0  NMSE 0.0500",
    ]
    assert ranked_lines({"a": records["a"]}) == []


def test_the_next_command_is_one_that_can_be_pasted() -> None:
    one = evaluate_line([Path("outputs/train/topk")])
    assert one == "evaluate it: .venv/bin/python -m evaluate saes=outputs/train/topk"
    several = evaluate_line([Path("outputs/my sweep/a"), Path("outputs/my sweep/b")])
    assert several == "evaluate them: .venv/bin/python -m evaluate " + override("saes", "outputs/my sweep")
    assert override("saes", "outputs/my sweep") == "'saes='\"'\"'outputs/my sweep'\"'\"''"


@pytest.mark.parametrize("name", ["resid_pots.3", "resid_pst.3", "residpost.3"])
def test_a_slip_in_a_site_names_the_nearest(name: str) -> None:
    assert did_you_mean(name, ["resid_post.3", "mlp_out.1"]) == "did you mean resid_post.3?"
    assert did_you_mean("something else", ["resid_post.3"]) == ""


def test_a_kind_of_site_that_is_not_known_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'resid-pots\.3' is not known: did you mean resid_post\.3\? Else name one as"):
        Site.parse("resid-pots.3")
