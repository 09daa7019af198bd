"""Memory by formula: against the counted step, and the count against what torch's allocator says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.counter import Counter
from benchmarks.counting import Shape, count_real_step, count_step, trainer_of
from benchmarks.memory import CHOOSING, VARIANTS, moments, parameters, peak_bytes, row, state_bytes
from tests.helpers.slow import slow_unless

# Of a plain step: sizes in which each of the moments of the formula is the highest.
SHAPES = [
    {"width": 1536, "d_model": 192, "batch": 1024},
    {"width": 12_288, "d_model": 768, "batch": 32},
    {"width": 4096, "d_model": 256, "batch": 512, "k": 200},  # every group of 32 latents may hold one of the largest
    {"width": 49_152, "d_model": 64, "batch": 8192, "k": 8},  # z in four blocks
]
# Of a variant with a bound, whose entries are sparse or all of z.
BOUND = [
    {"width": 12_288, "d_model": 96, "batch": 4096},
    {"width": 30_001, "d_model": 256, "batch": 1000, "k": 100},
    {"width": 262_144, "d_model": 64, "batch": 4096, "k": 1500},  # so many entries that ordering them needs most
    {"width": 262_144, "d_model": 64, "batch": 4096, "k": 2500},
    {"width": 1_048_576, "d_model": 256, "batch": 512},
    {"width": 12_288, "d_model": 96, "batch": 1024, "active": 6144},  # half of all, as where a run of ReLU starts
]
WITH_DEAD = [
    {"width": 4096, "d_model": 128, "batch": 512, "dead": 1001},
    {"width": 65_536, "d_model": 64, "batch": 64, "dead": 2000},
    {"width": 16_384, "d_model": 32, "batch": 2048, "dead": 4096},  # above 128 k_aux: a choice of a choice
]


@pytest.mark.parametrize("variant", slow_unless({"batchtopk", "relu"}.__contains__, VARIANTS))
def test_the_formula_is_within_one_percent_of_a_counted_step(variant: str) -> None:
    for sizes in SHAPES + (WITH_DEAD if variant in CHOOSING else BOUND):
        shape = Shape(variant, **sizes)
        count = count_step(shape)
        assert state_bytes(shape) == pytest.approx(count.state, rel=0.01), sizes
        assert peak_bytes(shape) == pytest.approx(count.peak, rel=0.01), sizes


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_formula_holds_up_to_a_million_latents(variant: str) -> None:
    for width in (12_288, 49_152, 262_144, 1_048_576):
        for share in (0.0, 0.2) if variant in CHOOSING else (0.0,):
            shape = Shape(variant, width, dead=round(share * width))
            assert peak_bytes(shape) == pytest.approx(count_step(shape).peak, rel=0.01)


def allocated(trace: Path) -> int:
    """The most bytes above the start that torch's allocator had given out at once, by a profiler's trace."""
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        most = max(most, live)
    return most


@pytest.mark.parametrize("variant", ["topk", "gated"])
def test_the_counter_sees_what_torch_allocates(variant: str, tmp_path: Path) -> None:
    """On the CPU's own path, with values: the same bytes as the allocator's own records."""
    for sizes in ({"width": 2048, "d_model": 64, "batch": 256}, {"width": 1024, "d_model": 128, "batch": 512}):
        shape = Shape(variant, **sizes, k=8)
        with Counter() as counter:
            trainer, x_BD = trainer_of(shape), torch.randn(shape.batch, shape.d_model)
            trainer.training_step(x_BD)
            counter.begin()
            start = counter.live
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as profile:
                trainer.training_step(x_BD)
        profile.export_chrome_trace(str(tmp_path / "trace.json"))
        assert counter.peak - start == pytest.approx(allocated(tmp_path / "trace.json"), rel=0.01)


@pytest.mark.parametrize("variant", ["batchtopk", "jumprelu"])
def test_shapes_alone_count_what_values_do(variant: str) -> None:
    shape = Shape(variant, width=512, d_model=32, batch=64, k=4, active=256)  # JumpReLU: half, so all of z
    by_shapes, by_values = count_step(shape), count_real_step(shape)
    assert by_shapes.peak == by_values.peak and by_shapes.state == by_values.state
    # Clipping takes a list of tensors at a time where they have values, and one at a time where they have none.
    assert sum(by_shapes.moved.values()) == pytest.approx(sum(by_values.moved.values()), abs=100)
    for part in ("products", "selection", "sparse products", "z"):
        assert by_shapes.moved.get(part) == by_values.moved.get(part)


@pytest.mark.parametrize("variant", ["relu", "jumprelu", "gated"])
def test_shapes_alone_count_what_values_do_of_sparse_entries(variant: str) -> None:
    shape = Shape(variant, width=1024, d_model=32, batch=256)
    by_values = count_real_step(shape, dense_share=1.0)
    (packed,) = [operation for operation in by_values.operations if operation.name == "kernel" and not operation.read]
    by_shapes = count_step(replace(shape, active=round(packed.written / 8 / shape.batch)), dense_share=1.0)
    assert by_shapes.peak == pytest.approx(by_values.peak, rel=0.01)
    for part in ("products", "selection", "sparse products", "parameters"):
        assert by_shapes.moved[part] == pytest.approx(by_values.moved[part], rel=0.01)


@pytest.mark.parametrize("variant", ["relu", "jumprelu", "gated"])
def test_a_million_latents_fit_where_few_are_active(variant: str) -> None:
    """96 of a token. Where half are active all of z comes, and they do not fit."""
    shape = Shape(variant, width=1_048_576)
    assert peak_bytes(shape) < 30e9
    assert peak_bytes(replace(shape, active=shape.width // 2)) > 80e9


def test_memory_that_is_freed_is_not_counted() -> None:
    with Counter() as counter:
        first = torch.zeros(1000)  # 4,000 bytes
        view = first[10:]
        del first
        assert counter.live == 4000  # the view holds it
        del view
        second = torch.zeros(500)
        assert (counter.live, counter.peak) == (2000, 4000)
        del second
    assert counter.live == 0


def test_the_state_by_hand() -> None:
    """10 latents of width 4: W_enc, W_dec, b_enc and b_dec are 94 entries, with two moments 12 bytes each."""
    shape = Shape("topk", width=10, d_model=4, k=2)
    assert parameters(shape) == 10 * 4 * 2 + 10 + 4
    assert state_bytes(shape) == 94 * 12 + 10 * 8
    assert state_bytes(replace(shape, ema=True)) == 94 * 16 + 10 * 8
    assert parameters(replace(shape, variant="gated")) == 94 + 20
    # 8 bits a moment, and a float32 scale for 256 entries of each: 2 + 8 / 256 bytes.
    assert state_bytes(shape, "adam8bit") == 94 * (4 + 2 + 8 / 256) + 10 * 8


def test_the_choice_by_hand() -> None:
    """64 latents, 100 tokens, k 1: the best of 2 groups of 32 a token, then of the 32 values of each chosen group."""
    shape = Shape("topk", width=64, d_model=8, batch=100, k=1)
    inputs, z = 3 * 100 * 8 * 4, 100 * 64 * 4
    assert moments(shape)["choice"] == inputs + z + 19 * 100 * 32 + 8 * 100
    assert moments(replace(shape, k=2))["choice"] == inputs + z + 7 * 100 * 64  # as many groups as are asked for
    assert moments(shape, "bf16")["product"] == inputs + z + 100 * 8 * 2 + 64 * 8 * 2


def test_a_line_of_the_table_names_the_moment() -> None:
    shape = Shape("topk", width=1024, d_model=64, batch=128, k=4)
    cells = row(shape).split(" | ")
    assert cells[7] in moments(shape)
    assert abs(float(cells[9].removesuffix("% |"))) < 1
