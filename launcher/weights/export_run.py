"""From a run or checkpoint to an exported, verified folder: what `meshwright export` does, as a function.

    find the checkpoint  ->  choose the class, or refuse  ->  write aside  ->  verify  ->  report  ->  rename

Nothing is written when the model cannot be represented or the text to verify on is not there; whatever stops the
writing, an older export under the same name stays as it was.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from meshwright.data.store import TokenStore
from meshwright.data.tokenizer import load_tokenizer
from meshwright.launcher.build import empty_model
from meshwright.launcher.runfile.input_file import input_bytes
from meshwright.launcher.runfile.messages import ConfigError
from meshwright.launcher.weights.destination import (
    REPORT_PAGE,
    destination_problems,
    finish,
    followed,
    written_partially,
)
from meshwright.launcher.weights.export_report import ExportReport, write_report
from meshwright.launcher.weights.hf_writer import (
    EXPORT_DTYPES,
    OF_TRAINING,
    ExportSettings,
    export_bytes,
    write_hf_folder,
)
from meshwright.launcher.weights.read_weights import CheckpointWeights, fill_model, find_source
from meshwright.launcher.weights.safetensors_stream import DEFAULT_MAX_SHARD_BYTES
from meshwright.launcher.weights.saved_run import SavedRun, read_saved_run
from meshwright.launcher.weights.verify_export import (
    VerificationText,
    import_transformers,
    round_weights,
    rounding_effect,
    verify_export,
)
from meshwright.model.families.choose import choose_family

MIN_SAMPLES, TOKENS = 2, 1024
LONGEST_SAMPLE = 512
MOST_FILE_GB = 1e6
# Of a longer text only the beginning would be used.
MOST_TEXT_BYTES = 2**24


@dataclass(frozen=True)
class ExportRequest:
    """What a user asks for."""

    source: Path
    """A run's folder or one of its checkpoints."""
    out: Path | None = None
    """None: `export` in the run's folder."""
    dtype: str = "fp32"
    """fp32 or bf16."""
    verify: bool = True
    overwrite: bool = False
    text: Path | None = None
    """Text to verify on; None: the validation split of the run's store."""
    end_of_text: str = ""
    """The token that ends a document; "": the one that the run recorded."""
    max_file_gb: float = DEFAULT_MAX_SHARD_BYTES / 1e9
    """Largest weight file, in 10^9 bytes."""

    def problems(self) -> list[str]:
        """Return what is wrong with the request in itself, one line each."""
        found = []
        if self.dtype not in EXPORT_DTYPES:
            found.append(f'--dtype "{self.dtype}": one of {", ".join(EXPORT_DTYPES)} would fit')
        if not 0.0 < self.max_file_gb <= MOST_FILE_GB:  # false for nan too
            rule = f"must be above 0 and at most {MOST_FILE_GB:g}; 2 to 5 are usual"
            found.append(f"--max-file-gb {self.max_file_gb:g}: {rule}")
        return found + (self.problems_at(self.out) if self.out is not None else [])

    def problems_at(self, out: Path) -> list[str]:
        """Return why the export cannot be written at `out`, one line each."""
        return destination_problems(out, overwrite=self.overwrite, may_fail=self.verify)


@dataclass(frozen=True)
class Exported:
    """What came of it."""

    folder: Path
    """Where the files are: the wanted folder, or beside it with `.failed` when the verification failed."""
    about: dict[str, Any]
    report: ExportReport | None
    passed_over: dict[Path, list[str]]
    """Newer checkpoints of the run that are damaged, and how."""

    @property
    def failures(self) -> list[str]:
        """Return every figure that is out of bounds."""
        return self.report.failures() if self.report is not None else []

    @property
    def page(self) -> Path:
        """Return the report for people."""
        return self.folder / REPORT_PAGE


def export_run(request: ExportRequest) -> Exported:
    """Export a run's newest checkpoint, or the one that is named, and verify the result.

    Raises:
        ValueError: if the source is no checkpoint, no class is exactly the model, something that the export needs is
            missing, or the destination is taken.
    """
    if problems := request.problems():
        raise ConfigError("meshwright export", problems)
    source = find_source(request.source)
    if not source.is_checkpoint:
        raise ValueError(f"{request.source}: is an export already; give a run's folder or a checkpoint")
    out = request.out or (source.run_folder / "export" if source.run_folder else None)
    if out is None:
        raise ValueError(f"{request.source}: lies in no run's folder, so say where the export should go with --out")
    if request.out is None and (problems := request.problems_at(out)):
        raise ConfigError("meshwright export", problems)
    out = followed(out)
    saved = read_saved_run(source)
    family = choose_family(saved.run_file.model)
    settings = _settings(request, saved)
    text = _verification_text(request, saved, settings) if request.verify else None
    weights = CheckpointWeights(source.path, is_verified=source.is_verified)
    with written_partially(out, export_bytes(saved.run_file.model, settings)) as partial:
        write_hf_folder(partial, saved.run_file.model, weights, settings)
        report = _verified(partial, saved, weights, text, settings) if text is not None else None
        about = {
            "source": str(source.path),
            "step": saved.step,
            "run": saved.run_file.run.name,
            "class": family.class_name,
            "dtype": request.dtype,
            "weights": sum(
                int(np.prod(shape)) for name, shape in weights.shapes().items() if not name.startswith(OF_TRAINING)
            ),
            "files": len(list(partial.glob("*.safetensors"))),
            "bytes": sum(path.stat().st_size for path in partial.iterdir()),
        }
        write_report(partial, report, about)
        passed = report is None or not report.failures()
        return Exported(finish(partial, out, passed=passed), about, report, source.passed_over)


def _settings(request: ExportRequest, saved: SavedRun) -> ExportSettings:
    if not saved.tokenizer.is_file():
        raise ValueError(f"{saved.tokenizer} is missing: an export needs the tokenizer that the run was trained with")
    tokenizer = load_tokenizer(saved.tokenizer, request.end_of_text or saved.end_of_text)
    vocab_size = saved.run_file.model.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{saved.tokenizer} has {tokenizer.vocab_size} tokens, the model {vocab_size}: it is another model's"
        )
    return ExportSettings(
        tokenizer_json=tokenizer.json.decode(),
        end_token=tokenizer.end_of_text,
        max_positions=saved.run_file.data.seq_len,
        dtype=request.dtype,
        max_shard_bytes=max(1, int(request.max_file_gb * 1e9)),
    )


def _verified(
    folder: Path,
    saved: SavedRun,
    weights: CheckpointWeights,
    text: VerificationText,
    settings: ExportSettings,
) -> ExportReport:
    """Compare the folder with our model, whose weights are rounded to the export's dtype."""
    model = empty_model(saved.run_file.model, torch.device("cpu"))
    fill_model(model, weights)
    rounding: dict[str, float] = {}
    if settings.dtype != "fp32":
        with torch.no_grad():
            before = model(text.tokens)
            round_weights(model, EXPORT_DTYPES[settings.dtype])
            rounding = rounding_effect(before, model(text.tokens), text.tokens)
    report = verify_export(folder, saved.run_file.model, weights, model, text, dtype=settings.dtype)
    return report.with_rounding(rounding)


def _verification_text(request: ExportRequest, saved: SavedRun, settings: ExportSettings) -> VerificationText:
    """Return a few samples of real text: of the user's file, or of the run's held-out split.

    Raises:
        ValueError: if there is no such text, with the ways out.
    """
    import_transformers()  # a missing library is told before anything is written
    length = min(saved.run_file.data.seq_len, LONGEST_SAMPLE)
    if request.text is not None:
        return _text_of_file(request.text, settings, length)
    folder = saved.run_file.data.store
    ways_out = "give a text with --text FILE, or --skip-verify"
    if not (Path(folder) / "meta.json").is_file():
        raise ValueError(f"data.store = {folder}: is not here, and the export is verified on its text; {ways_out}")
    store = TokenStore.open(folder)
    if store.fingerprint != saved.store_fingerprint:
        raise ValueError(f"data.store = {folder}: holds other tokens than the run was trained on; {ways_out}")
    name = "validation" if "validation" in store.splits else "train"
    split = store.splits[name]
    if split.num_tokens < 2:
        raise ValueError(f"data.store = {folder}: its {name} split has no text to verify on; {ways_out}")
    length = min(length, split.num_tokens)
    count = max(MIN_SAMPLES, TOKENS // length)
    starts = np.linspace(0, split.num_tokens - length, count).astype(int)
    samples = np.stack([split.read(int(start), length).astype(np.int64) for start in starts])
    tokens = torch.from_numpy(samples).T.contiguous()
    return VerificationText(tokens, f"the {name} split of {folder}", settings.tokenizer_json)


def _text_of_file(path: Path, settings: ExportSettings, length: int) -> VerificationText:
    try:
        ids = Tokenizer.from_str(settings.tokenizer_json).encode(input_bytes(path, MOST_TEXT_BYTES).decode()).ids
    except OSError as error:
        raise ValueError(f"--text {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--text {path}: is no UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
        ) from None
    except ValueError as error:
        raise ValueError(f"--text {path}: {error}") from None
    if len(ids) < 2:
        raise ValueError(f"--text {path}: has {len(ids)} tokens; at least 2 are needed, and a page is better")
    samples = max(1, min(TOKENS, len(ids)) // length)
    length = min(length, len(ids))
    tokens = torch.tensor(ids[: samples * length]).view(samples, length).T.contiguous()
    return VerificationText(tokens, str(path), settings.tokenizer_json)
