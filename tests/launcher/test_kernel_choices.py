"""The CPU kernels of a run go one way: its checkpoint's, or the one that this machine was measured to be best at."""

import json
from pathlib import Path

import pytest
import torch
from rank_pool import run_mesh
from runfile_cases import run_file

from meshwright.kernels import measure as measuring
from meshwright.kernels.choose import Choices, use
from meshwright.kernels.measure import Measured
from meshwright.launcher.kernel_choices import attention_lines, choices_of_run, grouped_lines
from meshwright.model.config import ModelConfig
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh

CPU = torch.device("cpu")
BLOCKS = Choices(fp32_attention="blocks")


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count measurements, each of which finds blocks; the cache is a folder of the test."""
    counted: list[int] = []

    def measure() -> Measured:
        counted.append(1)
        return Measured(BLOCKS, ["fp32 attention: flash 2 ms, blocks 1 ms -> blocks"])

    monkeypatch.setattr(measuring, "measure", measure)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return counted


def choose(stored: dict[str, str] | None = None, device: torch.device = CPU, dtype: torch.dtype = torch.float32):
    return choices_of_run(stored or {}, single_process_mesh(), device, dtype)


def test_a_machine_is_measured_once(measured: list[int]) -> None:
    first, second = choose(), choose()
    assert first.choices == second.choices == BLOCKS
    assert first.reasons == ["CPU kernels: fp32 attention: flash 2 ms, blocks 1 ms -> blocks"]
    assert "as measured earlier" in second.reasons[0]
    assert len(measured) == 1


def test_a_file_of_another_version_is_measured_anew(measured: list[int], tmp_path: Path) -> None:
    choose()
    (path,) = (tmp_path / "meshwright").iterdir()
    for content in ("{", json.dumps({"choices": {"fp32_attention": "magic"}}), json.dumps([])):
        path.write_text(content)
        assert choose().choices == BLOCKS
    assert len(measured) == 4


def test_of_two_runs_that_measure_at_once_the_first_to_remember_is_right_for_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    others: list[Choices] = []

    def slow() -> Measured:
        monkeypatch.setattr(measuring, "measure", lambda: Measured(BLOCKS, []))
        others.append(choose().choices)  # another run that began later and was done sooner
        return Measured(Choices(fp32_attention="flash"), [])

    monkeypatch.setattr(measuring, "measure", slow)
    assert choose().choices == BLOCKS
    assert choose().choices == BLOCKS
    assert others == [BLOCKS]
    assert [path.suffix for path in (tmp_path / "meshwright").iterdir()] == [".json"]


def test_a_home_that_cannot_be_written_to_only_costs_time(
    measured: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert choose().choices == choose().choices == BLOCKS
    assert len(measured) == 2


def test_a_checkpoints_choices_win_and_fp64_goes_pytorchs_way(measured: list[int]) -> None:
    stored = Choices(bf16_products="fp32").to_dict()
    assert choose(stored).choices == Choices(bf16_products="fp32")
    assert choose(dtype=torch.float64).choices == Choices()
    assert choose(device=torch.device("meta")).choices == Choices()
    assert measured == []


def _on_two_ranks(mesh: Mesh, folder: str) -> tuple[dict[str, str], int]:
    counted = []

    def measure() -> Measured:
        counted.append(1)
        return Measured(BLOCKS, [])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "measure", measure)
        patch.setenv("XDG_CACHE_HOME", folder)
        chosen = choices_of_run({}, mesh, CPU, torch.float32)
    return chosen.choices.to_dict(), len(counted)


def test_rank_0_measures_for_all(tmp_path: Path) -> None:
    first, second = run_mesh(Sizes(dp_shard=2), _on_two_ranks, str(tmp_path))
    assert first == (BLOCKS.to_dict(), 1)
    assert second == (BLOCKS.to_dict(), 0)


def test_a_ring_without_a_flash_operator_is_told() -> None:
    cuda, ring, ulysses = torch.device("cuda"), {"cp": 2}, {"cp": 2, "context": "ulysses"}
    of_ring = "ring attention goes by plain products (float32, heads of 64) on cuda: the flash operator takes"
    masked = "attention within documents goes by a mask of all pairs of positions (float32, heads of 64) on cuda: the"
    for parallel, documents, told in (
        (ring, False, of_ring), (ring, True, of_ring), (ulysses, True, masked), ({}, True, masked),
        (ulysses, False, None), ({}, False, None),
    ):  # fmt: skip
        table = run_file(model={"head_dim": 64}, parallel=parallel, data={"mask_documents": documents})
        lines = attention_lines(table, cuda, torch.float32)
        assert [line.startswith(told) for line in lines] == [True] if told else lines == []
        assert attention_lines(table, cuda, torch.bfloat16) == attention_lines(table, CPU, torch.float32) == []


def model_of(expert_hidden_size: int, **more: object) -> ModelConfig:
    moe = {"num_experts": 4, "top_k": 2, "expert_hidden_size": expert_hidden_size}
    table = {"pattern": "*E", "num_layers": 2, "hidden_size": 64, "num_heads": 4, "vocab_size": 64, "moe": moe}
    return ModelConfig.model_validate(table | more)


def test_experts_without_the_grouped_operator_are_told() -> None:
    cuda, bf16 = torch.device("cuda"), torch.bfloat16
    assert grouped_lines(model_of(48), 1, cuda, bf16) == grouped_lines(model_of(48), 2, cuda, bf16) == []
    told = "products of experts (bfloat16) on cuda go one expert after the other: F.grouped_mm asks for rows of a "
    assert grouped_lines(model_of(48), 4, cuda, bf16) == [
        told + "multiple of 16 bytes, and a rank's are 12 (24 bytes) wide"
    ]
    assert grouped_lines(model_of(50), 1, CPU, torch.float32)[0].endswith("a rank's are 50 (200 bytes) wide")
    assert grouped_lines(model_of(48), 1, cuda, torch.float32)[0].endswith("F.grouped_mm is fast with bf16 alone")
    assert grouped_lines(model_of(48), 1, CPU, torch.float64)[0].endswith("F.grouped_mm takes no fp64")
    assert grouped_lines(model_of(50, pattern="*-"), 1, CPU, torch.float32) == []


def test_experts_whose_kernels_were_chosen_have_the_choices_own_line() -> None:
    use(Choices(fp32_output="onednn"))
    assert grouped_lines(model_of(50), 1, CPU, torch.float32) == []
