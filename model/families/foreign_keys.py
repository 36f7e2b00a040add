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

from meshwright.model.config import MAX_LAYERS, MAX_SIZE, ModelConfig

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


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) <= 2**53)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


SIZE = whole(MAX_SIZE)
POSITIVE = Kind("a finite number above 0", lambda value: _is_number(value) and 0.0 < value < math.inf)
SHARE = Kind("a finite number, 0 or above", lambda value: _is_number(value) and 0.0 <= value < math.inf)
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

KINDS = {
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "num_hidden_layers": whole(MAX_LAYERS),
    "num_attention_heads": SIZE,
    "num_key_value_heads": may_be_null(SIZE),
    "head_dim": may_be_null(SIZE),
    "intermediate_size": SIZE,
    "moe_intermediate_size": SIZE,
    "num_experts": SIZE,
    "num_local_experts": SIZE,
    "num_experts_per_tok": SIZE,
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
}
ROPE_KINDS = {"rope_type": TEXT, "type": TEXT, "rope_theta": POSITIVE}

# What each key of ours is called there, for what several sizes together break.
THEIR_NAMES = {
    "model.num_layers": "num_hidden_layers",
    "model.hidden_size": "hidden_size",
    "model.num_heads": "num_attention_heads",
    "model.num_kv_heads": "num_key_value_heads",
    "model.head_dim": "head_dim",
    "model.moe.num_experts": "num_experts (or num_local_experts)",
    "model.moe.top_k": "num_experts_per_tok",
}


def key_problems(foreign: Mapping[str, Any], needed: Sequence[str]) -> list[str]:
    """Return a line for every key that is missing or holds what cannot be meant."""
    found = [f"{key}: is missing" for key in needed if key not in foreign]
    found += _wrong(foreign, KINDS, "")
    for table in ("rope_parameters", "rope_scaling"):
        if isinstance(foreign.get(table), dict):
            found += _wrong(foreign[table], ROPE_KINDS, f"{table}.")
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
