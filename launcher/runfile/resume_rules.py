"""What may change when a run goes on from its checkpoint, and what may not.

    free        layout: [parallel] [pipeline] [zero] [recompute], micro_batch_size, compile, threads
                length: train.steps
                saying and saving: [log] [checkpoint] [evaluation], run.name, folder, device, timeout_seconds
                how far data is read ahead: data.prefetch
    never       [model], run.seed and what orders the data: data.seq_len. A new run with [init] from = ... is the way
    on request  all else, each with `--allow-change key`: learning rate, optimizer, batch size, precision ...

The corpus and the tokenizer are known by the store's fingerprint, which the checkpoint holds: `data.store` may move to
another folder on request, its content may not change. This file compares keys; it reads no checkpoint.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from meshwright.launcher.runfile.keys import field_of
from meshwright.launcher.runfile.messages import problem, shown, suggestion
from meshwright.launcher.runfile.tables import RunFile
from meshwright.launcher.runfile.write import as_tables
from meshwright.model.config import ModelConfig
from meshwright.model.counts.shapes import parameter_shapes

FREE_TABLES = ("parallel", "pipeline", "zero", "recompute", "log", "checkpoint", "evaluation")
FREE_KEYS = (
    "train.micro_batch_size",
    "train.compile",
    "train.threads",
    "train.steps",
    "run.name",
    "run.folder",
    "run.device",
    "run.timeout_seconds",
    "data.prefetch",
)
ON_REQUEST_IN_DATA = ("data.store",)
DERIVED = ("model.num_kv_heads", "model.head_dim", "model.ffn_hidden_size")
"""What the [model] table fills in where it is not given."""


class Change(NamedTuple):
    """One key that differs between the checkpoint's run file and the one given now; None is a key that is not there."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        """Return the change as a log line says it."""
        return f"{self.key}: {_shown(self.before)} -> {_shown(self.after)}"


def compare_for_resume(
    before: RunFile, after: RunFile, allow_change: Sequence[str] = ()
) -> tuple[list[Change], list[str]]:
    """Return every change that is allowed, to be recorded, and a line for each that is not.

    A key in `allow_change` that did not change is no problem, so that a job script may keep it over many restarts.
    """
    problems = [line for key in allow_change for line in _request_problems(key)]
    changes = []
    is_same_shape = before.model == after.model or parameter_shapes(before.model) == parameter_shapes(after.model)
    for change in _changes(before, after):
        rule = _rule(change.key)
        if rule == "never":
            way_out = _new_run(change.key, is_same_shape=is_same_shape)
            problems.append(_refusal(change, "may never change when a run goes on", way_out))
        elif rule == "on request" and change.key not in allow_change:
            problems.append(
                _refusal(change, "changes what is learned", f"--allow-change {change.key} takes the new value")
            )
        else:
            changes.append(change)
    return changes, problems


def _rule(key: str) -> str:
    """Return "free", "on request" or "never"."""
    table = key.partition(".")[0]
    if table in FREE_TABLES or key in FREE_KEYS:
        return "free"
    if table == "model" or key == "run.seed" or (table == "data" and key not in ON_REQUEST_IN_DATA):
        return "never"
    return "on request"


def changed_keys(before: RunFile, after: RunFile) -> Iterator[Change]:
    """Yield every key that differs between two run files."""
    old, new = (dict(_flatten(as_tables(run_file), "")) for run_file in (before, after))
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key):
            yield Change(key, old.get(key), new.get(key))


def _changes(before: RunFile, after: RunFile) -> Iterator[Change]:
    for change in changed_keys(before, after):
        if change.key == "model.preset":  # a preset's name changes nothing: its keys are compared
            continue
        if all(is_derived(change.key, run_file.model) for run_file in (before, after)):
            continue  # it follows from another key, whose change is told
        # 0 is the tokenizer's, which the fingerprint looks after
        if change.key == "model.vocab_size" and 0 in (change.before, change.after):
            continue
        yield change


def is_derived(key: str, model: ModelConfig) -> bool:
    """Say whether a key of [model] is a size that the table fills in, and is what it would have filled in."""
    if key not in DERIVED:
        return False
    name = key.removeprefix("model.")
    filled = ModelConfig.model_validate({**model.model_dump(), name: 0})
    return bool(getattr(filled, name) == getattr(model, name))


def _flatten(tables: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tables.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _request_problems(key: str) -> list[str]:
    if field_of(key) is None:
        meant = suggestion(*_split(key))
        return [f"--allow-change {key}: no such key" + (f"; did you mean {meant}?" if meant else "")]
    if _rule(key) == "never":
        return [f"--allow-change {key}: may never change when a run goes on; {_new_run(key)}"]
    return []


def _refusal(change: Change, rule: str, way_out: str) -> str:
    rule = f"the checkpoint has {_shown(change.before)}, and this key {rule}"
    if change.after is None:
        return f"{change.key}: is left out; {rule}; {way_out}"
    return problem(change.key, change.after, rule, way_out)


def _new_run(key: str, *, is_same_shape: bool = True) -> str:
    """Return the way out; `is_same_shape`: the checkpoint's weights fit the model that is asked for."""
    if key == "run.seed":
        return "put the old value back, or begin a run of another name"
    if key.startswith("model.") and not is_same_shape:
        return "put the old value back, or begin a run of another name, from new weights"
    return 'put the old value back, or branch: a run of another name with [init] from = "the checkpoint"'


def _split(key: str) -> tuple[str, str]:
    table, _, last = key.rpartition(".")
    return table, last


def _shown(value: object) -> str:
    return "nothing" if value is None else shown(value)
