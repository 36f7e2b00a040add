"""Two silent errors of torch's checkpoint, shown to be there, and refused here.

S4: parts saved under one name as if each were whole: one is kept, the others are lost.
S5: no checksum: changed bytes, or a rank's file of another step, load without a word.
"""

import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from rank_pool import run_mesh
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from meshwright.parallel.checkpoint.agree import CheckpointError
from meshwright.parallel.checkpoint.describe import describe
from meshwright.parallel.checkpoint.load import load_checkpoint
from meshwright.parallel.checkpoint.save import save_checkpoint
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh
from meshwright.parallel.placement import WHOLE, Placement, Split


def torch_keeps_one_of_two_parts(mesh: Mesh, folder: Path) -> bool:
    mine = torch.full((2,), float(mesh.rank))
    dcp.save({"weight": mine}, storage_writer=dcp.FileSystemWriter(folder))
    loaded = {"weight": torch.zeros(2)}
    dcp.load(loaded, storage_reader=dcp.FileSystemReader(folder))
    return torch.equal(loaded["weight"], mine)


def test_s4_torch_gives_one_rank_the_part_of_another(tmp_path: Path) -> None:
    assert run_mesh(Sizes(dp_shard=2), torch_keeps_one_of_two_parts, tmp_path) == [True, False]


def refusal(folder: Path, tensors: dict[str, object], mesh: Mesh) -> str:
    try:
        save_checkpoint(folder, 1, tensors, {}, mesh, "model")  # type: ignore[arg-type]
    except CheckpointError as error:
        return str(error)
    return ""


def undescribed_parts(mesh: Mesh, folder: Path) -> str:
    return refusal(folder, {"weight": torch.full((2,), float(mesh.rank))}, mesh)


def test_s4_parts_that_are_not_described_are_refused(tmp_path: Path) -> None:
    texts = run_mesh(Sizes(dp_shard=2), undescribed_parts, tmp_path)
    assert "weight is not described" in texts[0]
    assert texts[0] == texts[1]


def parts_described_as_whole(mesh: Mesh, folder: Path) -> str:
    mine = torch.full((2,), float(mesh.rank))
    return refusal(folder, {"weight": describe(mine, (2,), WHOLE, mesh, zero_part=False)}, mesh)


def test_s4_different_parts_described_as_the_same_are_refused(tmp_path: Path) -> None:
    texts = run_mesh(Sizes(dp_shard=2), parts_described_as_whole, tmp_path)
    assert "ranks 0 and 1 both hold the part of weight at [0], but not the same" in texts[0]
    assert texts[0] == texts[1]


def parts_with_a_hole(mesh: Mesh, folder: Path) -> str:
    mine = torch.full((2,), float(mesh.rank))
    placement = Placement(splits=(Split(0, mesh.dp_shard),))
    return refusal(
        folder, {"weight": describe(mine, (4,), placement, mesh, zero_part=False)} if mesh.rank else {}, mesh
    )


def test_a_part_that_nobody_holds_is_refused(tmp_path: Path) -> None:
    texts = run_mesh(Sizes(dp_shard=2), parts_with_a_hole, tmp_path)
    assert "weight" in texts[0]
    assert "chunks-volume: 2" in texts[0]


def torch_saves_two_steps(mesh: Mesh, folder: Path) -> None:
    for step in (1, 2):
        part = dcp_part(mesh, float(step))
        dcp.save({"weight": part}, storage_writer=dcp.FileSystemWriter(folder / str(step)))


def dcp_part(mesh: Mesh, value: float) -> torch.Tensor:
    device_mesh = DeviceMesh.from_group(mesh.world.group, "cpu")  # type: ignore[arg-type]
    return DTensor.from_local(torch.full((512,), value), device_mesh, [Shard(0)])


def torch_loads(mesh: Mesh, folder: Path) -> float:
    loaded = {"weight": dcp_part(mesh, 0.0)}
    dcp.load(loaded, storage_reader=dcp.FileSystemReader(folder))
    return float(loaded["weight"].to_local()[0])


def test_s5_torch_loads_a_file_of_another_step(tmp_path: Path) -> None:
    sizes = Sizes(dp_shard=2)
    run_mesh(sizes, torch_saves_two_steps, tmp_path)
    shutil.copy(tmp_path / "2" / "__1_0.distcp", tmp_path / "1" / "__1_0.distcp")
    assert run_mesh(sizes, torch_loads, tmp_path / "1") == [1.0, 2.0]


def save_two_steps(mesh: Mesh, folder: Path) -> None:
    placement = Placement(splits=(Split(0, mesh.dp_shard),))
    for step in (1, 2):
        part = describe(torch.full((512,), float(step)), (1024,), placement, mesh, zero_part=False)
        save_checkpoint(folder, step, {"weight": part}, {}, mesh, "model")


def load_error(mesh: Mesh, path: Path) -> str:
    try:
        load_checkpoint(path, {"weight": torch.zeros(1024)}, mesh)
    except CheckpointError as error:
        return str(error)
    return ""


def test_s5_a_file_of_another_step_is_refused_by_name(tmp_path: Path) -> None:
    sizes = Sizes(dp_shard=2)
    run_mesh(sizes, save_two_steps, tmp_path)
    first, second = tmp_path / "step_00000001", tmp_path / "step_00000002"
    shutil.copy(second / "rank_00001.bin", first / "rank_00001.bin")
    texts = run_mesh(sizes, load_error, first)
    assert texts[0] == f"{first} is damaged: {first / 'rank_00001.bin'} was changed: its hash is not the manifest's"
    assert texts[1] == texts[0]


def flip_a_bit(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(bytes(data))


def test_s5_torch_loads_a_flipped_bit_and_here_it_is_refused(tmp_path: Path) -> None:
    weight = torch.ones(1024)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"weight": weight}, storage_writer=dcp.FileSystemWriter(tmp_path / "torch"))
        file = tmp_path / "torch" / "__0_0.distcp"
        flip_a_bit(file, file.read_bytes().find(weight.numpy().tobytes()) + 2000)
        loaded = {"weight": torch.zeros(1024)}
        dcp.load(loaded, storage_reader=dcp.FileSystemReader(tmp_path / "torch"))
    assert not torch.equal(loaded["weight"], weight)

    mesh = single_process_mesh()
    path = save_checkpoint(tmp_path, 1, {"weight": weight}, {}, mesh, "model")
    flip_a_bit(path / "rank_00000.bin", 2000)
    assert "rank_00000.bin was changed" in load_error(mesh, path)
