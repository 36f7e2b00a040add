"""What is kept and then written to in place is told, or kept as it became; a kept graph is gone through again."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from meshwright.parallel.recompute.policy import Recompute, keep_less
from meshwright.parallel.tally import Tally

CPU = torch.device("cpu")
H = 6
Body = Callable[["Part", Tensor], Tensor]


class Part(nn.Module):
    """A layer of a user's: a norm, an activation, two products, and a body that goes through them."""

    def __init__(self, body: Body, activation: nn.Module) -> None:
        super().__init__()
        self.norm, self.activation = nn.LayerNorm(H), activation
        self.first, self.second = nn.Linear(H, H), nn.Linear(H, H)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def built(body: Body, how: Recompute, activation: nn.Module | None = None) -> Part:
    torch.manual_seed(1)
    part = Part(body, activation or nn.GELU()).double()
    keep_less([part], Tally({}), how, CPU)
    return part


def gradients(body: Body, how: Recompute, passes: int = 1, activation: nn.Module | None = None) -> list[Tensor]:
    part = built(body, how, activation)
    x = torch.randn(3, 2, H, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    leaves = [x, *part.parameters()]
    loss = part(x).square().sum()
    for number in range(passes):
        found = torch.autograd.grad(loss, leaves, retain_graph=number < passes - 1, allow_unused=True)
    return [torch.zeros(()) if each is None else each for each in found]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def shifted_norm(part: Part, x: Tensor) -> Tensor:
    y = part.norm(x)
    y += 0.5
    return part.second(part.activation(part.first(y)))


def shifted_activation(part: Part, x: Tensor) -> Tensor:
    y = part.activation(part.first(part.norm(x)))
    y.mul_(1.5)
    return part.second(y) + part.first(y)


def input_written_after(part: Part, x: Tensor) -> Tensor:
    h = part.first(x)
    y = part.activation(h)  # a ReLU keeps its result and not its input
    h.add_(1.0)
    return part.second(y) + h


def used_then_written(part: Part, x: Tensor) -> Tensor:
    y = part.norm(x)
    z = part.first(y)
    y.mul_(3.0)
    return part.second(z) + y


WAYS = {
    "none": Recompute(),
    "norm": Recompute("modules", remade=("norm",)),
    "activation": Recompute("modules", remade=("activation",)),
    "both": Recompute("modules", remade=("norm", "activation")),
    "whole first": Recompute("modules", whole=("first",), remade=("norm",)),
    "offload": Recompute(offload=True),
    "full": Recompute("full"),
    "selective": Recompute("selective", save=("attention", "matmul")),
    "selective, offload": Recompute("selective", save=("matmul",), offload=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("body", [shifted_norm, shifted_activation])
def test_a_result_written_to_before_it_is_used_is_kept_as_it_became(body: Body, way: str) -> None:
    assert same(gradients(body, WAYS[way]), gradients(body, Recompute()))


@pytest.mark.parametrize("way", ["activation", "both"])
def test_a_result_whose_input_was_written_to_is_not_made_of_it(way: str) -> None:
    expected = gradients(input_written_after, Recompute(), activation=nn.ReLU())
    assert same(gradients(input_written_after, WAYS[way], activation=nn.ReLU()), expected)


def used_then_copied(part: Part, x: Tensor) -> Tensor:
    y = part.norm(x)
    z = part.first(y)
    return part.second(z) + y * 3.0


@pytest.mark.parametrize("way", ["none", "activation"])
def test_a_kept_tensor_that_is_written_to_later_is_told_as_autograd_does(way: str) -> None:
    with pytest.raises(RuntimeError, match=r"inplace operation|written to in place"):
        gradients(used_then_written, WAYS[way])


@pytest.mark.parametrize("way", ["norm", "both", "whole first"])
def test_what_is_made_again_does_not_see_what_was_written_to_it_later(way: str) -> None:
    assert same(gradients(used_then_written, WAYS[way]), gradients(used_then_copied, Recompute()))


def product_twice(part: Part, x: Tensor) -> Tensor:
    y = part.first(part.norm(x))
    return part.second(part.activation(y)) * part.second(y)


@pytest.mark.parametrize("way", WAYS)
def test_a_graph_that_is_kept_gives_the_same_gradients_in_each_backward_pass(way: str) -> None:
    expected = gradients(product_twice, Recompute())
    for passes in (1, 2, 3):
        assert same(gradients(product_twice, WAYS[way], passes), expected)


class View(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "activation", [nn.Identity(), nn.ReLU(inplace=True), View()], ids=["itself", "written", "view"]
)
def test_a_module_may_return_its_input(activation: nn.Module, way: str) -> None:
    def body(part: Part, x: Tensor) -> Tensor:
        return part.second(part.activation(part.first(part.norm(x))))

    if isinstance(activation, nn.ReLU) and "selective" in way:  # the product that it saves
        with pytest.raises(RuntimeError, match="written to in place"):
            gradients(body, WAYS[way], activation=activation)
        return
    expected = gradients(body, Recompute(), activation=activation)
    assert same(gradients(body, WAYS[way], activation=activation), expected)
