"""What a run of any size needs: worked by hand, and in the directions that arithmetic must go."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.counting import Shape, count_step
from benchmarks.memory import peak_bytes, state_bytes
from benchmarks.scale import (
    CARDS,
    Card,
    Message,
    Reached,
    Run,
    collectives,
    ending,
    fewest_ranks,
    gathering,
    gathering_bytes,
    message_seconds,
    moved,
    needs,
    paper_lines,
    product_seconds,
    row,
    shards,
)

SMALL = Shape("topk", width=1024, d_model=64, batch=128, k=4)
# Rates that make seconds easy: a product of 1e9 operations, a memory of 1e9 bytes and links of 1e6 a second.
ROUND = Card(memory=1e6, bf16=1e9, tf32=5e8, bandwidth=1e9, link=1e6)
ALL = Reached(products=1, bandwidth=1, link=1, network=1e3, latency=0, host=0, memory=1)


def payloads(run: Run, over: str) -> list[int]:
    return [message.payload for message in collectives(run) if message.over == over]


def test_a_ring_by_hand() -> None:
    """Of 4 processes each sends its quarter three times to add up, and three times to hand out."""
    assert Message("x", "all_reduce", "data", 400).sent(4) == 600
    assert Message("x", "all_gather", "data", 400).sent(4) == 1200


def test_one_process_sends_nothing() -> None:
    assert collectives(Run(SMALL, 1e6)) == []


def test_messages_of_topk_by_hand() -> None:
    run = Run(SMALL, 1e6, latent_ranks=2)
    # values and numbers of 4 latents of 128 tokens; x_hat 128 x 64; b_dec's gradient; L0; the norm
    assert payloads(run, "latents")[:6] == [4 * 128 * 4, 4 * 128 * 4, 4 * 128 * 64, 4 * 64, 8, 4]
    # AuxK: how many may be dead; where any may be, with k_aux 32, values, numbers, its part of x_hat, how many are dead
    assert payloads(run, "latents")[6:] == [8]
    dead = replace(run, shape=replace(SMALL, dead=100))
    assert payloads(dead, "latents")[6:] == [8, 4 * 128 * 32, 4 * 128 * 32, 4 * 128 * 64, 8]


def test_messages_of_batchtopk_by_hand() -> None:
    """Three rounds of 2,048 counts for the 32 bits of a value, two for the 17 of a place among 128 x 1,024."""
    run = Run(replace(SMALL, variant="batchtopk"), 1e6, latent_ranks=2)
    assert payloads(run, "latents") == [4 * 128 * 64, 4 * 64, 8, 4, 8, 8, *5 * [16_384]]
    # Over data too: the same rounds, then all gradients and who fired, of half the latents, and the six
    # numbers of a BatchTopK SAE.
    both = replace(run, data_ranks=2)
    gradients = [4 * 512 * 64, 4 * 512 * 64, 4 * 512, 4 * 64]
    assert payloads(both, "data") == [8, *5 * [16_384], *gradients, 4 * 512, 4, 4, 4, 4, 4, 8]
    assert payloads(both, "latents")[0] == 4 * 64 * 64  # each has half of the rows


def test_times_by_hand() -> None:
    run = Run(SMALL, 1e6, latent_ranks=2)
    # 2 x 128 x 64 x 512 operations, in bf16 and at half the rate in tf32
    assert product_seconds(run, ROUND, ALL) == pytest.approx(8_388_608 / 1e9)
    assert product_seconds(replace(run, matmul="tf32"), ROUND, ALL) == pytest.approx(8_388_608 / 5e8)
    # A ring of two sends what it is handed; all_gather too. Over the network it is 1,000 times slower.
    sent = 2 * 2048 + 32_768 + 256 + 8 + 4 + 8
    assert message_seconds(run, ROUND, ALL) == pytest.approx(sent / 1e6)
    assert message_seconds(run, ROUND, replace(ALL, latency=1.0)) == pytest.approx(sent / 1e6 + 7)
    beyond = replace(run, latent_ranks=16)
    assert message_seconds(beyond, ROUND, ALL) > 1000 * message_seconds(run, ROUND, ALL)


def test_needs_by_hand() -> None:
    run = Run(SMALL, 1e6)
    found = needs(run, ROUND, ALL)
    size, operations = moved(SMALL)
    assert found.seconds == pytest.approx(2 * 128 * 64 * 1024 / 1e9 + size / 1e9)
    assert needs(run, ROUND, replace(ALL, host=1.0)).seconds == pytest.approx(operations)  # the host is the slower
    assert found.days == pytest.approx(1e6 / 128 * found.seconds / 86_400)
    assert found.read == pytest.approx(128 * 64 * 2 / found.seconds)
    assert found.store == 1e6 * 64 * 2
    assert (found.state, found.peak) == (state_bytes(SMALL), peak_bytes(SMALL, matmul="bf16"))
    assert found.least < found.seconds and found.sent == 0


def test_bytes_of_many_blocks_lie_on_a_line() -> None:
    """As the paper's lines take them: 20 blocks of z from 5 and 10, dead latents and all."""
    shape = Shape("topk", width=20 * 32, d_model=32, batch=1 << 22, k=2, dead=128)
    count = count_step(shape)
    size, operations = moved(shape)
    assert size == pytest.approx(sum(count.moved.values()), rel=0.01)
    assert operations == pytest.approx(len(count.operations), rel=0.01)


def test_a_dictionary_is_split_until_it_fits() -> None:
    run = Run(SMALL, 1e6)
    ranks = fewest_ranks(run, ROUND, ALL)
    assert ranks > 1
    fits, too_few = (replace(run, latent_ranks=count).own for count in (ranks, ranks - 1))
    assert peak_bytes(fits, matmul="bf16") <= ROUND.memory < peak_bytes(too_few, matmul="bf16")
    assert fewest_ranks(replace(run, optimizer="adam8bit", weight=2), ROUND, ALL) < ranks
    with pytest.raises(SystemExit, match=r"more than 1,024"):
        fewest_ranks(run, replace(ROUND, memory=1.0), ALL)


def test_the_papers_run_is_16_million_latents_over_40_billion_tokens() -> None:
    paper = [run for run in paper_lines() if run.shape.width == 2**24]
    assert {(run.shape.batch, run.tokens) for run in paper} == {(131_072, 40e9)}
    plain, eight_bits, narrow = paper[:3]
    # 16 bytes an entry with its gradient; 2.7 times as far with 2-byte weights, gradients and 8-bit moments.
    entries = 2**24 * (2 * 768 + 1) + 768
    assert state_bytes(plain.shape) == 12 * entries + 8 * 2**24
    assert 16 / (narrow.weight * 2 + 2) == pytest.approx(2.7, abs=0.04)
    ranks = [fewest_ranks(run, CARDS["H100"]) for run in (plain, eight_bits, narrow)]
    assert ranks[0] > ranks[1] > ranks[2]


def test_the_final_sae_by_hand() -> None:
    """TopK's 10 latents of 4 entries in two files of 5: 36 bytes a latent, and 28 beside them in the first.

    Pieces of 8 entries: of each file two latents of W_dec, or a column of W_enc, or all of b_enc at a time. The second
    file begins with a latent of the second process, so the first one's latent before it comes along.
    """
    run = Run(Shape("topk", width=10, d_model=4, batch=2, k=1), 1e3, latent_ranks=2)
    assert shards(run, 28 + 5 * 36) == [5, 5] and shards(run, 10**6) == [10]
    first = [16, 16, 16, *4 * [12], 12]  # rows of 4: latents 0 and 1, 2 and 3, 4; columns of 5 and of 1
    second = [32, 32, 16, *4 * [12], 12]  # latents 4 with 5 and 6; 6 with 7 and 8; 8 with 9
    assert [message.payload for message in gathering(run, 28 + 5 * 36, 8)] == first + second
    assert gathering_bytes(run, 28 + 5 * 36, 8) == 4 * 8 * 4.5
    assert "the final SAE: 1 files, of which each of 2 processes sends 0.0 GB in 3 messages" in ending(run)


def test_a_line_of_the_table() -> None:
    cells = row(Run(SMALL, 1e6, latent_ranks=2), "H100").split(" | ")
    assert cells[0] == "| topk 1,024 x 64" and cells[4] == "2 H100 (1 x 2)"
