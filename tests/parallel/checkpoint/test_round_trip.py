"""What one layout saved, another loads bit for bit: ranks, ZeRO and expert parallelism may all change."""

from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoint_cases import SHAPES, assert_holds, held_state, names_in, whole
from rank_pool import run_mesh

from meshwright.parallel.checkpoint.agree import CheckpointError
from meshwright.parallel.checkpoint.describe import HeldPart, describe
from meshwright.parallel.checkpoint.load import Expect, load_checkpoint, read_state, saved_tensors
from meshwright.parallel.checkpoint.save import save_checkpoint
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh
from meshwright.parallel.placement import WHOLE

STATE = {"samples": 1_234_567_890_123, "rate": 0.1, "none": None, "list": [1, "two", {"three": float("inf")}]}


def save(folder: Path, zero: bool, mesh: Mesh) -> str:
    return save_checkpoint(folder, 100, held_state(mesh, zero=zero), STATE, mesh, "model").name


def load(path: Path, zero: bool, mesh: Mesh) -> object:
    parts = held_state(mesh, zero=zero, blank=True)
    state = load_checkpoint(path, parts, mesh, Expect("model"))
    assert_holds(parts, mesh, zero=zero)
    return state


def on_mesh(mesh: Mesh, case: partial[object]) -> object:
    return case(mesh)


def run(sizes: Sizes, case: partial[object]) -> list[object]:
    return [case(single_process_mesh())] if sizes.world == 1 else run_mesh(sizes, on_mesh, case)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    assert run(Sizes(dp_shard=4, ep=2), partial(save, folder, True)) == ["step_00000100"] * 4
    return folder / "step_00000100"


@pytest.mark.parametrize(
    "sizes",
    [Sizes(), Sizes(dp_shard=2), Sizes(dp_shard=2, ep=2), Sizes(dp_shard=3), Sizes(dp_shard=4, ep=2)],
    ids=["1", "2", "2, ep 2", "3", "4, ep 2"],
)
@pytest.mark.parametrize("zero", [False, True], ids=["whole moments", "cut moments"])
def test_a_checkpoint_of_four_ranks_loads_bit_equal_on(saved: Path, sizes: Sizes, zero: bool) -> None:
    assert run(sizes, partial(load, saved, zero)) == [STATE] * sizes.world


def test_a_checkpoint_of_one_process_loads_on_four_ranks(tmp_path: Path) -> None:
    run(Sizes(), partial(save, tmp_path, False))
    assert run(Sizes(dp_shard=4, ep=2), partial(load, tmp_path / "step_00000100", True)) == [STATE] * 4


def test_replicated_tensors_are_written_once_and_spread_over_the_ranks(tmp_path: Path) -> None:
    run(Sizes(dp_shard=4), partial(save, tmp_path, False))
    path = tmp_path / "step_00000100"
    written = {file: (path / file).stat().st_size for file in names_in(path) if file.endswith(".bin")}
    content = sum(2 * whole(name).nbytes for name in SHAPES)
    padding = 64 * 2 * len(SHAPES)
    assert len(written) == 4
    assert content <= sum(written.values()) <= content + padding
    largest = max(whole(name).nbytes for name in SHAPES)
    assert max(written.values()) < largest + content / 4


def test_no_file_of_a_checkpoint_is_a_pickle(saved: Path) -> None:
    assert {path.suffix for path in saved.iterdir()} == {".bin", ".json"}
    for name, dtype in (("weight", torch.float32), ("moment.bias", torch.bfloat16)):
        assert saved_tensors(saved)[name].dtype == dtype
    assert saved_tensors(saved)["gate"].shape == (6, 5, 4)
    assert read_state(saved, single_process_mesh()) == STATE


def test_part_of_a_column_block_is_read_where_rows_are_not_whole(saved: Path) -> None:
    columns = HeldPart(torch.zeros(6, 2, 2), (6, 5, 4), (0, 1, 2))
    transposed = HeldPart(torch.zeros(3, 7).t(), (7, 3), (0, 0))
    load_checkpoint(
        saved, {"gate": columns, "weight": transposed}, single_process_mesh(), Expect(may_stay_unread=("",))
    )
    assert torch.equal(columns.tensor, whole("gate")[:, 1:3, 2:4])
    assert torch.equal(transposed.tensor, whole("weight"))


def test_another_dtype_is_an_error_unless_conversion_is_asked_for(saved: Path) -> None:
    target = {"weight": torch.zeros(7, 3, dtype=torch.float64)}
    with pytest.raises(CheckpointError, match=r"weight is torch.float32 in the checkpoint, torch.float64 here"):
        load_checkpoint(saved, target, single_process_mesh(), Expect(may_stay_unread=("",)))
    load_checkpoint(saved, target, single_process_mesh(), Expect(may_stay_unread=("",), same_dtype=False))
    assert torch.equal(target["weight"], whole("weight").double())


def load_another_model(mesh: Mesh, path: Path) -> str:
    parts = held_state(mesh, zero=True, blank=True)
    weight = parts.pop("weight")
    if mesh.rank == 1:  # one rank's complaint must be everybody's
        parts["extra"] = HeldPart(torch.zeros(2), (2,), (0,))
    parts["six"] = HeldPart(torch.zeros(5, 2), (5, 2), (0, 0))
    try:
        load_checkpoint(path, parts, mesh, Expect("another", may_stay_unread=("moment.",)))
    except CheckpointError as error:
        assert not weight.tensor.any()
        return str(error)
    return ""


def test_a_checkpoint_of_another_model_is_refused_with_every_difference(saved: Path) -> None:
    texts = run_mesh(Sizes(dp_shard=2), load_another_model, saved)
    assert texts[0] == texts[1]
    for part in (
        f"{saved} was not loaded: it is a checkpoint of another model",
        "its fingerprint is model, this model's is another",
        "weight [7, 3] is in the checkpoint, and nothing here asks for it",
        "extra [2] is not in the checkpoint",
        "six is [6, 2] in the checkpoint, [5, 2] here",
    ):
        assert part in texts[0]
    assert "moment." not in texts[0]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": (1, 2)}, r"state\['a'\] is a tuple"),
        ({"a": {1: 2}}, r"state\['a'\] has the key 1"),
        ({"a": [torch.zeros(1)]}, r"state\['a'\]\[0\] is a Tensor"),
    ],
)
def test_state_that_json_would_change_is_refused(tmp_path: Path, state: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path, 1, {}, state, single_process_mesh(), "model")
    assert names_in(tmp_path) == []


def save_own_stage(mesh: Mesh, folder: Path) -> None:
    name = ("weight", "gate")[mesh.pp.rank]
    part = describe(whole(name), SHAPES[name][0], WHOLE, mesh, zero_part=False)
    save_checkpoint(folder, 1, {name: part}, {}, mesh, "model")


def load_other_stage(mesh: Mesh, path: Path) -> bool:
    name = ("gate", "weight")[mesh.pp.rank]
    part = describe(torch.zeros(SHAPES[name][0]), SHAPES[name][0], WHOLE, mesh, zero_part=False)
    load_checkpoint(path, {name: part}, mesh)
    return torch.equal(part.tensor, whole(name))


def test_stages_of_a_pipeline_hold_different_names(tmp_path: Path) -> None:
    sizes = Sizes(pp=2, dp_shard=2)
    run_mesh(sizes, save_own_stage, tmp_path)
    assert run_mesh(sizes, load_other_stage, tmp_path / "step_00000001") == [True] * 4
    tensors = {"weight": torch.zeros(7, 3), "gate": torch.zeros(6, 5, 4)}
    load_checkpoint(tmp_path / "step_00000001", tensors, single_process_mesh())
    assert all(torch.equal(tensor, whole(name)) for name, tensor in tensors.items())
