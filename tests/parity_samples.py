"""Layouts drawn at random, as run files: every axis, every stage, every choice that a table offers, any model.

    world 8 = pp 2 x dp_shard 2 x tp 2    ep 2, etp 2    zero.stage 1    recompute.mode "full"    micro-batch 2    moe

A sample is drawn from the fields of the tables themselves, so that a new axis or a new choice joins when its key is
there. It is sound if `check` (what `meshwright check` says) has nothing against it: that is the product's to say.
"""

from dataclasses import dataclass, fields
from math import prod
from typing import Any, Literal, get_args, get_origin

from engine_cases import BATCH, SEQ, dense_config, moe_config
from hypothesis import strategies
from pydantic import BaseModel
from runfile_cases import run_file

from meshwright.launcher.runfile.cross_checks import check
from meshwright.launcher.runfile.tables import RunFile
from meshwright.parallel.mesh import Sizes

MODELS = {
    "dense": dense_config(num_layers=4),  # for four stages
    "dense-tied-biased": dense_config(tie_embeddings=True, bias=("q", "k", "v", "output", "ffn")),
    "dense-one-kv-head": dense_config(num_kv_heads=1, qk_norm=True),
    "moe": moe_config(),
    "moe-step-balance": moe_config(num_experts=4, load_balancing="step", bias=("ffn",), normalise_top_k=False),
    "mixed": moe_config(pattern="*-*E", num_layers=4, tie_embeddings=True),
    "moe-draws-and-drops": moe_config(residual_dropout=0.2, router_jitter=0.2, capacity_factor=0.75),
}
# Models whose sizes three and four ranks divide: for what is counted by hand, none of them drawn.
DIVISIBLE = {
    "dense-by-two": dense_config(num_layers=4, vocab_size=38),
    "dense-deep": dense_config(num_layers=16, vocab_size=38),
    "moe-by-two": moe_config(num_layers=4, num_experts=8, vocab_size=38),
    "dense-by-three": dense_config(num_heads=6, num_kv_heads=3, ffn_hidden_size=54),
    "moe-by-four": moe_config(num_experts=8),
}
# Tables whose choices are drawn; [parallel]'s sizes are drawn apart, as they must multiply.
TABLES = ("parallel", "zero", "recompute", "pipeline")
# Of other tables these alone bear on how ranks work together.
KEYS = {"data": ("mask_documents",), "optimizer": ("kind",)}
# What no CPU has (tests/parallel/test_deep_ep.py).
ELSEWHERE = {("parallel", "expert_exchange")}
AXES = tuple(field.name for field in fields(Sizes))


@dataclass(frozen=True)
class Sample:
    """One layout, one model, and how a rank computes it."""

    model: str
    world: int
    micro_batch: int
    tables: tuple[tuple[str, str, Any], ...]
    """What differs from the defaults: table, key, value."""

    def run_file(self, *, precision: str = "fp64", stage: int | None = None) -> RunFile:
        """Return the run file that a user would write; `stage` is another ZeRO stage than the sample's."""
        tables: dict[str, dict[str, Any]] = {}
        for table, key, value in self.tables:
            tables.setdefault(table, {})[key] = value
        if stage is not None:
            tables["zero"] = {"stage": stage}
        train = {"steps": 2, "global_batch_size": BATCH, "micro_batch_size": self.micro_batch, "precision": precision}
        data = {"store": "s", "seq_len": SEQ, **tables.pop("data", {})}
        return run_file(model=(MODELS | DIVISIBLE)[self.model].model_dump(), train=train, data=data, **tables)

    def problems(self) -> list[str]:
        """Return what the product has against it, or the cases, whose ranks have whole micro-batches."""
        run_file = self.run_file()
        found = check(run_file, self.world)
        if not found and BATCH // run_file.parallel.dp_in(self.world) % self.micro_batch != 0:
            found.append(f"micro_batch = {self.micro_batch} does not divide a rank's samples")
        return found

    def has(self, axis: str) -> bool:
        """Say whether an axis is split."""
        return any(table == "parallel" and key == axis for table, key, _ in self.tables)

    def __str__(self) -> str:
        said = [f"{table}.{key}={value}" for table, key, value in self.tables]
        return f"{self.model} on {self.world}: {' '.join([*said, f'micro_batch={self.micro_batch}'])}"


def sample(model: str, *, micro_batch: int = 1, **changes: Any) -> Sample:
    """Return a sample by hand: `sample("moe", tp=2, ep=2, zero__stage=1)`; a key without a table is of [parallel]."""
    tables = []
    for key, value in changes.items():
        table, _, name = key.rpartition("__")
        tables.append((table or "parallel", name, value))
    world = prod(value for _, key, value in tables if key in AXES and key not in ("ep", "etp"))
    return Sample(model, world, micro_batch, tuple(tables))


@strategies.composite
def samples(draw: Any, tables_drawn: tuple[str, ...] = TABLES) -> Sample:
    """Draw a sample, sound or not: its `problems` are asked outside, as beartype draws random numbers of its own.

    Tables other than `tables_drawn` are left at their defaults.
    """
    sizes = dict.fromkeys(AXES, 1)
    dense = [axis for axis in AXES if axis not in ("ep", "etp")]
    factors = draw(strategies.sampled_from([(2,), (3,), (2, 2), (2, 3), (2, 2, 2), (2, 2, 2)]))
    for factor in factors:
        sizes[draw(strategies.sampled_from(dense))] *= factor
    model = draw(strategies.sampled_from(sorted(MODELS)))
    stage = prod(factors) // sizes["pp"]
    for axis in ("ep", "etp") if MODELS[model].moe else ():  # drawn from what may fit, as most would not
        sizes[axis] = draw(strategies.sampled_from([size for size in (1, 2, 3, 4) if stage % size == 0]))
    tables: list[tuple[str, str, Any]] = [("parallel", axis, size) for axis, size in sizes.items()]
    for table in tables_drawn:
        if table != "pipeline" or sizes["pp"] > 1:
            tables += draw(strategies.tuples(*choices_of(table)))
    for table, keys in KEYS.items():
        tables += draw(strategies.tuples(*choices_of(table, keys)))
    return Sample(
        model=model,
        world=prod(factors),
        micro_batch=draw(strategies.sampled_from([1, 2, 4])),
        tables=tuple(sorted(entry for entry in tables if entry[2] != default_of(*entry[:2]))),
    )


def choices_of(table: str, keys: tuple[str, ...] = ()) -> list[Any]:
    """Return, for each key of a table (of `keys`, if given) that offers a choice, what draws (table, key, value)."""
    drawn = []
    for key, field in table_of(table).model_fields.items():
        values = values_of(field.annotation, field.metadata)
        if values and key not in AXES and (table, key) not in ELSEWHERE and (not keys or key in keys):
            drawn.append(strategies.sampled_from([(table, key, value) for value in values]))
    return drawn


def values_of(annotation: Any, metadata: list[Any]) -> list[Any]:
    """Return the values that a field of this type is tried with; none where it offers no choice."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if annotation is bool:
        return [False, True]
    if annotation is int:
        least = max([rule.ge for rule in metadata if hasattr(rule, "ge")] or [1])
        most = min([rule.le for rule in metadata if hasattr(rule, "le")] or [2])
        return list(range(least, min(most, least + 3) + 1)) if most <= 8 else [1, 2]
    return []


def table_of(table: str) -> type[BaseModel]:
    """Return the class of a table."""
    found = RunFile.model_fields[table].annotation
    assert isinstance(found, type)
    assert issubclass(found, BaseModel)
    return found


def default_of(table: str, key: str) -> Any:
    """Return what a key is where the file does not say."""
    default = table_of(table).model_fields[key].default
    return 1 if key in AXES else default
