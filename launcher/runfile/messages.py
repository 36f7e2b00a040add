"""What the user reads when a run file is wrong: the key as written, the value, the rule, what would fit.

runs/8b.toml: 2 problems, nothing was started
  train.stps: no such key; did you mean train.steps? [train] has: steps, global_batch_size, ...
  parallel.tp = 16: must divide model.num_kv_heads = 8; one of [1, 2, 4, 8] would fit
"""

from collections.abc import Mapping, Sequence
from typing import Any

from meshwright.launcher.runfile.keys import all_keys, entry_of, field_of, fields, tables
from meshwright.model.wording import (
    BOUND_RULES,
    choices_of,
    closest,
    cut_short,
    dotted,
    no_such_key,
    not_one_of,
    of_type,
    out_of_bounds,
    problem,
    shown,
)

__all__ = [
    "OTHER_NAMES", "ConfigError", "closest", "cut_short", "dotted", "of_validation", "problem", "shown", "suggestion",
    "unknown_key",
]  # fmt: skip

# What other systems call it; a user who comes from one of them is told our name.
OTHER_NAMES = {
    "d_model": "model.hidden_size", "n_embd": "model.hidden_size", "dim": "model.hidden_size",
    "n_layers": "model.num_layers", "n_layer": "model.num_layers", "num_hidden_layers": "model.num_layers",
    "n_heads": "model.num_heads", "n_head": "model.num_heads", "num_attention_heads": "model.num_heads",
    "num_query_groups": "model.num_kv_heads", "num_key_value_heads": "model.num_kv_heads",
    "kv_channels": "model.head_dim", "rope_theta": "model.rope_base", "rms_norm_eps": "model.norm_eps",
    "intermediate_size": "model.ffn_hidden_size", "d_ff": "model.ffn_hidden_size",
    "hidden_dim": "model.ffn_hidden_size",
    "tie_word_embeddings": "model.tie_embeddings", "num_local_experts": "model.moe.num_experts",
    "moe_intermediate_size": "model.moe.expert_hidden_size", "moe_router_topk": "model.moe.top_k",
    "num_experts_per_tok": "model.moe.top_k", "norm_topk_prob": "model.moe.normalise_top_k",
    "router_aux_loss_coef": "model.moe.load_balancing_weight", "seqlen": "data.seq_len", "block_size": "data.seq_len",
    "seq_length": "data.seq_len", "lr": "learning_rate.peak", "learning_rate": "learning_rate.peak",
    "min_lr": "learning_rate.final_fraction", "max_steps": "train.steps", "train_iters": "train.steps",
    "batch_size": "train.global_batch_size", "bs": "train.global_batch_size", "dtype": "train.precision",
    "clip_grad": "train.clip_norm", "max_grad_norm": "train.clip_norm", "grad_clip": "train.clip_norm",
    "tensor_model_parallel_size": "parallel.tp", "pipeline_model_parallel_size": "parallel.pp",
    "context_parallel_size": "parallel.cp", "expert_model_parallel_size": "parallel.ep",
    "zero_stage": "zero.stage", "activation_checkpointing": "recompute.mode", "save_interval": "checkpoint.every",
    "eval_interval": "evaluation.every", "log_interval": "log.every",
}  # fmt: skip

# Of texts that must not be empty, what would fit.
WAYS_OUT = {"data.store": "name the folder that prepare wrote"}


class ConfigError(ValueError):
    """What a user gave cannot be honoured; `problems` holds every reason, `str()` what the user reads."""

    def __init__(self, source: str, problems: Sequence[str], *, is_same_on_all_ranks: bool = False) -> None:
        """Take the file's name, as the user gave it, and every problem found in it.

        `is_same_on_all_ranks`: all ranks agreed on it, so that it is said once (launcher/last_words.py).
        """
        self.is_same_on_all_ranks = is_same_on_all_ranks
        self.source = source
        self.problems = tuple(problems)
        count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
        super().__init__("\n".join([f"{source}: {count}, nothing was started", *(f"  {line}" for line in problems)]))


def suggestion(table: str, key: str) -> str | None:
    """Return the key, with its table, that an unknown one was most likely meant to be."""
    own = tables().get(table)
    near = closest(key, fields(own)) if own else None
    if near:
        return f"{table}.{near}"
    if key.lower() in OTHER_NAMES:
        return OTHER_NAMES[key.lower()]
    same = [known for known in all_keys() if known.rpartition(".")[2] == key.lower()]
    return same[0] if same else closest(f"{table}.{key}" if table else key, [*all_keys(), *tables()])


def unknown_key(table: str, key: str) -> str:
    """Return the line for a key, or a table, that does not exist: what it may have meant and what there is."""
    meant = suggestion(table, key)
    if table:
        return no_such_key(table, key, [*fields(tables()[table]), *_tables_within(table)], meant)
    fault, listing = f"{key}: no such table", f"the tables are: {', '.join(tables())}"
    return f"{fault}; did you mean {meant}? {listing}" if meant else f"{fault}; {listing}"


def of_validation(error: Mapping[str, Any]) -> str:
    """Return the line for one of pydantic's errors (an entry of `ValidationError.errors()`)."""
    location: tuple[str | int, ...] = error["loc"]
    key, kind, value, context = dotted(location), error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden" and len(location) <= 3 and all(isinstance(at, str) for at in location):
        table, _, last = key.rpartition(".")
        return unknown_key(table, last)
    if kind == "extra_forbidden":
        return problem(key, value, "no such key")
    if kind == "missing":
        return _missing(key)
    if kind in BOUND_RULES:
        return out_of_bounds(key, value, kind, context[BOUND_RULES[kind][0]], is_whole=_is_whole(key))
    if kind == "literal_error":
        field = field_of(_without_index(key))
        return not_one_of(key, value, list(choices_of(field.annotation)) if field else [])
    if kind == "string_pattern_mismatch":
        field = field_of(key)
        return problem(key, value, "does not have the form", field.description or "" if field else "")
    if kind in ("too_long", "too_short"):
        return problem(key, value, f"must have {context.get('max_length', context.get('min_length'))} values")
    if kind == "string_too_short":
        return problem(key, value, "must not be empty", WAYS_OUT.get(key, "some text would fit"))
    return of_type(key, value, kind, error["msg"])


def _tables_within(table: str) -> list[str]:
    """Return the tables that stand in this one, without its name."""
    return [name.removeprefix(f"{table}.") for name in tables() if name.startswith(f"{table}.")]


def _missing(key: str) -> str:
    if key in tables():
        needed = [name for name, field in fields(tables()[key]).items() if field.is_required()]
        return f"[{key}]: the table is missing; it needs {', '.join(needed)}"
    field = field_of(key)
    meaning = f"; {field.description}" if field and field.description else ""
    return f"{key}: is missing{meaning}"


def _is_whole(key: str) -> bool:
    """Say whether a key holds a whole number, so that above 0 means at least 1."""
    table, in_list, last = key.rpartition("].")
    field = field_of(_without_index(table or key))
    entry = entry_of(field) if field and in_list else None
    if entry:
        field = fields(entry).get(last)
    return field is None or "float" not in str(field.annotation)


def _without_index(key: str) -> str:
    return key.partition("[")[0]
