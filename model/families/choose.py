"""Which foreign class is exactly this model; a model that none of them is is refused, with every reason.

                          dense              MoE in some layers
    without QK-norm       llama              mixtral
    with QK-norm          qwen3              qwen3_moe

Only one class can come near a configuration, because each has QK-norm or not and experts or not; what
else the class asks for is its own list of reasons.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from meshwright.model.config import ModelConfig
from meshwright.model.families.family import Family
from meshwright.model.families.foreign_keys import key_problems, shown, size_problems
from meshwright.model.families.llama import LLAMA
from meshwright.model.families.mixtral import MIXTRAL
from meshwright.model.families.qwen3 import QWEN3
from meshwright.model.families.qwen3_moe import QWEN3_MOE

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, QWEN3, MIXTRAL, QWEN3_MOE)}


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
    """Return the class that represents the configuration exactly.

    Raises:
        NotRepresentableError: with every reason, if there is none.
    """
    family = nearest_family(config)
    reasons = family.reasons_against(config)
    if reasons:
        raise NotRepresentableError(family.class_name, reasons)
    return family


def nearest_family(config: ModelConfig) -> Family:
    """Return the only class that could represent the configuration."""
    has_experts = any(kinds.feedforward == "moe" for kinds in config.layers)
    if has_experts:
        return QWEN3_MOE if config.qk_norm else MIXTRAL
    return QWEN3 if config.qk_norm else LLAMA


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
    if problems := key_problems(foreign, family.needed):
        raise ForeignConfigError(problems)
    try:
        config = ModelConfig(**family.to_ours(foreign))
    except ValidationError as error:  # what passed the rules of single keys and no size of ours is
        lines = [f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in error.errors(include_url=False)]
        raise ForeignConfigError(lines) from None
    except ValueError as error:
        raise ForeignConfigError(str(error).split("; ")) from None
    if problems := size_problems(config):
        raise ForeignConfigError(problems)
    return config
