"""What the user reads when a run file is wrong: the key as written, the value, the rule, what would fit.

runs/8b.toml: 2 problems, nothing was started
  train.stps: no such key; did you mean train.steps? [train] has: steps, global_batch_size, ...
  parallel.tp = 16: must divide model.num_kv_heads = 8; one of [1, 2, 4, 8] would fit
"""

import difflib
import json
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from meshwright.launcher.runfile.keys import all_keys, entry_of, field_of, fields, tables

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

TYPE_RULES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be text, in quotes",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list, in brackets",
    "model_type": "must be a table",
    "finite_number": "must be a finite number",
}

# Of texts that must not be empty, what would fit.
WAYS_OUT = {"data.store": "name the folder that prepare wrote"}

# pydantic's name of a bound, in words; {0} is the bound.
BOUND_RULES = {
    "greater_than": ("gt", "must be above {0}"),
    "greater_than_equal": ("ge", "must be at least {0}"),
    "less_than": ("lt", "must be below {0}"),
    "less_than_equal": ("le", "must be at most {0}"),
}


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


def problem(key: str, value: object, rule: str, way_out: str = "") -> str:
    """Return one line: `key = value: rule; way out`."""
    return f"{key} = {shown(value)}: {rule}" + (f"; {way_out}" if way_out else "")


def shown(value: object) -> str:
    """Return a value as it stands in TOML, cut short where it is long."""
    if isinstance(value, bool | str):
        text = json.dumps(value, ensure_ascii=False)
    elif isinstance(value, Mapping):
        text = "{" + ", ".join(f"{key} = {shown(inner)}" for key, inner in value.items()) + "}"
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(shown(inner) for inner in value) + "]"
    elif isinstance(value, int) and value.bit_length() > 4096:  # str() has a limit, and nobody reads so many digits
        text = f"a number of about {round(value.bit_length() * 0.30103):,} digits"
    else:
        text = str(value)
    return cut_short(text)


def cut_short(text: str) -> str:
    """Return the beginning of a text that is too long for a line."""
    return text if len(text) <= 80 else text[:77] + "..."


def closest(word: str, among: Iterable[str]) -> str | None:
    """Return the one of `among` that the user most likely meant, or None if nothing is near."""
    by_lower = {name.lower(): name for name in among}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


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
        names = [*fields(tables()[table]), *_tables_within(table)]
        fault, listing = f"{table}.{key}: no such key", f"[{table}] has: {', '.join(names)}"
    else:
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
        name, rule = BOUND_RULES[kind]
        if isinstance(value, int) and context[name] == 0 and name == "gt" and _is_whole(key):
            rule = "must be at least 1"
        return problem(key, value, rule.format(context[name]))
    if kind == "literal_error":
        return _not_one_of(key, value, field_of(_without_index(key)))
    if kind == "string_pattern_mismatch":
        field = field_of(key)
        return problem(key, value, "does not have the form", field.description or "" if field else "")
    if kind in ("too_long", "too_short"):
        return problem(key, value, f"must have {context.get('max_length', context.get('min_length'))} values")
    if kind == "string_too_short":
        return problem(key, value, "must not be empty", WAYS_OUT.get(key, "some text would fit"))
    rule = TYPE_RULES.get(kind, error["msg"][:1].lower() + error["msg"][1:])
    return problem(key, value, rule, _unquoted(value) if kind in ("int_type", "float_type", "bool_type") else "")


def _tables_within(table: str) -> list[str]:
    """Return the tables that stand in this one, without its name."""
    return [name.removeprefix(f"{table}.") for name in tables() if name.startswith(f"{table}.")]


def dotted(location: Sequence[str | int]) -> str:
    """Return pydantic's location as the user would write it: `train.batch_ramp[0].samples`."""
    text = ""
    for at in location:
        text += f"[{at}]" if isinstance(at, int) else f".{at}" if text else at
    return text


def _missing(key: str) -> str:
    if key in tables():
        needed = [name for name, field in fields(tables()[key]).items() if field.is_required()]
        return f"[{key}]: the table is missing; it needs {', '.join(needed)}"
    field = field_of(key)
    meaning = f"; {field.description}" if field and field.description else ""
    return f"{key}: is missing{meaning}"


def _not_one_of(key: str, value: object, field: Any) -> str:
    choices = list(_choices(field.annotation)) if field else []
    near = closest(value, choices) if isinstance(value, str) else None
    listed = "[" + ", ".join(shown(choice) for choice in choices) + "]"  # whole, however long: it is the way out
    return problem(key, value, f"must be one of {listed}", f"did you mean {shown(near)}?" if near else "")


def _choices(annotation: Any) -> Iterable[str]:
    """Yield the values of every Literal within an annotation."""
    if typing.get_origin(annotation) is typing.Literal:
        yield from typing.get_args(annotation)
    else:
        for inner in typing.get_args(annotation):
            yield from _choices(inner)


def _is_whole(key: str) -> bool:
    """Say whether a key holds a whole number, so that above 0 means at least 1."""
    table, in_list, last = key.rpartition("].")
    field = field_of(_without_index(table or key))
    entry = entry_of(field) if field and in_list else None
    if entry:
        field = fields(entry).get(last)
    return field is None or "float" not in str(field.annotation)


def _unquoted(value: object) -> str:
    """Return the way out when the value would be right without its quotes."""
    if not isinstance(value, str):
        return ""
    try:
        float(value)
    except ValueError:
        return "" if value.lower() not in ("true", "false") else f"write {value.lower()} without quotes"
    return f"write {value} without quotes"


def _without_index(key: str) -> str:
    return key.partition("[")[0]
