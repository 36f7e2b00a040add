"""A sound run file with some keys changed, for the tests of checks."""

from typing import Any

from meshwright.launcher.runfile.tables import RunFile
from meshwright.model.presets import with_preset

MOE = {"preset": "moe-tiny", "moe": {"num_experts": 12}}


def run_file(**tables: dict[str, Any]) -> RunFile:
    """Return a sound run file with some keys changed, table by table."""
    sound: dict[str, dict[str, Any]] = {
        "run": {"name": "x"},
        "model": {"preset": "dense-tiny"},
        "data": {"store": "s", "seq_len": 64},
        "train": {"steps": 100, "global_batch_size": 24},
        "learning_rate": {"peak": 1e-3},
    }
    merged = {name: {**sound.get(name, {}), **tables.get(name, {})} for name in {*sound, *tables}}
    merged["model"] = with_preset(merged["model"])
    return RunFile.model_validate(merged)
