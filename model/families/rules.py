"""What a class can represent: for each key of [model] the values that its program computes.

    RULES = {**BASE, "num_heads": ANY, "norm": only("rmsnorm"), "qk_norm": only(True)}

A key that changes what is computed and that a family does not speak of must have its usual value: a new key of ours is
so refused by every class until its family knows it. Keys that only training knows (losses of the router, dropouts,
first values, lengths of chunks) are free. Knows no family and needs no torch.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from meshwright.model.config import ModelConfig
from meshwright.model.kinds.table import KINDS
from meshwright.model.kinds.unread import OF_KINDS, READ_WITH, read_by_stack

MOST_NAMED = 3
SPOKEN_WITH_VOWEL = (*"aeiou", "MLP", "MoE", "S4D")


class Rule(NamedTuple):
    """What may stand at a key."""

    values: tuple[Any, ...] = ()
    """None at all stands for any value."""
    why: str = ""
    """What the class computes instead."""
    way_out: str = ""


Rules = Mapping[str, Rule]

ANY = Rule()


def only(*values: Any, why: str = "", way_out: str = "") -> Rule:
    """Return the rule of a key that must hold one of these values."""
    return Rule(values, why, way_out)


# Rotary positions of whole heads, scaled as the foreign library can say it.
ROPE: Rules = {
    "rope_base": ANY,
    "rope_scaling": ANY,
    "rope_scaling.kind": only(
        "linear", "yarn", "llama3", why="transformers has no name for it", way_out="linear, yarn and llama3 have one"
    ),
}

# Not part of what is computed on a text, or told by the rules for layers.
FREE = frozenset(
    {
        "preset", "pattern", "multi_token",
        "init", "init_std", "init_depth_scaled", "num_heads", "num_kv_heads", "head_dim",
        "ffn_hidden_size", "num_layers", "hidden_size", "vocab_size", "norm_eps", "tie_embeddings",
        "embedding_dropout", "residual_dropout", "ffn_dropout", "attention_dropout", "max_positions",
        "moe.num_experts", "moe.top_k", "moe.expert_hidden_size", "moe.load_balancing", "moe.load_balancing_weight",
        "moe.z_loss_weight", "moe.bias_rate", "moe.capacity_factor", "moe.router_jitter", "moe.expert_dropout",
    }
)  # fmt: skip
TABLES = ({kind.table for kind in KINDS.values()} | {"depth"}) - {""}
FREE_ENDS = (".chunk_size", ".time_step_low", ".time_step_high", ".time_step_min", ".time_step_max")


class Parts(NamedTuple):
    """The kinds of parts that a class has a place for; None stands for a part that is missing."""

    mixers: tuple[str | None, ...]
    feedforwards: tuple[str | None, ...]
    example: str
    """A pattern, or some, for the way out."""


def reasons(config: ModelConfig, parts: Parts, rules: Rules) -> list[str]:
    """Return a line for every part that the class has no place for, and every key whose value it does not compute."""
    return [*_layer_reasons(config, parts), *_key_reasons(config, parts, rules)]


def _layer_reasons(config: ModelConfig, parts: Parts) -> Iterator[str]:
    layers, begin = config.layers, f"model.pattern = {config.pattern!r}:"
    for place, words, allowed in (
        ("mixer", "mixer", parts.mixers),
        ("feedforward", "feed-forward", parts.feedforwards),
    ):
        for name in sorted({getattr(kinds, place) for kinds in layers} - set(allowed), key=str):
            where = layer_list(n for n, kinds in enumerate(layers) if getattr(kinds, place) == name)
            what = f"no {words}" if name is None else _with_article(KINDS[name].words)
            yield f"{begin} {where} {what}; {parts.example} can be exported"
    if config.depth is not None:
        yield f"{begin} no class has layers that only some tokens go through; those without [ ] can be exported"


def _key_reasons(config: ModelConfig, parts: Parts, rules: Rules) -> Iterator[str]:
    known = {KINDS[name].table for name in (*parts.mixers, *parts.feedforwards) if name is not None}
    read = frozenset[str]().union(*(kind.reads for kind in config.part_kinds)) | read_by_stack(config)
    told = set[str]()
    for key, value, usual in _keys(config):
        if key in OF_KINDS and key not in read:
            continue  # of no part: whatever the class has there, no layer does
        if key in READ_WITH and READ_WITH[key].on in told:
            continue  # goes away with the key that it hangs on
        table = key.partition(".")[0] if "." in key else ""
        if key in FREE or key.endswith(FREE_ENDS) or (table in TABLES and table not in known):
            continue
        rule = rules.get(key) or rules.get(table) or Rule((usual,), "the class has nothing of the kind")
        if rule.values and value not in rule.values:
            fits = " or ".join(_toml(fitting) for fitting in rule.values)
            told.add(key)
            why = rule.why or f"the class computes {fits}"
            yield f"model.{key} = {_toml(value)}: {why}; {rule.way_out or f'{fits} can be exported'}"


def no_bias(config: ModelConfig, parts: Iterable[str], what: str) -> list[str]:
    """Return why these products may have no bias."""
    present = [part for part in parts if part in config.bias]
    return [f"model.bias has {present}: {what} no biases; leave them out"] if present else []


def all_or_none(config: ModelConfig, parts: tuple[str, ...]) -> list[str]:
    """Return why only some of the products that the class has one switch for have a bias."""
    present = [part for part in parts if part in config.bias]
    if len(present) in (0, len(parts)):
        return []
    return [f"model.bias has {present} of attention: the class knows all of {list(parts)} or none"]


def head_reasons(config: ModelConfig, name: str) -> list[str]:
    """Return why the heads are not as wide as the stream together, where the class knows no other width."""
    n, d, h = config.num_heads, config.head_dim, config.hidden_size
    if n * d in (0, h):  # 0: no part is attention
        return []
    fits = f"{h // n} can be exported" if h % n == 0 else f"a model.num_heads that divides {h} can be exported"
    return [
        f"model.head_dim = {d}: {name}'s model.num_heads = {n} heads are as wide as model.hidden_size = {h} together;"
        f" {fits}"
    ]


def layer_list(numbers: Iterable[int]) -> str:
    """Return `layer 3 has`, or `layers 0, 2, 4 and 12 more have`, to begin a sentence."""
    listed = list(numbers)
    if len(listed) == 1:
        return f"layer {listed[0]} has"
    shown = ", ".join(str(number) for number in listed[:MOST_NAMED])
    more = f" and {len(listed) - MOST_NAMED} more" if len(listed) > MOST_NAMED else ""
    return f"layers {shown}{more} have"


def _keys(config: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    """Yield each key with its value and the value that it has where it is left out."""
    for name in ModelConfig.model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel) and name not in FREE:
            for inner, field in type(value).model_fields.items():
                yield f"{name}.{inner}", getattr(value, inner), _usual(field.get_default(call_default_factory=True))
        elif not isinstance(value, BaseModel) and name not in TABLES and name != "bias":
            yield name, value, _usual(ModelConfig.model_fields[name].get_default(call_default_factory=True))


def _usual(default: Any) -> Any:
    return None if default is PydanticUndefined else default


def _toml(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | str) else str(value)


def _with_article(words: str) -> str:
    has_one = words.split()[0] in ("a", "an", "the") or words.endswith(("attention", "experts"))
    return words if has_one else f"{'an' if words.startswith(SPOKEN_WITH_VOWEL) else 'a'} {words}"
