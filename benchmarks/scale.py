"""What a run of any size needs, by arithmetic: GPUs, memory, seconds a step, messages, reading, days.

    python -m benchmarks.scale                                    # the lines of benchmarks/RESULTS.md
    python -m benchmarks.scale --width 16777216 --tokens 40e9 --batch 131072 --dead 0.07 --card H100

Memory is by the formula of benchmarks/memory.py and bytes are as benchmarks/counting.py counts them, both held by
tests; messages by `collectives`. Times follow from a card's published rates and the shares of them that are reached,
which are assumptions: no card has confirmed them. A dictionary is split over R processes by latents, a batch over N.
Letters: B tokens in a batch of all processes, D model width, F latents, k entries a token, R and N as above.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from benchmarks.counting import Shape, count_step
from benchmarks.memory import BIASES, CHOOSING, PREFIXES, VARIANTS, block_of, peak_bytes, state_bytes
from benchmarks.traffic import least_bytes
from train.sae.parts.auxk import auxk_size
from train.sae.weights_file import PIECE
from train.sae.weights_folder import SHARD_BYTES

NODE = 8  # GPUs of a host, which reach each other over the card's own links
DIGIT = 11  # bits of a round of histograms, and so 2,048 counts of 8 bytes
COUNTS = 8 * 2**DIGIT
# Bytes of the numbers beside an SAE's parameters: the scale and moments of its input, then what a variant has.
NUMBERS = (4, 4, 4)
OWN_NUMBERS = {"batchtopk": (4, 4, 8), "matryoshka": (4, 4, 8), "relu": (4,), "gated": (4,)}


@dataclass(frozen=True)
class Card:
    """A GPU's published rates, dense: where a sheet gives them with sparsity, half of that.

    NVIDIA's data sheets: A100 80GB SXM (2021), H100 SXM (2023), H200 SXM (2024).
    """

    memory: float
    """Bytes."""
    bf16: float
    """Products' operations a second."""
    tf32: float
    """The same of float32 factors in the card's tf32."""
    bandwidth: float
    """Bytes a second of its memory."""
    link: float
    """Bytes a second and direction to the other cards of its host."""


CARDS = {
    "A100": Card(80e9, 312e12, 156e12, 2.039e12, 300e9),
    "H100": Card(80e9, 989e12, 494e12, 3.35e12, 450e9),
    "H200": Card(141e9, 989e12, 494e12, 4.8e12, 450e9),
}


@dataclass(frozen=True)
class Reached:
    """Shares of the published rates, and times, that a step is assumed to reach."""

    products: float = 0.6
    """Of the operations a second."""
    bandwidth: float = 0.75
    """Of the memory's."""
    link: float = 0.7
    """Of the links'."""
    network: float = 40e9
    """Bytes a second of a card to another host: a 400 Gbit/s network at 0.8."""
    latency: float = 20e-6
    """Seconds a message takes whatever its size."""
    host: float = 7e-6
    """Seconds the host takes to launch an operation."""
    memory: float = 0.9
    """Of the card's memory, after what the context and the allocator's gaps take."""


@dataclass(frozen=True)
class Run:
    """A run of one SAE."""

    shape: Shape
    """The whole dictionary and the whole batch."""
    tokens: float
    """In all."""
    latent_ranks: int = 1
    """R."""
    data_ranks: int = 1
    """N."""
    matmul: str = "bf16"
    """The encoder's product in training: bf16 or tf32."""
    optimizer: str = "adam"
    """adam or adam8bit."""
    weight: int = 4
    """Bytes of a weight; 2 is not offered here, and says what it would bring."""
    entry: float = 2.0
    """Bytes of an activation in the store: 2 in bfloat16, 1 in int8."""

    @property
    def own(self) -> Shape:
        """Return what one process has: its latents, its rows."""
        shape, ranks = self.shape, self.latent_ranks
        return replace(
            shape,
            width=math.ceil(shape.width / ranks),
            batch=math.ceil(shape.batch / self.data_ranks),
            dead=math.ceil(shape.dead / ranks),
        )

    @property
    def gpus(self) -> int:
        """Return how many processes there are, each with a card."""
        return self.latent_ranks * self.data_ranks


# Messages


@dataclass(frozen=True)
class Message:
    """A collective of a step, as one process calls it."""

    what: str
    """What goes over."""
    kind: str
    """all_reduce, all_gather or broadcast."""
    over: str
    """latents or data: over which of the mesh's dimensions."""
    payload: int
    """Bytes of the tensor that is handed in."""

    def sent(self, ranks: int) -> float:
        """Compute the bytes that a process sends around a ring."""
        if self.kind == "all_reduce":
            return 2 * (ranks - 1) / ranks * self.payload
        return (ranks - 1) * self.payload if self.kind == "all_gather" else float(self.payload)


def collectives(run: Run) -> list[Message]:
    """List the messages of a plain step; there is none over a dimension of one process."""
    found = [*over_latents(run), *of_the_whole_choice(run), *over_data(run)]
    size = {"latents": run.latent_ranks, "data": run.data_ranks}
    return [message for message in found if size[message.over] > 1]


def over_latents(run: Run) -> Iterator[Message]:
    """List what the processes that hold one dictionary tell each other of their rows."""
    own, variant, k = run.own, run.shape.variant, run.shape.k
    rows = 4 * own.batch * own.d_model
    if variant == "topk":
        yield Message("each one's k largest of a token", "all_gather", "latents", 4 * own.batch * k)
        yield Message("their latents", "all_gather", "latents", 4 * own.batch * k)
    yield Message("parts of x_hat", "all_reduce", "latents", rows * (PREFIXES if variant == "matryoshka" else 1))
    if variant == "gated":
        yield Message("parts of the gate's x_hat", "all_reduce", "latents", rows)
    if variant != "relu":  # its encoder reads x' as it is
        yield Message("the gradient of b_dec", "all_reduce", "latents", 4 * own.d_model)
    if variant not in CHOOSING:
        yield Message("the penalty", "all_reduce", "latents", 4)
    if variant != "jumprelu":
        yield Message("L0", "all_reduce", "latents", 8)
    yield Message("the gradients' norm", "all_reduce", "latents", 4)
    if variant in CHOOSING:
        # Also where none is dead here: another process may have some. The rest follows where any has.
        yield Message("how many may be dead", "all_reduce", "latents", 8)
        if run.shape.dead:
            k_aux = auxk_size(own.d_model)
            yield Message("each one's k_aux largest dead of a token", "all_gather", "latents", 4 * own.batch * k_aux)
            yield Message("their latents", "all_gather", "latents", 4 * own.batch * k_aux)
            yield Message("parts of AuxK's reconstruction", "all_reduce", "latents", rows)
            yield Message("how many are dead", "all_reduce", "latents", 8)


def of_the_whole_choice(run: Run) -> Iterator[Message]:
    """List the rounds in which the whole batch's largest are found, over both dimensions, one after the other."""
    if run.shape.variant not in ("batchtopk", "matryoshka"):
        return
    places = run.shape.batch * run.shape.width
    of_values = math.ceil(32 / DIGIT)
    of_ties = math.ceil(max(1, (places - 1).bit_length()) / DIGIT)
    for over in ("latents", "data"):
        yield Message("how many are positive", "all_reduce", over, 8)
        for _ in range(of_values + of_ties):
            yield Message("counts by digit", "all_reduce", over, COUNTS)


def over_data(run: Run) -> Iterator[Message]:
    """List what the processes that have other rows tell each other of their latents, of variants that aim at an L0."""
    own, variant = run.own, run.shape.variant
    if variant in CHOOSING and run.shape.dead:
        yield Message("the residual's mean", "all_reduce", "data", 4 * own.d_model)
        yield Message("its spread", "all_reduce", "data", 4)
        yield Message("its mean square", "all_reduce", "data", 4)
    if variant not in CHOOSING:
        yield Message("L0", "all_reduce", "data", 4 if variant == "jumprelu" else 8)
    for _ in range(2):
        yield Message("the gradient of a matrix", "all_reduce", "data", 4 * own.width * own.d_model)
    for _ in range(BIASES.get(variant, 1)):
        yield Message("the gradient of a bias", "all_reduce", "data", 4 * own.width)
    yield Message("the gradient of b_dec", "all_reduce", "data", 4 * own.d_model)
    yield Message("who fired", "all_reduce", "data", 4 * own.width)
    for size in NUMBERS + OWN_NUMBERS.get(variant, ()):
        yield Message("a number of the SAE", "broadcast", "data", size)


# The final SAE, which the processes that hold a dictionary send each other a piece at a time, for the first to write


def shards(run: Run, shard_bytes: int) -> list[int]:
    """List the latents of each file of the final folder."""
    shape = run.shape
    of_rows = 4 * (2 * shape.d_model + BIASES.get(shape.variant, 1))
    beside = 4 * shape.d_model + sum(NUMBERS + OWN_NUMBERS.get(shape.variant, ()))
    most = max(1, (shard_bytes - beside) // of_rows)
    size = math.ceil(shape.width / math.ceil(shape.width / most))
    return [min(size, shape.width - first) for first in range(0, shape.width, size)]


def pieces(run: Run, shard_bytes: int, entries: int) -> Iterator[tuple[range, int]]:
    """Yield the latents of each piece of the final SAE, and how many numbers it has of each of them."""
    first = 0
    for count in shards(run, shard_bytes):
        latents, d_model = range(first, first + count), run.shape.d_model
        rows, columns = max(1, entries // d_model), max(1, entries // count)
        yield from ((latents[at : at + rows], d_model) for at in range(0, count, rows))  # of W_dec
        yield from ((latents, min(columns, d_model - at)) for at in range(0, d_model, columns))  # of W_enc
        for _ in range(BIASES.get(run.shape.variant, 1)):
            yield from ((latents[at : at + entries], 1) for at in range(0, count, entries))
        first += count


def gathering(run: Run, shard_bytes: int = SHARD_BYTES, entries: int = PIECE) -> list[Message]:
    """List the messages of the final SAE, in files of so many bytes and pieces of so many entries."""
    found = []
    for latents, row in pieces(run, shard_bytes, entries) if run.latent_ranks > 1 else ():
        # Of each process equally many rows, from the last latent before the piece that is the first process's on.
        rows = math.ceil((latents.stop - latents.start // run.latent_ranks * run.latent_ranks) / run.latent_ranks)
        found.append(Message("a piece of the final SAE", "all_gather", "latents", 4 * rows * row))
    return found


def gathering_bytes(run: Run, shard_bytes: int = SHARD_BYTES, entries: int = PIECE) -> int:
    """Compute the most bytes that a process holds for the final SAE beside its own part of it.

    While a piece comes in, that is gathered and then put in order, the one before it is being written, of W_enc
    besides in the order that it was gathered in; and each process sends its part of the piece. What the transport
    (gloo, NCCL) holds is not in it.
    """
    most = max(len(latents) * row for latents, row in pieces(run, shard_bytes, entries))
    return round(4 * most * (4 + 1 / run.latent_ranks))


def ending(run: Run) -> str:
    """Say what the final SAE of a run takes: its files, and what each process sends and holds for them."""
    files = len(shards(run, SHARD_BYTES))
    sent = sum(message.sent(run.latent_ranks) for message in gathering(run))
    return (
        f"  the final SAE: {files} files, of which each of {run.latent_ranks} processes sends {sent / 1e9:.1f} GB in "
        f"{len(gathering(run)):,} messages and holds {gathering_bytes(run) / 1e6:,.0f} MB at a time"
    )


# What follows


@dataclass(frozen=True)
class Needs:
    """What a run needs, of each card or in all."""

    gpus: int
    """In all."""
    state: float
    """Bytes a card, between two steps."""
    peak: float
    """Bytes a card, at the most."""
    sent: float
    """Bytes a process sends in a step."""
    seconds: float
    """A step of the code as it is."""
    least: float
    """A step that moves only what the roofline counts, with the same messages."""
    read: float
    """Bytes a second of rows, each read once."""
    store: float
    """Bytes of a store that holds every token once."""
    days: float
    """Of the code as it is."""


@cache
def moved(shape: Shape) -> tuple[float, float]:
    """Count the bytes and the operations of a step; with many blocks of z by the line through two smaller counts."""
    block = block_of(shape)
    fewest = max(4, math.ceil(shape.dead / block) + 1)
    if shape.width <= 2 * fewest * block or shape.variant not in CHOOSING:
        count = count_step(shape)
        return float(sum(count.moved.values())), float(len(count.operations))
    # Every further block of z adds the same, and so do the further rows of the matrices.
    low = moved(replace(shape, width=fewest * block))
    high = moved(replace(shape, width=2 * fewest * block))
    further = (shape.width / block - fewest) / fewest
    return low[0] + further * (high[0] - low[0]), low[1] + further * (high[1] - low[1])


def message_seconds(run: Run, card: Card, reached: Reached) -> float:
    """Compute what the messages of a step take, one after another; a host's cards reach each other over its links."""
    ranks = {"latents": run.latent_ranks, "data": run.data_ranks}
    # Processes number through the latents first, so a host holds whole dictionaries as long as they fit into it.
    within = {"latents": run.latent_ranks <= NODE, "data": run.gpus <= NODE}
    seconds = 0.0
    for message in collectives(run):
        rate = card.link * reached.link if within[message.over] else reached.network
        seconds += message.sent(ranks[message.over]) / rate + reached.latency
    return seconds


def product_seconds(run: Run, card: Card, reached: Reached) -> float:
    """Compute what the encoder's product takes; of the variants with a bound all five products of a dense step."""
    own = run.own
    products = 1 if own.variant in CHOOSING else 5
    rate = card.bf16 if run.matmul == "bf16" else card.tf32
    return products * 2 * own.batch * own.d_model * own.width / (rate * reached.products)


def needs(run: Run, card: Card, reached: Reached = Reached()) -> Needs:
    """Compute what a run needs on so many cards of a kind."""
    own = run.own
    size, operations = moved(own)
    product, messages = product_seconds(run, card, reached), message_seconds(run, card, reached)
    bandwidth = card.bandwidth * reached.bandwidth
    # The host launches ahead of the device: the slower of the two sets the pace.
    seconds = max(product + size / bandwidth, operations * reached.host) + messages
    least = product + least_bytes(own) / bandwidth + messages
    ranks = {"latents": run.latent_ranks, "data": run.data_ranks}
    rows = run.shape.batch * run.shape.d_model * run.entry
    return Needs(
        gpus=run.gpus,
        state=state_bytes(own, run.optimizer, run.weight),
        peak=peak_bytes(own, run.optimizer, run.matmul, run.weight),
        sent=sum(message.sent(ranks[message.over]) for message in collectives(run)),
        seconds=seconds,
        least=least,
        read=rows / seconds,
        store=run.tokens * run.shape.d_model * run.entry,
        days=run.tokens / run.shape.batch * seconds / 86_400,
    )


def fewest_ranks(run: Run, card: Card, reached: Reached = Reached()) -> int:
    """Find the fewest processes that the dictionary must be split over to fit into the cards; at most 1,024."""
    for ranks in range(1, 1025):
        own = replace(run, latent_ranks=ranks).own
        if peak_bytes(own, run.optimizer, run.matmul, run.weight) <= card.memory * reached.memory:
            return ranks
    raise SystemExit("more than 1,024 processes would be needed: take more data ranks, or a smaller batch")


# The lines


def row(run: Run, card_name: str, reached: Reached = Reached()) -> str:
    """Write one line of the table."""
    found = needs(run, CARDS[card_name], reached)
    shape = run.shape
    held = run.optimizer + (", bf16 weights" if run.weight == 2 else "")
    cells = [
        f"{shape.variant} {shape.width:,} x {shape.d_model:,}",
        f"{shape.batch:,}",
        f"{run.tokens / 1e9:g}",
        held,
        f"{found.gpus} {card_name} ({run.data_ranks} x {run.latent_ranks})",
        f"{found.state / 1e9:.1f}",
        f"{found.peak / 1e9:.1f}",
        f"{found.sent / 1e6:.1f}",
        f"{1e3 * found.seconds:.1f}",
        f"{1e3 * found.least:.1f}",
        f"{found.read / 1e9:.2f}",
        f"{found.store / 1e12:.2f}",
        f"{found.days:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| SAE, F x d | B | 1e9 tokens | optimizer | cards (data x latents) | state, GB a card | peak | sent, MB a step "
    "| ms a step | at the roofline | read, GB/s | store, TB | days |"
)


def paper_lines() -> list[Run]:
    """List the runs of the table: the sizes of the other benchmarks, then Gao et al.'s 16M latents and 40B tokens.

    The width of the model whose activations they took is not public: GPT-2's 768, and 2,304 and 4,096 beside it.
    7% of its latents were dead. The last two lines of each width are of 8-bit moments, and of what bfloat16 weights
    would bring besides, which this project does not train.
    """
    runs = [Run(Shape("batchtopk", width), 1e9, matmul="tf32") for width in (12_288, 49_152, 262_144, 1_048_576)]
    width = 1 << 24
    for d_model in (768, 2304, 4096):
        paper = Run(Shape("topk", width, d_model, 131_072, dead=round(0.07 * width)), 40e9, data_ranks=8)
        runs += [paper, replace(paper, optimizer="adam8bit"), replace(paper, optimizer="adam8bit", weight=2)]
    return runs


def asked(args: argparse.Namespace) -> Run:
    """Make the run that the command line asks for."""
    dead = round(args.dead * args.width) if args.variant in CHOOSING else 0
    shape = Shape(args.variant, args.width, args.d_model, args.batch, args.k, dead=dead, ema=args.ema)
    return Run(
        shape,
        args.tokens,
        args.latent_ranks or 1,
        args.data_ranks,
        args.matmul,
        args.optimizer,
        2 if args.bf16_weights else 4,
        args.entry_bytes,
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--card", choices=CARDS, default="H100")
    parser.add_argument("--variant", choices=VARIANTS, default="topk")
    parser.add_argument("--width", type=int, help="F; without it the table of RESULTS.md")
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--batch", type=int, default=4096, help="B, of all processes")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=float, default=1e9)
    parser.add_argument("--latent-ranks", type=int, help="R; without it the fewest that fit")
    parser.add_argument("--data-ranks", type=int, default=1, help="N")
    parser.add_argument("--matmul", choices=["bf16", "tf32"], default="bf16")
    parser.add_argument("--optimizer", choices=["adam", "adam8bit"], default="adam")
    parser.add_argument("--bf16-weights", action="store_true", help="what they would bring; not offered in training")
    parser.add_argument("--entry-bytes", type=float, default=2.0, help="of an activation in the store; int8: 1")
    parser.add_argument("--dead", type=float, default=0.0, help="share of latents that may be dead")
    parser.add_argument("--ema", action="store_true")
    parser.add_argument("--messages", action="store_true", help="list the collectives of a step, and of the final SAE")
    return parser.parse_args()


def main() -> None:
    args = parsed()
    runs = paper_lines() if args.width is None else [asked(args)]
    reached = Reached()
    print(f"Assumed: {reached}\n\n{HEAD}\n| :-- " + "| --: " * 12 + "|")
    for run in runs:
        if args.width is None or args.latent_ranks is None:
            run = replace(run, latent_ranks=fewest_ranks(run, CARDS[args.card]))
        print(row(run, args.card), flush=True)
        for message in collectives(run) if args.messages else []:
            print(f"  {message.payload:>14,} bytes  {message.kind} over {message.over}: {message.what}")
        if args.messages:
            print(ending(run))


if __name__ == "__main__":
    main()
