"""Which foreign class is exactly this model; a model that none of them is is refused, with every reason.

Each family lists its reasons against a configuration (rules.py). The first one without any is taken, so that the plain
and widely known ones stand first. Where all have reasons, those of the nearest are told: the one that has a place for
the parts, and of these the one with the fewest.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from meshwright.model.config import ModelConfig
from meshwright.model.families.bloom import BLOOM
from meshwright.model.families.deepseek_v3 import DEEPSEEK_V3
from meshwright.model.families.family import Family
from meshwright.model.families.foreign_keys import fixed_problems, key_problems, renamed, shown, size_problems
from meshwright.model.families.gemma import GEMMA
from meshwright.model.families.gpt2 import GPT2
from meshwright.model.families.granite_moe_hybrid import GRANITE_MOE_HYBRID
from meshwright.model.families.llama import LLAMA
from meshwright.model.families.mamba import MAMBA
from meshwright.model.families.mamba2 import MAMBA2
from meshwright.model.families.mixtral import MIXTRAL
from meshwright.model.families.olmo2 import OLMO2
from meshwright.model.families.olmoe import OLMOE
from meshwright.model.families.qwen3 import QWEN3
from meshwright.model.families.qwen3_moe import QWEN3_MOE
from meshwright.model.families.qwen3_next import QWEN3_NEXT
from meshwright.model.kinds.table import KINDS
from meshwright.model.kinds.unread import idle_keys

# Where several are exactly a model, the first is taken.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA,
        QWEN3,
        MIXTRAL,
        QWEN3_MOE,
        GEMMA,
        OLMO2,
        OLMOE,
        DEEPSEEK_V3,
        GRANITE_MOE_HYBRID,
        MAMBA2,
        MAMBA,
        QWEN3_NEXT,
        BLOOM,
        GPT2,
    )
}


class ForeignConfigError(ValueError):
    """A foreign configuration cannot be read as one of our models; `problems` says why."""

    def __init__(self, problems: list[str]) -> None:
        """Keep the problems apart, so that a command can print one on a line."""
        super().__init__("\n  ".join(problems))
        self.problems = problems


class NotRepresentableError(ValueError):
    """No foreign class computes exactly this model; `reasons` says why."""

    def __init__(self, class_name: str, reasons: list[str]) -> None:
        """Keep the reasons apart, so that a command can print one on a line."""
        super().__init__(f"{class_name} is the nearest class and is not this model:\n  " + "\n  ".join(reasons))
        self.class_name = class_name
        self.reasons = reasons


def choose_family(config: ModelConfig) -> Family:
    """Return the class that represents the configuration exactly; of several the first in the table.

    Raises:
        NotRepresentableError: with every reason against the class that has the fewest, if there is none.
    """
    against: dict[str, list[str]] = {}
    for family in FAMILIES.values():
        against[family.model_type] = family.reasons_against(config)
        if not against[family.model_type]:
            return family
    mixers = [KINDS[layer.mixer].words for layer in config.layer_kinds if layer.mixer]
    nearest = min(against, key=lambda name: _distance(against[name], mixers))
    raise NotRepresentableError(FAMILIES[nearest].class_name, against[nearest])


def _distance(reasons: list[str], mixers: list[str]) -> tuple[int, int, int]:
    """Return how far a class is from a configuration: first come parts that it has not, of these mixers, then keys."""
    parts = [reason for reason in reasons if reason.startswith("model.pattern")]
    return len(parts), sum(any(words in reason for words in mixers) for reason in parts), len(reasons)


def family_of_foreign(foreign: Mapping[str, Any]) -> Family:
    """Return the family that a foreign config.json names.

    Raises:
        ForeignConfigError: if it is none of those that can be read.
    """
    if "model_type" not in foreign:
        raise ForeignConfigError([f"model_type: is missing; must be one of {sorted(FAMILIES)}"])
    model_type = foreign["model_type"]
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ForeignConfigError([f"model_type = {shown(model_type)}: must be one of {sorted(FAMILIES)}"])
    return FAMILIES[model_type]


def config_from_foreign(foreign: Mapping[str, Any]) -> ModelConfig:
    """Return our configuration of the model that a foreign config.json describes.

    Raises:
        ForeignConfigError: if the class cannot be read, its configuration is damaged, or it asks for what we do not
            compute; with every key at fault.
    """
    family = family_of_foreign(foreign)
    try:
        foreign = renamed(foreign, family.aliases)
    except ValueError as error:
        raise ForeignConfigError(str(error).split("\n")) from None
    if problems := key_problems(foreign, family.needed, family.not_null):
        raise ForeignConfigError(problems)
    problems = fixed_problems(foreign, family.fixed)
    try:
        table = family.to_ours(foreign)
    except ValueError as error:
        problems += str(error).split("\n")
    if problems:
        raise ForeignConfigError(problems)
    try:
        config = ModelConfig(**table)
    except ValidationError as error:  # what passed the rules of single keys and no size of ours is
        lines = [f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in error.errors(include_url=False)]
        raise ForeignConfigError(lines) from None
    config = _without_idle_scales(config)
    if problems := size_problems(config):
        raise ForeignConfigError(problems)
    return config


def _without_idle_scales(config: ModelConfig) -> ModelConfig:
    """Return the configuration without those of yarn's scales that the class has no use for, nor have we."""
    scaling, prefix = config.rope_scaling, "rope_scaling.mscale"
    idle = {key.key.rpartition(".")[2]: 0.0 for key in idle_keys(config) if key.key.startswith(prefix)}
    if scaling is None or scaling.kind != "yarn" or not idle:
        return config
    return config.model_copy(update={"rope_scaling": scaling.model_copy(update=idle)})
