"""The table of placements: global shapes, offsets, and the cut of torch.chunk."""

import pytest
import torch
from rank_pool import run_mesh
from torch import nn

from meshwright.model.config import ModelConfig
from meshwright.model.kinds.feedforward.moe import MoeConfig
from meshwright.model.parts import build_model
from meshwright.parallel.mesh import Axis, Mesh, Sizes
from meshwright.parallel.placement import WHOLE, Placement, Split, chunk_bounds, placement_table

EP, TP = Axis("ep", 4, 2), Axis("tp", 2, 1)


def test_a_part_knows_its_whole_and_where_it_begins() -> None:
    placement = Placement((Split(0, EP), Split(2, TP)))
    assert placement.global_shape((2, 5, 3)) == (8, 5, 6)
    assert placement.offset((2, 5, 3)) == (4, 0, 3)
    assert WHOLE.global_shape((2, 5)) == (2, 5)
    assert WHOLE.offset((2, 5)) == (0, 0)


def test_of_two_cuts_of_one_dim_the_first_is_the_outer_one() -> None:
    placement = Placement((Split(0, EP), Split(0, TP)))
    assert placement.global_shape((3,)) == (24,)
    assert placement.offset((3,)) == (2 * 6 + 3,)  # part 2 of 4 begins at 12, its second half at 15
    assert torch.arange(24).chunk(4)[2].chunk(2)[1][0] == 15


def test_neighbours_that_hold_copies_hold_the_same_part() -> None:
    starts = [Placement((Split(0, Axis("tp", 4, rank), copies=2),)).offset((3,)) for rank in range(4)]
    assert starts == [(0,), (0,), (3,), (3,)]
    assert Placement((Split(0, Axis("tp", 4, 1), copies=2),)).global_shape((3,)) == (6,)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [1, 2, 5, 8, 9])
def test_a_dim_is_cut_as_torch_chunk_cuts_it(size: int, parts: int) -> None:
    whole = torch.arange(size)
    ours = [whole[slice(*chunk_bounds(size, parts, index))].tolist() for index in range(parts)]
    theirs = [piece.tolist() for piece in whole.chunk(parts)]
    assert ours == theirs + [[]] * (parts - len(theirs))  # torch leaves out the empty ones


def data_axes(mesh: Mesh) -> tuple[list[str], list[str], str, str, str, str]:
    dense, expert = Placement(), Placement(factorisation="expert")
    return (
        [axis.name for axis in dense.data_axes(mesh)],
        [axis.name for axis in expert.data_axes(mesh)],
        dense.zero_axis(mesh).name,
        expert.zero_axis(mesh).name,
        dense.data_axis(mesh).name,
        expert.data_axis(mesh).name,
    )


def test_dense_gradients_are_summed_over_the_data_and_experts_over_edp() -> None:
    for found in run_mesh(Sizes(dp_shard=2, ep=2), data_axes):
        assert found == (["dp_replicate", "zero"], ["edp"], "zero", "edp", "data", "edp")


CONFIG = ModelConfig(
    pattern="*E",
    num_layers=1,
    hidden_size=8,
    num_heads=2,
    vocab_size=10,
    tie_embeddings=True,
    bias=("ffn",),
    moe=MoeConfig(num_experts=4, top_k=2, expert_hidden_size=6, num_shared_experts=1),
)


def expert_rows(mesh: Mesh) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    model = build_model(CONFIG, mesh=mesh, device="meta")
    table = placement_table(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert table.keys() == shapes.keys()
    return {name: (table[name].global_shape(shape), table[name].offset(shape)) for name, shape in shapes.items()}


def test_the_table_of_a_model_names_every_parameter_once_and_its_experts_parts() -> None:
    whole = {name: tuple(parameter.shape) for name, parameter in build_model(CONFIG).named_parameters()}
    for rank, table in enumerate(run_mesh(Sizes(dp_shard=2, ep=2), expert_rows)):
        assert {name: shape for name, (shape, _) in table.items()} == whole
        for name, (shape, offset) in table.items():
            is_expert = ".experts." in name
            assert offset == ((2 * rank if is_expert else 0), *[0] * (len(shape) - 1)), name
    assert "output.weight" not in whole


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def placements(self) -> dict[str, Placement]:
        return {"weight": Placement((Split(0, EP),)), "absent": WHOLE}


def test_what_no_module_names_is_whole_and_what_is_not_there_is_left_out() -> None:
    model = nn.Sequential(Named(), nn.Linear(2, 2))
    assert placement_table(model) == {"0.weight": Placement((Split(0, EP),)), "1.weight": WHOLE, "1.bias": WHOLE}
    assert list(placement_table(Named())) == ["weight"]
