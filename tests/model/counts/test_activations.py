"""What a forward pass keeps: counted by hand, and held against what torch really saves."""

import pytest
import torch
from rank_pool import run_mesh
from torch import Tensor

from meshwright.model.config import ModelConfig
from meshwright.model.counts.activations import ActivationBytes, Held, activation_bytes, layer_bytes
from meshwright.model.kinds.feedforward.moe import MoeConfig
from meshwright.model.kinds.kind import Degrees, Types
from meshwright.model.kinds.mixers.gated_delta import GatedDeltaConfig
from meshwright.model.kinds.mixers.mamba1 import Mamba1Config
from meshwright.model.kinds.mixers.mamba2 import Mamba2Config
from meshwright.model.kinds.mixers.s4d import S4dConfig
from meshwright.model.kinds.table import KINDS
from meshwright.model.kinds.unread import keys_read
from meshwright.model.parts import build_model
from meshwright.parallel.context.order import zigzag_positions
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh
from meshwright.parallel.tally import Tally, declared_entries
from meshwright.parallel.where import place

SIZES = {"num_layers": 2, "hidden_size": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "vocab_size": 4096}
MOE = MoeConfig(num_experts=4, top_k=2, expert_hidden_size=40, num_shared_experts=1)
WEIGHED = MOE.model_copy(update={"shared_expert_gate": True, "router": "sigmoid", "expert_dropout": 0.1})
CONFIGS = {
    "dense": ModelConfig(pattern="*-", ffn_hidden_size=160, **SIZES),
    "normed": ModelConfig(pattern="*-", ffn_hidden_size=160, qk_norm=True, **SIZES),
    "moe": ModelConfig(pattern="*E", moe=MOE, **SIZES),
    "plain": ModelConfig(pattern="*-", ffn_hidden_size=240, ffn_activation="relu2", ffn_dropout=0.1, **SIZES),
    "weighed": ModelConfig(pattern="*E", moe=WEIGHED, ffn_activation="gelu_tanh", **SIZES),
    "routed": ModelConfig(pattern="*-[*-]", ffn_hidden_size=160, depth={"capacity": 0.25}, **SIZES),
}
WITH_STATE = {"num_layers": 2, "hidden_size": 96, "vocab_size": 64, "ffn_hidden_size": 160}
MAMBA2 = Mamba2Config(num_heads=6, head_dim=24, num_groups=2, state_size=16, chunk_size=32)
DELTA = GatedDeltaConfig(num_heads=4, num_key_heads=2, key_head_dim=16, value_head_dim=24, chunk_size=32)
OF_STATES = {
    "mamba2": ModelConfig(pattern="M-", mamba2=MAMBA2, **WITH_STATE),
    "mamba1": ModelConfig(pattern="m-", mamba1=Mamba1Config(dt_rank=10, bias=True), **WITH_STATE),
    "gated delta": ModelConfig(pattern="G-", gated_delta=DELTA, **WITH_STATE),
    "s4d": ModelConfig(pattern="S-", s4d=S4dConfig(state_size=8, chunk_size=64), **WITH_STATE),
    # A sample fills no whole number of chunks; that of the layer for some tokens neither, and each has tables.
    "s4d with a rest": ModelConfig(pattern="S-", s4d=S4dConfig(state_size=8, chunk_size=200), **WITH_STATE),
    "s4d for some tokens": ModelConfig(
        pattern="[S-]", s4d=S4dConfig(state_size=8, chunk_size=48), depth={"capacity": 0.3}, **WITH_STATE
    ),
}
CONFIGS |= OF_STATES
CHOOSING = MoeConfig(num_experts=8, top_k=2, expert_hidden_size=40, num_shared_experts=1, router="expert_choice")
SHORT = SIZES | {"num_layers": 1}
OF_ENDS = {
    "embedding norm": ModelConfig(pattern="*-", ffn_hidden_size=160, embedding_norm=True, **SHORT),
    "layernorm": ModelConfig(pattern="*-", ffn_hidden_size=160, embedding_norm=True, norm="layernorm", **SHORT),
    "no final norm": ModelConfig(
        pattern="*-", ffn_hidden_size=160, norm_placement="post", final_norm=False, embedding_dropout=0.1, **SHORT
    ),
    "further tokens": ModelConfig(pattern="*-", ffn_hidden_size=160, multi_token={"depth": 2}, **SHORT),
    "further tokens, no final norm": ModelConfig(
        pattern="*-", ffn_hidden_size=160, multi_token={"depth": 2}, final_norm=False, norm="layernorm", **SHORT
    ),
    "further tokens of experts": ModelConfig(pattern="*E", multi_token={}, moe=MOE, **SHORT),
}
# Mixtures alone, so that what a router keeps shows.
OF_ROUTERS = {
    "expert choice": CHOOSING,
    "many experts": MoeConfig(num_experts=64, top_k=2, expert_hidden_size=40),
    "noisy": MoeConfig(num_experts=32, top_k=2, expert_hidden_size=40, num_shared_experts=1, router="noisy"),
    "jittered": MoeConfig(num_experts=4, top_k=2, expert_hidden_size=40, num_shared_experts=1, router_jitter=0.1),
    "half a capacity": MoeConfig(num_experts=8, top_k=2, expert_hidden_size=40, capacity_factor=0.5),
}
OF_ENDS |= {
    name: ModelConfig(pattern="E", num_layers=2, hidden_size=96, vocab_size=64, moe=moe)
    for name, moe in OF_ROUTERS.items()
}
CONFIGS |= OF_ENDS
LATENT = {"kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "q_lora_rank": 40}
YARN = {"kind": "yarn", "factor": 4.0, "original_length": 64, "mscale": 1.0, "mscale_all_dim": 1.0}
OF_LATENTS = ["q", "k", "v", "output"]
OF_ATTENTION = {
    "sliding": {"pattern": "L-", "sliding": {"window": 64}, "position": "alibi", "attention_scale": 0.1},
    "block sparse": {"pattern": "B-", "block_sparse": {"block_size": 16, "local_blocks": 3}, "position": "none"},
    "latent": {"pattern": "+-", "latent": LATENT, "rope_scaling": YARN},
    "latent without queries' latent": {"pattern": "+-", "latent": LATENT | {"q_lora_rank": 0}, "bias": OF_LATENTS},
    "switch head": {"pattern": "H-", "position": "t5"},
    "gate": {"pattern": "*-", "attention_gate": True, "rope_fraction": 0.5, "bias": ["q"]},
    "norms of tokens": {"pattern": "*-", "qk_norm": True, "qk_norm_over": "tokens", "rope_scaling": YARN},
    "hybrid norm": {"pattern": "*-", "norm_placement": "hybrid_norm", "position": "t5", "t5_buckets": 8},
}
CONFIGS |= {
    name: ModelConfig.model_validate(
        keys_read(str(keys["pattern"]), SIZES) | {"ffn_hidden_size": 160, "vocab_size": 64} | keys
    )
    for name, keys in OF_ATTENTION.items()
}
# By default each kind once, and those of most models also where numbers are of two widths.
DEFAULT = ("dense", "moe", "sliding", "block sparse", "latent", "switch head", *OF_STATES, *OF_ENDS)
WIDTHS = {"fp32": Types(), "autocast": Types(4, 2, is_cast=True), "bf16": Types(2, 2)}
CASES = [
    (name, width, tp)
    if tp == 1 and name in DEFAULT and (width == "fp32" or name == "moe")
    else pytest.param(name, width, tp, marks=pytest.mark.slow)
    for name in CONFIGS
    for width in WIDTHS
    for tp in (1, 2)
    if tp == 1 or name not in OF_ATTENTION
    if width != "autocast" or name not in OF_ROUTERS  # whose weights' copies weigh more than the tokens
]
OVER_CP = ("embedding norm", "further tokens", "further tokens of experts", "expert choice")
RECURRENT = ("mamba2", "mamba1", "gated delta")
# 8 billion weights: 32 layers, hidden 4096, 32 heads and 8 key heads of width 128, feed-forward 14336.
LARGE = ModelConfig(pattern="*-", num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=8,
                    head_dim=128, ffn_hidden_size=14336, vocab_size=128256)  # fmt: skip
BF16 = Types(stream=2, product=2)
ONE, SEQ, BATCH = single_process_mesh(), 512, 8
MILLION, ALL = 1 << 20, frozenset(range(32))


def saved_bytes(mesh: Mesh, config: ModelConfig, types: Types) -> int:
    """Return the bytes of all storages that a forward pass in training saves for its backward, but the weights'."""
    torch.manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (SEQ, BATCH))
    no_document, all_counted = torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool)
    where = place(
        torch.arange(BATCH),
        no_document,
        all_counted,
        zigzag_positions(SEQ, mesh.cp),
        mesh.tp,
        step=0,
        step_tokens=float(SEQ * BATCH),
        whole_tokens=(tokens, tokens),
    )
    dtype = {4: torch.float32, 2: torch.bfloat16}[types.stream]
    model, saved = build_model(config, mesh=mesh, dtype=dtype), {}
    tally, tokens = Tally(declared_entries(model)), tokens[where.position_mixed]
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        with torch.autocast("cpu", torch.bfloat16, enabled=types.is_cast):
            loss = model(tokens, tokens, where, tally)
        assert loss.requires_grad
        return sum(saved.values())


def test_each_kind_is_counted() -> None:
    assert {kind.name for name in DEFAULT for kind in CONFIGS[name].part_kinds} == KINDS.keys()


def assert_counted(name: str, types: Types, sizes: Sizes) -> None:
    config, spread = CONFIGS[name], Degrees(sizes.cp, sizes.tp)
    is_split = sizes.cp * sizes.tp > 1
    found = run_mesh(sizes, saved_bytes, config, types) if is_split else [saved_bytes(ONE, config, types)]
    counted = activation_bytes(config, SEQ * BATCH, spread, types, samples=BATCH)
    # Left out: the norms' factors, the token ids, and under autocast bf16 copies of these few weights. Ranks' experts
    # take the tokens that were routed there: ranks differ, and the mean is counted.
    saved = sum(found) / len(found)
    assert counted.kept <= saved <= 1.05 * counted.kept


@pytest.mark.parametrize(("name", "width", "tp"), CASES)
def test_the_count_is_what_torch_saves(name: str, width: str, tp: int) -> None:
    assert_counted(name, WIDTHS[width], Sizes(tp=tp))


@pytest.mark.parametrize("sizes", [Sizes(cp=2), pytest.param(Sizes(cp=2, tp=2), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", OVER_CP)
def test_the_count_is_what_torch_saves_over_cp(name: str, sizes: Sizes) -> None:
    assert_counted(name, Types(), sizes)


@pytest.mark.parametrize(
    ("sizes", "width"),
    [
        (Sizes(cp=2), "fp32"),
        pytest.param(Sizes(cp=2), "bf16", marks=pytest.mark.slow),
        pytest.param(Sizes(cp=2, tp=2), "fp32", marks=pytest.mark.slow),
        pytest.param(Sizes(cp=4), "fp32", marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", RECURRENT)
def test_states_of_all_chunks_are_counted_over_cp(name: str, sizes: Sizes, width: str) -> None:
    """Samples are short, so that what is kept of each, however long, shows: of Mamba on two ranks 5 to 8 percent."""
    assert_counted(name, WIDTHS[width], sizes)


def test_a_million_tokens_of_eight_billion_weights_by_hand() -> None:
    """On 32 x 8 ranks, in bf16: for a token stream 1024, normed 1024, heads (8 + 2) * 128 * 2 and 4 sums of 4 bytes.

    While they work, products hold all tokens of tp and their gradient, 4096 * 2 bytes each, and the head's gradient in
    fp32, with the logits of 8371 tokens in fp32 and in bf16. The ring merges: two blocks of a key and a value, and four
    outputs of 4 heads in fp32, over what is held anyway, the gradients of 4 queries, a key, a value and 4 outputs.
    """
    attention = 1024 + 1024 + 2560 + 16
    mlp = 1024 + 1024 + 3 * 1792 * 2
    head, ring, gathered = 1024 + 1024, (4 * 2 + 4 * 4 * 4 - 10 * 2) * 128, 2 * 4096 * 2
    of_loss = 4096 * (2 + 4) * 32_768 + 8371 * 16_032 * (4 + 2)
    matrix = 128_256 // 8 * 4096 * 4  # its gradient, however many tokens there are
    spread, held = Degrees(cp=32, tp=8), 32_768
    whole = activation_bytes(LARGE, MILLION, spread, BF16)
    assert whole == ActivationBytes((32 * (attention + mlp) + head) * held + matrix, of_loss)
    assert whole.kept == 18_600_165_376  # 17.3 GiB
    again = activation_bytes(LARGE, MILLION, spread, BF16, Held(ALL, ALL))
    assert again == ActivationBytes((32 * 1024 + head) * held + matrix, of_loss)
    assert again.total == 3_014_048_576  # 2.8 GiB
    without_head = activation_bytes(LARGE, MILLION, spread, BF16, Held(ALL, ALL, has_head=False))
    assert without_head == ActivationBytes(32 * 1024 * held, (attention + mlp + ring + gathered) * held)


def test_ulysses_keeps_its_output_twice_by_hand() -> None:
    """On cp = 4, tp = 2: 16 query heads, 4 key heads, as cp divides them; on cp = 8 these are sent twice each."""
    for cp, sent in ((4, 4), (8, 8)):
        ring, ulysses = Degrees(cp, 2), Degrees(cp, 2, context="ulysses")
        more = layer_bytes(LARGE, LARGE.layers[0], ulysses, BF16) - layer_bytes(LARGE, LARGE.layers[0], ring, BF16)
        assert more == (16 + 2 * (sent - 4)) * 128 * 2


def test_one_rank_would_need_terabytes_for_a_million_tokens() -> None:
    attention = 2 * 8192 + (64 + 16) * 128 * 2 + 32 * 4
    mlp = 2 * 8192 + 3 * 14336 * 2
    found = activation_bytes(LARGE, MILLION, Degrees(), BF16)
    matrix = 128_256 * 4096 * 4
    kept = (32 * (attention + mlp) + 4096 * 6) * MILLION + matrix
    assert kept == 4_705_090_535_424
    # The logits of 1046 tokens and their part of the matrix's gradient, in bf16, are more than the former in fp32.
    assert found == ActivationBytes(kept, (1046 + 4096) * 128_256 * 2)


def test_experts_count_their_rows_and_every_other_layer_may_be_recomputed() -> None:
    """moe in fp32 on tp = 2, etp = 2; scores, choices and two rows of half the tokens, rows gathered over etp."""
    spread = Degrees(tp=2, etp=2)
    attention = (96 / 2 + 96 / 2) * 4 + (4 + 2) * 16 * 4 + 2 * 4
    routed = 2 / 2 * (96 * 2 + 96 + 3 * 40) * 4
    router = (2 * 4 * 4 + 2 * (3 * 8 + 4)) / 2
    moe = 2 * 96 / 2 * 4 + router + routed + 3 * 40 / 2 * 4
    assert layer_bytes(CONFIGS["moe"], CONFIGS["moe"].layers[0], spread, Types()) == attention + moe
    found = activation_bytes(CONFIGS["moe"], 10, spread, Types(), Held(frozenset({0, 1}), frozenset({0})))
    head, gathered, matrix = 96 / 2 * (4 + 4), 96 * (4 + 4), 4096 * 96 / 2 * 4
    kept = (96 / 2 * 4 + attention + moe + head) * 10 + matrix
    assert found == ActivationBytes(kept, (gathered + 4096 / 2 * 4) * 10)
    below = activation_bytes(CONFIGS["moe"], 10, spread, Types(), Held(frozenset({0, 1}), frozenset({0}), False))
    assert below.at_work == (attention + moe + gathered) * 10


def test_further_tokens_gather_two_vectors_of_each_token_by_hand() -> None:
    """In fp32 on tp = 2: both, [2h] of every token, and their gradient: more than a loss of 64 logits takes."""
    config = CONFIGS["further tokens"].model_copy(update={"vocab_size": 64})
    found = activation_bytes(config, 10, Degrees(tp=2), Types())
    assert found.at_work == 2 * 96 * (4 + 4) * 10
    alone = config.model_copy(update={"multi_token": None})
    assert activation_bytes(alone, 10, Degrees(tp=2), Types()).at_work == (96 * (4 + 4) + 64 / 2 * 4) * 10
    layers, head = 3 * layer_bytes(config, config.layers[0], Degrees(tp=2), Types()), 96 / 2 * (4 + 4)
    kept = layers + 3 * head + 2 * 96 / 2 * (4 + 2 * 4)
    assert found.kept == kept * 10 + 3 * 64 * 96 / 2 * 4
