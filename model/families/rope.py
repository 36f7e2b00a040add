"""Rotary positions in a foreign config.json: one table in the new spelling, two keys in the old one.

    new   "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, ...}
    old   "rope_theta": 10000.0, "rope_scaling": {"type": "yarn", "factor": 40.0, ...} or null

Scaled frequencies are read and written for linear, yarn and llama3; a base that is changed once (ntk) has no name
there, and "dynamic" changes it with the length of each sample, which is not computed here. Where a file has both
spellings, transformers takes the table of the old one.
"""

from collections.abc import Mapping
from typing import Any

from meshwright.model.config import ModelConfig

KINDS = ("linear", "yarn", "llama3")
OF_YARN = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")
OF_LLAMA3 = ("low_freq_factor", "high_freq_factor")


def rope_keys(config: ModelConfig) -> dict[str, Any]:
    """Return RoPE's keys in both spellings."""
    scaling = _scaling(config)
    kind = {"rope_type": scaling["type"]} if scaling else {"rope_type": "default"}
    partial = {"partial_rotary_factor": config.rope_fraction} if config.rope_fraction != 1.0 else {}
    new = {"rope_theta": config.rope_base, **kind, **{k: v for k, v in scaling.items() if k != "type"}, **partial}
    return {
        "rope_parameters": new,
        "rope_theta": config.rope_base,
        **({"rope_scaling": {**scaling, "rope_type": scaling["type"]}} if scaling else {}),
        **partial,
    }


def rope_to_ours(
    foreign: Mapping[str, Any], default_base: float, default_fraction: float | None = None
) -> dict[str, Any]:
    """Return our keys of the rotary positions; without a `default_fraction` the class turns whole heads.

    Raises:
        ValueError: with a line for each reason why these frequencies are not computed here.
    """
    rope = foreign.get("rope_scaling") or foreign.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    fraction = rope.get("partial_rotary_factor", foreign.get("partial_rotary_factor", default_fraction or 1.0))
    problems, scaling = [], dict[str, Any]()
    if kind not in ("default", *KINDS):
        problems.append(f"rope_type = {kind!r}: only 'default' (without scaling), {', '.join(KINDS)} can be read")
    if default_fraction is None and fraction != 1.0:
        problems.append(f"partial_rotary_factor = {fraction}: the class turns whole heads; only 1.0 can be read")
    try:
        scaling = {"rope_scaling": _scaling_to_ours(foreign, rope, kind)} if kind in KINDS else {}
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return {
        "rope_base": float(rope.get("rope_theta", foreign.get("rope_theta", default_base))),
        "rope_fraction": float(fraction),
        **scaling,
    }


def _scaling(config: ModelConfig) -> dict[str, Any]:
    """Return the table of the old spelling; empty where nothing is scaled."""
    scaling = config.rope_scaling
    if scaling is None:
        return {}
    found: dict[str, Any] = {"type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        found["original_max_position_embeddings"] = scaling.original_length
    of_kind = {"yarn": OF_YARN, "llama3": OF_LLAMA3}.get(scaling.kind, ())
    return found | {name: value for name in of_kind if (value := getattr(scaling, name))}


def _scaling_to_ours(foreign: Mapping[str, Any], rope: Mapping[str, Any], kind: str) -> dict[str, Any]:
    needs, length = f"is missing, and rope_type = {kind!r} needs it", None
    problems = [] if "factor" in rope else [f"rope_parameters.factor: {needs}; how many times longer samples may be"]
    if kind == "yarn" and not rope.get("truncate", True):
        problems.append(
            "rope_parameters.truncate = False: yarn's ramp ends at whole numbers here; only True can be read"
        )
    if kind != "yarn" and rope.get("mscale_all_dim"):
        problems.append(
            f"rope_parameters.mscale_all_dim = {rope['mscale_all_dim']}: can be read with rope_type = 'yarn' alone"
        )
    if kind != "linear":
        of_table = rope.get("original_max_position_embeddings", foreign.get("max_position_embeddings"))
        length = foreign.get("original_max_position_embeddings", of_table)  # which the class prefers, too
        if length is None:
            problems.append(f"rope_parameters.original_max_position_embeddings: {needs}; the length before it")
    if problems:
        raise ValueError("\n".join(problems))
    found: dict[str, Any] = {"kind": kind, "factor": float(rope["factor"])}
    found |= {} if length is None else {"original_length": length}
    of_kind = {"yarn": OF_YARN, "llama3": OF_LLAMA3}.get(kind, ())
    return found | {name: float(rope[name]) for name in of_kind if rope.get(name)}
