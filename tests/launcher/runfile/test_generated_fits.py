"""Run files drawn by chance: none ends in an exception, and each size that is said to fit is right.

one problem      with the size that is named nothing at all is wrong
several          with it this key breaks no rule, unless it is of a key that must be changed anyhow
"""

import copy
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest

from meshwright.launcher.runfile.read import examine
from meshwright.launcher.runfile.would_fit import keys_of

SOUND: dict[str, dict[str, Any]] = {
    "run": {"name": "x"},
    "data": {"store": "s", "seq_len": 48},
    "train": {"steps": 100, "global_batch_size": 24},
    "learning_rate": {"peak": 1e-3},
}
MODEL = {"num_layers": 4, "hidden_size": 48, "num_heads": 4}
LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
PATTERNS = ["*-", "*-", "*E", "*E", "2(L)H*E @4-4 M", "*-*E @5 *-", "3M*-", "+-", "*-[*-]", "M", "L-*- @0-2 *E"]
DRAWS, AT_ONCE = 60, 20


def drawn(seed: int) -> tuple[dict[str, Any], int]:
    """Return the tables of a run file with small sizes, often ones that do not go together, and a world."""
    draw = random.Random(seed)

    def maybe(share: float, **keys: Any) -> dict[str, Any]:
        return keys if draw.random() < share else {}

    pattern = draw.choice(PATTERNS)
    model = {**MODEL, "pattern": pattern, "num_layers": draw.choice([1, 2, 3, 4, 5, 6, 8, 12])}
    model |= maybe(0.2, hidden_size=draw.choice([1, 6, 33, 40, 64])) | maybe(0.2, num_heads=draw.choice([3, 5, 8]))
    model |= maybe(0.2, distinct_layers=draw.choice([1, 2, 3, 4, 8])) | maybe(0.2, num_kv_heads=draw.choice([2, 3]))
    model |= maybe(0.3, position="learned", max_positions=draw.choice([3, 20, 50])) | maybe(0.2, head_dim=12)
    model |= maybe(0.2, multi_token={"depth": draw.choice([1, 2, 7])})
    if "E" in pattern and draw.random() > 0.25:
        moe = {"num_experts": draw.choice([6, 8, 12, 31]), "top_k": draw.choice([1, 2, 3, 4]), "expert_hidden_size": 24}
        moe |= maybe(0.5, num_groups=draw.choice([2, 3, 4, 6, 31]), top_groups=draw.choice([1, 1, 2, 3, 5]))
        model["moe"] = moe | maybe(0.3, router=draw.choice(["sigmoid", "noisy"]))
    if "M" in pattern:
        model["mamba2"] = maybe(0.5, head_dim=draw.choice([5, 8, 16, 32])) | maybe(0.5, num_groups=draw.choice([3, 4]))
        model["mamba2"] |= maybe(0.2, time_step_low=0.2)
    if "L" in pattern and draw.random() > 0.1:
        model["sliding"] = {"window": 8}
    if "H" in pattern and draw.random() > 0.1:
        model["switch_head"] = {"num_experts": draw.choice([2, 3]), "top_k": draw.choice([1, 2, 4])}
    if "+" in pattern and draw.random() > 0.3:
        model["latent"] = LATENT
    parallel = maybe(0.4, tp=draw.choice([2, 3, 4])) | maybe(0.3, pp=draw.choice([2, 3])) | maybe(0.3, ep=2)
    parallel |= maybe(0.4, cp=draw.choice([2, 4]), context=draw.choice(["ring", "ulysses"]))
    recompute = maybe(0.2, mode="full", every=draw.choice([1, 3]))
    data = {**SOUND["data"], "seq_len": draw.choice([3, 7, 16, 48, 60])}
    return {**SOUND, "model": model, "parallel": parallel, "recompute": recompute, "data": data}, draw.choice(
        [1, 8, 24]
    )


def said_to_fit(line: str) -> Iterator[dict[str, int]]:
    """Yield what the end of a line offers, as the keys that are to be changed."""
    key, _, way_out = line.rpartition("; ")
    key = key.partition(" = ")[0]
    also = {name: int(size) for name, size in re.findall(r"(?:, with|;) ([a-z_.0-9]+) = (\d+)", f"; {way_out}")}
    if found := re.match(r"(?:one of )?\[([\d, ]+)\] would fit", way_out):
        sizes = [int(size) for size in found[1].split(", ")]
    elif found := re.match(r"(\d+) to (\d+) would fit", way_out):
        sizes = [int(found[1]), int(found[2])]
    elif found := re.match(r"(\d+(?: or \d+)*)(?: would fit|, with)", way_out):
        sizes = [int(size) for size in found[1].split(" or ")]
    else:
        return
    yield from ({key: size, **also} for size in sizes)


def changed(tables: dict[str, Any], keys: dict[str, int]) -> dict[str, Any]:
    """Return the tables with other values of some keys."""
    found = copy.deepcopy(tables)
    for key, size in keys.items():
        *path, last = key.split(".")
        at = found
        for name in path:
            at = at.setdefault(name, {})
        at[last] = size
    return found


@pytest.mark.parametrize("first", range(0, DRAWS, AT_ONCE))
def test_what_is_said_to_fit_fits(first: int) -> None:
    offered = 0
    for seed in range(first, first + AT_ONCE):
        tables, world_size = drawn(seed)
        problems = examine(copy.deepcopy(tables), world_size=world_size)[1]
        wrong = {key for line in problems for key in keys_of(line)}
        for line in problems:
            for keys in said_to_fit(line):
                left = examine(changed(tables, keys), world_size=world_size)[1]
                where = f"draw {seed}, {problems}, with {keys}: {left}"
                if len(problems) == 1:
                    assert left == [], where
                else:
                    assert all(keys_of(other) - set(keys) & wrong for other in left if keys_of(other) & set(keys)), (
                        where
                    )
                offered += 1
    assert offered > AT_ONCE // 2
