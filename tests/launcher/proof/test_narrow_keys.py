"""A narrow run has every key of the user's as it is, but for those that `CHANGED` allows, and in the way that it says.

The keys are found by walking the tables, and their values are drawn from what each field takes (choices: all of them),
so that a key that is new tomorrow is held to this without a line here.
"""

from collections.abc import Callable, Iterator
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from meshwright.launcher.proof.narrow import narrow
from meshwright.launcher.runfile.tables import RunFile
from meshwright.model.kinds.table import ALL
from meshwright.model.pattern import kinds_in
from meshwright.parallel.mesh import Sizes

Table = dict[str, Any]
Rule = Callable[[Any, Any], bool]
"""(the user's value, the narrow run's) -> whether the second stands for the first."""


def stays_on(given: Any, narrowed: Any) -> bool:
    """What is 0, empty or off stays so, and what is not stays on."""
    return bool(given) == bool(narrowed)


def stays_many(given: Any, narrowed: Any) -> bool:
    """0 stays 0, 1 stays 1, and of several there are several, or as many as before."""
    return given == narrowed or (stays_on(given, narrowed) and (given == 1) == (narrowed == 1))


def grows_not(given: Any, narrowed: Any) -> bool:
    """What is on stays on, and is no more than it was."""
    return stays_on(given, narrowed) and narrowed <= given


def is_given(_given: Any, narrowed: Any) -> bool:
    """0 stands for what follows from other sizes, which become others: the small model says its own."""
    return bool(narrowed > 0)


def becomes(value: object) -> Rule:
    """The proof has one value, whatever the user's: it is no part of what is computed."""
    return lambda _given, narrowed: bool(narrowed == value)


CHANGED: dict[str, Rule] = {
    # No part of the computation: what it runs on, reads, writes, and for how long.
    "run.device": becomes("cpu"),
    "run.timeout_seconds": becomes(60),
    "data.store": becomes("counted"),
    "train.compile": becomes(False),
    "train.threads": becomes(1),
    "train.steps": becomes(4),
    "checkpoint.every": becomes(0),
    "checkpoint.keep_every": becomes(0),
    "init.from": becomes(""),
    "init.load": becomes("weights"),
    "parallel.expert_exchange": becomes("all_to_all"),
    "model.preset": becomes(""),  # its sizes are written out
    # Features that become small and stay.
    "train.batch_ramp": lambda given, narrowed: bool(given) == (len(narrowed) == 1),
    "train.clip_norm": grows_not,
    "learning_rate.warmup_steps": grows_not,
    "evaluation.every": grows_not,
    "evaluation.samples": grows_not,
    "recompute.every": grows_not,
    # Sizes; how they relate to each other and to the layout is held in test_narrow.py.
    "data.seq_len": stays_on,
    "train.global_batch_size": stays_on,
    "train.micro_batch_size": stays_many,
    "model.pattern": lambda given, narrowed: kinds_in(given) == kinds_in(narrowed),
    "model.num_layers": stays_many,
    "model.distinct_layers": stays_on,
    "model.multi_token.depth": stays_many,
    "model.max_positions": stays_on,
    "model.hidden_size": stays_on,
    "model.num_heads": stays_on,
    "model.num_kv_heads": stays_on,
    "model.head_dim": stays_on,
    "model.rope_fraction": lambda given, narrowed: (given < 1.0) == (narrowed < 1.0),
    "model.ffn_hidden_size": stays_on,
    "model.vocab_size": stays_on,
    "model.moe.num_experts": stays_on,
    "model.moe.top_k": stays_many,
    "model.moe.num_groups": stays_many,
    "model.moe.top_groups": stays_on,
    "model.moe.expert_hidden_size": stays_on,
    "model.moe.num_shared_experts": stays_many,
    "model.sliding.window": grows_not,
    "model.block_sparse.block_size": grows_not,
    "model.block_sparse.local_blocks": grows_not,
    "model.block_sparse.leading_blocks": grows_not,
    "model.switch_head.num_experts": stays_many,
    "model.switch_head.top_k": stays_many,
    "model.latent.kv_lora_rank": stays_on,
    "model.latent.q_lora_rank": stays_on,
    "model.latent.qk_nope_head_dim": stays_on,
    "model.latent.qk_rope_head_dim": stays_on,
    "model.latent.v_head_dim": stays_on,
    "model.mamba2.num_heads": is_given,
    "model.mamba2.head_dim": stays_on,
    "model.mamba2.num_groups": stays_many,
    "model.mamba2.state_size": grows_not,
    "model.mamba2.chunk_size": grows_not,
    "model.mamba1.inner_size": is_given,
    "model.mamba1.dt_rank": is_given,
    "model.mamba1.state_size": grows_not,
    "model.mamba1.chunk_size": grows_not,
    "model.gated_delta.num_heads": is_given,
    "model.gated_delta.num_key_heads": is_given,
    "model.gated_delta.key_head_dim": stays_on,
    "model.gated_delta.value_head_dim": stays_on,
    "model.gated_delta.chunk_size": grows_not,
    "model.s4d.state_size": grows_not,
    "model.s4d.chunk_size": grows_not,
}
BASE: Table = {
    "run": {"name": "x"},
    "model": {
        "pattern": "*E", "num_layers": 8, "hidden_size": 512, "num_heads": 16, "num_kv_heads": 8,
        "vocab_size": 1000, "moe": {"num_experts": 64, "top_k": 6, "expert_hidden_size": 128},
    },
    "data": {"store": "x", "seq_len": 256},
    "train": {"steps": 1000, "global_batch_size": 64},
    "learning_rate": {"peak": 1e-3},
}  # fmt: skip
# Where any value would do for the field, and not for the model.
GIVEN: dict[str, list[Any]] = {
    "model.pattern": ["E*", "*-*E", "2(*-)5(*E)-", "*E @0,3-4 *-"],
    "model.num_heads": [32, 8],
    "model.num_kv_heads": [2, 1, 16],
    "model.head_dim": [64, 12],
    "model.rope_fraction": [0.125, 0.5],
    "model.moe.top_k": [1, 2, 64],
    "model.moe.num_experts": [8, 128],
    "model.switch_head.num_experts": [3, 8],
    "model.s4d.state_size": [2, 128],
    "parallel.dp_shard": [2, 4],
}
# What else a table must have.
NEEDED: dict[str, dict[str, Any]] = {
    "latent": {"kv_lora_rank": 64, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 16},
    "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_length": 64},
}
NUMBERS = (0, 1, 2, 3, 7, 16, 0.25, 0.6, 1.5)


def keys_of(table: type[BaseModel], above: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every key of a table and of the tables in it, as a user writes it, with its field."""
    for name, field in table.model_fields.items():
        key = f"{above}{field.alias or name}"
        inner = [kind for kind in (field.annotation, *get_args(field.annotation)) if is_table(kind)]
        if inner and get_origin(field.annotation) is not tuple:
            yield from keys_of(inner[0], f"{key}.")
        else:
            yield key, field


def is_table(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


KEYS = dict(keys_of(RunFile))


@cache
def values_of(key: str) -> list[Any]:
    """Return values that a key takes, none of them its default."""
    field = KEYS[key]
    taken = [value for value in GIVEN.get(key) or drawn(field) if value != field.get_default()]
    assert taken, f"no value but the default is known for {key}: GIVEN needs one"
    return taken


def drawn(field: FieldInfo) -> list[Any]:
    """Return those of our values that a field takes."""
    whole = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    return [value for value in candidates(whole) if is_taken(whole, value)]


def candidates(kind: Any) -> list[Any]:
    """Return values for a type, of which its limits may take only some."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return candidates(inner[0])
    if origin in (Union, UnionType):
        return [value for one in inner if one is not NoneType for value in candidates(one)]
    if origin is Literal:
        return list(inner)
    if origin is tuple and inner[-1] is Ellipsis:
        return [(value,) for value in candidates(inner[0])]
    if origin is tuple:
        return [tuple(value for _ in inner) for value in candidates(inner[0])]
    if is_table(kind):  # with every key of it written
        return [{name: next(value for value in drawn(field)) for name, field in kind.model_fields.items()}]
    return {bool: [True, False], str: ["other"], int: list(NUMBERS), float: [float(n) for n in NUMBERS]}.get(kind, [])


def is_taken(kind: Any, value: Any) -> bool:
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError:
        return False
    return True


def with_values(values: dict[str, Any]) -> RunFile:
    """Return a run file with these keys written."""

    def written(table: Table, above: str) -> Table:
        own = {key: value for key, value in values.items() if key.startswith(above)}
        table = {
            name: written(held, f"{above}{name}.") if isinstance(held, dict) else held for name, held in table.items()
        }
        for key, value in own.items():
            name, _, below = key.removeprefix(above).partition(".")
            if not below:
                table[name] = value
            elif name not in table:
                table[name] = written({}, f"{above}{name}.")
        return table

    return RunFile.model_validate(written(BASE, ""))


def at(table: Table, key: str) -> Any:
    """Return what stands at a key."""
    held: Any = table
    for name in key.split("."):
        if held is None:  # a table that is left out
            return None
        held = held[name]
    return held


def pattern_with(key: str) -> dict[str, Any]:
    """Return a pattern that has the kind of part whose table a key stands in."""
    examples = {kind.table: kind.example for kind in ALL if kind.table} | {"depth": "[*-]"}
    table = key.split(".")[1] if key.count(".") == 2 else ""
    needed = {f"model.{table}.{name}": value for name, value in NEEDED.get(table, {}).items()}
    return needed | ({"model.pattern": "*E" + examples[table]} if table in examples and table != "moe" else {})


TARGETS = [Sizes(dp_shard=8, ep=8), Sizes(tp=2, pp=2, dp_shard=2), Sizes(dp_shard=2)]


def before_and_after(run_file: RunFile, target: Sizes) -> tuple[Table, Table]:
    """Return the user's tables and the narrow run's."""
    small = narrow(run_file, target, [target]).run_file
    return run_file.model_dump(by_alias=True), small.model_dump(by_alias=True)


def wrong_keys(run_file: RunFile, target: Sizes) -> list[str]:
    """Return the keys that the narrow run has otherwise than `CHANGED` says."""
    before, after = before_and_after(run_file, target)
    pairs = {key: (at(before, key), at(after, key)) for key in KEYS}
    return [f"{key}: {one!r} -> {other!r}" for key, (one, other) in pairs.items() if not allowed(key, one, other)]


def allowed(key: str, given: Any, narrowed: Any) -> bool:
    if key not in CHANGED or given is None:  # of a table that is left out
        return bool(given == narrowed)
    return CHANGED[key](given, narrowed)


@pytest.mark.parametrize("key", KEYS)
def test_a_key_stays_as_the_user_wrote_it_or_stays_on(key: str) -> None:
    for value in values_of(key):
        run_file = with_values(pattern_with(key) | {key: value})
        assert at(run_file.model_dump(by_alias=True), key) != KEYS[key].get_default(), "this shows nothing"
        for target in TARGETS:
            assert wrong_keys(run_file, target) == []


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_all_keys_together_stay_as_the_user_wrote_them_or_stay_on(target: Sizes) -> None:
    for last in (0, -1):
        assert wrong_keys(with_values({key: values_of(key)[last] for key in KEYS}), target) == []


def test_each_key_that_may_change_is_one_and_does() -> None:
    assert set(CHANGED) <= set(KEYS)
    files = [with_values(pattern_with(key) | {key: value}) for key in CHANGED for value in values_of(key)]
    dumps = [before_and_after(run_file, target) for run_file in files for target in TARGETS]
    for key in CHANGED:
        assert any(at(before, key) != at(after, key) for before, after in dumps), f"{key} need not be in CHANGED"


def test_values_of_every_sort_are_drawn() -> None:
    assert values_of("model.residual_dropout") == [0.25, 0.6]
    assert values_of("data.mask_documents") == [True]
    assert values_of("train.precision") == ["bf16_autocast", "bf16", "fp64"]
    assert values_of("model.bias")[0] == ("q",)
    assert values_of("optimizer.betas") == [(0.0, 0.0), (0.25, 0.25), (0.6, 0.6)]
    assert values_of("train.batch_ramp") == [({"samples": 1, "global_batch_size": 1},)]
    assert values_of("optimizer.groups")[0][0]["learning_rate_factor"] == 1.0
    assert len(KEYS) > 80
