"""Shapes by name: `preset = "llama3-8b"` in a run file, `preset("llama3-8b", num_layers=2)` in Python.

    {dense,moe,mamba,hybrid}-{tiny,small,medium,large,1b,8b}   of ours            preset_tables/ours.py
    gpt-{tiny,small,medium}   switch_all                       of ours            preset_tables/ours.py
    llama* qwen3-* olmo2-* gemma-* gpt2* bloom-*               public, dense      preset_tables/dense.py
    mixtral-* qwen3-*-a* olmoe-* deepseek-* qwen3-next-*       public, experts    preset_tables/experts.py
    mamba-2.8b mamba2-2.7b granite4-h-* nemotron-h-8b          public, a state    preset_tables/state.py

A preset is a table of [model] keys; a key that a user writes beside it wins. `vocab_size` is the tokenizer's where a
preset names none. docs/models.md lists all of them with their numbers of weights.
"""

from collections.abc import Mapping
from typing import Any

from meshwright.model.config import ModelConfig
from meshwright.model.preset_tables.dense import DENSE
from meshwright.model.preset_tables.experts import EXPERTS
from meshwright.model.preset_tables.ours import OURS
from meshwright.model.preset_tables.state import STATE

Keys = Mapping[str, Any]

PRESETS: Mapping[str, Keys] = {**OURS, **DENSE, **EXPERTS, **STATE}


def with_preset(table: Keys) -> dict[str, Any]:
    """Return the [model] keys with those of the preset that they name laid beneath; keys within its tables likewise.

    Raises:
        ValueError: if there is no preset of that name.
    """
    name = table.get("preset", "")
    if name == "":
        return dict(table)
    if name not in PRESETS:
        raise ValueError(f"there is no such preset; the presets are: {', '.join(PRESETS)}")
    return _laid_over(PRESETS[name], table)


def _laid_over(beneath: Keys, above: Keys) -> dict[str, Any]:
    merged = {**beneath, **above}
    for key, table in beneath.items():
        if isinstance(table, Mapping) and isinstance(above.get(key), Mapping):
            merged[key] = {**table, **above[key]}
    return merged


def preset(name: str, **changes: Any) -> ModelConfig:
    """Return a preset's config, with some keys changed: `preset("moe-tiny", vocab_size=512, moe={"top_k": 1})`.

    Raises:
        ValueError: if there is no such preset, or the changed sizes make no model.
    """
    config = ModelConfig.model_validate(with_preset({**changes, "preset": name}))
    if problems := config.problems():
        raise ValueError("\n".join(problems))
    return config
