"""From a Hugging Face folder to a run file that goes on from its weights: what `meshwright import` does, as a function.

    read config.json  ->  names and shapes of all tensors  ->  compare with transformers  ->  write the run file

The weights stay where they are: `[init] from` in the run file names the folder, and each rank reads its part of it when
the run starts (launcher/training/branching.py). Nothing is written where anything is wrong.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from meshwright.data.aside import why_not_made, write_whole
from meshwright.launcher.build import empty_model
from meshwright.launcher.runfile.cross_checks import untrainable
from meshwright.launcher.runfile.messages import ConfigError, cut_short
from meshwright.launcher.runfile.read import examine
from meshwright.launcher.runfile.write import toml_of
from meshwright.launcher.weights.destination import not_written
from meshwright.launcher.weights.export_report import LogitsReport
from meshwright.launcher.weights.read_weights import ExportWeights, fill_model, what_lies_at
from meshwright.launcher.weights.verify_export import LOADED, compare_logits, import_transformers, their_logits
from meshwright.model.config import ModelConfig
from meshwright.model.counts.costs import parameter_count

SAMPLES, LONGEST_SAMPLE, LONGEST_RUN = 2, 64, 4096


@dataclass(frozen=True)
class ImportRequest:
    """What a user asks for."""

    source: Path
    """A Hugging Face folder: config.json and safetensors files."""
    out: Path | None = None
    """The run file to write; None: `<folder's name>.toml` here."""
    store: str = ""
    """The token store of the run; "": `output/<folder's name>-store`, to be prepared."""
    verify: bool = True
    overwrite: bool = False


class Imported(NamedTuple):
    """What came of it."""

    run_file: Path
    class_name: str
    config: ModelConfig
    weights: int
    prepare: str
    """The command that makes the store, empty where the folder has no tokenizer.json."""
    logits: LogitsReport | None
    """How our logits and those of the class compare; None where that was not asked for."""


def import_run(request: ImportRequest) -> Imported:
    """Look at everything in the folder, compare what it computes with transformers, and write the run file.

    Raises:
        ValueError: if the folder is no model that can be read, naming every reason, the run file is there already, or
            what is needed to compare is missing.
    """
    folder = request.source
    if what_lies_at(folder) != "export":
        raise ValueError(f"{folder}: is a run or a checkpoint of ours; init.from in a run file takes it as it is")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).lstrip("._-") or "imported"
    out = request.out or Path(f"{name}.toml")
    if why := _why_not_written(out):  # before anything long is done
        raise ValueError(not_written(out, "the run file", why))
    if out.exists() and not request.overwrite:
        raise ValueError(f"--out {out}: is there already; give another name, or --overwrite to replace it")
    if request.verify:
        import_transformers()  # a missing library is told before anything long is done
    weights = ExportWeights(folder)
    tables = _tables(request, weights, name)
    run_file, problems = examine(tables)
    # What only training minds is told by `check` and `train`: the model is computed and exported as it is.
    if run_file is None or problems != untrainable(run_file):
        raise ConfigError(f"{folder}: the run file for it", problems)
    logits = compare_with_transformers(weights) if request.verify else None
    count, tokenizer = parameter_count(weights.config), folder / "tokenizer.json"
    store = tables["data"]["store"]
    prepare = f"meshwright prepare --tokenizer {tokenizer} --out {store} TEXT..." if tokenizer.is_file() else ""
    imported = Imported(out, weights.class_name, weights.config, count, prepare, logits)
    if logits is None or failure_of(logits) is None:
        try:
            write_whole(out, _page(imported, folder, tables))
        except OSError as error:
            raise ValueError(not_written(out, "the run file", error.strerror or str(error))) from None
    return imported


def _why_not_written(out: Path) -> str | None:
    """Return why no file can be written there, as far as that can be seen without writing."""
    return why_not_made(out) or ("is a folder" if out.is_dir() else None)


@torch.no_grad()
def compare_with_transformers(weights: ExportWeights) -> LogitsReport:
    """Compare our logits of fixed token ids with those of the class, both in fp32.

    The ids are no text, so that no tokenizer is needed; they reach over the whole vocabulary.

    Raises:
        ConfigError: if weights are not finite, or transformers cannot load the folder or compute with it.
    """
    model = empty_model(weights.config, torch.device("cpu"))
    fill_model(model, weights)
    transformers = import_transformers()
    with _told_of_transformers(weights.path, "load the folder"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(weights.path, **LOADED, **weights.family.loaded_with)
    length = min(LONGEST_SAMPLE, weights.max_positions or LONGEST_SAMPLE)
    ids = torch.arange(length * SAMPLES) * 7919 % weights.config.vocab_size
    tokens = ids.view(SAMPLES, length).T.contiguous()

    def logits(batch: Tensor) -> Tensor:
        with _told_of_transformers(weights.path, "compute with the folder"):
            return their_logits(theirs.eval(), batch)

    return compare_logits(model, logits, tokens)[0]


@contextmanager
def _told_of_transformers(folder: Path, what: str) -> Iterator[None]:
    """Tell any error of the library in one line: in what it reads of a folder it trips in many ways."""
    try:
        yield
    except Exception as error:  # nothing narrower is common to them
        words = " ".join(str(error).split())
        line = f"transformers cannot {what}: {type(error).__name__}: {cut_short(words)}"
        way_out = "a folder that save_pretrained wrote, or --skip-verify to do without the comparison, would fit"
        raise ConfigError(str(folder), [f"{line}; {way_out}"]) from error


def failure_of(logits: LogitsReport) -> str | None:
    """Return what is out of bounds, None if nothing is."""
    if logits.finite and logits.max_difference <= logits.limit:
        return None
    return (
        f"the largest difference of logits is {logits.max_difference:.3g}, allowed are {logits.limit:.3g}"
        if logits.finite
        else "logits are not finite"
    )


def _tables(request: ImportRequest, weights: ExportWeights, name: str) -> dict[str, Any]:
    """Return the run file: the model as it is, and a start that is gentle with trained weights."""
    longest = min(weights.max_positions or LONGEST_RUN, LONGEST_RUN)
    return {
        "run": {"name": name},
        "model": _without_defaults(weights.config),
        "data": {"store": request.store or f"output/{name}-store", "seq_len": longest},
        "train": {"steps": 1000, "global_batch_size": 8},
        "learning_rate": {"peak": 1e-5, "warmup_steps": 100},
        "init": {"from": str(request.source)},
    }


def _without_defaults(config: ModelConfig) -> Mapping[str, Any]:
    """Return the keys of [model] that say something, without sizes of parts that are not there."""
    table = config.model_dump(exclude_defaults=True, exclude_none=True)
    if not config.has("mlp"):
        table.pop("ffn_hidden_size", None)
    return {key: value for key, value in table.items() if value or isinstance(value, bool)}


def _page(imported: Imported, folder: Path, tables: dict[str, Any]) -> str:
    lines = [
        f"# Goes on from the weights in {folder} ({imported.class_name}, {imported.weights:,} weights).",
        "#",
        *([f"#   {imported.prepare}"] if imported.prepare else []),
        f"#   meshwright train {imported.run_file}",
        "",
        "",
    ]
    return "\n".join(lines) + toml_of(tables)
