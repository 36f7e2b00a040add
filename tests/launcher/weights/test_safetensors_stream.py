"""Files written tensor by tensor are what the safetensors library reads, and never hold two tensors in memory."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from meshwright.launcher.weights.safetensors_stream import NamedShape, write_safetensors

TENSORS = {
    "b.weight": torch.arange(15, dtype=torch.float32).view(3, 5) / 7,
    "a.weight": torch.tensor([1.0, -2.0, 3.5]),
    "c": torch.full((2, 3, 4), 0.1),
}
SHAPES = [NamedShape(name, tuple(tensor.shape)) for name, tensor in TENSORS.items()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_library_reads_what_was_written(dtype: torch.dtype, tmp_path: Path) -> None:
    write_safetensors(tmp_path, SHAPES, TENSORS.__getitem__, dtype)
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], tensor.to(dtype))
    assert not (tmp_path / "model.safetensors.index.json").exists()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without it


def test_a_view_that_is_not_contiguous_is_written_in_its_own_order(tmp_path: Path) -> None:
    turned = TENSORS["b.weight"].T
    write_safetensors(tmp_path, [NamedShape("t", (5, 3))], lambda name: turned, torch.float32)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["t"], turned)


def test_large_models_are_cut_at_whole_tensors_and_indexed(tmp_path: Path) -> None:
    # 60, 12 and 96 bytes: the first two share a file of at most 72, the third is larger than any and stands alone.
    weight_map = write_safetensors(tmp_path, SHAPES, TENSORS.__getitem__, torch.float32, max_shard_bytes=72)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert weight_map == {"b.weight": first, "a.weight": first, "c": second}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": 168}, "weight_map": weight_map}
    read = load_file(tmp_path / first) | load_file(tmp_path / second)
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())


def test_only_one_tensor_is_alive_at_a_time(tmp_path: Path) -> None:
    alive: set[str] = set()
    most = 0

    def read(name: str) -> torch.Tensor:
        nonlocal most
        tensor = TENSORS[name].clone()
        alive.add(name)
        weakref.finalize(tensor, alive.discard, name)
        most = max(most, len(alive))
        return tensor

    write_safetensors(tmp_path, SHAPES, read, torch.bfloat16)
    assert most == 1
    assert not alive


def test_a_tensor_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.weight has the shape \[3\], the configuration says \[4\]"):
        write_safetensors(tmp_path, [NamedShape("a.weight", (4,))], TENSORS.__getitem__, torch.float32)


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="same name"):
        write_safetensors(tmp_path, [SHAPES[0], SHAPES[0]], TENSORS.__getitem__, torch.float32)
