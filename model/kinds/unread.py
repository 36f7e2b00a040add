"""Keys of [model] that nothing reads: each is refused, because a key that is ignored looks like one that works.

A kind names what it reads of the keys that stand in [model] (`Kind.reads`, `Kind.reads_of`); all others, such as
hidden_size, are read by the stack, whatever the pattern.

    a key                 refused where its value is not its default and
    any of a kind's       no kind of the pattern reads it
    rope_base, _fraction  model.position is not "rope"
    t5_*                  model.position is not "t5"
    qk_norm_over          nothing is normalised

Sizes that are filled in (num_kv_heads, head_dim) may also be what they are filled in with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from meshwright.model.kinds.mixers.attention import normed
from meshwright.model.kinds.table import ALL

if TYPE_CHECKING:
    from meshwright.model.config import ModelConfig

OF_KINDS = sorted(frozenset[str]().union(*(kind.reads for kind in ALL)))
"""All keys that kinds read; "bias.q" is the letter q of model.bias."""
_OF_POSITION = {"rope_base": "rope", "rope_fraction": "rope", "t5_buckets": "t5", "t5_max_distance": "t5"}


def unread_problems(model: ModelConfig) -> list[str]:
    """Return a line for each key that is given and not read, by the pattern or because of another key."""
    if not model.layer_kinds:
        return []  # told by the pattern
    read = frozenset[str]().union(*(kind.reads_of(model) for kind in model.part_kinds))
    unread = [key for key in OF_KINDS if key not in read and _is_given(model, key)]
    return [*(_line(model, key) for key in unread), *_idle(model, read), *_unnormalised(model)]


def keys_read(pattern: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a [model] table without those that no kind of the pattern reads, nor its positions."""
    read = frozenset[str]().union(*(kind.reads for kind in ALL if kind.letter in pattern))
    if keys.get("position", "rope") != "rope":
        read -= {"rope_base", "rope_fraction", "rope_scaling"}
    found = {key: value for key, value in keys.items() if key in read or key not in OF_KINDS}
    if "bias" in found:
        found["bias"] = [letter for letter in found["bias"] if f"bias.{letter}" in read]
    return found


def filled_in(model: ModelConfig, key: str) -> Any:
    """Return the value of a key that was left out."""
    if key == "num_kv_heads":
        return model.num_heads
    if key == "head_dim":
        heads = model.num_heads
        return model.hidden_size // heads if heads and model.hidden_size % heads == 0 else 0
    return type(model).model_fields[key].default


def _is_given(model: ModelConfig, key: str) -> bool:
    whole, _, letter = key.partition(".")
    if letter:
        return letter in getattr(model, whole)
    is_added = key == "position" and model.position not in ("alibi", "t5")  # these the stack reads, or nothing does
    return not is_added and getattr(model, key) != filled_in(model, key)


def _line(model: ModelConfig, key: str) -> str:
    reader = next(kind for kind in ALL if key in kind.reads)
    why = f'nothing in model.pattern = "{model.pattern}" reads it; {reader.words} ({reader.letter}) does'
    if "." in key:
        return f'model.bias has "{key.partition(".")[2]}": {why}; leave it out'
    if key == "rope_scaling":
        return f"model.rope_scaling: {why}; leave it out"
    left_out = json.dumps(type(model).model_fields[key].default)  # of a size, 0: it follows from the others
    return f"model.{key} = {json.dumps(getattr(model, key))}: {why}; {left_out} would fit"


def _idle(model: ModelConfig, read: frozenset[str]) -> Iterator[str]:
    """Yield the keys that a kind reads, but not with the model's other keys."""
    for key, position in _OF_POSITION.items():
        if key in read and model.position != position and _is_given(model, key):
            yield (
                f"model.{key} = {json.dumps(getattr(model, key))}: is for model.position = "
                f'"{position}", and it is "{model.position}"; {json.dumps(filled_in(model, key))} would fit'
            )
    if "qk_norm_over" in read and not normed(model) and _is_given(model, "qk_norm_over"):
        yield (
            f'model.qk_norm_over = "{model.qk_norm_over}": is for model.qk_norm = true, and it is false; "heads"'
            " would fit"
        )


def _unnormalised(model: ModelConfig) -> Iterator[str]:
    """Yield the mixers that take the residual stream as it is, where they should normalise q, k and v instead."""
    if model.norm_placement != "hybrid_norm":
        return
    for kind in model.part_kinds:
        if kind.place == "mixer" and "qk_norm" not in kind.reads:
            yield (
                f'model.norm_placement = "hybrid_norm": normalises q, k and v in place of what a mixer takes, and'
                f' {kind.words} ({kind.letter}) of model.pattern = "{model.pattern}" does not normalise them; "pre" or'
                ' "pre_post" would fit'
            )
