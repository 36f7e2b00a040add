"""slurm/pretrain_moe.sh does the same by hand and under a real Slurm, and never installs inside a job."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from virtual_slurm import VirtualSlurm

from .conftest import ROOT, SCRIPT, TinyRun


def test_by_hand_it_trains_exports_verifies_and_samples(
    tiny_run: TinyRun, by_hand: "subprocess.CompletedProcess[str]"
) -> None:
    said = by_hand.stdout + by_hand.stderr
    assert by_hand.returncode == 0, said
    for expected in ("verified in transformers", "A sample of what the model writes", "validation loss  ", "seconds"):
        assert expected in by_hand.stdout, said
    for place in re.findall(r"^(?:run|loss curve|metrics|checkpoint|export|its report) +(\S+)$", by_hand.stdout, re.M):
        assert Path(place).exists(), place
    assert (tiny_run.folder / "by-hand" / "export" / "model.safetensors").exists()


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [
        ("2 ranks on 2 nodes", ["--ntasks-per-node=1"]),
        pytest.param("4 ranks on 2 nodes", [], marks=pytest.mark.slow),
    ],
)
def test_two_nodes_give_the_losses_of_one_machine(
    cluster: VirtualSlurm,
    tiny_run: TinyRun,
    by_hand: "subprocess.CompletedProcess[str]",
    ranks: str,
    arguments: list[str],
) -> None:
    assert by_hand.returncode == 0, by_hand.stderr
    name = ranks.replace(" ", "-")
    job = cluster.wait(cluster.submit("--nodes=2", *arguments, str(SCRIPT), *tiny_run.arguments(name), cwd=ROOT))
    assert (job.state, job.exit_code) == ("COMPLETED", "0:0"), job.output
    assert ranks in job.output
    assert "(slurm)" in job.output
    assert "verified in transformers" in job.output
    # The same sums in another order; torch's tolerance for fp32.
    assert tiny_run.losses(name) == pytest.approx(tiny_run.losses("by-hand"), rel=1.3e-6, abs=1e-5)
    assert len(tiny_run.losses(name)) == 5  # four steps and one evaluation


@pytest.mark.slurm
def test_a_signalled_job_saves_and_says_how_to_go_on(cluster: VirtualSlurm, tiny_run: TinyRun) -> None:
    long = [*tiny_run.arguments("signalled"), "train.steps=100000", "evaluation.every=0", "checkpoint.every=0"]
    folder = tiny_run.folder / "signalled"
    number = cluster.submit("--nodes=2", "--ntasks-per-node=1", str(SCRIPT), *long, cwd=ROOT)
    until = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or '"loss"' not in (folder / "metrics.jsonl").read_text():
        assert time.monotonic() < until, cluster.wait(number, 0).output
        time.sleep(0.1)
    subprocess.run(["scancel", "--signal=USR1", number], env=cluster.environment, check=True)
    job = cluster.wait(number, seconds=60)
    assert (job.state, job.exit_code) == ("COMPLETED", "0:0"), job.output
    assert "the same command goes on from there" in job.output
    assert len(list((folder / "checkpoints").glob("step_*"))) == 1


@pytest.mark.slurm
def test_without_an_environment_a_job_stops_in_seconds_and_names_the_command(
    cluster: VirtualSlurm, tmp_path: Path
) -> None:
    clone, no_python = tmp_path / "clone", tmp_path / "bin"
    for name in (
        "slurm/environment.sh",
        "slurm/pretrain.sh",
        "slurm/pretrain_moe.sh",
        "runs/moe_tiny.toml",
        "pyproject.toml",
        "constraints.txt",
    ):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, clone / name)
    no_python.mkdir()
    for name in ("python", "python3"):
        (no_python / name).write_text("#!/bin/sh\nexit 1\n")
        (no_python / name).chmod(0o755)
    path = f"{no_python}:{os.environ['PATH']}"
    job = cluster.wait(cluster.submit("--nodes=2", "slurm/pretrain_moe.sh", cwd=clone, PATH=path), seconds=30)
    assert (job.state, job.exit_code) == ("FAILED", "2:0"), job.output
    assert "no python with torch" in job.output
    assert f"On a login node, in {clone}: bash slurm/pretrain_moe.sh --prepare" in job.output
    assert not (clone / ".venv").exists()


@pytest.mark.slurm
def test_without_a_corpus_a_job_stops_in_seconds_and_names_the_command(cluster: VirtualSlurm, tmp_path: Path) -> None:
    override = f"data.store={tmp_path / 'nothing'}"
    job = cluster.wait(cluster.submit(str(SCRIPT), override, cwd=tmp_path), seconds=60)
    assert (job.state, job.exit_code) == ("FAILED", "2:0"), job.output
    assert "the corpus is not prepared" in job.output
    assert "bash slurm/pretrain_moe.sh --prepare" in job.output
    assert not (tmp_path / "nothing").exists()


@pytest.mark.slurm
def test_a_job_has_one_rank_for_each_gpu(cluster: VirtualSlurm, tiny_run: TinyRun) -> None:
    # A batch that two ranks could share but four cannot is refused, without training anything.
    wrong = [*tiny_run.arguments("gpus"), "train.global_batch_size=6", "train.micro_batch_size=1"]
    submitted = cluster.submit("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", str(SCRIPT), *wrong, cwd=ROOT)
    job = cluster.wait(submitted, seconds=60)
    assert (job.state, job.exit_code) == ("FAILED", "2:0"), job.output
    assert "train.global_batch_size = 6" in job.output
