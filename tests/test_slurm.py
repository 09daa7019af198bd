"""Sweeps and harvests on a real Slurm of two nodes: cancelled, requeued and killed jobs, a node that fails."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.corpus import ROOT, contents, save_model, write_stories
from tests.helpers.runs import assert_same_sae, composed, make_store
from tests.helpers.slurm import WAIT, Slurm, cluster, until, why_not

pytestmark = pytest.mark.slow

SIZES = ["batch=64", "tokens=25600", "epochs=10", "calibration_tokens=512", "heldout_tokens=512", "sae.expansion=2"]
PACES = ["log_every=10", "validate_every=400", "checkpoint_every=25", "loader.pool_chunks=4", "loader.threads=1"]
SWEEP = ["train", "-m", "sae=topk,batchtopk", "sae.k=2", "trainer=cpu", *SIZES, *PACES]
ON_SLURM = ["hydra/launcher=slurm", "hydra.launcher.gpus=0", "hydra.launcher.cpus=1", "hydra.launcher.poll_seconds=0.5"]
SAES = ("sae-topk", "sae-batchtopk")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if reason := why_not():
        pytest.skip(reason)
    with cluster(tmp_path_factory.mktemp("slurm") / "cluster") as one:
        yield one


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache")
    make_store(path, composed("out=x"))
    return path


@contextlib.contextmanager
def command(slurm: Slurm, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run a stage on the cluster's login node; it and its jobs are ended with the test."""
    environment = {**slurm.environment, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", *arguments]
    pipe = subprocess.PIPE
    # A shell has its background jobs ignore SIGINT, and processes inherit that: here it must be heard.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        words, cwd=ROOT, env=environment, text=True, stdout=pipe, stderr=pipe, preexec_fn=heard
    ) as process:
        try:
            yield process
        finally:
            process.kill()
            slurm.say("scancel", "--user=root")


def said(process: subprocess.Popen[str]) -> str:
    """Wait for a command that succeeds, and return what it said."""
    out, err = process.communicate(timeout=2 * WAIT)
    assert process.returncode == 0, out + err
    return out + err


def has_saved(run: Path) -> bool:
    """Whether a run has written a checkpoint."""
    return (run / "checkpoints" / "last.ckpt").exists()


def freeze(slurm: Slurm, runs: Mapping[str, Sequence[Path]]) -> None:
    """Let jobs stand still as soon as all of their `runs` have a checkpoint, so that none ends before its turn."""
    frozen: set[str] = set()

    def all_stand() -> bool:
        for job, folders in runs.items():
            if job not in frozen and all(has_saved(folder) for folder in folders):
                slurm.say("scancel", "--signal=STOP", job)
                frozen.add(job)
        return frozen == set(runs)

    until(all_stand, "the checkpoints")


@pytest.fixture(scope="module")
def local(slurm: Slurm, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep in one process, without Slurm."""
    folder = tmp_path_factory.mktemp("local")
    with command(slurm, *SWEEP, f"cache={cache}", f"hydra.sweep.dir={folder}") as process:
        said(process)
    return folder


def test_a_requeued_job_and_a_node_that_fails_end_in_the_same_bytes(
    slurm: Slurm, cache: Path, local: Path, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    arguments = [*SWEEP, *ON_SLURM, "hydra.launcher.saes_per_job=1", f"cache={cache}", f"hydra.sweep.dir={sweep}"]
    with command(slurm, *arguments) as process:
        first, second = sorted(slurm.running(2))
        freeze(slurm, {first: [sweep / SAES[0]], second: [sweep / SAES[1]]})
        # As Slurm does when the time limit is near; submitit then has the job queued again.
        slurm.say("scancel", "--signal=USR2", first)
        slurm.say("scancel", "--signal=CONT", first)
        node = slurm.queue()[second][1]
        slurm.kill_node(node)
        slurm.start_node(node)
        until(lambda: slurm.queue()[first][0] == "PENDING", "the first job to be queued again")
        slurm.running(2)
        slurm.say("scontrol", "requeue", first)
        text = said(process)
    assert text.count("submitted") == 1  # Slurm queued them again, and nobody submitted more
    log = "".join(path.read_text() for path in (sweep / "slurm" / "1").glob("*_log.out"))
    assert log.count("going on from step") >= 2
    for name in SAES:
        assert_same_sae(sweep / name, local / name)


def test_ctrl_c_leaves_the_jobs_and_the_same_command_goes_on_after_a_cancellation(
    slurm: Slurm, cache: Path, local: Path, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    arguments = [*SWEEP, *ON_SLURM, f"cache={cache}", f"hydra.sweep.dir={sweep}"]
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(command(slurm, *arguments))
        (job,) = slurm.running()
        freeze(slurm, {job: [sweep / name for name in SAES]})
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=WAIT)
        assert process.returncode == 130 and "the jobs go on; look again with" in out
        process = stack.enter_context(command(slurm, *arguments))
        assert process.stdout is not None
        assert any("1 jobs of this command are there already, with 2 SAEs" in line for line in process.stdout)
        assert list(slurm.queue()) == [job]
        slurm.say("scancel", job)
        _, err = process.communicate(timeout=WAIT)
        assert process.returncode == 1 and "2 of 2 SAEs failed: its job was cancelled" in err
        text = said(stack.enter_context(command(slurm, *arguments)))
    assert "2/2 SAEs done" in text
    assert "going on from step" in next((sweep / "slurm" / "2").glob("*_log.out")).read_text()
    for name in SAES:
        assert_same_sae(sweep / name, local / name)


def test_a_job_of_two_processes_splits_a_dictionary_as_torchrun_does(slurm: Slurm, cache: Path, tmp_path: Path) -> None:
    small = ["sae=batchtopk", "sae.k=2", "trainer=cpu", "tokens=1920", "batch=32", *SIZES[2:], *PACES, f"cache={cache}"]
    # The nodes have names that no other program knows.
    alias = Slurm(slurm.folder, {**slurm.environment, "MASTER_ADDR": "127.0.0.1"})
    ranks = ["trainer.num_nodes=2", "trainer.latent_ranks=2", f"hydra.sweep.dir={tmp_path / 'jobs'}"]
    with command(alias, "train", "-m", *small, *ON_SLURM, *ranks) as process:
        assert "1/1 SAEs done" in said(process)
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "train"]
    mesh = ["trainer.devices=2", "trainer.latent_ranks=2"]
    with command(slurm, *torchrun, *small, *mesh, f"hydra.run.dir={tmp_path / 'ranks'}") as process:
        said(process)
    (folder,) = (path.parent for path in (tmp_path / "jobs").glob("*/config.json"))
    assert_same_sae(folder, tmp_path / "ranks")


def test_a_harvest_whose_worker_is_killed_ends_in_the_same_store(slurm: Slurm, tmp_path: Path) -> None:
    model, text = save_model(tmp_path / "model"), write_stories(tmp_path / "stories.jsonl", range(1500))
    sizes = ["sites=[resid_post.1]", "tokens=40000", "heldout_tokens=1000", "packing.context=16", "lm_batch=2"]
    harvest = ["harvest", f"model.name={model}", "text=files", f"text.paths=[{text}]", *sizes]
    caches = [tmp_path / name for name in ("jobs", "local")]
    with command(
        slurm,
        *harvest,
        *ON_SLURM,
        "hydra.launcher.workers=2",
        f"cache={caches[0]}",
        f"hydra.run.dir={tmp_path / 'runs' / 'x'}",
    ) as process:
        until(lambda: any(caches[0].glob("*/commits/train/*")), "a unit")
        job = slurm.running()[0]
        os.kill(slurm.process_of(job), signal.SIGKILL)
        text_said = said(process)
    assert "it is started again" in text_said and "holds all of it" in text_said
    with command(slurm, *harvest, f"cache={caches[1]}", f"hydra.run.dir={tmp_path / 'runs' / 'y'}") as process:
        said(process)
    stores = [next(cache.glob("model-*")) for cache in caches]
    assert contents(stores[0]) == contents(stores[1])
