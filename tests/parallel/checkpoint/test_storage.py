"""Our files are an ordinary storage of torch's distributed checkpoint: torch reads and writes them too."""

from pathlib import Path

import pytest
import strict_group
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_cases import held_state, whole
from rank_pool import run_mesh
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from meshwright.parallel.checkpoint.agree import CheckpointError
from meshwright.parallel.checkpoint.describe import HeldPart
from meshwright.parallel.checkpoint.load import load_checkpoint
from meshwright.parallel.checkpoint.plan import PartLoadPlanner
from meshwright.parallel.checkpoint.save import save_checkpoint
from meshwright.parallel.checkpoint.storage import FolderReader, FolderWriter, table_from_json
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh

EVERY_DTYPE = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (3, 5)], ids=str)
def test_every_dtype_and_shape_comes_back_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    mesh = single_process_mesh()
    tensor = (torch.randn(shape, dtype=torch.float64) * 3).to(dtype)
    if tensor.is_floating_point() and tensor.dim() == 2 and tensor.numel() and dtype.itemsize > 1:
        tensor[0, 0] = float("nan")
    path = save_checkpoint(tmp_path, 1, {"x": tensor}, {}, mesh, "model")
    loaded = torch.zeros_like(tensor)
    load_checkpoint(path, {"x": loaded}, mesh)
    assert same_bits(loaded, tensor)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    bits = [tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and torch.equal(bits[0], bits[1])


def torch_reads_ours(mesh: Mesh, folder: Path) -> None:
    path = save_checkpoint(folder, 1, held_state(mesh, zero=True), {}, mesh, "model")
    device_mesh = DeviceMesh("cpu", torch.tensor([[0, 2], [1, 3]]))  # (ep, edp)
    target = distribute_tensor(torch.zeros(6, 5, 4), device_mesh, [Shard(0), Shard(2)])
    state = {"gate": target, "moment.weight": torch.zeros(7, 3)}
    dcp.load(state, storage_reader=FolderReader(path))
    assert isinstance(state["gate"], DTensor)
    strict_group.let_torch_call_past()
    assert torch.equal(state["gate"].full_tensor(), whole("gate"))
    assert torch.equal(state["moment.weight"], whole("moment.weight"))


def test_torch_reads_a_checkpoint_of_ours_into_dtensors(tmp_path: Path) -> None:
    run_mesh(Sizes(dp_shard=4, ep=2), torch_reads_ours, tmp_path)


def torch_writes_ours(mesh: Mesh, folder: Path) -> None:
    device_mesh = DeviceMesh.from_group(mesh.world.group, "cpu")  # type: ignore[arg-type]
    cut = distribute_tensor(whole("weight"), device_mesh, [Shard(0)])
    dcp.save({"weight": cut}, storage_writer=FolderWriter(folder))
    loaded = {"weight": torch.zeros(7, 3)}
    dcp.load(loaded, storage_reader=FolderReader(folder))
    assert torch.equal(loaded["weight"], whole("weight"))


def test_torch_writes_through_our_writer(tmp_path: Path) -> None:
    run_mesh(Sizes(dp_shard=2), torch_writes_ours, tmp_path)


def test_a_large_tensor_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshwright.parallel.checkpoint.storage._READ_BYTES", 100)
    mesh = single_process_mesh()
    tensor = torch.arange(700.0).view(70, 10)
    path = save_checkpoint(tmp_path, 1, {"x": tensor}, {}, mesh, "model")
    for target in (torch.zeros(70, 10), torch.zeros(10, 70).t()):
        load_checkpoint(path, {"x": target}, mesh)
        assert torch.equal(target, tensor)


def test_a_tensor_with_a_hole_is_neither_saved_nor_loaded(tmp_path: Path) -> None:
    mesh = single_process_mesh()
    half = HeldPart(torch.ones(2, 3), (4, 3), (2, 0))
    with pytest.raises(CheckpointError, match=r"x \[4, 3\]: the ranks hold 6 of 12 elements"):
        save_checkpoint(tmp_path, 1, {"x": half}, {}, mesh, "model")
    table = table_from_json(
        b'{"x": {"dtype": "float32", "shape": [4, 3], "parts": '
        b'[{"offset": [2, 0], "shape": [2, 3], "file": "rank_00000.bin", "at": 0, "bytes": 24}]}}'
    )
    whole_part = HeldPart(torch.zeros(4, 3), (4, 3), (0, 0))
    with pytest.raises(ValueError, match="do not cover"):
        PartLoadPlanner({"x": whole_part}, table).create_local_plan()
    assert len(PartLoadPlanner({"x": half}, table).create_local_plan().items) == 1
