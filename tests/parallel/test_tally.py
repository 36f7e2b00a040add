"""The tally: sums over layers, micro-batches and ranks, flags seen by all, and nothing counted while it is paused."""

import pytest
import torch
from rank_pool import run_mesh
from torch import Tensor, nn

from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh
from meshwright.parallel.tally import (
    Tally,
    attach_loss,
    declared_entries,
    everyones_entries,
    finish_step,
    gather_texts,
    tally_of,
)

ONE = single_process_mesh()


def test_what_is_added_is_summed_and_a_step_begins_at_zero() -> None:
    tally = Tally({"loss": 1, "load": 3})
    tally.add("loss", 0.5)
    tally.add("loss", torch.tensor(0.25, requires_grad=True))
    tally.add("load", torch.tensor([1, 0, 2]))
    tally.add("load", torch.tensor([0, 5, 1]))
    sums = tally.reduce(ONE)
    assert {name: value.tolist() for name, value in sums.items()} == {"loss": [0.75], "load": [1, 5, 3]}
    assert {name: value.tolist() for name, value in tally.reduce(ONE).items()} == {"loss": [0], "load": [0, 0, 0]}
    assert sums["load"].tolist() == [1, 5, 3]  # what was handed out does not change with the next step


def test_large_counts_are_exact() -> None:
    tally = Tally({"load": 1})
    tally.add("load", torch.tensor([2**40]))
    tally.add("load", torch.tensor([1]))
    assert tally.reduce(ONE)["load"].item() == 2**40 + 1


def test_a_paused_tally_counts_nothing_and_goes_on_after_an_error() -> None:
    tally = Tally({"load": 1})
    with tally.paused():
        tally.add("load", 1.0)
        with tally.paused():
            tally.add("load", 1.0)
        tally.add("load", 1.0)
    with pytest.raises(KeyError), tally.paused():
        raise KeyError
    tally.add("load", 4.0)
    assert tally.reduce(ONE)["load"].item() == 4


def test_an_entry_that_was_not_declared_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="z was not declared"):
        Tally({"load": 1}).add("z", 1.0)


def test_no_entries_are_no_sums() -> None:
    assert Tally({}).reduce(ONE) == {}


def sums_of(mesh: Mesh) -> dict[str, list[float]]:
    tally = Tally({"stop": 1, "save": 1, "load": 2})
    if mesh.rank == 2:
        tally.add("stop", 1.0)
    tally.add("load", torch.tensor([mesh.rank, 1]))
    return {name: value.tolist() for name, value in tally.reduce(mesh).items()}


def test_a_flag_raised_by_one_rank_is_seen_by_all_and_counts_add_up() -> None:
    for sums in run_mesh(Sizes(dp_shard=4, ep=2), sums_of):
        assert sums == {"stop": [1], "save": [0], "load": [6, 4]}


def test_texts_come_in_rank_order() -> None:
    assert run_mesh(Sizes(dp_shard=2), texts) == [["0", "0", "1", "1"]] * 2
    assert gather_texts(["a"], ONE) == ["a"]


def texts(mesh: Mesh) -> list[str]:
    return gather_texts([str(mesh.rank)] * 2, mesh)


class Counting(nn.Module):
    def __init__(self, name: str, length: int) -> None:
        super().__init__()
        self.name, self.length = name, length

    def tally_entries(self) -> dict[str, int]:
        return {f"{self.name}.load": self.length}


def test_the_entries_of_all_modules_are_declared_together() -> None:
    model = nn.Sequential(Counting("a", 2), nn.Sequential(nn.Linear(1, 1), Counting("b", 3)))
    assert declared_entries(model) == {"a.load": 2, "b.load": 3}


@pytest.mark.parametrize("above", [1.0, 7.0])
def test_an_attached_loss_gets_the_gradient_one_whatever_comes_from_above(above: float) -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    w = torch.tensor(3.0, requires_grad=True)
    y = attach_loss(x, 5 * w)
    assert torch.equal(y, x)
    (y * above).sum().backward()
    assert w.grad.item() == 5
    assert x.grad.tolist() == [above, above]


def test_two_attached_losses_both_count() -> None:
    w: Tensor = torch.tensor(3.0, requires_grad=True)
    x = attach_loss(attach_loss(torch.ones(2, requires_grad=True), w * w), 2 * w)
    (0 * x).sum().backward()
    assert w.grad.item() == 8


def union(mesh: Mesh) -> list[tuple[str, int]]:
    mine = {"layers.10.load": 3, "layers.2.load": 3} if mesh.rank == 0 else {"layers.9.load": 4, "a": 1}
    return list(everyones_entries(mine, mesh.pp).items())


def test_all_stages_reduce_the_same_entries_in_the_order_of_the_layers() -> None:
    entries = [("a", 1), ("layers.2.load", 3), ("layers.9.load", 4), ("layers.10.load", 3)]
    assert run_mesh(Sizes(pp=2), union) == [entries] * 2


class Watcher(nn.Module):
    """A part that counts under a name, and keeps what a step counted."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.seen = name, -1.0

    def tally_entries(self) -> dict[str, int]:
        return {self.name: 1}

    def finish_step(self, sums: dict[str, Tensor]) -> None:
        self.seen = sums[self.name].item()


def test_a_step_is_finished_once_with_what_it_counted() -> None:
    model = nn.ModuleList([Watcher("a"), Watcher("b")])
    tally = tally_of(model)
    tally.add("b", 2.0)
    tally.add("b", 3.0)
    assert finish_step(model, tally)["b"].item() == 5.0
    assert [each.seen for each in model] == [0.0, 5.0]
    finish_step(model, tally)
    assert [each.seen for each in model] == [0.0, 0.0]


def test_two_parts_that_would_count_as_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^a would be counted by two modules; another name for one of them would fit"):
        tally_of(nn.ModuleList([Watcher("a"), Watcher("a")]))
