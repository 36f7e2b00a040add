"""What the keys of a foreign config.json must hold, looked at before any of them is used.

    "hidden_size": "32"          hidden_size = '32': must be a whole number of 1 to 16777216
    "rope_parameters": [1]       rope_parameters = [1]: must be an object
    (no num_attention_heads)     num_attention_heads: is missing

A file from another hand may hold anything under any key. Here every key that one of the families reads has its kind,
so that the functions that translate them take right types for granted, and all that is wrong is told at once.
Keys that nobody reads are not looked at. Knows no file and needs no torch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from meshwright.model.config import ModelConfig
from meshwright.model.kinds.sizes import MAX_LAYERS, MAX_SIZE

MOST_SHOWN = 80
MOST_IN_LINE = 300


class Kind(NamedTuple):
    """What may stand at a key."""

    rule: str
    fits: Callable[[Any], bool]


def whole(most: int, least: int = 1) -> Kind:
    """Return the kind of a whole number between bounds; true is none."""
    return Kind(f"a whole number of {least} to {most}", lambda value: type(value) is int and least <= value <= most)


def may_be_null(kind: Kind) -> Kind:
    """Return the same kind, or null."""
    return Kind(f"{kind.rule}, or null", lambda value: value is None or kind.fits(value))


def not_null(kind: Kind) -> Kind:
    """Return the same kind without null."""
    return Kind(kind.rule.removesuffix(", or null"), lambda value: value is not None and kind.fits(value))


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) <= 2**53)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


SIZE = whole(MAX_SIZE)
POSITIVE = Kind("a finite number above 0", lambda value: _is_number(value) and 0.0 < value < math.inf)
SHARE = Kind("a finite number, 0 or above", lambda value: _is_number(value) and 0.0 <= value < math.inf)
DROPPED = Kind("a number from 0 to below 1", lambda value: _is_number(value) and 0.0 <= value < 1.0)
FRACTION = Kind("a number above 0, 1 at most", lambda value: _is_number(value) and 0.0 < value <= 1.0)
COUNT = whole(MAX_SIZE, least=0)
SIZE_OR_AUTO = Kind(f'{SIZE.rule}, or "auto"', lambda value: value == "auto" or SIZE.fits(value))
BOOLEAN = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("text", lambda value: isinstance(value, str))
OBJECT_OR_NULL = may_be_null(Kind("an object", _is_object))
ANY_SIZE_OR_NULL = may_be_null(whole(2**53, least=0))
LAYER_NUMBERS_OR_NULL = may_be_null(
    Kind(
        f"a list of whole numbers of 0 to {MAX_LAYERS - 1}",
        lambda value: isinstance(value, list) and all(type(it) is int and 0 <= it < MAX_LAYERS for it in value),
    )
)
NAMES_OR_NULL = may_be_null(
    Kind("a list of texts", lambda value: isinstance(value, list) and all(isinstance(it, str) for it in value))
)

KINDS = {
    "vocab_size": SIZE,
    "max_position_embeddings": SIZE,
    "original_max_position_embeddings": SIZE,
    "hidden_size": SIZE,
    "num_hidden_layers": whole(MAX_LAYERS),
    "num_attention_heads": SIZE,
    "num_key_value_heads": may_be_null(SIZE),
    "head_dim": may_be_null(SIZE),
    "intermediate_size": SIZE,
    "moe_intermediate_size": SIZE,
    "num_experts": SIZE,
    "num_local_experts": COUNT,
    "num_experts_per_tok": COUNT,
    "router_aux_loss_coef": may_be_null(SHARE),
    "decoder_sparse_step": whole(MAX_LAYERS),
    "mlp_only_layers": LAYER_NUMBERS_OR_NULL,
    "rms_norm_eps": POSITIVE,
    "initializer_range": POSITIVE,
    "rope_theta": POSITIVE,
    "attention_dropout": SHARE,
    "hidden_act": TEXT,
    "rope_parameters": OBJECT_OR_NULL,
    "rope_scaling": OBJECT_OR_NULL,
    "sliding_window": ANY_SIZE_OR_NULL,
    "use_sliding_window": BOOLEAN,
    "tie_word_embeddings": BOOLEAN,
    "attention_bias": BOOLEAN,
    "mlp_bias": BOOLEAN,
    "norm_topk_prob": BOOLEAN,
    "shared_intermediate_size": SIZE,
    "shared_expert_intermediate_size": SIZE,
    "n_routed_experts": SIZE,
    "n_shared_experts": COUNT,
    "n_group": SIZE,
    "topk_group": SIZE,
    "routed_scaling_factor": POSITIVE,
    "first_k_dense_replace": whole(MAX_LAYERS, least=0),
    "q_lora_rank": may_be_null(SIZE),
    "kv_lora_rank": SIZE,
    "qk_nope_head_dim": SIZE,
    "qk_rope_head_dim": SIZE,
    "qk_head_dim": may_be_null(SIZE),
    "v_head_dim": SIZE,
    "embedding_multiplier": POSITIVE,
    "attention_multiplier": POSITIVE,
    "residual_multiplier": POSITIVE,
    "logits_scaling": POSITIVE,
    "position_embedding_type": may_be_null(TEXT),
    "layer_types": NAMES_OR_NULL,
    "full_attention_interval": whole(MAX_LAYERS),
    "partial_rotary_factor": FRACTION,
    "mamba_n_heads": SIZE,
    "mamba_n_groups": SIZE,
    "mamba_d_state": SIZE,
    "mamba_d_head": SIZE_OR_AUTO,
    "mamba_d_conv": SIZE,
    "mamba_expand": SIZE,
    "mamba_conv_bias": BOOLEAN,
    "mamba_proj_bias": BOOLEAN,
    "expand": SIZE,
    "num_heads": SIZE,
    "n_groups": SIZE,
    "state_size": SIZE,
    "conv_kernel": SIZE,
    "use_bias": BOOLEAN,
    "use_conv_bias": BOOLEAN,
    "time_step_rank": SIZE_OR_AUTO,
    "layer_norm_epsilon": POSITIVE,
    "n_embd": SIZE,
    "n_head": SIZE,
    "n_layer": whole(MAX_LAYERS),
    "n_positions": SIZE,
    "n_inner": may_be_null(SIZE),
    "embd_pdrop": DROPPED,
    "resid_pdrop": DROPPED,
    "attn_pdrop": DROPPED,
    "hidden_dropout": DROPPED,
    "linear_conv_kernel_dim": SIZE,
    "linear_key_head_dim": SIZE,
    "linear_value_head_dim": SIZE,
    "linear_num_key_heads": SIZE,
    "linear_num_value_heads": SIZE,
}
# What asks every class for something that is not computed here, unless it holds one of these.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "compression_config": (None,),
    "per_layer_config": (None, {}),
    "transformers_weights": (None, "model.safetensors", "model.safetensors.index.json"),
}
_DEQUANTISED = "its weights are packed; a copy that was written dequantised, in bf16, fp16 or fp32, can be read"
_WINDOW = "tokens would see only so many before them; a checkpoint whose layers attend to all tokens can be read"
WAYS_OUT = {
    "quantization_config": _DEQUANTISED,
    "compression_config": _DEQUANTISED,
    "per_layer_config": "layers would differ in their sizes; a checkpoint of equal layers can be read",
    "transformers_weights": "its class would load that file; a copy that save_pretrained wrote can be read",
    "sliding_window": _WINDOW,
    "use_sliding_window": _WINDOW,
    "clip_qkv": "queries, keys and values would be clipped; a checkpoint that was trained without can be read",
    "attention_dropout": "it changes training alone; write 0.0 here, and model.attention_dropout into the run file",
}
ROPE_KINDS = {
    "rope_type": TEXT,
    "type": TEXT,
    "rope_theta": POSITIVE,
    "factor": POSITIVE,
    "original_max_position_embeddings": SIZE,
    "beta_fast": POSITIVE,
    "beta_slow": POSITIVE,
    "mscale": SHARE,
    "mscale_all_dim": SHARE,
    "attention_factor": may_be_null(POSITIVE),
    "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE,
    "partial_rotary_factor": FRACTION,
    "truncate": BOOLEAN,
}

# What each key of ours is called there, for what several sizes together break.
THEIR_NAMES = {
    "model.num_layers": "num_hidden_layers",
    "model.hidden_size": "hidden_size",
    "model.num_heads": "num_attention_heads",
    "model.num_kv_heads": "num_key_value_heads",
    "model.head_dim": "head_dim",
    "model.moe.num_experts": "num_experts (or num_local_experts)",
    "model.moe.top_k": "num_experts_per_tok",
    "model.moe.num_groups": "n_group",
    "model.moe.top_groups": "topk_group",
    "model.latent.qk_rope_head_dim": "qk_rope_head_dim",
    "model.mamba2.num_heads": "num_heads (or mamba_n_heads)",
    "model.mamba2.num_groups": "n_groups (or mamba_n_groups)",
    "model.gated_delta.num_heads": "linear_num_value_heads",
    "model.gated_delta.num_key_heads": "linear_num_key_heads",
}


def key_problems(foreign: Mapping[str, Any], needed: Sequence[str], never_null: Sequence[str] = ()) -> list[str]:
    """Return a line for every key that is missing or holds what cannot be meant; `never_null` is the class's own."""
    found = [f"{key}: is missing" for key in needed if key not in foreign]
    found += _wrong(foreign, KINDS | {key: not_null(KINDS[key]) for key in never_null}, "")
    for table in ("rope_parameters", "rope_scaling"):
        if isinstance(foreign.get(table), dict):
            found += _wrong(foreign[table], ROPE_KINDS, f"{table}.")
            found += [
                f"{table}.{key} = {shown(value)}: is of one kind of layer; only one set for all layers can be read"
                for key, value in foreign[table].items()
                if isinstance(value, dict)
            ]
    return found


def fixed_problems(foreign: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """Return a line for every key that asks for what is not computed here, of this class (`fixed`) or of any."""
    return [
        f"{key} = {shown(foreign[key])}: only {' or '.join(map(repr, values))} can be read"
        + (f"; {WAYS_OUT[key]}" if key in WAYS_OUT else "")
        for key, values in {**REFUSED, **fixed}.items()
        if key in foreign and foreign[key] not in values
    ]


def renamed(foreign: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Return the keys by the names that are read here; `aliases` are those by which the class knows them too.

    Raises:
        ValueError: if a file has a key under both names, with two values.
    """
    found, problems = dict(foreign), []
    for alias, name in aliases.items():
        if alias not in found:
            continue
        value = found.pop(alias)
        if found.setdefault(name, value) != value:
            problems.append(
                f"{alias} = {shown(value)}: is another name of {name} = {shown(found[name])}; leave one of them out"
            )
    if problems:
        raise ValueError("\n".join(problems))
    return found


def size_problems(config: ModelConfig) -> list[str]:
    """Return every reason why the sizes make no model, under the foreign names."""
    found = []
    for line in config.problems():
        for ours in sorted(THEIR_NAMES, key=len, reverse=True):
            line = line.replace(f"{ours} ", f"{THEIR_NAMES[ours]} ")
        found.append(line if len(line) <= MOST_IN_LINE else line[: MOST_IN_LINE - 3] + "...")  # patterns may be long
    return found


def shown(value: object) -> str:
    """Return a value in Python's spelling, cut short where it is long."""
    text = repr(value) if not isinstance(value, int) or value.bit_length() < 4096 else "a number of many digits"
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."


def _wrong(table: Mapping[str, Any], kinds: Mapping[str, Kind], prefix: str) -> list[str]:
    return [
        f"{prefix}{key} = {shown(table[key])}: must be {kind.rule}"
        for key, kind in kinds.items()
        if key in table and not kind.fits(table[key])
    ]
