"""Recomputing a layer: the same gradients, nothing counted twice, the routing kept, and the named results kept."""

from collections import Counter
from typing import Any

import engine_cases
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from meshwright.kernels.choose import Choices, use
from meshwright.model.parts import build_model
from meshwright.model.stack import LanguageModel
from meshwright.parallel.apply import Plan, apply
from meshwright.parallel.mesh import single_process_mesh
from meshwright.parallel.placement import placement_table
from meshwright.parallel.recompute.policy import Recompute, recompute_layers
from meshwright.parallel.tally import Tally, declared_entries
from meshwright.parallel.where import where_of_plain_tokens

OURS = Choices(
    fp32_output="onednn",
    fp32_input_gradient="onednn",
    fp32_weight_gradient="onednn",
    bf16_products="fp32",
    fp32_attention="blocks",
    bf16_attention="blocks_fp32",
)
CONFIG = engine_cases.moe_config(hidden_size=16, expert_hidden_size=8, bias=("q", "ffn"))
MODES: list[tuple[str, ...] | None] = [None, (), ("attention",), ("matmul",), ("attention", "matmul")]


def model_and_tally(save: tuple[str, ...] | None, dtype: torch.dtype = torch.float32) -> tuple[LanguageModel, Tally]:
    model = build_model(CONFIG, dtype=dtype)
    tally = Tally(declared_entries(model))
    if save is not None:
        recompute_layers(model.layers.values(), tally, save)
    return model, tally


def loss_of(model: LanguageModel, tally: Tally) -> Tensor:
    tokens, targets = engine_cases.batch_of(0)
    return model(tokens, targets.clamp(min=0), None, tally)


@pytest.mark.parametrize("save", MODES[1:])
def test_gradients_and_counts_are_bitwise_those_without_recompute(save: tuple[str, ...]) -> None:
    results = []
    for mode in (None, save):
        model, tally = model_and_tally(mode)
        loss_of(model, tally).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((gradients, tally.reduce(single_process_mesh())))
    (gradients, sums), (again, sums_again) = results
    for name, value in gradients.items():
        assert torch.equal(again[name], value), name
    assert sums["layers.0.load"].sum() == engine_cases.SEQ * engine_cases.BATCH * 2
    for name, value in sums.items():
        assert torch.equal(sums_again[name], value), name


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(op)] += 1
        return op(*args, **(kwargs or {}))


ATTENTION = ("aten._scaled_dot_product_flash_attention_for_cpu.default", "meshwright.attention_by_blocks.default")
PRODUCTS = ("aten.mm.default", "aten.addmm.default", "aten.bmm.default", "meshwright.onednn_product.default")
GROUPED = "meshwright.grouped_product.default"


def recomputed(save: tuple[str, ...] | None, *, autocast: bool) -> tuple[int, int, int]:
    """Count attention, dense and grouped products in the backward pass."""
    model, tally = model_and_tally(save)
    with torch.autocast("cpu", enabled=autocast):
        loss = loss_of(model, tally)
    with Count() as count:
        loss.backward()
    return (
        sum(count.calls[name] for name in ATTENTION),
        sum(count.calls[name] for name in PRODUCTS),
        count.calls[GROUPED],
    )


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("choices", [Choices(), OURS])
def test_what_is_named_is_kept_whatever_kernel_this_cpu_uses(choices: Choices, autocast: bool) -> None:
    # The ops that a kernel really is must stand in the lists: a list written for another device keeps nothing.
    use(choices)
    none, full, attention, matmul, both = (recomputed(save, autocast=autocast) for save in MODES)
    assert none[0] == none[2] == 0
    # Each of the 2 layers: 1 attention, 3 grouped products; q, k, v, output, router, 3 of the shared expert and the
    # biases of 3 experts' products. The last may be left out: its result is not needed again.
    assert (full[0], full[2]) == (2, 6)
    assert none[1] + 2 * 10 <= full[1] <= none[1] + 2 * 11
    assert attention == (0, *full[1:])
    assert matmul == (2, *none[1:])
    assert both == none


def test_full_recompute_holds_less_than_selective_and_that_less_than_none() -> None:
    none, full, selective = (saved_bytes(save) for save in (None, (), ("attention", "matmul")))
    assert full < 0.5 * none
    assert full <= selective < none


def saved_bytes(save: tuple[str, ...] | None) -> int:
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    model, tally = model_and_tally(save)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model, tally)
    return sum(t.untyped_storage().nbytes() for pointer, t in held.items() if pointer not in weights)


@pytest.mark.parametrize("save", MODES[1:])
def test_the_routing_is_kept_when_recomputed_scores_differ(save: tuple[str, ...]) -> None:
    model, tally = model_and_tally(save)
    loss = loss_of(model, tally)
    load = tally.reduce(single_process_mesh())
    for layer in model.layers.values():
        router = layer.feedforward.part.router
        router.weight.data.neg_()  # by `.data`, so that autograd does not notice: now the worst experts score best
    loss.backward()
    reference, other = model_and_tally(None)
    loss_of(reference, other).backward()
    for name, layer in model.layers.items():
        experts, wanted = layer.feedforward.part.experts, reference.layers[name].feedforward.part.experts
        assert load[f"layers.{name}.load"].min() > 0
        # The gradient of a bias is a weighted sum over the expert's own rows. With other rows it would be another.
        chosen = experts.down.grad.flatten(1).norm(dim=1) / wanted.down.grad.flatten(1).norm(dim=1)
        assert ((chosen > 0.1) & (chosen < 10)).all()
    assert [len(used) for used in routed_rows(save)] == [2, 2]


def routed_rows(save: tuple[str, ...]) -> list[set[int]]:
    """Return, for one token, the experts that it was sent to in each layer and that got a gradient."""
    model, tally = model_and_tally(save)
    loss = model(torch.tensor([[3]]), torch.tensor([[5]]), None, tally)
    loads = tally.reduce(single_process_mesh())
    sent = [set(loads[f"layers.{name}.load"].nonzero().flatten().tolist()) for name in model.layers]
    for layer in model.layers.values():
        layer.feedforward.part.router.weight.data.neg_()
    loss.backward()
    for layer, experts in zip(model.layers.values(), sent, strict=True):
        gradient = layer.feedforward.part.experts.down.grad.flatten(1).abs().sum(1)
        assert set(gradient.nonzero().flatten().tolist()) == experts
    return sent


def test_layers_keep_their_names() -> None:
    names = [name for name, _ in model_and_tally(())[0].named_parameters()]
    assert names == [name for name, _ in model_and_tally(None)[0].named_parameters()]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]))
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return (x * self.weight).exp()


def test_only_the_layers_that_are_given_are_recomputed() -> None:
    first, second = Plain(), Plain()
    recompute_layers([first], Tally({}))
    second(first(torch.ones(1, requires_grad=True))).backward()
    assert (first.passes, second.passes) == (2, 1)


@pytest.mark.parametrize(("every", "passes"), [(1, [2, 2, 2, 2, 2]), (2, [2, 1, 2, 1, 2]), (3, [2, 1, 1, 2, 1])])
def test_every_nth_layer_is_recomputed(every: int, passes: list[int]) -> None:
    layers = [Plain() for _ in passes]
    model, mesh = nn.Sequential(*layers), single_process_mesh()
    plan = Plan(recompute=Recompute("full", every=every))
    engine = apply(model, layers, [model], placement_table(model), mesh, Tally({}), plan, torch.device("cpu"))
    engine.start_step(1)
    model(torch.zeros(1, requires_grad=True)).backward()
    assert [layer.passes for layer in layers] == passes


def test_a_layer_that_is_used_twice_routes_each_pass_by_itself() -> None:
    outputs = []
    for save in (None, ()):
        model, tally = model_and_tally(save)
        layer, x = model.layers["0"], torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(0))
        where = where_of_plain_tokens(torch.zeros(5, 2, dtype=torch.int64))
        y = layer(layer(x.requires_grad_(), where, tally), where, tally)
        y.square().sum().backward()
        outputs.append((y, layer.feedforward.part.experts.up.grad, layer.feedforward.part.router.weight.grad))
    for expected, found in zip(*outputs, strict=True):
        assert torch.equal(found, expected)
