"""What a checkpoint says of the run that wrote it: its run file, and the tokenizer that its tokens are of.

run folder/
    tokenizer.json                   of a checkpoint that was moved out of its run, the store's is taken
    checkpoints/step_.../state.json  run_file, step, store, end_of_text
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshwright.data.meta import TOKENIZER_NAME
from meshwright.launcher.runfile.messages import ConfigError
from meshwright.launcher.runfile.overrides import parse_toml
from meshwright.launcher.runfile.read import examine
from meshwright.launcher.runfile.tables import RunFile
from meshwright.launcher.weights.read_weights import Source
from meshwright.parallel.checkpoint.folder import STATE_NAME, read_manifest, read_sealed


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint's small values, for who reads it outside its run."""

    run_file: RunFile
    step: int
    store_fingerprint: str
    tokenizer: Path
    """Where its tokenizer.json should be; the file may be missing."""
    end_of_text: str
    """The token that ends a document."""


def read_saved_run(source: Source) -> SavedRun:
    """Read what the checkpoint says.

    Raises:
        ValueError: if its manifest or state is missing or damaged.
        ConfigError: if this version cannot read its run file.
    """
    state = json.loads(read_sealed(source.path, STATE_NAME, read_manifest(source.path)))
    run_file = run_file_of(state, source.path)
    tokenizer = (source.run_folder or Path(run_file.data.store)) / TOKENIZER_NAME
    return SavedRun(run_file, int(state["step"]), state["store"], tokenizer, state["end_of_text"])


def run_file_of(state: dict[str, Any], path: Path) -> RunFile:
    """Return the run file that a checkpoint was written under.

    Raises:
        ConfigError: if this version cannot read it.
    """
    try:
        tables = parse_toml(state["run_file"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: the run file in it", [str(error)]) from None
    run_file, problems = examine(tables)
    if run_file is None:
        raise ConfigError(f"{path}: the run file in it", problems)
    return run_file
