"""Reads any part of any weight, by our name, from a checkpoint or from an exported folder.

    open_weights("output/moe")                               a run: its newest checkpoint that verifies
    open_weights("output/moe/checkpoints/step_00000100")     one checkpoint
    open_weights("output/moe/export")                        a Hugging Face folder of a family that we know

    weights.shapes()                                         {"embedding.weight": (8192, 384), ...}
    weights.read("layers.0.feedforward.part.experts.gate")           the whole [e, f, h]
    weights.read("layers.0.feedforward.part.experts.gate", (2, 4))   experts 2 and 3 alone: other bytes stay on disk

In a checkpoint a weight lies in parts, as the ranks held them; in an exported folder an expert may be a tensor of its
own, and q, k and v one together. Both look the same from here. What is kept with the weights and is no parameter (the
bias of a router) has "buffers." before its name. One process reads; no process group is needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from meshwright.launcher.runfile.messages import ConfigError
from meshwright.launcher.weights.foreign_files import are_the_same, files_of, first_told, read_json
from meshwright.launcher.weights.rows import read_ours
from meshwright.model.config import ModelConfig
from meshwright.model.families.choose import ForeignConfigError, config_from_foreign, family_of_foreign
from meshwright.model.families.family import BUFFERS, Family, Row, our_shapes
from meshwright.parallel.checkpoint.describe import HeldPart
from meshwright.parallel.checkpoint.folder import MANIFEST_NAME, read_manifest, read_sealed
from meshwright.parallel.checkpoint.load import SavedTensor, saved_tensors
from meshwright.parallel.checkpoint.plan import PartLoadPlanner
from meshwright.parallel.checkpoint.storage import TABLE_NAME, FolderReader, table_from_json
from meshwright.parallel.checkpoint.verify import newest_that_verifies, verify
from meshwright.parallel.mesh import Mesh, single_process_mesh

Kind = Literal["checkpoint", "export", "run"]
"""What a user's path can be."""

# Beginnings of names in a checkpoint that are neither weights nor kept with them.
NOT_WEIGHTS = ("optimizer.",)

# As many missing tensors are named one by one.
MOST_NAMED = 100_000

# What classes that tie it call the output; what it holds is the embedding, by our name.
TIED_OUTPUT = "lm_head.weight"
EMBEDDING = "embedding.weight"

# What a safetensors file calls the dtypes of weights; of others, scales of their own would be needed.
FLOATS = ("F64", "F32", "F16", "BF16")


class CheckpointWeights:
    """The weights of one checkpoint folder, verified when it is opened."""

    def __init__(self, path: Path, *, is_verified: bool = False) -> None:
        """Verify every file, unless that was done just now, and read the table.

        Raises:
            ValueError: if a file is missing, cut short or changed, naming it.
        """
        damage = [] if is_verified else verify(path, single_process_mesh())
        if damage:
            raise ValueError(f"{path} is damaged: " + "; ".join(damage))
        self.path = path
        self._metadata = table_from_json(read_sealed(path, TABLE_NAME, read_manifest(path)))
        self._reader = FolderReader(path)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=False)
        self._saved: dict[str, SavedTensor] = {
            name: saved for name, saved in saved_tensors(path).items() if not name.startswith(NOT_WEIGHTS)
        }

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return every weight's global shape."""
        return {name: saved.shape for name, saved in self._saved.items() if not name.startswith(BUFFERS)}

    def buffers(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of what is kept with the weights and is no parameter."""
        return {name: saved.shape for name, saved in self._saved.items() if name.startswith(BUFFERS)}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Return a whole weight, or its rows from the first to before the second, in the dtype it was saved in."""
        saved = self._saved[name]
        first, end = _checked_rows(name, saved.shape, rows)
        wanted = torch.empty(end - first, *saved.shape[1:], dtype=saved.dtype)
        part = HeldPart(wanted, saved.shape, (first,) + (0,) * (len(saved.shape) - 1))
        planner = PartLoadPlanner({name: part}, self._metadata)
        self._reader.read_data(planner.create_local_plan(), planner).wait()
        return wanted


class ExportWeights:
    """The weights of an exported folder, under our names."""

    def __init__(self, folder: Path) -> None:
        """Read config.json and the headers of the files.

        Raises:
            ConfigError: if the folder is of a family or configuration that cannot be read, or tensors are missing,
                left over or of another shape, naming every one.
        """
        self.path = folder
        foreign = read_json(folder / "config.json")
        try:
            self.config: ModelConfig = config_from_foreign(foreign)
        except ForeignConfigError as error:
            raise ConfigError(str(folder / "config.json"), error.problems) from None
        self.family = family = family_of_foreign(foreign)
        self.class_name: str = family.class_name
        longest = foreign.get("max_position_embeddings", foreign.get("n_positions"))
        self.max_positions: int | None = longest if type(longest) is int and longest > 0 else None
        self._file_of = files_of(folder)
        self._says_tied = "tie_word_embeddings" in foreign
        self._saved_as: dict[str, str] = {}
        self._not_finite: set[str] = set()
        # Not all of them: a count that is only a slip would make rows until the memory ends.
        most = len(self._file_of) + MOST_NAMED
        rows = list(islice(family.mapping(self.config), most + 1))
        if len(rows) > most:
            raise ConfigError(
                str(folder),
                [
                    f"config.json describes a model of more than {most:,} tensors, and the weight files hold"
                    f" {len(self._file_of):,}"
                ],
            )
        # Shared experts of which there are none: transformers saves their products, of size 0.
        rows = [row for row in rows if 0 not in row.shape]
        self._held: dict[str, list[tuple[Row, int]]] = {}
        for row in rows:
            for number, source in enumerate(row.sources):
                self._held.setdefault(source.ours, []).append((row, number))
        self._shapes = our_shapes(rows)
        if problems := self._problems(rows, family):
            raise ConfigError(f"{folder} does not hold the model of its config.json", first_told(problems))

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return every weight's global shape."""
        return {name: shape for name, shape in self._shapes.items() if not name.startswith(BUFFERS)}

    def buffers(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of what the class holds and is no parameter of ours: biases of routers."""
        return {name: shape for name, shape in self._shapes.items() if name.startswith(BUFFERS)}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Return a whole weight, or its rows from the first to before the second, in the dtype of the file."""
        first, end = _checked_rows(name, self._shapes[name], rows)
        held = self._held[name]
        if held[0][0].sources[held[0][1]].at is None:
            ((row, number),) = held
            return read_ours(row, number, (first, end), self._read_foreign)
        slices = {row.sources[number].at: (row, number) for row, number in held}
        if first == end:
            return self._read_foreign(held[0][0].theirs, False, 0, 0).new_empty(0, *self._shapes[name][1:])
        return torch.stack([self._read_slice(*slices[at]) for at in range(first, end)])

    def _read_slice(self, row: Row, number: int) -> Tensor:
        return read_ours(row, number, (0, row.sources[number].shape[0]), self._read_foreign)

    def _read_foreign(self, name: str, is_last_dim: bool, first: int, end: int) -> Tensor:
        saved = self._saved_as[name]
        with safe_open(self._file_of[saved], framework="pt") as file:
            whole = file.get_slice(saved)
            tensor: Tensor = whole[:, first:end] if is_last_dim else whole[first:end]
        # Of NaN and infinity both ends tell; nothing as large as the tensor is made for it.
        if tensor.numel() and not all(end.isfinite() for end in tensor.aminmax()):
            self._not_finite.add(saved)
        return tensor

    def check_finite(self) -> None:
        """Look at what was read so far.

        Raises:
            ConfigError: naming every tensor that holds NaN or infinity.
        """
        way_out = "an earlier checkpoint, or converting it anew, would fit"
        lines = [f"{name} holds NaN or infinity: must be finite; {way_out}" for name in sorted(self._not_finite)]
        if lines:
            raise ConfigError(str(self.path), first_told(lines))

    def _problems(self, rows: list[Row], family: Family) -> list[str]:
        """Return every tensor that is missing, left over or of another shape, and note under which name each is saved.

        Files of some classes leave the beginning of all names out, and hold masks; an output that is tied may be there
        once more.
        """
        wanted = {row.theirs: row.shape for row in rows}
        passed_over = family.passed_over(self._file_of.keys(), self.config.num_layers)
        left_over = []
        for name in sorted(self._file_of):
            if name in wanted or family.prefix + name in wanted:
                self._saved_as[name if name in wanted else family.prefix + name] = name
                continue
            is_copy = self.config.tie_embeddings and name == TIED_OUTPUT
            if not is_copy and name not in passed_over:
                left_over.append(name)
        problems = [f"{name} {list(wanted[name])} is missing" for name in sorted(wanted.keys() - self._saved_as.keys())]
        problems += [f"{name} has no place in the class" for name in self._that_hold_anything(left_over)]
        problems += self._tied_problems()
        for path in sorted(set(self._file_of.values())):
            with safe_open(path, framework="pt") as file:
                held = set(file.keys())
                for name in sorted(name for name, saved in self._saved_as.items() if saved in held):
                    shape = tuple(file.get_slice(self._saved_as[name]).get_shape())
                    if shape != wanted[name]:
                        problems.append(f"{name} is {list(shape)}, config.json says {list(wanted[name])}")
                    if (dtype := file.get_slice(self._saved_as[name]).get_dtype()) not in FLOATS:
                        rule = f"must be {', '.join(FLOATS[:-1])} or {FLOATS[-1]}"
                        way_out = "the weights as they were before quantising would fit"
                        problems.append(f"{name} is of dtype {dtype}: {rule}; {way_out}")
        return problems

    def _that_hold_anything(self, names: list[str]) -> list[str]:
        """Return those that are not of size 0."""
        of_file: dict[Path, list[str]] = {}
        for name in names:
            of_file.setdefault(self._file_of[name], []).append(name)
        holding = set[str]()
        for path, within in of_file.items():
            with safe_open(path, framework="pt") as file:
                holding.update(name for name in within if 0 not in file.get_slice(name).get_shape())
        return [name for name in names if name in holding]

    def _tied_problems(self) -> list[str]:
        """Return why an output that is there cannot be left unread, as that of a tied model is."""
        embedding = self._saved_as.get(self._held[EMBEDDING][0][0].theirs)
        if not self.config.tie_embeddings or TIED_OUTPUT not in self._file_of or embedding is None:
            return []
        if are_the_same(TIED_OUTPUT, embedding, self._file_of):
            return []
        given = " = true" if self._says_tied else f" is not given, which {self.class_name} takes as true"
        rule = f"{TIED_OUTPUT} must be {embedding} once more, and is another matrix"
        return [f"tie_word_embeddings{given}: {rule}; false would fit"]


@dataclass(frozen=True)
class Source:
    """What a user's path turned out to be."""

    path: Path
    """The checkpoint's or the export's own folder."""
    run_folder: Path | None
    """The run that a checkpoint lies in; None for an export, or a checkpoint that was moved out of its run."""
    is_checkpoint: bool
    """Whether this is a checkpoint of ours, not an export."""
    is_verified: bool = False
    """Whether finding it read every file."""
    passed_over: dict[Path, list[str]] = field(default_factory=dict)
    """Newer checkpoints of the run that are damaged, and how."""


def what_lies_at(path: Path) -> Kind:
    """Say what a user's path is, by the files that make it so.

    Raises:
        ValueError: if it is neither a run, nor a checkpoint, nor an exported folder.
    """
    try:
        if (path / MANIFEST_NAME).is_file():
            return "checkpoint"
        if (path / "config.json").is_file():
            return "export"
        if (path / "checkpoints").is_dir():
            return "run"
        what = "there is nothing" if not path.exists() else "neither a run, nor a checkpoint, nor an export"
    except OSError as error:  # such as a name that is too long
        what = f"cannot be looked at ({error.strerror})"
    raise ValueError(
        f"{path}: {what}; give a run's folder (it has checkpoints/), a checkpoint "
        "(checkpoints/step_...) or an exported folder (it has config.json)"
    )


def find_source(path: Path) -> Source:
    """Say what lies at a path; of a run, the newest checkpoint that verifies is taken.

    Raises:
        ValueError: if it is neither a run, nor a checkpoint, nor an exported folder.
    """
    return source_of_kind(path, what_lies_at(path), single_process_mesh())


def source_of_kind(path: Path, kind: Kind, mesh: Mesh) -> Source:
    """Do the same where it is known what the path is; every rank must call this, and they verify the files together.

    Raises:
        ValueError: on every rank, if no checkpoint of a run verifies.
    """
    if kind == "checkpoint":
        run_folder = path.resolve().parent.parent
        return Source(path, run_folder if (run_folder / "run.toml").is_file() else None, is_checkpoint=True)
    if kind == "export":
        return Source(path, None, is_checkpoint=False)
    newest = newest_that_verifies(path / "checkpoints", mesh)
    if newest.path is None:
        damage = [f"{folder}: {'; '.join(problems)}" for folder, problems in newest.passed_over.items()]
        raise ValueError("\n  ".join([f"{path} has no checkpoint that can be loaded", *damage]))
    return Source(newest.path, path, is_checkpoint=True, is_verified=True, passed_over=newest.passed_over)


def open_weights(path: Path) -> CheckpointWeights | ExportWeights:
    """Open the weights at a path: of a run (its newest checkpoint), a checkpoint or an exported folder.

    Raises:
        ValueError: if there are none, or they are damaged.
    """
    source = find_source(path)
    if source.is_checkpoint:
        return CheckpointWeights(source.path, is_verified=source.is_verified)
    return ExportWeights(source.path)


@torch.no_grad()
def fill_model(model: nn.Module, weights: CheckpointWeights | ExportWeights) -> None:
    """Copy the weights into a model that holds all of them, whatever its dtype and device.

    Raises:
        ValueError: if they are not exactly the model's, or those of an export not finite, naming every one at fault.
    """
    parameters, held = dict(model.named_parameters()), weights.shapes()
    problems = [f"{name} is missing" for name in parameters.keys() - held.keys()]
    problems += [f"{name} is not of this model" for name in held.keys() - parameters.keys()]
    for name in parameters.keys() & held.keys():
        if tuple(parameters[name].shape) != held[name]:
            problems.append(f"{name} is {list(held[name])}, in the model {list(parameters[name].shape)}")
    if problems:
        raise ValueError(f"{weights.path} holds another model:\n  " + "\n  ".join(sorted(problems)))
    for name, parameter in parameters.items():
        parameter.copy_(weights.read(name))
    there = weights.buffers()
    for name, buffer in model.named_buffers():
        if there.get(BUFFERS + name) == tuple(buffer.shape):  # others begin as in a new run
            buffer.copy_(weights.read(BUFFERS + name))
    if isinstance(weights, ExportWeights):
        weights.check_finite()


def _checked_rows(name: str, shape: tuple[int, ...], rows: tuple[int, int] | None) -> tuple[int, int]:
    first, end = (0, shape[0]) if rows is None else rows
    if not 0 <= first <= end <= shape[0]:
        raise ValueError(f"rows {first} to {end} are not within {name} {list(shape)}")
    return first, end
