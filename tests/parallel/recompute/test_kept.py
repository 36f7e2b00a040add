"""What is kept for the backward pass, in every mode and with offload: the same bits come out, fewer bytes lie there."""

import gc
from copy import deepcopy
from functools import cache
from typing import get_args

import engine_cases
import pytest
import torch
from rank_pool import run_mesh
from storages import Storages
from torch import Tensor, nn

from meshwright.launcher.build import recompute_of
from meshwright.launcher.runfile.recompute_checks import modules_of
from meshwright.model.block import RECOMPUTED_WHOLE, RUN_AGAIN
from meshwright.model.config import ModelConfig
from meshwright.model.kinds.unread import keys_read
from meshwright.model.parts import build_model
from meshwright.model.pattern import parse_pattern
from meshwright.model.stack import LanguageModel
from meshwright.parallel.apply import Plan
from meshwright.parallel.config import RecomputeConfig, RecomputedModule
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh
from meshwright.parallel.recompute.host_copies import SMALLEST, HostCopies
from meshwright.parallel.recompute.kept import Kept
from meshwright.parallel.recompute.policy import Recompute, keep_less
from meshwright.parallel.tally import Tally, declared_entries

CPU = torch.device("cpu")
CONFIG = engine_cases.moe_config(hidden_size=16, expert_hidden_size=24, bias=("q", "ffn"))


def modules(*keys: str, offload: bool = False) -> Recompute:
    return recompute_of(RecomputeConfig(mode="modules", modules=keys, offload=offload))  # type: ignore[arg-type]


WAYS = {
    "none": Recompute(),
    "full": Recompute("full"),
    "every second": Recompute("full", every=2),
    "attention": Recompute("selective", save=("attention",)),
    "products": Recompute("selective", save=("attention", "matmul")),
    "norm": modules("norm"),
    "norm and activation": modules("norm", "activation"),
    "mixer": modules("mixer"),
    "feedforward": modules("feedforward"),
    "experts": modules("experts"),
    "norm and mixer": modules("norm", "mixer"),
    "all modules": modules("norm", "mixer", "feedforward"),
    "none, offload": Recompute(offload=True),
    "full, offload": Recompute("full", offload=True),
    "every second, offload": Recompute("full", every=2, offload=True),
    "products, offload": Recompute("selective", save=("attention", "matmul"), offload=True),
    "norm and experts, offload": modules("norm", "experts", offload=True),
}


@cache
def initial_model() -> LanguageModel:
    return build_model(CONFIG)


def built(how: Recompute) -> tuple[LanguageModel, Tally, Kept | None]:
    model = deepcopy(initial_model())
    tally = Tally(declared_entries(model))
    return model, tally, keep_less(list(model.layers.values()), tally, how, CPU)


def loss_of(model: LanguageModel, tally: Tally) -> Tensor:
    tokens, targets = engine_cases.batch_of(0)
    return model(tokens, targets.clamp(min=0), None, tally)


def results(how: Recompute, *, autocast: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model, tally, _ = built(how)
    with torch.autocast("cpu", enabled=autocast):
        loss = loss_of(model, tally)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, tally.reduce(single_process_mesh())


@pytest.mark.parametrize("autocast", [False, True])
def test_every_way_of_keeping_gives_bitwise_the_same_gradients_and_counts(autocast: bool) -> None:
    gradients, sums = results(WAYS["none"], autocast=autocast)
    for way, how in WAYS.items():
        again, sums_again = results(how, autocast=autocast)
        for name, value in gradients.items():
            assert torch.equal(again[name], value), f"{way}: {name}"
        for name, value in sums.items():
            assert torch.equal(sums_again[name], value), f"{way}: {name}"


def held_bytes(how: Recompute) -> tuple[int, int]:
    """Return the bytes that lie on the device and on the host between a forward and a backward pass."""
    model, tally, kept = built(how)
    gc.disable()
    try:
        with Storages() as storages:
            loss = loss_of(model, tally)
        on_host = kept.host.nbytes if kept is not None and kept.host is not None else 0
        on_device = storages.alive() - on_host - loss.nbytes
        weights = {p.untyped_storage()._cdata: p.nbytes for p in model.parameters()}
        on_device -= sum(nbytes for cdata, nbytes in weights.items() if cdata in storages.made)
        loss.backward()
        # Nothing keeps itself alive: what was held goes with the backward pass, without a garbage collection.
        assert kept is None or kept.host is None or kept.host.nbytes == 0
    finally:
        gc.enable()
    return on_device, on_host


def test_every_way_keeps_less_on_the_device_than_keeping_all() -> None:
    held = {way: held_bytes(how) for way, how in WAYS.items()}
    everything, _ = held.pop("none")
    for way, (on_device, on_host) in held.items():
        assert on_device < 0.97 * everything, way
        assert (on_host > 0) == way.endswith("offload"), way
    device = {way: on_device for way, (on_device, _) in held.items()}
    assert device["full"] < device["every second"]
    assert device["full"] < device["all modules"] < min(device["norm and mixer"], device["feedforward"])
    assert device["norm and activation"] < device["norm"]
    assert device["norm and mixer"] < min(device["norm"], device["mixer"])
    assert device["feedforward"] < device["experts"]
    assert device["full"] < device["attention"] < device["products"]
    assert device["full, offload"] < device["full"]
    # What is offloaded is what would be kept.
    for way in ("full", "every second", "products"):
        assert sum(held[f"{way}, offload"]) == pytest.approx(device[way], rel=0.02)
    assert sum(held["none, offload"]) == pytest.approx(everything, rel=0.02)


def test_autograd_sees_fewer_bytes_in_every_mode() -> None:
    # Counted by autograd's own hooks, put under each layer in turn, where ours are not.
    def saved(how: Recompute) -> int:
        model, tally, _ = built(how)
        held: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor
            return tensor.detach()

        weights = {parameter.data_ptr() for parameter in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss_of(model, tally)
        return sum(t.untyped_storage().nbytes() for pointer, t in held.items() if pointer not in weights)

    everything = saved(WAYS["none"])
    for way in ("full", "every second", "attention", "products", "mixer", "feedforward", "experts"):
        assert saved(WAYS[way]) < everything, way


def test_a_graph_that_is_dropped_frees_the_host() -> None:
    model, tally, kept = built(WAYS["none, offload"])
    assert kept is not None
    assert kept.host is not None
    loss = loss_of(model, tally)
    assert kept.host.nbytes > 0
    del loss
    assert kept.host.nbytes == 0


@pytest.mark.parametrize("way", ["none, offload", "norm", "norm and experts, offload"])
def test_a_second_backward_pass_finds_everything_again(way: str) -> None:
    model, tally, _ = built(WAYS[way])
    loss = loss_of(model, tally)
    loss.backward(retain_graph=True)
    first = {name: p.grad.clone() for name, p in model.named_parameters()}
    loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, 2 * first[name]), name


def test_views_of_one_result_travel_once_and_come_back_as_they_were() -> None:
    copies = HostCopies(CPU)
    kept = Kept(copies)
    whole = torch.randn(4, 100, 3, requires_grad=True) * 1.0
    views = [whole, whole[1:3], whole.transpose(0, 1), whole.view(torch.int32)[..., 1]]
    packed = [kept.pack(view) for view in views]
    assert copies.nbytes == whole.nbytes
    expected = [view.clone() for view in views]
    for view, form, bits in zip(views, packed, expected, strict=True):
        again = kept.unpack(form)
        assert torch.equal(again, bits)
        assert (again.stride(), again.storage_offset()) == (view.stride(), view.storage_offset())
        assert again.data_ptr() != view.data_ptr()


def test_what_is_written_to_later_is_kept_as_it_was() -> None:
    copies = HostCopies(CPU)
    kept, x = Kept(copies), torch.ones(1000)
    before = kept.pack(x)
    x.add_(1)
    after = kept.pack(x)
    assert kept.unpack(before).max() == 1
    assert kept.unpack(after).min() == 2


def test_weights_and_small_tensors_stay() -> None:
    copies, weight = HostCopies(CPU), nn.Parameter(torch.ones(1000))
    assert not copies.takes(weight)
    assert not copies.takes(weight.view(10, 100))
    assert not copies.takes(torch.ones(SMALLEST // 4 - 1))
    assert copies.takes(torch.ones(SMALLEST // 4))
    assert not copies.takes(torch.ones(1000, device="meta"))


def test_new_memory_at_the_place_of_old_is_not_taken_for_it() -> None:
    copies = HostCopies(CPU)
    for value in range(20):  # freed and allocated again at the same address
        x = torch.full((1000,), float(value))
        copy = copies.copy_of(x)
        assert copies.take_back(copy).view(torch.float32)[0] == value


def test_a_norm_is_made_again_once_for_all_who_use_it() -> None:
    class Norm(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Norm.calls += 1
            return x * 2

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = Norm()
            self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return self.q(y) + self.k(y)

    layer = Layer()
    keep_less([layer], Tally({}), Recompute("modules", remade=("norm",)), CPU)
    layer(torch.ones(3, 4, requires_grad=True)).sum().backward()
    assert Norm.calls == 2
    with torch.no_grad():
        layer(torch.ones(3, 4))
    assert Norm.calls == 3


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(self.norm(x))


def test_what_is_made_again_has_the_types_of_the_first_time() -> None:
    gradients = []
    for remade in ((), ("norm",)):
        torch.manual_seed(0)
        layer, x = Two(), torch.randn(4, 8)
        keep_less([layer], Tally({}), Recompute("modules" if remade else "none", remade=remade), CPU)
        with torch.autocast("cpu"):  # the norm's product is in bf16, and the backward pass runs outside
            loss = layer(x).float().square().sum()
        loss.backward()
        gradients.append(layer.q.weight.grad)
    assert torch.equal(*gradients)


def test_every_module_that_a_run_file_may_name_is_there() -> None:
    layer = dict(build_model(CONFIG).layers["0"].named_modules())
    assert set(get_args(RecomputedModule)) == RECOMPUTED_WHOLE.keys() | RUN_AGAIN.keys()
    names = {name for table in (RECOMPUTED_WHOLE, RUN_AGAIN) for paths in table.values() for name in paths}
    assert names - layer.keys() == {"feedforward.part.activation"}  # of an MLP; this layer has a mixture
    dense = build_model(engine_cases.dense_config()).layers["0"]
    assert dense.get_submodule("feedforward.part.activation")


def test_a_stage_without_any_of_the_modules_computes_as_if_none_were_recomputed() -> None:
    """The rule that the model has them is the whole pattern's: `*-*E` on two stages has experts on one of them."""
    stage = build_model(engine_cases.dense_config())
    keep_less(list(stage.layers.values()), Tally({}), modules("experts"), CPU)
    assert not any("forward" in vars(module) for module in stage.modules())


@pytest.mark.parametrize("pattern", ["*", "-", "E", "*-", "*E", "**-", "*-*E"])
def test_the_modules_of_a_pattern_are_those_of_the_model_built_of_it(pattern: str) -> None:
    period = parse_pattern(pattern)
    table = CONFIG.model_dump() | {"pattern": pattern, "num_layers": len(period)}
    if "E" not in pattern:
        table["moe"] = None
    model = build_model(ModelConfig(**keys_read(pattern, table)))
    for kinds, layer in zip(period, model.layers.values(), strict=True):
        has = dict(layer.named_modules()).keys()
        named = {**RECOMPUTED_WHOLE, **RUN_AGAIN}
        assert modules_of(kinds) == {name for name, paths in named.items() if has & set(paths)}


@pytest.mark.parametrize("how", [modules("feedforward"), modules("experts"), modules("norm", "mixer", "feedforward")])
def test_the_routing_is_kept_when_recomputed_scores_differ(how: Recompute) -> None:
    model, tally, _ = built(how)
    loss = model(torch.tensor([[3]]), torch.tensor([[5]]), None, tally)
    loads = tally.reduce(single_process_mesh())
    for layer in model.layers.values():
        layer.feedforward.part.router.weight.data.neg_()  # now the worst experts score best
    loss.backward()
    for name, layer in model.layers.items():
        gradient = layer.feedforward.part.experts.down.grad.flatten(1).abs().sum(1)
        assert torch.equal(gradient.nonzero().flatten(), loads[f"layers.{name}.load"].nonzero().flatten())


NORMS = Plan(stage=3, recompute=Recompute("modules", remade=RUN_AGAIN["norm"], offload=True))
LAYOUTS = [
    (Sizes(dp_shard=2), NORMS),
    pytest.param(Sizes(dp_shard=2), Plan(stage=3, recompute=Recompute(offload=True)), marks=pytest.mark.slow),
    pytest.param(Sizes(dp_shard=4, ep=2), NORMS, marks=pytest.mark.slow),
]


def one_step(mesh: Mesh, plan: Plan) -> dict[str, Tensor]:
    return engine_cases.train(mesh, engine_cases.moe_config(), plan, steps=1).weights


@pytest.mark.parametrize(("sizes", "plan"), LAYOUTS)
def test_a_layout_computes_bitwise_the_same_with_and_without(sizes: Sizes, plan: Plan) -> None:
    plain, other = (run_mesh(sizes, one_step, which)[0] for which in (Plan(stage=plan.stage), plan))
    for name, value in plain.items():
        assert torch.equal(other[name], value), name


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["none, offload", "full, offload", "products, offload", "norm and experts, offload"])
def test_offload_from_a_gpu_gives_the_same_bits_and_frees_its_memory(way: str) -> None:
    device, peaks, gradients = torch.device("cuda"), [], []
    config = engine_cases.moe_config(hidden_size=512, num_layers=6, expert_hidden_size=512)
    tokens = torch.randint(0, engine_cases.VOCAB, (256, 4), device=device)
    for how in (Recompute(WAYS[way].mode, save=WAYS[way].save, whole=WAYS[way].whole), WAYS[way]):
        model = build_model(config).to(device)
        tally = Tally(declared_entries(model), device)
        keep_less(list(model.layers.values()), tally, how, device)
        for _ in range(3):  # what is timed wrongly shows in some passes only
            model.zero_grad()
            model(tokens, tokens, None, tally).backward()
        before = torch.cuda.memory_allocated()
        loss = model(tokens, tokens, None, tally)
        peaks.append(torch.cuda.memory_allocated() - before)
        del loss
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert peaks[1] < 0.8 * peaks[0]
    for plain, offloaded in zip(*gradients, strict=True):
        assert torch.equal(offloaded, plain)
