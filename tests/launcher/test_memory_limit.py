"""A run whose state no rank could hold is refused before anything is allocated, with what would fit."""

from pathlib import Path

import pytest
import torch
from faults.real_command import run
from tiny_run import write_run_file

from meshwright.launcher import memory_limit
from meshwright.launcher.memory_limit import check_memory, host_bytes
from meshwright.launcher.runfile.footprint import state_bytes
from meshwright.launcher.runfile.messages import ConfigError
from meshwright.launcher.runfile.read import read_run_file
from meshwright.launcher.runfile.tables import RunFile

CPU = torch.device("cpu")


def run_file(folder: Path, *overrides: str) -> RunFile:
    return read_run_file(write_run_file(folder), overrides)


def test_what_fits_passes_and_what_does_not_names_the_stage_that_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded, halved, local_ranks = run_file(tmp_path, "zero.stage=3"), run_file(tmp_path, "zero.stage=2"), 2
    monkeypatch.setattr(memory_limit, "host_bytes", lambda: int(state_bytes(halved, 4).total * local_ranks) + 1)
    check_memory(sharded, CPU, 4, local_ranks)
    check_memory(halved, CPU, 4, local_ranks)
    with pytest.raises(ConfigError, match=r"GiB for 2 ranks\); zero\.stage = 2 would fit"):
        check_memory(run_file(tmp_path, "zero.stage=0"), CPU, 4, local_ranks)
    with pytest.raises(ConfigError, match=r"more ranks with zero\.stage = 3, or a smaller model, would fit"):
        check_memory(sharded, CPU, 4, 64)


def test_no_stage_is_named_that_the_schedule_does_not_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 loses gradients where backwards are taken apart, and so it would not fit, however small."""
    pipeline = (
        "parallel.pp=2",
        "pipeline.schedule=interleaved_zero_bubble",
        "train.micro_batch_size=1",
        "model.num_layers=4",
    )
    whole, cut = (run_file(tmp_path, *pipeline, f"zero.stage={stage}") for stage in (0, 2))
    monkeypatch.setattr(memory_limit, "host_bytes", lambda: int(state_bytes(cut, 8).total * 2) - 2)
    with pytest.raises(ConfigError, match=r"zero\.stage = 1 would fit|more ranks with zero\.stage = 2, or a smaller"):
        check_memory(whole, CPU, 8, 2)
    monkeypatch.setattr(memory_limit, "host_bytes", lambda: 2)
    with pytest.raises(ConfigError, match=r"more ranks with zero\.stage = 2, or a smaller model, would fit"):
        check_memory(whole, CPU, 8, 2)


def test_the_command_refuses_a_model_larger_than_the_machine(tmp_path: Path) -> None:
    refused = run("train", write_run_file(tmp_path), "model.hidden_size=4000000")
    refused.told(2, "weights, gradients and moments take ", " GiB on each rank, and it has ", "would fit")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("own", "files", "limits"),
    [
        ("0::/job/step", {"memory.max": "900", "job/memory.max": "500", "job/step/memory.max": "max"}, [500, 900]),
        ("4:memory:/job\n0::/", {"memory/job/memory.limit_in_bytes": "700"}, [700]),
        ("4:cpu,memory:/not/shown/here", {"memory/memory.limit_in_bytes": "600"}, [600]),
        ("3:cpuset:/job", {"memory/job/memory.limit_in_bytes": "1"}, []),
    ],
)
def test_limits_of_a_container_or_a_job_are_found(
    tmp_path: Path, own: str, files: dict[str, str], limits: list[int]
) -> None:
    (tmp_path / "own").write_text(own + "\n")
    for name, content in files.items():
        (tmp_path / "sys" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys" / name).write_text(content + "\n")
    assert list(memory_limit._cgroup_limits(tmp_path / "sys", tmp_path / "own")) == limits


def test_the_machines_memory_is_that_which_the_system_names() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    assert 2**20 < host_bytes() <= total
