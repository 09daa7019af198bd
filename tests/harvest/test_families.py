"""python -m pytest tests/harvest/test_families.py: the residual identities of every architecture, on tiny models.

What is right is read by plain hooks on modules that tests/helpers/families.py names, without the project's own code.
`-m slow` runs all of them and prints a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data.base.errors import UserError
from data.base.sites import INPUT_KINDS, STREAM_KINDS
from harvest import lm
from harvest.hooks import Site, locate, replace, run_to
from tests.helpers.families import (
    COMMON,
    LAYERS,
    NORMED_STREAM,
    PARALLEL,
    REFUSED,
    ROPE,
    SEQUENTIAL,
    TINY,
    WIDTH,
    Tiny,
    first_of,
    logits,
    tokens,
)
from tests.helpers.slow import slow_unless
from tests.helpers.tiny_lm import write_tokenizer


@dataclass
class Row:
    """One line of the table."""

    family: str
    form: str
    n_sites: int
    largest_error: float


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    """Rows of the table, printed after the last test of this file."""
    rows: list[Row] = []
    yield rows
    capturing = request.config.pluginmanager.getplugin("capturemanager")
    if rows and capturing is not None:
        with capturing.global_and_fixture_disabled():
            print(as_text(rows))


def as_text(rows: list[Row]) -> str:
    proved = [row for row in rows if row.n_sites]
    lines = [f"\n{'family':26}{'form':15}{'sites proved':>12}{'largest error':>15}"]
    lines += [f"{row.family:26}{row.form:15}{row.n_sites:12}{row.largest_error:15.1e}" for row in rows]
    lines += [f"{len(proved)} forms of {len({TINY[row.family].kind for row in proved})} architectures proved"]
    return "\n".join(lines)


def read_by_plain_hooks(model: nn.Module, tiny: Tiny, ids: Tensor) -> dict[str, Tensor]:
    """Every site of the model, [B, T, D], copied when it is made."""
    seen: dict[str, Tensor] = {}
    handles = []

    def keep(name: str, value: Any, multiplier: float = 1.0) -> None:
        x = value[0] if isinstance(value, tuple | list) else value
        seen[name] = (x.reshape(*ids.shape, -1) * multiplier).clone()

    def on_input(module: nn.Module, name: str) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keep(name, args[0] if args else kwargs["hidden_states"])

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def on_output(module: nn.Module, name: str, multiplier: float = 1.0) -> None:
        handles.append(module.register_forward_hook(lambda m, args, out: keep(name, out, multiplier)))

    for layer in range(LAYERS):
        block = tiny.block(model, layer)
        on_input(block, f"resid_pre.{layer}")
        on_output(block, f"resid_post.{layer}")
        on_output(first_of(block, tiny.attn), f"attn_out.{layer}", tiny.multiplier)
        on_output(first_of(block, tiny.mlp), f"mlp_out.{layer}", tiny.multiplier)
        places = {"resid_mid": tiny.mid} | input_places(tiny)
        for kind, place in places.items():
            if place:
                path, end = place.split(":")
                (on_input if end == "in" else on_output)(first_of(block, path), f"{kind}.{layer}")
    try:
        logits(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def input_places(tiny: Tiny) -> dict[str, str]:
    """Where attention and the MLP read, "" where that is refused."""
    places = {"attn_in": tiny.attn_in or f"{tiny.attn}:in", "mlp_in": tiny.mlp_in or f"{tiny.mlp}:in"}
    return {kind: "" if place == "refused" else place for kind, place in places.items()}


def sums(model: nn.Module, tiny: Tiny, seen: dict[str, Tensor], layer: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs that are equal if the block does what the family is said to do."""
    pre, mid, post, attn, mlp = (seen.get(f"{kind}.{layer}") for kind in STREAM_KINDS)
    assert pre is not None and post is not None and attn is not None and mlp is not None
    if tiny.form == PARALLEL:
        return [(pre + attn + mlp, post)]
    assert mid is not None
    if tiny.form == SEQUENTIAL:
        return [(pre + attn, mid), ((mid + mlp) * tiny.stream_scale, post)]
    assert tiny.norms is not None
    block = tiny.block(model, layer)
    return [(first_of(block, tiny.norms[0])(pre + attn), mid), (first_of(block, tiny.norms[1])(mid + mlp), post)]


def relative(x: Tensor, y: Tensor) -> float:
    return ((x - y).abs().max() / y.abs().max()).item()


def shifted(model: nn.Module, site: str, ids: Tensor) -> Tensor:
    shift_D = torch.linspace(-1, 1, WIDTH)
    with replace(model, Site.parse(site), lambda x_BTD: x_BTD + shift_D):
        return logits(model, ids)


def check(name: str) -> Row:
    tiny, ids = TINY[name], tokens()
    model = tiny.build()
    clean, truth = logits(model, ids), read_by_plain_hooks(model, tiny, ids)
    n_inputs = sum(bool(place) for place in input_places(tiny).values())
    assert len(truth) == LAYERS * (len(STREAM_KINDS) - (not tiny.mid) + n_inputs)

    # What is read is what the plain hooks read, and adds up.
    seen = run_to(model, [Site.parse(site) for site in truth], ids)
    for site, x_BTD in truth.items():
        assert torch.equal(seen[site], x_BTD), site
        assert x_BTD.shape == (*ids.shape, WIDTH) and x_BTD.abs().mean() > 1e-3, site
    pairs = [pair for layer in range(LAYERS) for pair in sums(model, tiny, truth, layer)]
    worst = max(relative(x, y) for x, y in pairs)
    assert worst < 1e-6
    assert torch.equal(truth["resid_post.0"], truth["resid_pre.1"])

    # The identity changes no bit, at any site.
    for site in truth:
        with replace(model, Site.parse(site), lambda x_BTD: x_BTD):
            assert torch.equal(logits(model, ids), clean), site

    # To shift one summand is to shift their sum: so a replacement reaches every reader.
    alike = [["resid_post.0", "resid_pre.1"]]
    if tiny.stream_scale != 1:
        alike.append(["attn_out.0", "resid_mid.0"])
    elif tiny.form == SEQUENTIAL:
        alike = [["resid_post.0", "resid_pre.1", "mlp_out.0"], ["attn_out.0", "resid_mid.0"]]
    elif tiny.form == PARALLEL:
        alike = [["resid_post.0", "resid_pre.1", "mlp_out.0", "attn_out.0"]]
    for first, *others in alike:
        moved = shifted(model, first, ids)
        assert relative(moved, clean) > 1e-2, first
        for other in others:
            assert relative(shifted(model, other, ids), moved) < 1e-4, other

    for kind in INPUT_KINDS:
        check_input(model, tiny, kind, truth, ids)
    if not tiny.mid:
        with pytest.raises(UserError, match="in parallel and have no resid_mid"):
            locate(model, Site.parse("resid_mid.0"))
    return Row(name, tiny.form, len(truth), worst)


def check_input(model: nn.Module, tiny: Tiny, kind: str, truth: dict[str, Tensor], ids: Tensor) -> None:
    """What attention or the MLP gives is a function of what it reads, and nothing else reads what is put there."""
    part = kind.removesuffix("_in")
    site, output = Site.parse(f"{kind}.1"), Site.parse(f"{part}_out.1")
    if not input_places(tiny)[kind]:
        with pytest.raises(UserError, match=rf"{kind}\.1: {part}_out of this .* block is not known to be a function"):
            locate(model, site)
        return
    stream = Site.parse("resid_mid.1" if tiny.mid and part == "mlp" else "resid_pre.1")
    clean_BTD = truth[str(output)]

    def move(x_BTD: Tensor) -> Tensor:
        return x_BTD.flip(-1) + 1

    def put_back(x_BTD: Tensor) -> Tensor:
        return truth[str(site)]

    # The stream is another, and what is read of it the old: so is what is given. In whichever order the two stand.
    with replace(model, stream, move), replace(model, site, put_back):
        assert torch.equal(run_to(model, [output], ids)[str(output)], clean_BTD)
    with replace(model, site, put_back), replace(model, stream, move):
        assert torch.equal(run_to(model, [output], ids)[str(output)], clean_BTD)
    # The stream is the old, and what is read of it another.
    skip = [Site.parse(name) for name in ("resid_pre.1", "resid_mid.1") if name in truth]
    with replace(model, site, move):
        seen = run_to(model, [*skip, output], ids)
    assert relative(seen[str(output)], clean_BTD) > 1e-3
    for unmoved in skip:
        if not (part == "attn" and unmoved.kind == "resid_mid"):
            assert torch.equal(seen[str(unmoved)], truth[str(unmoved)])
    with replace(model, site, lambda x_BTD: torch.zeros_like(x_BTD)):
        assert not run_to(model, [site], ids)[str(site)].any()


def check_refused(name: str) -> Row:
    """It is refused in a sentence, with the path of a block, which is a site that works."""
    tiny, ids = TINY[name], tokens()
    model = tiny.build()
    path = f"{tiny.blocks}.1"
    with pytest.raises(UserError, match=f"name the path of a module instead, such as {path} for what that block gives"):
        locate(model, Site.parse("attn_out.1"))
    outputs: list[Any] = []
    handle = model.get_submodule(path).register_forward_hook(lambda module, args, out: outputs.append(out))
    clean = logits(model, ids)
    handle.remove()
    with replace(model, Site.parse(path), lambda x_BTD: x_BTD):
        assert torch.equal(logits(model, ids), clean)
    (x_BTD,) = run_to(model, [Site.parse(path)], ids).values()
    assert torch.equal(x_BTD, outputs[0][0] if isinstance(outputs[0], tuple | list) else outputs[0])
    return Row(name, REFUSED, 0, 0.0)


@pytest.mark.parametrize("name", slow_unless({"gemma2", "gpt_neox", "falcon", "gemma3 image"}.__contains__, COMMON))
def test_the_identities_of_the_commonest(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_the_identities_of_every_family(name: str, table: list[Row]) -> None:
    table.append(check_refused(name) if TINY[name].form == REFUSED else check(name))


def test_the_families_are_as_many_as_is_said() -> None:
    kinds = {tiny.kind for tiny in TINY.values() if tiny.form != REFUSED}
    assert len(kinds) >= 50 and set(COMMON) <= set(TINY)
    assert {tiny.form for tiny in TINY.values()} == {SEQUENTIAL, PARALLEL, NORMED_STREAM, REFUSED}


# ---- The MLP of what it reads ----------------------------------------------------------------------------------------


def call_mlp(name: str, block: nn.Module, x_BTD: Tensor) -> Tensor:
    """The MLP on its own, as a reader of the block's `forward` would call it."""
    zero = torch.zeros_like(x_BTD)
    if name.startswith("opt"):
        return block.fc2(block.activation_fn(block.fc1(x_BTD)))
    if name in ("biogpt", "xglm"):
        return block.fc2(block.activation_fn(block.fc1(x_BTD)))
    if name == "bloom":
        return block.mlp(x_BTD, zero)  # it adds to the stream itself
    if name == "mpt":
        return block.ffn(x_BTD, zero)
    tiny = TINY[name]
    module = first_of(block, (tiny.mlp_in or f"{tiny.mlp}:in").split(":")[0])
    given = module(x_BTD)
    y_BTD = given[0] if isinstance(given, tuple) else given
    last = first_of(block, tiny.mlp)
    return y_BTD * tiny.multiplier if last is module else last(y_BTD) * tiny.multiplier


def check_mlp_of_mlp_in(name: str) -> None:
    tiny, ids = TINY[name], tokens()
    model = tiny.build()
    for layer in range(LAYERS):
        seen = run_to(model, [Site.parse(f"mlp_in.{layer}"), Site.parse(f"mlp_out.{layer}")], ids)
        y_BTD = call_mlp(name, tiny.block(model, layer), seen[f"mlp_in.{layer}"])
        assert torch.equal(y_BTD.reshape(seen[f"mlp_out.{layer}"].shape), seen[f"mlp_out.{layer}"])


WITH_MLP_IN = [name for name, tiny in TINY.items() if tiny.form != REFUSED and tiny.mlp_in != "refused"]


@pytest.mark.parametrize("name", slow_unless({"gemma2", "gpt_neox", "falcon", "gemma3 image"}.__contains__, COMMON))
def test_the_mlp_of_mlp_in_is_mlp_out_to_the_bit(name: str) -> None:
    check_mlp_of_mlp_in(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_MLP_IN)
def test_the_mlp_of_mlp_in_is_mlp_out_to_the_bit_in_every_family(name: str) -> None:
    check_mlp_of_mlp_in(name)


# ---- What a replacement does where a block multiplies, or adds in place ---------------------------------------------


def test_a_replacement_is_what_the_block_adds_also_behind_a_multiplier() -> None:
    """Granite adds .22 times what its attention gives out; attn_out is what is added."""
    tiny, ids = TINY["granite"], tokens()
    model = tiny.build()
    new_BTD = torch.randn(*ids.shape, WIDTH, generator=torch.Generator().manual_seed(2))
    clean = read_by_plain_hooks(model, tiny, ids)
    with replace(model, Site.parse("attn_out.1"), lambda x_BTD: new_BTD):
        seen = read_by_plain_hooks(model, tiny, ids)
    torch.testing.assert_close(seen["resid_mid.1"], clean["resid_pre.1"] + new_BTD, rtol=1e-6, atol=1e-6)
    with replace(model, Site.parse("attn_out.1"), torch.zeros_like):
        seen = read_by_plain_hooks(model, tiny, ids)
    assert torch.equal(seen["resid_mid.1"], clean["resid_pre.1"])


def test_gradients_pass_behind_a_multiplier() -> None:
    """The logits move by as much for a shift of attn_out as for one of resid_mid, the identity included."""
    model, ids = TINY["granite"].build(), tokens()
    gradients = []
    for site in ("attn_out.1", "resid_mid.1"):
        shift_D = torch.zeros(WIDTH, requires_grad=True)
        with replace(model, Site.parse(site), lambda x_BTD, d=shift_D: x_BTD + d):
            logits(model, ids).square().sum().backward()
        assert shift_D.grad is not None and shift_D.grad.abs().max() > 0
        gradients.append(shift_D.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


def test_falcon_does_not_write_into_what_was_read_or_put_there() -> None:
    """Its blocks add attention's output into the MLP's own tensor."""
    model, ids = TINY["falcon"].build(), tokens()
    site = Site.parse("mlp_out.0")
    new_BTD = torch.ones(*ids.shape, WIDTH)
    given: list[Tensor] = []

    def put(x_BTD: Tensor) -> Tensor:
        given.append(x_BTD)
        return new_BTD

    with replace(model, site, put):
        logits(model, ids)
    assert torch.equal(new_BTD, torch.ones_like(new_BTD))
    assert torch.equal(given[0], read_by_plain_hooks(model, TINY["falcon"], ids)["mlp_out.0"])


# ---- The proof -------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A sequential block whose norms have names that no form knows."""

    def __init__(self, add: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        attn = self.self_attn(x)
        return self.add(x + attn, self.mlp(x + attn))


class Model(nn.Module):
    """The least that a model must have: a list of blocks, an embedding, and a forward of ids."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([make() for _ in range(2)])
        self.embed = nn.Embedding(4, WIDTH)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        x = self.embed(input_ids)
        for block in self.model.layers:
            x = block(x)
        return x


class ParallelBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.self_attn(x) + self.mlp(x)


def test_a_sequential_block_with_unknown_norms_is_not_called_parallel() -> None:
    """resid_pre + attn_out + mlp_out adds up in both, so it takes more to tell them apart."""
    torch.manual_seed(0)
    with pytest.raises(UserError, match=r"architecture 'Model' are not known .*, such as model\.layers\.0 for"):
        locate(Model(lambda: Block(torch.add)).eval(), Site.parse("resid_post.0"))
    model = Model(lambda: ParallelBlock(torch.add)).eval()
    assert locate(model, Site.parse("attn_out.1")).module is model.model.layers[1].self_attn
    with pytest.raises(UserError, match="Model blocks add attention and MLP in parallel"):
        locate(model, Site.parse("resid_mid.0"))


def test_a_declared_family_that_no_longer_adds_up_is_refused() -> None:
    """As where another version of transformers scales what a block gives out."""
    model = TINY["llama"].build()
    model.model.layers[1].register_forward_hook(lambda module, args, output: output * 1.001)
    with pytest.raises(UserError, match=r"'llama' do not add up here as .*, such as model\.layers\.1 for"):
        locate(model, Site.parse("resid_mid.1"))


def test_a_silent_layer_of_a_declared_family_is_taken() -> None:
    model = TINY["llama"].build()
    for parameter in model.model.layers[1].mlp.parameters():
        parameter.zero_()
    (x_BTD,) = run_to(model, [Site.parse("mlp_out.1")], tokens()).values()
    assert not x_BTD.any()


def test_a_vocabulary_of_four_is_enough_for_the_proof() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**(ROPE | {"vocab_size": 4}))).eval().requires_grad_(False)
    assert locate(model, Site.parse("resid_mid.1")).end == "in"


# ---- Models that read images too ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma3 image", "llava image"])
def test_the_language_model_inside_another_is_loaded_and_read(name: str, tmp_path: Path) -> None:
    model, ids = TINY[name].build(), tokens()
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path, ["a b"])
    loaded = lm.load_model({"name": str(tmp_path), "device": "cpu"})
    (x_BTD,) = run_to(loaded, [Site.parse("resid_mid.1")], ids).values()
    assert torch.equal(x_BTD, read_by_plain_hooks(model, TINY[name], ids)["resid_mid.1"])


def test_a_model_that_is_no_language_model_is_refused_in_a_sentence(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    ViTModel(
        ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16)
    ).save_pretrained(tmp_path)
    write_tokenizer(tmp_path, ["a b"])
    with pytest.raises(UserError, match="of architecture 'vit' is none that transformers loads as a language model"):
        lm.load_model({"name": str(tmp_path), "device": "cpu"})
