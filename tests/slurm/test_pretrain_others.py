"""The four job scripts are one script with four names; each trains its own run file, by hand and under a real Slurm."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from virtual_slurm import VirtualSlurm

from .conftest import ROOT, TinyRun

SCRIPTS = sorted(path.name for path in (ROOT / "slurm").glob("pretrain_*.sh"))
SIZES = {
    "pretrain_dense.sh": "model.num_layers=1 model.num_heads=2 model.num_kv_heads=1 model.ffn_hidden_size=64",
    "pretrain_hybrid.sh": "model.pattern=ME*E model.num_layers=2 model.num_heads=2 model.num_kv_heads=1"
    " model.attention_scale=0.0625 model.mamba2.head_dim=16 model.mamba2.state_size=8 model.moe.num_experts=4"
    " model.moe.expert_hidden_size=16",
    "pretrain_mamba.sh": "model.num_layers=1 model.mamba2.head_dim=16 model.mamba2.state_size=8",
}


def run(script: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", str(ROOT / "slurm" / script), *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def code(script: str) -> str:
    """Return what a script does, with its name and its run file taken out."""
    own = re.compile(r"# |#$|#SBATCH --job-name|default_run_file=|one_rank=")
    lines = (ROOT / "slurm" / script).read_text().splitlines()
    return "\n".join(line for line in lines if not own.match(line)).replace(script, "pretrain_x.sh")


def test_there_is_a_script_for_each_architecture() -> None:
    assert {f"pretrain_{name}.sh" for name in ("dense", "hybrid", "mamba", "moe")} == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_differ_in_names_alone(script: str) -> None:
    assert code(script) == code("pretrain_moe.sh")
    text = (ROOT / "slurm" / script).read_text()
    run_file = re.search(r"^default_run_file=(\S+)$", text, re.MULTILINE)
    assert run_file is not None
    assert f"(default: {run_file[1]})" in text
    assert f"#SBATCH --job-name={script.removesuffix('.sh').replace('_', '-')}\n" in text
    header = (ROOT / run_file[1]).read_text()
    assert f"slurm/{script}." in header
    # With one rank there is nobody to share the experts with.
    assert ("one_rank=(parallel.ep=1)" in text) == ("\nep = 2 " in header)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_head_of_the_script_and_what_is_no_key_is_refused(script: str) -> None:
    told = run(script, "--help")
    assert told.returncode == 0
    assert told.stdout.startswith("Pretrain a ")
    assert f"bash slurm/{script} [KEY=VALUE ...]" in told.stdout
    refused = run(script, "--prepar")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == f"--prepar: neither KEY=VALUE nor --prepare; bash slurm/{script} --help explains both\n"


def of(script: str, tiny_run: TinyRun) -> list[str]:
    """Return the overrides that make a tiny run of a script's own run file."""
    keys = [key for key in tiny_run.arguments(script) if not key.startswith("model.")]
    return [*keys, "model.hidden_size=32", *SIZES[script].split()]


@pytest.mark.slow
@pytest.mark.parametrize("script", SIZES)
def test_by_hand_each_trains_exports_verifies_and_samples(tiny_run: TinyRun, script: str) -> None:
    said = run(script, *of(script, tiny_run), cwd=tiny_run.folder)
    assert said.returncode == 0, said.stdout + said.stderr
    for expected in ("verified in transformers", "A sample of what the model writes", "validation loss  "):
        assert expected in said.stdout
    assert (tiny_run.folder / script / "export" / "model.safetensors").exists()


@pytest.mark.slow
def test_one_rank_needs_no_partner_for_the_experts(tiny_run: TinyRun) -> None:
    keys = [key for key in of("pretrain_hybrid.sh", tiny_run) if not key.startswith("run.")]
    places = [f"run.folder={tiny_run.folder / 'alone'}", "run.device=cpu"]
    said = run("pretrain_hybrid.sh", *keys, *places, MESHWRIGHT_RANKS="1")
    assert said.returncode == 0, said.stdout + said.stderr
    assert said.stdout.startswith("One rank: parallel.ep=1.\n")


@pytest.mark.slow
@pytest.mark.slurm
def test_two_nodes_train_a_dense_model(cluster: VirtualSlurm, tiny_run: TinyRun) -> None:
    keys = [key for key in of("pretrain_dense.sh", tiny_run) if not key.startswith("run.")]
    keys += [f"run.folder={tiny_run.folder / 'nodes'}", "run.device=cpu"]
    script = str(ROOT / "slurm" / "pretrain_dense.sh")
    job = cluster.wait(cluster.submit("--nodes=2", "--ntasks-per-node=1", script, *keys, cwd=ROOT))
    assert (job.state, job.exit_code) == ("COMPLETED", "0:0"), job.output
    assert "2 ranks on 2 nodes" in job.output
    assert "verified in transformers" in job.output
