"""Keys of [model] that nothing reads: each is refused, because a key that is ignored looks like one that works.

A kind names what it reads of the keys that stand in [model] (`Kind.reads`, `Kind.reads_of`); all others, such as
hidden_size, are read by the stack, whatever the pattern.

    a key                  refused where its value is not its default and
    any of a kind's        no kind of the pattern reads it
    a key of READ_WITH     the key that it hangs on has another value
    max_positions          positions are not learned
    rope_scaling           positions are not rotary
    yarn's mscale, ...     they are a ratio of two, and one of them is missing or attention_factor stands for it
    qk_norm, qk_norm_over  hybrid_norm normalises anyhow; nothing is normalised
    norm_eps               no norm divides by anything
    init_depth_scaled      DeepNorm has its own way to begin

Sizes that are filled in (num_kv_heads, head_dim, ffn_hidden_size) may also be what they are filled in with. Idle keys
of a preset are left out instead (model/presets.py): nobody wrote them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from meshwright.model.kinds.mixers.attention import normed
from meshwright.model.kinds.sizes import usual_width
from meshwright.model.kinds.table import ALL

if TYPE_CHECKING:
    from meshwright.model.config import ModelConfig

OF_KINDS = sorted(frozenset[str]().union(*(kind.reads for kind in ALL)))
"""All keys that kinds read; "bias.q" is the letter q of model.bias."""


class Idle(NamedTuple):
    """A key that is given and that nothing reads."""

    key: str
    """Within [model]: "num_heads", "bias.q", "moe.bias_rate"."""
    line: str
    """What the user reads."""


class Hangs(NamedTuple):
    """When a key is read that hangs on another one."""

    on: str
    values: tuple[str, ...]
    """With these values of the other one it is read."""
    off: float | None = None
    """A value that is no different from the key's not being there."""


_OF_YARN = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")
_OF_LLAMA3 = ("low_freq_factor", "high_freq_factor")
READ_WITH = {
    "rope_base": Hangs("position", ("rope",)),
    "rope_fraction": Hangs("position", ("rope",)),
    "t5_buckets": Hangs("position", ("t5",)),
    "t5_max_distance": Hangs("position", ("t5",)),
    "init_std": Hangs("init", ("normal",)),
    "rope_scaling.original_length": Hangs("rope_scaling.kind", ("yarn", "llama3")),
    **{f"rope_scaling.{key}": Hangs("rope_scaling.kind", ("yarn",)) for key in _OF_YARN},
    **{f"rope_scaling.{key}": Hangs("rope_scaling.kind", ("llama3",)) for key in _OF_LLAMA3},
    "moe.bias_rate": Hangs("moe.router", ("sigmoid", "expert_choice"), off=0.0),
    "moe.load_balancing_weight": Hangs("moe.load_balancing", ("sequence", "step"), off=0.0),
}
"""Keys that are read with some values of another one alone."""


def unread_problems(model: ModelConfig) -> list[str]:
    """Return a line for each key that is given and not read, by the pattern or because of another key."""
    return [*(idle.line for idle in idle_keys(model)), *_unnormalised(model)]


def idle_keys(model: ModelConfig) -> list[Idle]:
    """Return each key that is given and not read, by the pattern or because of another key."""
    if not model.layer_kinds:
        return []  # told by the pattern
    read = frozenset[str]().union(*(kind.reads_of(model) for kind in model.part_kinds))
    unread = [key for key in OF_KINDS if key not in read and _is_given(model, key)]
    return [*(Idle(key, _line(model, key)) for key in unread), *_hanging(model, read), *_needless(model, read)]


def keys_read(pattern: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a [model] table without those that nothing reads: no kind of the pattern, nor with the others.

    Keys within a table of their own stay as they are.
    """
    read = frozenset[str]().union(*(kind.reads for kind in ALL if kind.letter in pattern))
    read -= {key for key, hangs in READ_WITH.items() if hangs.on in keys and keys[hangs.on] not in hangs.values}
    if keys.get("position", "rope") != "rope":
        read -= {"rope_scaling"}
    found = {key: value for key, value in keys.items() if key in read or key not in OF_KINDS}
    if "bias" in found:
        found["bias"] = [letter for letter in found["bias"] if f"bias.{letter}" in read]
    return found


def read_by_stack(model: ModelConfig) -> frozenset[str]:
    """Return those keys of kinds that the stack reads, whatever its parts: of positions that the embedding gets."""
    return frozenset({"position"} if model.position in ("learned", "sinusoidal") else ())


def filled_in(model: ModelConfig, key: str) -> Any:
    """Return the value of a key that was left out."""
    if key == "num_kv_heads":
        return model.num_heads
    if key == "head_dim":
        heads = model.num_heads
        return model.hidden_size // heads if heads and model.hidden_size % heads == 0 else 0
    if key == "ffn_hidden_size":
        return usual_width(model.hidden_size)
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


def _hanging(model: ModelConfig, read: frozenset[str]) -> Iterator[Idle]:
    """Yield the keys that hang on another one, where that has a value with which they are not read."""
    tables = {kind.table for kind in ALL} - {kind.table for kind in model.part_kinds}
    for key, hangs in READ_WITH.items():
        whole = key.partition(".")[0]
        if whole in tables or (whole in OF_KINDS and whole not in read):
            continue  # told as a whole
        value, default = _at(model, key)
        of, _ = _at(model, hangs.on)
        if value in (default, hangs.off) or of in hangs.values:
            continue
        fits = " or ".join(map(json.dumps, hangs.values))
        yield Idle(
            key,
            f"model.{key} = {json.dumps(value)}: is for model.{hangs.on} = {fits}, and it is {json.dumps(of)};"
            f" {json.dumps(default)} would fit",
        )


def _needless(model: ModelConfig, read: frozenset[str]) -> Iterator[Idle]:
    """Yield the keys that other keys leave nothing to do, each with a reason of its own."""
    placement = f'model.norm_placement = "{model.norm_placement}"'
    if model.position != "learned" and model.max_positions:
        yield Idle(
            "max_positions",
            f"model.max_positions = {model.max_positions}: is for learned positions, and model.position ="
            f' "{model.position}"; 0 would fit',
        )
    if "rope_scaling" in read and model.rope_scaling is not None and model.position != "rope":
        yield Idle(
            "rope_scaling",
            f'model.position = "{model.position}": has nothing for [model.rope_scaling]; "rope" has, or leave it out',
        )
    if "rope_scaling" in read and model.position == "rope":
        yield from _scales_of_yarn(model)
    if "qk_norm" in read and model.qk_norm and model.norm_placement == "hybrid_norm":
        yield Idle("qk_norm", f"model.qk_norm = true: {placement} normalises q, k and v already; false would fit")
    if "qk_norm_over" in read and not normed(model) and _is_given(model, "qk_norm_over"):
        yield Idle(
            "qk_norm_over",
            f'model.qk_norm_over = "{model.qk_norm_over}": is for model.qk_norm = true, and it is false; "heads"'
            " would fit",
        )
    if "norm_eps" not in read and model.norm == "dynamic_tanh" and _is_given(model, "norm_eps"):
        yield Idle(
            "norm_eps",
            f'model.norm_eps = {model.norm_eps}: model.norm = "dynamic_tanh" divides by nothing, and no part of'
            f' model.pattern = "{model.pattern}" has a norm of its own; leave it out',
        )
    if model.norm_placement == "deepnorm" and not model.init_depth_scaled:
        yield Idle(
            "init_depth_scaled",
            f"model.init_depth_scaled = false: {placement} begins with a scale of its own, whatever stands here; leave"
            " it out",
        )


def _scales_of_yarn(model: ModelConfig) -> Iterator[Idle]:
    """Yield mscale and mscale_all_dim where their ratio is not taken; the latter scales latent attention by itself."""
    scaling = model.rope_scaling
    if scaling is None or scaling.kind != "yarn":
        return
    scales = {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
    if all(scales.values()) and not scaling.attention_factor:
        return
    for key, other in (("mscale", "mscale_all_dim"), ("mscale_all_dim", "mscale")):
        if not scales[key] or (key == "mscale_all_dim" and model.has("latent_attention")):
            continue
        if scaling.attention_factor:
            why = f"model.rope_scaling.attention_factor = {scaling.attention_factor} stands in its place"
        else:
            why = f"does nothing without model.rope_scaling.{other}, which is 0.0"
        yield Idle(f"rope_scaling.{key}", f"model.rope_scaling.{key} = {scales[key]}: {why}; 0.0 would fit")


def _at(model: ModelConfig, key: str) -> tuple[Any, Any]:
    """Return the value and the default of a key, "position" or "moe.router"; of a table that is not there, None."""
    whole, _, inner = key.partition(".")
    if not inner:
        return getattr(model, key), filled_in(model, key)
    table = getattr(model, whole)
    return (None, None) if table is None else (getattr(table, inner), type(table).model_fields[inner].default)


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
