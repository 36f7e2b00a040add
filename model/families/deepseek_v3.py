"""`deepseek_v3`, DeepseekV3ForCausalLM: latent attention, fine-grained experts by sigmoid and bias, shared experts.

p = qk_nope_head_dim, r = qk_rope_head_dim, e = v_head_dim, c = kv_lora_rank, a = q_lora_rank, n heads:

    layers.N.mixer.part.q_a, q_b            ...self_attn.q_a_proj [a, h], q_b_proj [n*(p + r), a]   r of a head in pairs
    layers.N.mixer.part.kv_a, k_rope         ...self_attn.kv_a_proj_with_mqa [c + r, h]               r in pairs
    layers.N.mixer.part.k_b, v_b             ...self_attn.kv_b_proj [n*(p + e), c]                    by heads
    layers.N.feedforward.part.shared.gate    ...mlp.shared_experts.gate_proj [s*f, h]                 (up, down)
    buffers.layers.N.feedforward.part.router.bias   ...mlp.gate.e_score_correction_bias [e]

The first layers may be dense. The norms of the latents have an eps of 1e-6 whatever the config says.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from meshwright.model.config import ModelConfig
from meshwright.model.families.family import BUFFERS, Family, Row, Source, same
from meshwright.model.families.rules import ANY, ROPE, Parts, all_or_none, no_bias, only, reasons
from meshwright.model.families.table import (
    ATTENTION_BIASES,
    NEEDED,
    attention_bias_parts,
    common_keys,
    common_keys_to_ours,
    expert_rows,
    experts_of,
    gated_rows,
    linear_rows,
    mlp_rows,
    shortest_pattern,
    stack_rows,
    without,
)
from meshwright.model.kinds.mixers.attention_keys import LatentConfig

EPS = 1e-6
PARTS = Parts(("latent_attention",), ("mlp", "moe"), "'+E' or '+E @0-2 +-'")
RULES = {
    **ROPE,
    "latent": ANY,
    "moe.router": only("sigmoid"),
    "moe.normalise_top_k": ANY,
    "moe.weight_scale": ANY,
    "moe.num_groups": ANY,
    "moe.top_groups": ANY,
    "moe.num_shared_experts": ANY,
}
FIXED = {
    "hidden_act": ("silu",),
    "attention_dropout": (0.0,),
    "rope_interleave": (True,),
    "pretraining_tp": (1,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "rms_norm_eps": (EPS,),
    "moe_layer_freq": (1,),
}


def reasons_against(config: ModelConfig) -> list[str]:
    """Return every reason why a DeepSeek-V3 cannot be this model."""
    found = reasons(config, PARTS, RULES) + all_or_none(config, ATTENTION_BIASES)
    if config.moe is None:
        found.append(f"model.pattern = {config.pattern!r}: has no experts; '+E' can be exported")
    elif config.moe.num_shared_experts == 0:
        found.append("model.moe.num_shared_experts = 0: a DeepSeek-V3 always has some; 1 can be exported")
    letters = [kinds.feedforward for kinds in config.layers]
    if letters != sorted(letters, key=lambda name: name == "moe"):
        found.append(
            f"model.pattern = {config.pattern!r}: a dense layer follows one of experts; a DeepSeek-V3 can only begin"
            " with dense layers, such as '+E @0-2 +-'"
        )
    if config.norm_eps != EPS:
        found.append(
            f"model.norm_eps = {config.norm_eps}: the norms of a DeepSeek-V3's latents have {EPS}, whatever the others"
            f" have; {EPS} can be exported"
        )
    return found + no_bias(config, ["ffn"], "DeepSeek-V3's feed-forwards have")


def mapping(config: ModelConfig) -> Iterator[Row]:
    """Yield all tensors of a DeepSeek-V3."""
    return stack_rows(config, {"latent_attention": latent_rows, "mlp": mlp_rows, "moe": moe_rows})


def latent_rows(config: ModelConfig, ours: str, theirs: str) -> Iterator[Row]:
    """Yield latent attention's rows; rotary rows lie in pairs on the disk."""
    table, n, h, has_bias = latent_of(config), config.num_heads, config.hidden_size, "q" in config.bias
    a, c, r = table.q_lora_rank, table.kv_lora_rank, table.qk_rope_head_dim
    p, e, attention = table.qk_nope_head_dim, table.v_head_dim, f"{theirs}.self_attn"
    if a:
        yield from linear_rows(f"{ours}.q_a", f"{attention}.q_a_proj", (a, h), bias=has_bias)
        yield same(f"{ours}.q_a_norm.weight", f"{attention}.q_a_layernorm.weight", (a,))
    name, there, width = ("q_b", "q_b_proj", a) if a else ("q", "q_proj", h)
    shape = (n * (p + r), width)
    yield Row(f"{attention}.{there}.weight", shape, (Source(f"{ours}.{name}.weight", shape),), groups=n, pairs=r)
    for kind, tail in (("weight", (h,)), ("bias", ())) if has_bias else (("weight", (h,)),):
        sources = (Source(f"{ours}.kv_a.{kind}", (c, *tail)), Source(f"{ours}.k_rope.{kind}", (r, *tail)))
        yield Row(f"{attention}.kv_a_proj_with_mqa.{kind}", (c + r, *tail), sources, pairs=r)
    yield same(f"{ours}.kv_a_norm.weight", f"{attention}.kv_a_layernorm.weight", (c,))
    of_heads = (Source(f"{ours}.k_b.weight", (n * p, c)), Source(f"{ours}.v_b.weight", (n * e, c)))
    yield Row(f"{attention}.kv_b_proj.weight", (n * (p + e), c), of_heads, groups=n)
    yield from linear_rows(f"{ours}.output", f"{attention}.o_proj", (h, n * e), bias=has_bias)


def moe_rows(config: ModelConfig, ours: str, theirs: str) -> Iterator[Row]:
    """Yield the router with its bias, the experts and the shared ones."""
    moe = experts_of(config)
    yield same(f"{BUFFERS}{ours}.router.bias", f"{theirs}.mlp.gate.e_score_correction_bias", (moe.num_experts,))
    yield from expert_rows(config, ours, theirs)
    yield from gated_rows(config, f"{ours}.shared", f"{theirs}.mlp.shared_experts", moe.shared_hidden_size)


def latent_of(config: ModelConfig) -> LatentConfig:
    """Return the [model.latent] table of a model that has latent attention."""
    assert config.latent is not None, "the checks let no + pass without a [model.latent]"
    return config.latent


def to_foreign(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of a DeepSeek-V3's config.json."""
    moe, table = experts_of(config), latent_of(config)
    return common_keys(config) | {
        "num_key_value_heads": config.num_heads,
        "head_dim": table.qk_rope_head_dim,
        "intermediate_size": config.ffn_hidden_size,
        "attention_bias": "q" in config.bias,
        "q_lora_rank": table.q_lora_rank or None,
        "kv_lora_rank": table.kv_lora_rank,
        "qk_nope_head_dim": table.qk_nope_head_dim,
        "qk_rope_head_dim": table.qk_rope_head_dim,
        "v_head_dim": table.v_head_dim,
        "moe_intermediate_size": moe.expert_hidden_size,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "num_experts_per_tok": moe.top_k,
        "n_group": moe.num_groups,
        "topk_group": moe.top_groups,
        "norm_topk_prob": moe.normalise_top_k,
        "routed_scaling_factor": moe.weight_scale,
        "first_k_dense_replace": sum(kinds.feedforward == "mlp" for kinds in config.layers),
        "num_nextn_predict_layers": 0,
    }


def to_ours(foreign: Mapping[str, Any]) -> dict[str, Any]:
    """Return our [model] keys from a DeepSeek-V3's config.json."""
    layers, first = foreign["num_hidden_layers"], foreign.get("first_k_dense_replace", 3)
    dense = min(first, layers)
    _check_what_follows(foreign)
    keys = without(foreign, "head_dim", "num_key_value_heads")
    rank = foreign.get("q_lora_rank", 1536)
    return common_keys_to_ours(keys, default_rope_base=10_000.0) | {
        "pattern": shortest_pattern(["+-"] * dense + ["+E"] * (layers - dense)),
        "ffn_hidden_size": foreign["intermediate_size"],
        "bias": attention_bias_parts(foreign),
        "latent": {
            "q_lora_rank": rank or 0,
            "kv_lora_rank": foreign.get("kv_lora_rank", 512),
            "qk_nope_head_dim": foreign.get("qk_nope_head_dim", 128),
            "qk_rope_head_dim": foreign.get("qk_rope_head_dim", 64),
            "v_head_dim": foreign.get("v_head_dim", 128),
        },
        **({"moe": _experts(foreign)} if dense < layers else {}),
    }


def _check_what_follows(foreign: Mapping[str, Any]) -> None:
    """Check the sizes that the class makes of others, unless a file overrides them.

    Raises:
        ValueError: for each that says something else.
    """
    nope, rope = foreign.get("qk_nope_head_dim", 128), foreign.get("qk_rope_head_dim", 64)
    follows = {
        "num_key_value_heads": ("num_attention_heads", foreign["num_attention_heads"]),
        "head_dim": ("qk_rope_head_dim", rope),
        "qk_head_dim": ("qk_nope_head_dim + qk_rope_head_dim", nope + rope),
    }
    given = {key: foreign.get(key) for key in follows}
    problems = [
        f"{key} = {given[key]}: follows from {of}; only {size} can be read"
        for key, (of, size) in follows.items()
        if given[key] not in (None, size)
    ]
    if problems:
        raise ValueError("\n".join(problems))


def _experts(foreign: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "router": "sigmoid",
        "num_experts": foreign.get("n_routed_experts", 256),
        "num_shared_experts": foreign.get("n_shared_experts", 1),
        "top_k": foreign.get("num_experts_per_tok", 8),
        "num_groups": foreign.get("n_group", 8),
        "top_groups": foreign.get("topk_group", 4),
        "expert_hidden_size": foreign["moe_intermediate_size"],
        "normalise_top_k": foreign.get("norm_topk_prob", True),
        "weight_scale": float(foreign.get("routed_scaling_factor", 2.5)),
    }


DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    reasons_against,
    mapping,
    to_foreign,
    to_ours,
    (*NEEDED, "moe_intermediate_size"),
    FIXED,
    aliases={"num_local_experts": "n_routed_experts"},
    not_null=("head_dim",),
    ignored=r"rotary_emb\.inv_freq$",
    further=r"^(?P<layer>model\.layers\.(?P<number>\d{1,9})\.)(eh_proj|enorm|hnorm)\.",
)
