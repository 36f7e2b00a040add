"""Whole models, a tiny one for each thing that a config can ask for; the tests of parts go through them all.

    OF_KINDS       each kind of part (model/kinds/table.py)      OF_ROUTERS      OF_ACTIVATIONS
    OF_NORMS       each norm, each placement                     OF_POSITIONS
    OF_LAYERS      what stands around parts: Mixture-of-Depths around each kind of mixer, shared layers, further tokens
    OF_ENDS        multipliers, dropouts, what is done to embedding and logits

A new kind, norm, router, ... is one line here, and everything that holds for parts is tested of it: in every layout,
in decoding, of documents, names, shapes, operations, bytes, initial weights (tests/parity/test_parts_in_layouts.py,
tests/model/test_every_part.py, tests/model/counts/test_every_part_counted.py, tests/model/test_initial_weights.py).
Two layers, so that a pipeline cuts them; 12 tokens a sample (engine_cases.py), so that chunks, windows and convolutions
end within it; every dim has its own size.
"""

from typing import Any

from engine_cases import dense_config, moe_config

from meshwright.model.config import ModelConfig
from meshwright.model.kinds.feedforward.mlp import FfnActivation

EVERY_BIAS = ("q", "k", "v", "output", "ffn")
YARN = {"kind": "yarn", "factor": 4.0, "original_length": 8}
LLAMA3 = {"kind": "llama3", "factor": 4.0, "original_length": 8}
LATENT = {"kv_lora_rank": 5, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 3, "q_lora_rank": 7}
MAMBA2 = {"num_heads": 4, "head_dim": 5, "num_groups": 2, "state_size": 7, "conv_kernel": 3, "chunk_size": 4}
MAMBA1 = {"inner_size": 16, "dt_rank": 3, "state_size": 5, "conv_kernel": 3, "chunk_size": 4}
DELTA = {
    "num_heads": 4, "num_key_heads": 2, "key_head_dim": 5, "value_head_dim": 3, "conv_kernel": 3, "chunk_size": 4
}  # fmt: skip
BLOCKS = {"block_size": 2, "local_blocks": 2}
DEPTH = {"capacity": 0.4, "predictor_size": 7}
TABLES: dict[str, dict[str, Any]] = {
    "L": {"sliding": {"window": 5}},
    "B": {"block_sparse": BLOCKS},
    "+": {"latent": LATENT},
    "H": {"switch_head": {"num_experts": 3, "top_k": 2}},
    "M": {"mamba2": MAMBA2},
    "m": {"mamba1": MAMBA1},
    "G": {"gated_delta": DELTA},
    "S": {"s4d": {"state_size": 6, "chunk_size": 5}},
}
ROUTER_KEYS: dict[str, dict[str, Any]] = {
    # More experts of a token than groups are kept: with fewer, the best are always in the groups of the best.
    "softmax": {"top_k": 3, "num_groups": 3, "top_groups": 2, "weight_scale": 1.5, "shared_expert_gate": True},
    "sigmoid": {"num_groups": 2, "weight_scale": 2.5, "bias_rate": 0.05, "load_balancing": "sequence"},
    "switch": {"top_k": 1, "expert_dropout": 0.2},
    "sinkhorn": {"load_balancing": "none"},
    "expert_choice": {"bias_rate": 0.05, "expert_dropout": 0.3},
    "noisy": {"load_balancing": "step", "router_jitter": 0.1},
}


def sample(pattern: str, **changes: Any) -> ModelConfig:
    """Return a tiny model of a pattern, with the tables that its letters need."""
    tables = {key: value for letter in TABLES if letter in pattern for key, value in TABLES[letter].items()}
    more = {"depth": DEPTH} if "[" in pattern else {}
    make = moe_config if "E" in pattern else dense_config
    return make(**{"pattern": pattern, **tables, **more, **changes})


OF_KINDS = {
    "attention": sample("*-", qk_norm=True, attention_gate=True, bias=EVERY_BIAS, rope_fraction=1 / 3),
    "sliding_attention": sample("L-", position="none"),
    "block_sparse_attention": sample("B-"),
    "latent_attention": sample("+-", bias=("q", "k", "v", "output")),
    "switch_head": sample("H-", position="t5", t5_buckets=6, t5_max_distance=9),
    "mamba2": sample("M-"),
    "mamba1": sample("m-", mamba1=MAMBA1 | {"bias": True}),
    "gated_delta": sample("G-"),
    "s4d": sample("S-"),
    "mlp": sample("*-", tie_embeddings=True, ffn_dropout=0.1),
    "moe": sample("*E", bias=("ffn",)),
}
"""By the names of the kinds; all else that a kind can do stands below, or in the tests of its module."""

OF_VARIANTS = {
    "one key head": sample("*-", num_kv_heads=1, qk_norm=True, qk_norm_over="tokens"),
    "latent without the queries' latent": sample("+-", latent=LATENT | {"q_lora_rank": 0}, rope_scaling=YARN),
    "mamba2, one group": sample("M-", mamba2=MAMBA2 | {"num_groups": 1, "bias": True, "conv_bias": False}),
    "s4d, real": sample("S-", s4d={"state_size": 4, "chunk_size": 3, "start": "real", "bias": False}),
    "mixers alone": sample("M"),
    "feed-forwards alone": sample("-", num_layers=2),
    "hybrid": sample("M-*EG-L-", num_layers=4),
}

OF_NORMS = {
    f"norm {name}": sample("*-", norm=name, qk_norm=True)
    for name in (
        "rmsnorm_zero_centred", "layernorm", "dynamic_tanh", "adaptive_rmsnorm", "adaptive_layernorm"
    )
} | {
    f"placing {name}": sample("*-", norm_placement=name)
    for name in ("post", "sandwich", "branch", "deepnorm", "pre_post", "hybrid_norm")
}  # fmt: skip

OF_POSITIONS = {
    "rope stretched, linear": sample("*-", rope_scaling={"kind": "linear", "factor": 3.0}),
    "rope stretched, ntk": sample("*-", rope_scaling={"kind": "ntk", "factor": 3.0}),
    "rope stretched, yarn": sample("*-", rope_scaling=YARN),
    "rope stretched, llama3": sample("*-", rope_scaling=LLAMA3),
    "alibi": sample("*-", position="alibi"),
    "alibi in a window": sample("L-", position="alibi"),
    "t5": sample("*-", position="t5", t5_buckets=6, t5_max_distance=9),
    "learned": sample("*-", position="learned", max_positions=13),
    "sinusoidal": sample("*-", position="sinusoidal"),
    "none": sample("*-", position="none"),
}

OF_ROUTERS = {
    f"router {name}": sample("*E", num_layers=2, router=name, **keys) for name, keys in ROUTER_KEYS.items()
} | {"router with capacity": sample("*E", capacity_factor=0.75, router_jitter=0.1)}

OF_ACTIVATIONS = {
    f"activation {name}": sample("*E" if at % 2 else "*-", ffn_activation=name, bias=("ffn",))
    for at, name in enumerate(FfnActivation.__args__)
}

OF_LAYERS = {
    **{f"depth around {pattern}": sample(f"[{pattern}]") for pattern in ("*-", "L-", "B-", "+-", "H-", "M-", "m-")},
    **{f"depth around {pattern}": sample(f"[{pattern}]") for pattern in ("G-", "S-", "*E")},
    "depth by sigmoid": sample("*-[*-]", depth=DEPTH | {"gate": "sigmoid"}, residual_dropout=0.1),
    "depth around alibi in a window": sample("[L-]", position="alibi"),
    "shared layers": sample("*-", distinct_layers=1, residual_dropout=0.1),
    "shared layers of experts": sample("*EM-", num_layers=4, distinct_layers=2),
    "further tokens": sample("*-", multi_token={"depth": 2, "loss_weight": 0.5}),
    "further tokens of experts": sample("*-*E", multi_token={}, tie_embeddings=True),
}

OF_ENDS = {
    "multipliers": sample(
        "*-", embedding_multiplier=3.0, residual_multiplier=0.4, logits_scaling=5.0, attention_scale=0.2
    ),
    "dropouts": sample(
        "*E", embedding_dropout=0.2, residual_dropout=0.2, ffn_dropout=0.2, attention_dropout=0.2, expert_dropout=0.2
    ),
    "ends": sample("*-", embedding_norm=True, final_norm=False, init="xavier_uniform"),
    "scaled init": sample("*-", init="scaled", init_depth_scaled=False),
}

SAMPLES: dict[str, ModelConfig] = {
    **OF_KINDS, **OF_VARIANTS, **OF_NORMS, **OF_POSITIONS, **OF_ROUTERS, **OF_ACTIVATIONS, **OF_LAYERS, **OF_ENDS
}  # fmt: skip
