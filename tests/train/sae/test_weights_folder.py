"""Weights in shards: what stands on the disk, what is read of it, and what is said where a file is not as it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.base.errors import UserError
from tests.helpers.toy import FORMS, D, F, make
from train.sae import SAE, load, read_rows, save
from train.sae.parts.split import LatentSplit

INDEX = "sae.safetensors.index.json"
MOST = 3000  # bytes a file
RECORD = {"site": "resid_post.3", "fingerprint": "abc"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(make("batchtopk"), tmp_path / "sae", RECORD, shard_bytes=MOST)
    return tmp_path / "sae"


def same_state(one: SAE, other: SAE) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]) and tensor.dtype == other.state_dict()[name].dtype, name


def test_the_folder_by_hand(folder: Path) -> None:
    """A latent of BatchTopK has 2 x 16 + 1 numbers, 132 bytes, and beside them there are 16 + 5 and a counter, 92.

    So a file of 3,000 bytes holds 22 latents, and 64 latents are in three of them.
    """
    names = [f"sae-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(path.name for path in folder.iterdir()) == sorted(["config.json", *names, INDEX])
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"] == {"total_size": 64 * 132 + 92, "width": 64}
    assert [(shard["file"], shard["first"], shard["last"]) for shard in index["shards"]] == [
        (names[0], 0, 22),
        (names[1], 22, 44),
        (names[2], 44, 64),
    ]
    for shard in index["shards"]:
        assert shard["sha256"] == hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest()
    config = json.loads((folder / "config.json").read_text())
    assert config["format"] == 2 and config["site"] == "resid_post.3"
    assert config["weights_sha256"] == hashlib.sha256((folder / INDEX).read_bytes()).hexdigest()


@pytest.mark.parametrize("form", FORMS)
def test_shards_side_by_side_are_the_one_file(form: str, tmp_path: Path) -> None:
    sae = make(form)
    save(sae, tmp_path / "one", RECORD)
    save(sae, tmp_path / "many", RECORD, shard_bytes=MOST)
    one = load_file(tmp_path / "one" / "sae.safetensors")
    parts = [load_file(path) for path in sorted((tmp_path / "many").glob("sae-*.safetensors"))]
    assert len(parts) >= 3
    for name, tensor in one.items():
        of_latents = F in tensor.shape
        pieces = [part[name] for part in parts] if of_latents else [parts[0][name]]
        joined = torch.cat(pieces, dim=1 if name == "W_enc" else 0) if of_latents else pieces[0]
        assert torch.equal(joined, tensor), name
        assert of_latents or not any(name in part for part in parts[1:])
    same_state(load(tmp_path / "many"), load(tmp_path / "one"))
    same_state(load(tmp_path / "many"), sae)
    assert repr(load(tmp_path / "many")) == repr(load(tmp_path / "one"))


@pytest.mark.parametrize(("most", "files"), [(10**9, 1), (64 * 132 + 92, 1), (64 * 132 + 91, 2), (1, 64)])
def test_no_more_files_than_are_needed(most: int, files: int, tmp_path: Path) -> None:
    """All in one file where it is just small enough, and one latent a file where nothing else would do."""
    sae = make("batchtopk")
    save(sae, tmp_path, RECORD, shard_bytes=most)
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    same_state(load(tmp_path), sae)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("most", [10**9, MOST, 400])
def test_a_process_reads_its_own_latents(ranks: int, most: int, tmp_path: Path) -> None:
    sae = make("gated")
    save(sae, tmp_path, RECORD, shard_bytes=most)
    for rank in range(ranks):
        split = LatentSplit(ranks, rank)
        part = load(tmp_path, split)
        assert (part.width, part.own_width, part.site) == (F, len(range(rank, F, ranks)), "resid_post.3")
        for name, tensor in sae.state_dict().items():
            wanted = tensor[rank::ranks] if F in tensor.shape else tensor
            assert torch.equal(part.state_dict()[name], wanted), name
            assert part.state_dict()[name].is_contiguous()


def test_rows_are_read_without_the_rest(folder: Path) -> None:
    sae = load(folder)
    for name, whole in (("W_dec", sae.W_dec), ("W_enc", sae.W_enc_FD), ("b_enc", sae.bias_F)):
        assert torch.equal(torch.cat(list(read_rows(folder, name))), whole)
        assert torch.equal(torch.cat(list(read_rows(folder, name, range(20, 45)))), whole[20:45])
    (folder / "sae-00003-of-00003.safetensors").write_bytes(b"")
    assert torch.equal(torch.cat(list(read_rows(folder, "W_dec", range(3, 5)))), sae.W_dec[3:5])
    with pytest.raises(UserError, match=r"sae-00003-of-00003\.safetensors is damaged"):
        list(read_rows(folder, "W_dec", range(40, 50)))
    with pytest.raises(UserError, match="b_dec is nothing that batchtopk has for each latent: name one of W_dec,"):
        list(read_rows(folder, "b_dec"))
    with pytest.raises(UserError, match=r"range\(60, 65\) is no part of the 64 latents"):
        list(read_rows(folder, "W_dec", range(60, 65)))


def test_saving_again_leaves_nothing_of_the_other_layout(folder: Path) -> None:
    (folder / ".sae-00002-of-00009.safetensors.tmp").write_bytes(b"left by a killed process")
    (folder / "metrics.csv").write_text("not mine")
    save(make("topk"), folder, RECORD)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "metrics.csv", "sae.safetensors"]
    save(make("gated"), folder, RECORD, shard_bytes=MOST)
    assert not (folder / "sae.safetensors").exists() and load(folder).name == "gated"


@pytest.mark.parametrize("name", [*(f"sae-0000{number}-of-00003.safetensors" for number in (1, 2, 3)), INDEX])
def test_a_save_that_fails_halfway_leaves_no_sae(folder: Path, name: str) -> None:
    """At each of three shards and the index, whose place a folder has taken, over another SAE that was there."""
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(IsADirectoryError):
        save(make("relu"), folder, RECORD, shard_bytes=MOST)
    with pytest.raises(UserError, match="no trained SAE"):
        load(folder)
    (folder / name).rmdir()
    save(make("relu"), folder, RECORD, shard_bytes=MOST)
    same_state(load(folder), make("relu"))
    assert not list(folder.glob(".*"))


def sealed(change: Callable[[dict[str, object]], None]) -> Callable[[Path], None]:
    """A change of the index that config.json's checksum goes along with."""

    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))
        config = json.loads((folder / "config.json").read_text())
        config["weights_sha256"] = hashlib.sha256((folder / INDEX).read_bytes()).hexdigest()
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def flip(folder: Path) -> None:
    path = folder / "sae-00002-of-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def swap(folder: Path) -> None:
    second, third = (folder / f"sae-0000{number}-of-00003.safetensors" for number in (2, 3))
    data = second.read_bytes()
    second.write_bytes(third.read_bytes())
    third.write_bytes(data)


def poison(index: dict[str, list[dict[str, str]]], folder: Path) -> None:
    from safetensors.torch import save_file

    path = folder / "sae-00003-of-00003.safetensors"
    tensors = load_file(path)
    tensors["b_enc"][-1] = torch.inf
    save_file(tensors, path)
    index["shards"][2]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / INDEX).unlink(), "index.json is missing"),
        (lambda folder: (folder / INDEX).write_text("{}"), "index.json is damaged, its checksum"),
        (lambda folder: (folder / "sae-00002-of-00003.safetensors").unlink(), "sae-00002-of-00003.safetensors is miss"),
        (flip, "sae-00002-of-00003.safetensors is damaged, its checksum"),
        (swap, "sae-00002-of-00003.safetensors is damaged, its checksum"),
        (sealed(lambda index: index.pop("shards")), "is no index of an SAE's weights"),
        (sealed(lambda index: index["shards"].pop()), "does not list the 64 latents of this SAE"),
        (sealed(lambda index: index["shards"][1].update(first=21)), "does not list the 64 latents of this SAE"),
        (sealed(lambda index: index["shards"][0].update(file="../x.safetensors")), "is no index"),
        (sealed(lambda index: index["shards"][0].update(file="x.safetensors")), "does not list the 64 latents"),
        (sealed(lambda index: index["shards"][0].update(sha256="0")), "sae-00001-of-00003.safetensors is damaged"),
        (
            sealed(lambda index: (index["shards"][0].update(last=20), index["shards"][1].update(first=20))),
            r"sae-00001-of-00003.safetensors does not fit its config.json \(W_dec is \[22, 16\] and should be \[20",
        ),
        (
            lambda folder: sealed(lambda index: poison(index, folder))(folder),
            "sae-00003-of-00003.safetensors has values in b_enc that are not finite",
        ),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(folder: Path, damage: Callable[[Path], None], sentence: str) -> None:
    damage(folder)
    for rank in range(3):  # every process of a split dictionary, whichever latents it reads
        with pytest.raises(UserError, match=sentence) as told:
            load(folder, LatentSplit(3, rank))
        assert "\n" not in str(told.value)


def test_what_reads_an_sae_reads_shards(folder: Path) -> None:
    """The same f and x_hat, for a batch of vectors."""
    x_BD = torch.randn(32, D, generator=torch.Generator().manual_seed(1))
    for found, wanted in zip(load(folder).encode_decode(x_BD), make("batchtopk").encode_decode(x_BD), strict=True):
        assert torch.equal(found, wanted)
