"""What a stack asks of [model], whatever its parts: a pattern that fits the layers, tables for its letters, and so on.

What each part asks stands with its description (`Kind.problems`), what nobody reads in `unread.py`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, get_args

from pydantic import BaseModel

from meshwright.model.kinds.kind import Choose, Kind
from meshwright.model.kinds.sizes import MAX_LAYERS, round_up
from meshwright.model.kinds.table import ALL, KINDS
from meshwright.model.pattern import layers_of, parse_pattern, parse_placed
from meshwright.parallel.fits import divisors, nearest

if TYPE_CHECKING:
    from meshwright.model.config import ModelConfig


def stack_problems(config: ModelConfig, choose: Choose) -> list[str]:
    """Return every reason why these parts make no stack; `choose` as in `ModelConfig.problems`."""
    return [
        *_pattern_problems(config, choose),
        *_position_problems(config),
        *_sharing_problems(config),
        *_table_problems(config),
        *_bias_problems(config),
    ]


def _pattern_problems(config: ModelConfig, choose: Choose) -> list[str]:
    try:
        period, placed = parse_pattern(config.pattern), parse_placed(config.pattern)
    except ValueError as error:
        return [f'model.pattern = "{config.pattern}": {error}; "*-" is a dense decoder, "*E" one of experts']
    found, last, placed_last = list[str](), config.num_layers - 1, max(placed, default=0)
    if placed_last > last:
        places = f"layers 0 to {last}" if last else "layer 0"
        enough = round_up(placed_last + 1, len(period))
        more = f", or model.num_layers = {enough}" if enough <= MAX_LAYERS and not config.distinct_layers else ""
        found.append(
            f'model.pattern = "{config.pattern}": layer {placed_last} is none of model.num_layers = '
            f"{config.num_layers}; {places} would fit{more}"
        )
    if config.num_layers % len(period):
        found.append(
            f"model.num_layers = {config.num_layers}: must be a multiple of the {len(period)} layers of"
            f' model.pattern = "{config.pattern}"; {_layers_that_fit(config, choose)}'
        )
    return found


def _layers_that_fit(config: ModelConfig, choose: Choose) -> str:
    """Return the numbers of layers next to the one given that the pattern, its places and shared weights take."""
    period, placed_last = len(parse_pattern(config.pattern)), max(parse_placed(config.pattern), default=0)
    near = [size for size in _multiples_near(max(config.num_layers, placed_last + 1), period) if size > placed_last]
    changes = {size: {"num_layers": size} for size in near if _shares_weights(config, size, config.distinct_layers)}
    also = ""
    if near and not changes:
        changes = {size: {"num_layers": size, "distinct_layers": 0} for size in near}
        also = ", with model.distinct_layers = 0"
    fits = choose("model.num_layers", {size: config.model_copy(update=keys) for size, keys in changes.items()})
    below, above = [size for size in fits if size < config.num_layers], [s for s in fits if s > config.num_layers]
    fits = [*below[-1:], *above[:1]]
    return f"one of {fits} would fit{also}" if fits else f"a pattern of at most {MAX_LAYERS} layers would fit"


def _shares_weights(config: ModelConfig, num_layers: int, distinct: int) -> bool:
    """Say whether layers that lie `distinct` apart are alike in a stack of so many."""
    if distinct in (0, num_layers):
        return True
    layers = layers_of(config.pattern, num_layers)
    return num_layers % distinct == 0 and layers == layers[:distinct] * (num_layers // distinct)


def _position_problems(config: ModelConfig) -> list[str]:
    """Return what is wrong with the rows that are added to the embedding."""
    found = []
    if config.position == "learned" and not config.max_positions:
        found.append('model.max_positions = 0: model.position = "learned" has a row for each; 1024 would fit')
    if config.position == "sinusoidal" and config.hidden_size % 2:
        fits = [size for size in (config.hidden_size - 1, config.hidden_size + 1) if size]
        found.append(
            f"model.hidden_size = {config.hidden_size}: must be even for sinusoidal positions; one of {fits} fits"
        )
    return found


def _sharing_problems(config: ModelConfig) -> list[str]:
    """Return why layers cannot share weights as it is asked."""
    try:
        if _shares_weights(config, config.num_layers, config.distinct_layers):
            return []
    except ValueError:
        return []  # told by the pattern
    fits = [size for size in divisors(config.num_layers) if _shares_weights(config, config.num_layers, size)]
    return [
        f"model.distinct_layers = {config.distinct_layers}: must divide model.num_layers = {config.num_layers}, and"
        f' model.pattern = "{config.pattern}" repeat with it; one of {nearest(fits, config.distinct_layers)} would fit'
    ]


def _bias_problems(config: ModelConfig) -> list[str]:
    once = list(dict.fromkeys(config.bias))
    rule = f"has a place twice; {json.dumps(once)} would fit"
    return [] if len(once) == len(config.bias) else [f"model.bias = {json.dumps(config.bias)}: {rule}"]


def _table_problems(config: ModelConfig) -> list[str]:
    """Return each table that the pattern lacks, and each that it does not use."""
    found = []
    if config.depth is not None and "[" not in config.pattern:
        found.append(
            f'model.pattern = "{config.pattern}": has no layer in [ ], so nothing uses the table [model.depth];'
            ' "*-[*-]" would use it, or leave the table out'
        )
    for kind in ALL:
        if not kind.table:
            continue
        is_there, is_used = getattr(config, kind.table) is not None, kind.letter in config.pattern
        if is_used and not is_there:
            required = required_keys(type(config), kind)
            found.append(
                f'model.pattern = "{config.pattern}": has an {kind.letter}, so a table [model.{kind.table}] with'
                f" {', '.join(required[:-1])} and {required[-1]} must be there; or write {_instead(kind)}"
                f" for {kind.letter}"
            )
        if is_there and not is_used:
            found.append(
                f'model.pattern = "{config.pattern}": has no {kind.letter}, so nothing uses the table'
                f' [model.{kind.table}]; "{kind.example}" would use it, or leave the table out'
            )
    return found


def required_keys(config: type[BaseModel], kind: Kind) -> list[str]:
    """Return the keys of a kind's table that have no default."""
    of = config.model_fields[kind.table].annotation
    classes = [each for each in get_args(of) if isinstance(each, type) and issubclass(each, BaseModel)]
    return [name for name, field in classes[0].model_fields.items() if field.is_required()]


def _instead(kind: Kind) -> str:
    """Return the letter that needs no table, with its meaning."""
    other = KINDS["mlp" if kind.place == "feedforward" else "attention"]
    return f'"{other.letter}" ({other.words})'


def _multiples_near(value: int, step: int) -> list[int]:
    """Return the few multiples below `value`, and some more above it: a pipeline may ask for many layers."""
    below = value // step
    return [times * step for times in range(max(1, below - 3), below + 65) if times * step <= MAX_LAYERS]
