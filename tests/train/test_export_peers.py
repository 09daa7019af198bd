"""Every export, loaded and run by the tools it is for, in the environment that `make peers` makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.agreement import ROOT, ask, margin
from evaluate.metrics import statistics, totals
from evaluate.score import SiteScore
from evaluate.splice import Splice
from harvest.hooks import Site, run_to
from harvest.lm import EMBEDDED, load_model
from tests.helpers.hub import serving
from tests.helpers.runs import SITE, activations
from tests.helpers.transcoders import CASES, make_transcoder, save_transcoder, write_export
from tests.train.interop.test_export import RECORD, cases, make
from train.interop.export import export
from train.sae import VARIANTS, save

PEERS = ROOT / ".venv-peers/bin/python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PEERS.exists(), reason="no .venv-peers: `make peers` makes it"),
]


def test_the_peers_encode_and_decode_as_we_do(tmp_path: Path) -> None:
    x = torch.from_numpy(activations(2048, 9))
    save_file({"x": x}, tmp_path / "x.safetensors")
    jobs = []
    for number, (to, form, norm) in enumerate(cases()):
        save(make(form, input_norm=norm), tmp_path / f"{number}", RECORD)
        export(tmp_path / f"{number}", to, tmp_path / f"{number}-out")
        paths = {"folder": str(tmp_path / f"{number}-out"), "to": str(tmp_path / f"{number}.safetensors")}
        jobs.append({"format": to, "x": str(tmp_path / "x.safetensors"), **paths})
    ask(PEERS, "benchmarks.peer_forms", jobs)
    rms = float(x.square().mean().sqrt())
    for number, (to, form, norm) in enumerate(cases()):
        sae, theirs = make(form, input_norm=norm), load_file(tmp_path / f"{number}.safetensors")
        with torch.no_grad():
            f, x_hat = sae.encode_decode(x)
            f = f / sae.norm.scale * (1 if sae.unit_rows else sae.W_dec.norm(dim=1))
            near = margin(sae, x) < 1e-5
            if norm == "token":  # the eps that SAELens leaves out on its way back
                std, mean = torch.std_mean(x, dim=1, keepdim=True)
                theirs["x_hat"] += 1e-5 * (theirs["x_hat"] - mean) / std
        assert near.float().mean() < 1e-4, (to, form, norm)
        assert torch.equal(((f > 0) & ~near), ((theirs["f"] > 0) & ~near)), (to, form, norm)
        rows = ~near.any(1)
        assert (f - theirs["f"])[rows].abs().max() < 1e-5 * rms, (to, form, norm)
        assert (x_hat - theirs["x_hat"])[rows].abs().max() < 1e-5 * rms, (to, form, norm)


def test_the_peers_transcode_as_we_do(tmp_path: Path) -> None:
    """SAELens' four transcoders, sparsify's with and without skip, circuit-tracer's set."""
    x = torch.from_numpy(activations(2048, 9))
    save_file({"x": x}, tmp_path / "x.safetensors")
    jobs = []
    for number, (to, form, skip) in enumerate(CASES):
        folder = save_transcoder(tmp_path / f"{number}", make_transcoder(form, skip))
        write_export(to, folder, tmp_path / f"{number}-out")
        paths = {"folder": str(tmp_path / f"{number}-out"), "to": str(tmp_path / f"{number}.safetensors")}
        jobs.append({"format": to, "x": str(tmp_path / "x.safetensors"), **paths})
    ask(PEERS, "benchmarks.peer_forms", jobs)
    for number, (to, form, skip) in enumerate(CASES):
        sae, theirs = make_transcoder(form, skip), load_file(tmp_path / f"{number}.safetensors")
        with torch.no_grad():
            f, y = sae.encode_decode(x)
            f = f / sae.norm_out.scale * (1 if sae.unit_rows else sae.W_dec.norm(dim=1))
            near = margin(sae, x) < 1e-5
        rows, rms = ~near.any(1), float(y.square().mean().sqrt())
        assert near.float().mean() < 1e-4, (to, form, skip)
        assert (f - theirs["f"])[rows].abs().max() < 2e-5 * rms, (to, form, skip)
        assert (y - theirs["x_hat"])[rows].abs().max() < 2e-5 * rms, (to, form, skip)


def test_sae_lens_own_evaluation_agrees(tmp_path: Path) -> None:
    """On the same contexts of the embedded model, which have no special token: both ablate all positions."""
    model = load_model({"name": "embedded"})
    ids = torch.randint(1, 2048, (8, 64), generator=torch.Generator().manual_seed(0))
    x = run_to(model, [Site.parse(SITE)], ids)[SITE].flatten(0, 1)
    sae = VARIANTS["batchtopk"](192, 256, k=16)
    sae.initialise(x)
    save(sae, tmp_path / "sae", RECORD)
    export(tmp_path / "sae", "saelens", tmp_path / "out")
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    job = {"model": str(EMBEDDED), "ids": str(tmp_path / "ids.safetensors"), "batch": 4, "special": [0], "hook": ""}
    told = ask(PEERS, "benchmarks.peer_scores", {**job, "saelens": [str(tmp_path / "out")], "dictionary_learning": []})
    score = SiteScore(Splice(model, Site.parse(SITE)), [sae], x.mean(0), torch.float32, (8, 64))
    score.batch(ids, torch.ones(8, 64, dtype=torch.bool), 0)
    own = {name: float(value[0]) for name, value in statistics(totals(score.columns(score.scores[0]))).items()}
    theirs = json.loads(told)["free"]
    assert own["l0"] == pytest.approx(theirs["l0"], rel=1e-3) and own["l0"] > 4
    assert own["ev"] == pytest.approx(theirs["explained_variance"], abs=1e-3)
    assert own["recovered_zero"] == pytest.approx(theirs["ce_loss_score"], abs=1e-3)


def test_sae_lens_loads_what_is_published(tmp_path: Path) -> None:
    """From a stand-in hub, by the repository's name and the SAE's folder, as the card says."""
    save(make("topk"), tmp_path / "saes" / "one", RECORD)
    x = torch.from_numpy(activations(64, 9))
    save_file({"x": x}, tmp_path / "x.safetensors")
    code = (
        "import sys; from safetensors.torch import load_file, save_file; from sae_lens import SAE\n"
        "sae = SAE.from_pretrained('me/saes', 'one')\n"
        "x_hat = sae(load_file(sys.argv[1])['x']).detach()\n"
        "save_file({'x_hat': x_hat}, sys.argv[2])\n"
    )
    with serving("token") as hub:
        hub_of = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "token", "HF_HUB_DISABLE_XET": "1"}
        environment = os.environ | hub_of | {"HF_HOME": str(tmp_path / "home")}
        sent = ["-m", "train.publish", f"saes={tmp_path / 'saes'}", "repo=me/saes", "go=true"]
        subprocess.run([sys.executable, *sent], cwd=ROOT, env=environment, check=True)
        paths = [str(tmp_path / "x.safetensors"), str(tmp_path / "out.safetensors")]
        subprocess.run([str(PEERS), "-c", code, *paths], cwd=tmp_path, env=environment, check=True)
    theirs = load_file(tmp_path / "out.safetensors")["x_hat"]
    torch.testing.assert_close(theirs, make("topk")(x), rtol=1e-5, atol=1e-5)
