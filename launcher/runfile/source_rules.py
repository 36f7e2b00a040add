"""What may differ between the model at `init.from` and the one that begins from its weights.

    nothing is made of them     what the model computes may change with the same weights: each key is told in one line
    pool_kv_heads               the same, but for the heads: pooled are those that were trained
    upcycle                     nothing but what makes the experts: without noise the first loss is the dense model's

Two models can have weights of the same shapes and compute different things: 4 heads of 8 features and 8 heads of 4,
another activation, other positions. This file compares keys; it reads no weights.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from meshwright.launcher.runfile.messages import problem, shown
from meshwright.launcher.runfile.resume_rules import Change, is_derived
from meshwright.launcher.runfile.tables import InitConfig
from meshwright.model.config import ModelConfig
from meshwright.model.kinds.table import ALL
from meshwright.model.kinds.unread import OF_KINDS, read_by_stack
from meshwright.model.pattern import LayerKinds
from meshwright.parallel.fits import divisors

DROPOUTS = ("embedding_dropout", "residual_dropout", "ffn_dropout", "attention_dropout")
# They change how weights begin, how training goes or how sums round, and not what given weights compute.
OF_TRAINING = frozenset(
    [
        *("preset", "init", "init_std", "init_depth_scaled", "multi_token.loss_weight", "depth.predictor_weight"),
        *(*DROPOUTS, "moe.expert_dropout"),
        *("moe.bias_rate", "moe.load_balancing", "moe.load_balancing_weight", "moe.z_loss_weight"),
        *("moe.router_jitter", "mamba2.time_step_low", "mamba2.time_step_high", "s4d.start"),
        *("mamba2.chunk_size", "mamba1.chunk_size", "gated_delta.chunk_size", "s4d.chunk_size"),
    ]
)
# Where one of the two has 0, it follows from sizes that are compared.
FOLLOWS_IF_0 = frozenset(
    [
        *("vocab_size", "attention_scale", "mamba2.num_heads", "mamba1.inner_size", "mamba1.dt_rank"),
        *("gated_delta.num_heads", "gated_delta.num_key_heads"),
    ]
)
# Of these the shapes are made, so that weights of other shapes say that one of them differs.
OF_SHAPES = frozenset(
    [
        *("pattern", "num_layers", "distinct_layers", "hidden_size", "ffn_hidden_size", "ffn_activation"),
        *("vocab_size", "tie_embeddings", "qk_norm", "qk_norm_over", "bias", "attention_gate", "norm"),
        *("norm_placement", "embedding_norm", "final_norm", "position", "max_positions"),
    ]
)
HEADS = frozenset(("num_heads", "head_dim"))


def differing_keys(there: ModelConfig, here: ModelConfig) -> list[Change]:
    """Return each key by which the same weights compute something else here than there; `before` is there."""
    return [change for change in _differing(there, here) if not _is_pattern_alike(change, there, here)]


def not_dense(there: ModelConfig, init: InitConfig) -> str | None:
    """Return why no experts can be made of the model there, whatever the model here; what else is wrong follows."""
    if init.upcycle == "none" or (there.moe is None and there.has("mlp")):
        return None
    has = "experts" if there.moe is not None else "no feed-forwards"
    rule = f"makes experts of dense layers, and the model at init.from has {has} ({_said('pattern', there)})"
    return problem("init.upcycle", init.upcycle, rule, '"none" would fit')


def source_problems(there: ModelConfig, here: ModelConfig, init: InitConfig, *, same_shapes: bool) -> list[str]:
    """Return a line for each key of the model here with which its weights cannot be made of those there.

    `same_shapes`: whether all weights there have the shapes that are needed; where not, keys of sizes are told too.
    """
    if line := not_dense(there, init):
        return [line]
    found = []
    for change in _differing(there, here):
        if init.upcycle != "none":
            line = _upcycled_line(change, there, here, init)
        elif change.key in HEADS or (change.key in OF_SHAPES and not same_shapes):
            line = None if _is_pattern_alike(change, there, here) else _line(change)
        else:
            line = None
        found += [line] if line else []
    return [*found, *_pooled_problems(there, here, init)]


def made_of(there: ModelConfig, here: ModelConfig) -> bool:
    """Say whether the layers are those there, with experts in place of any dense feed-forwards."""
    return all(_is_made_of(one, other) for one, other in zip(there.layers, here.layers, strict=False))


def training_line(here: ModelConfig) -> list[str]:
    """Return the line for what acts in training alone, and so parts the first loss there from the dense model's."""
    moe = here.moe
    keys = {f"model.{key}": getattr(here, key) for key in DROPOUTS}
    if moe is not None:
        keys["model.moe.expert_dropout"] = moe.expert_dropout
        # With so much room an expert could take every token.
        can_drop = moe.capacity_factor * moe.top_k < moe.num_experts
        keys["model.moe.capacity_factor"] = moe.capacity_factor if can_drop else 0.0
    told = [f"{key} = {shown(value)}" for key, value in keys.items() if value]
    line = "an evaluation computes without, and in training the first loss may be another than the dense model's"
    return [f"{', '.join(told)}: {line}"] if told else []


def _upcycled_line(change: Change, there: ModelConfig, here: ModelConfig, init: InitConfig) -> str | None:
    if change.key == "num_kv_heads" and init.pool_kv_heads:
        return None
    if change.key == "ffn_hidden_size" and here.moe is not None:
        return _line(change) + _width_with_it(change.before, here.moe.expert_hidden_size, init)
    if change.key != "pattern":
        return _line(change)
    if made_of(there, here):
        return None
    fits = there.pattern.replace("-", "E")
    rule = f"must be that at init.from, {shown(there.pattern)}, with an E for each - that experts are made of"
    if any(other.is_routed and not one.is_routed for one, other in zip(there.layers, here.layers, strict=False)):
        rule += ", and its layers are not in [ ], whose routers would have to be trained there"
    return problem("model.pattern", here.pattern, rule, f"{shown(fits)} would fit")


def _width_with_it(dense: int, width: int, init: InitConfig) -> str:
    """Return what else must change with the width of the feed-forwards that experts are made of."""
    if init.upcycle == "copy":
        return "" if width == dense else f", and with it model.moe.expert_hidden_size = {dense}"
    return "" if dense % width == 0 else ", and with it a model.moe.expert_hidden_size that divides it"


def _line(change: Change) -> str:
    key, rule = f"model.{change.key}", "must be as at init.from, or its weights compute something else"
    if isinstance(change.after, Mapping) or change.after is None:
        value = "is left out" if change.after is None else "is there"
        fits = "leaving it out" if change.before is None else shown(change.before)
        return f"[{key}]: {value}, and {rule}; {fits} would fit"
    return problem(key, change.after, rule, f"{shown(change.before)} would fit")


def _pooled_problems(there: ModelConfig, here: ModelConfig, init: InitConfig) -> Iterator[str]:
    """Yield why heads of keys cannot be the means of groups of those there."""
    if not init.pool_kv_heads or not here.num_kv_heads or there.num_kv_heads % here.num_kv_heads == 0:
        return
    fits = [size for size in divisors(there.num_kv_heads) if here.num_heads % size == 0]
    rule = f"must divide the {there.num_kv_heads} key heads at init.from, of which init.pool_kv_heads makes means"
    yield problem("model.num_kv_heads", here.num_kv_heads, rule, f"one of {fits} would fit")


def _differing(there: ModelConfig, here: ModelConfig) -> Iterator[Change]:
    for key in type(here).model_fields:
        before, after = _value(there, key), _value(here, key)
        if before == after or key in OF_TRAINING or _is_idle(key, there, here):
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            for inner in before:
                change = Change(f"{key}.{inner}", before[inner], after[inner])
                if change.before != change.after and not _makes_no_difference(change, there, here):
                    yield change
        elif not _makes_no_difference(Change(key, before, after), there, here):
            yield Change(key, before, after)


def _value(model: ModelConfig, key: str) -> Any:
    value = getattr(model, key)
    return value.model_dump() if hasattr(value, "model_dump") else value


def _is_idle(key: str, there: ModelConfig, here: ModelConfig) -> bool:
    """Say whether neither model reads a key, or a table's kind is told by the pattern."""
    if key == "depth" or key in {kind.table for kind in ALL}:
        return getattr(there, key) is None or getattr(here, key) is None
    if key == "ffn_hidden_size":  # filled in where it is not read, too
        return not there.has("mlp") and not here.has("mlp")
    kinds = [(kind, model) for model in (there, here) for kind in model.part_kinds]
    is_read = any(key in kind.reads_of(model) for kind, model in kinds)
    return key in OF_KINDS and not (is_read or any(key in read_by_stack(model) for model in (there, here)))


def _makes_no_difference(change: Change, there: ModelConfig, here: ModelConfig) -> bool:
    if change.key in OF_TRAINING or (change.key in FOLLOWS_IF_0 and _follows(change, here)):
        return True
    if change.key == "distinct_layers":
        return there.num_layers != here.num_layers or there.held_layers == here.held_layers
    return is_derived(f"model.{change.key}", there) and is_derived(f"model.{change.key}", here)


def _follows(change: Change, here: ModelConfig) -> bool:
    """Say whether a key of 0 stands for the other one's value."""
    given = change.before or change.after
    if 0 not in (change.before, change.after):
        return False
    return change.key != "attention_scale" or abs(given * here.head_dim**0.5 - 1) < 1e-6


def _is_pattern_alike(change: Change, there: ModelConfig, here: ModelConfig) -> bool:
    """Say whether a change is of a pattern that is written in another way and has the same layers."""
    return change.key == "pattern" and all(one == other for one, other in zip(there.layers, here.layers, strict=False))


def _is_made_of(dense: LayerKinds, layer: LayerKinds) -> bool:
    return dense == layer or (dense.feedforward == "mlp" and dense == layer._replace(feedforward="mlp"))


def _said(key: str, model: ModelConfig) -> str:
    return f"model.{key} = {shown(getattr(model, key))}"
