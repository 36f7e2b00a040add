"""A trained model on one process, from a run, a checkpoint or an export: for generation and for judging exports.

run folder          its newest checkpoint that verifies; sizes from the run file in it, tokenizer beside it
checkpoint folder   the same, of that step
export folder       sizes from config.json, tokenizer.json in it
"""

from pathlib import Path
from typing import NamedTuple

import torch

from meshwright.data.meta import TOKENIZER_NAME
from meshwright.launcher.build import empty_model
from meshwright.launcher.runfile.messages import ConfigError, problem
from meshwright.launcher.weights.foreign_files import read_json
from meshwright.launcher.weights.read_weights import CheckpointWeights, ExportWeights, fill_model, find_source
from meshwright.launcher.weights.saved_run import read_saved_run
from meshwright.model.config import ModelConfig
from meshwright.model.stack import LanguageModel


class Loaded(NamedTuple):
    """A model with its weights, and what belongs to it."""

    model: LanguageModel
    config: ModelConfig
    tokenizer: Path | None
    """Its tokenizer.json, where one was found."""
    end_of_text: str | None
    """The token that ends a document; None where the folder does not say."""
    source: Path
    """The checkpoint or export that the weights are of."""
    passed_over: dict[Path, list[str]]
    """Newer checkpoints of the run that are damaged, and how."""


def load_for_inference(path: Path, device: torch.device | str = "cpu") -> Loaded:
    """Load what lies at `path` in fp32.

    Raises:
        ConfigError: if nothing there can be loaded, with the reason.
    """
    try:
        source = find_source(path)
        weights: CheckpointWeights | ExportWeights
        end_of_text: str | None
        if source.is_checkpoint:
            weights = CheckpointWeights(source.path, is_verified=source.is_verified)
            saved = read_saved_run(source)
            config, tokenizer, end_of_text = saved.run_file.model, saved.tokenizer, saved.end_of_text
        else:
            weights = ExportWeights(source.path)
            config, tokenizer, end_of_text = weights.config, source.path / TOKENIZER_NAME, _of_export(source.path)
        model = empty_model(config, torch.device(device))
        fill_model(model, weights)
    except ConfigError:
        raise  # names its file already
    except ValueError as error:
        raise ConfigError(str(path), str(error).splitlines()) from None
    there = tokenizer if tokenizer.is_file() else None
    return Loaded(model, config, there, end_of_text, source.path, source.passed_over)


def _of_export(folder: Path) -> str | None:
    """Return the end token that tokenizer_config.json names; None where it names none."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    token = read_json(path).get("eos_token")
    if isinstance(token, dict):  # older folders describe the token instead of naming it
        token = token.get("content")
    if not isinstance(token, str | None):
        raise ConfigError(str(path), [problem("eos_token", token, "must be text, or null")])
    return token
