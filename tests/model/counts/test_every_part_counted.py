"""What is said of every part's cost is what is computed: products by a counter, mixing by loops, states by their bytes.

Products with weights are counted exactly by `WeightProducts`, which sees every product of the forward pass and asks
whether one of its two sides is weights alone (fused, transposed, cast). Products of activations with
each other are not: kernels compute scans by chunks and attention by tiles, some within operators that no counter sees,
so the operations of mixing are held to the recurrence or the pairs themselves, written down here as loops.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_cases import VOCAB
from part_samples import OF_ENDS, OF_KINDS, OF_LAYERS, OF_NORMS, OF_VARIANTS, SAMPLES
from rank_pool import run_mesh
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from meshwright.model.config import ModelConfig
from meshwright.model.counts.costs import forward_flops_per_token, parameter_count
from meshwright.model.counts.shapes import weights
from meshwright.model.kinds.table import KINDS
from meshwright.model.parts import build_model
from meshwright.parallel.mesh import Mesh, Sizes
from meshwright.parallel.tally import Tally, declared_entries
from meshwright.parallel.where import where_of_plain_tokens

S, B = 12, 2
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
GROUPED = {"grouped_product"}  # ours (kernels/matmul/grouped.py): rows [r, in], a stack of weights [e, out, in]
MOVES = {"cat", "stack", "t", "transpose", "permute", "view", "_unsafe_view", "reshape", "expand", "clone", "slice"}
MOVES |= {"detach", "alias", "_to_copy", "unsqueeze", "squeeze", "split", "split_with_sizes", "select", "contiguous"}


class WeightProducts(TorchDispatchMode):
    """Count the operations of products of which one side is weights alone."""

    def __init__(self, weights: list[Tensor]) -> None:
        """Take the weights."""
        super().__init__()
        self.made_of_weights = {id(weight): weight for weight in weights}  # held: an address is used again
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, and look at what went in."""
        result = func(*args, **(kwargs or {}))
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        are_weights, name = [id(each) in self.made_of_weights for each in given], func.overloadpacket.__name__
        if name in PRODUCTS and any(are_weights[-2:]):
            self.operations += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        elif name in GROUPED and are_weights[1]:
            self.operations += 2 * len(given[0]) * given[1][0].numel()
        elif name in MOVES and all(are_weights):
            self.made_of_weights |= {id(each): each for each in tree_leaves(result) if isinstance(each, Tensor)}
        return result


def counted(config: ModelConfig) -> int:
    """Return the operations of products with weights in one training forward, the loss's excepted where it is split."""
    model = build_model(config, dtype=torch.float64).train()
    tokens = torch.randint(0, VOCAB, (S, B), generator=torch.Generator().manual_seed(0))
    # Not biases: those of experts are spread over their rows by a product, which no count has.
    products = [weight for name, weight in model.named_parameters() if "bias" not in name]
    where, counter = where_of_plain_tokens(tokens), WeightProducts(products)
    with torch.no_grad(), counter:
        if config.further_tokens:
            model(tokens, tokens, where, Tally(declared_entries(model)))
        else:
            model(tokens, None, where)
    return counter.operations


# Experts that choose, and those of sequences whose tokens are chosen, compute for another number of rows on average.
NAMES = [name for name in {**OF_KINDS, **OF_VARIANTS, **OF_NORMS, **OF_LAYERS, **OF_ENDS} if name != "depth around *E"]


def halved(config: ModelConfig) -> ModelConfig:
    """Let half of the tokens through: of 12 a whole number."""
    if config.depth is None:
        return config
    return config.model_copy(update={"depth": config.depth.model_copy(update={"capacity": 0.5})})


def mixing(config: ModelConfig) -> float:
    """Return what is said of a token's operations beside products with weights."""
    found = 0.0
    for kinds in [*config.layers, *[config.last_layer] * config.further_tokens]:
        share = 0.5 if kinds.is_routed else 1.0
        found += share * sum(KINDS[name].mixing_flops(config, int(share * S), causal=True) for name in kinds.names)
    return found


@pytest.mark.parametrize(
    "name", [name if name in OF_KINDS else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_products_with_weights_are_those_that_a_counter_sees(name: str) -> None:
    config = halved(SAMPLES[name])
    said = (forward_flops_per_token(config, S) - mixing(config)) * S * B
    assert counted(config) == pytest.approx(said, rel=1e-12)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_number_of_parameters_is_that_of_the_model(name: str) -> None:
    model = build_model(SAMPLES[name], device="meta")
    assert parameter_count(SAMPLES[name]) == sum(parameter.numel() for parameter in model.parameters())


def held(mesh: Mesh, names: list[str]) -> dict[str, dict[str, int]]:
    models = {name: build_model(SAMPLES[name], mesh=mesh, device="meta") for name in names}
    return {name: {each: p.numel() for each, p in model.named_parameters()} for name, model in models.items()}


OVER_FOUR = ["one key head", "mamba2, one group", "mamba2", "gated_delta"]  # of fewer key heads and groups
ON_RANKS = {
    "kinds": (Sizes(tp=2), list(OF_KINDS)),
    "all": (Sizes(tp=2), list(SAMPLES)),
    "more ranks": (Sizes(tp=4), OVER_FOUR),
    "experts": (Sizes(tp=2, dp_shard=2, ep=2, etp=2), [name for name in SAMPLES if SAMPLES[name].moe]),
}


@pytest.mark.parametrize(
    "ranks", [each if each == "kinds" else pytest.param(each, marks=pytest.mark.slow) for each in ON_RANKS]
)
def test_a_rank_holds_what_is_said_of_it(ranks: str) -> None:
    sizes, names = ON_RANKS[ranks]
    for found in run_mesh(sizes, held, names):
        for name, numbers in found.items():
            assert numbers == {each: weight.on_a_rank(sizes) for each, weight in weights(SAMPLES[name]).items()}, name


def pairs(sees: Callable[[int, int], bool], seq_len: int) -> int:
    """Return how many pairs of a token and one that it sees a sequence has."""
    return sum(sees(i, j) for i in range(seq_len) for j in range(i + 1))


def of_attention(config: ModelConfig, seq_len: int) -> float:
    return 4.0 * config.num_heads * config.head_dim * pairs(lambda i, j: True, seq_len)


def of_window(config: ModelConfig, seq_len: int) -> float:
    window = config.sliding.window
    return 4.0 * config.num_heads * config.head_dim * pairs(lambda i, j: i - j < window, seq_len)


def of_blocks(config: ModelConfig, seq_len: int) -> float:
    size, local, leading = config.block_sparse.block_size, config.block_sparse.local_blocks, 1
    sees = lambda i, j: i // size - j // size < local or j // size < leading  # noqa: E731
    return 4.0 * config.num_heads * config.head_dim * pairs(sees, seq_len)


def of_latent(config: ModelConfig, seq_len: int) -> float:
    table = config.latent
    width = table.qk_nope_head_dim + table.qk_rope_head_dim
    return 2.0 * config.num_heads * (width + table.v_head_dim) * pairs(lambda i, j: True, seq_len)


def of_recurrence(state: int, operations: int, channels: int, taps: int) -> Callable[[ModelConfig, int], float]:
    """Return a count: so many operations on each number of the state, and two for each tap of each channel."""
    return lambda _, seq_len: float(sum(state * operations + 2 * channels * taps for _ in range(seq_len)))


# Of a state's number: decay it, make what is written and add it, multiply and add what is read: 5. Mamba-1 makes its
# exponent too; the delta net reads twice, before it writes (a product and a sum) and after; S4D's numbers are pairs.
BY_LOOP: dict[str, Callable[[ModelConfig, int], float]] = {
    "attention": of_attention,
    "sliding_attention": of_window,
    "block_sparse_attention": of_blocks,
    "latent_attention": of_latent,
    "switch_head": of_attention,
    "mamba2": of_recurrence(4 * 5 * 7, 5, 4 * 5 + 2 * 2 * 7, 3),
    "mamba1": of_recurrence(16 * 5, 6, 16, 3),
    "gated_delta": of_recurrence(4 * 5 * 3, 7, 4 * 3 + 2 * 2 * 5, 3),
    "s4d": of_recurrence(22 * 6, 5, 0, 0),
    "mlp": lambda _config, _seq_len: 0.0,
    "moe": lambda _config, _seq_len: 0.0,
}


@pytest.mark.parametrize("seq_len", [1, 4, 12, 23])
@pytest.mark.parametrize("name", KINDS)
def test_the_operations_of_mixing_are_those_of_a_loop(name: str, seq_len: int) -> None:
    said = KINDS[name].mixing_flops(OF_KINDS[name], seq_len, causal=True) * seq_len
    assert said == pytest.approx(BY_LOOP[name](OF_KINDS[name], seq_len))


def tensors_of(state: Any) -> list[Tensor]:
    """Return all tensors of a state, whatever holds them."""
    if isinstance(state, Tensor):
        return [state]
    inner = state if isinstance(state, list | tuple) else getattr(state, "__dict__", {}).values()
    return [tensor for each in inner for tensor in tensors_of(each)]


def bytes_of(state: Any) -> int:
    """Return the bytes that a state holds, also where it shows only a part of them."""
    held = {storage.data_ptr(): storage.nbytes() for storage in (each.untyped_storage() for each in tensors_of(state))}
    return sum(held.values())


GROWS = {"attention", "block_sparse_attention", "latent_attention", "switch_head", "moe"}


@pytest.mark.parametrize("name", KINDS)
def test_the_memory_of_generation_over_32_thousand_tokens(name: str) -> None:
    config = OF_KINDS[name]
    table = KINDS[name].table
    if table and name not in GROWS:  # chunks are speed alone
        keys = {"window": 300} if table == "sliding" else {"chunk_size": 64}
        config = config.model_copy(update={table: getattr(config, table).model_copy(update=keys)})
    layer = build_model(config).eval().layers["0"]
    part = getattr(layer, KINDS[name].place).part
    x = torch.randn(1024, 1, config.hidden_size)
    after = {}
    for tokens in (1024, 32 * 1024):
        state = part.initial_state(1, tokens)
        if name in GROWS or table == "sliding":  # all the room that there will be is there from the beginning
            part.step(x[:7], state)
        else:
            with torch.no_grad():
                for _ in range(tokens // 1024):
                    part.step(x, state)
        after[tokens] = bytes_of(state)
        assert after[tokens] == KINDS[name].state_bytes(config, tokens, 4)
    assert (after[32 * 1024] == 32 * after[1024] > 0) == (name in GROWS)
    assert (after[32 * 1024] == after[1024]) == (name not in GROWS)


@pytest.mark.parametrize("name", KINDS)
def test_a_state_that_was_told_no_length_holds_less_than_twice_what_it_needs(name: str) -> None:
    config = OF_KINDS[name]
    part = getattr(build_model(config).eval().layers["0"], KINDS[name].place).part
    x, state = torch.randn(1, 1, config.hidden_size), part.initial_state(1)
    room, moved, before = 16, -1, [0]
    for tokens in range(1, 71):
        with torch.no_grad():
            part.step(x, state)
        room *= 2 if tokens > room else 1
        assert bytes_of(state) == KINDS[name].state_bytes(config, room, 4)
        held = [each.data_ptr() for each in tensors_of(state)]
        moved, before = moved + (held != before), held
    if name in GROWS:
        assert moved == 3, "rows are copied at 17, 33 and 65 tokens alone"
