"""Begin a run from the weights of another one, or of an export: to branch, to anneal, to train on another mixture.

Step, data position and learning rate begin anew. Weights mean nothing under another vocabulary, so the tokenizer must
be that of the run's store: the same file, or one that gives every token the same number.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from meshwright.data.meta import TOKENIZER_NAME
from meshwright.launcher.build import Run, held_dtype
from meshwright.launcher.ranks.one_outcome import one_outcome
from meshwright.launcher.runfile.messages import ConfigError
from meshwright.launcher.runfile.source_rules import (
    differing_keys,
    made_of,
    not_dense,
    source_problems,
    training_line,
)
from meshwright.launcher.training.kept_moments import Kept, kept_moments
from meshwright.launcher.training.progress import Progress, held_tensors
from meshwright.launcher.weights.foreign_files import first_told
from meshwright.launcher.weights.read_weights import (
    CheckpointWeights,
    ExportWeights,
    Source,
    source_of_kind,
    what_lies_at,
)
from meshwright.launcher.weights.saved_run import run_file_of
from meshwright.launcher.weights.upcycle import Upcycled, Weights
from meshwright.model.config import ModelConfig
from meshwright.model.counts.shapes import parameter_shapes
from meshwright.model.families.family import BUFFERS
from meshwright.model.parts import build_model
from meshwright.parallel.checkpoint.agree import CheckpointError
from meshwright.parallel.checkpoint.describe import HeldPart
from meshwright.parallel.checkpoint.load import Expect, load_checkpoint, read_state, saved_tensors
from meshwright.parallel.checkpoint.verify import verify
from meshwright.parallel.initialise import fill, init_rules
from meshwright.parallel.whole.tensors import Box


def begin_from(run: Run, source: Path, events: list[str]) -> Progress:
    """Fill the run with a checkpoint's or an export's weights (and by choice moments); add to `events` what was done.

    Raises:
        ConfigError: if what lies there is damaged, of another model or of another tokenizer.
    """
    load, title = run.run_file.init.load, f"init.from = {source}"
    kind = one_outcome(run.mesh, title, lambda: what_lies_at(source))
    with _as_given(title):
        found = source_of_kind(source, kind, run.mesh)
        state = read_state(found.path, run.mesh) if found.is_checkpoint else None
    for path, why in found.passed_over.items():
        events.append(f"passed over {path}: {'; '.join(why)}")
    one_outcome(run.mesh, title, lambda: _check_tokenizer(run, found, state, events))
    is_upcycled = run.run_file.init.upcycle != "none" or run.run_file.init.pool_kv_heads
    if state is not None and not is_upcycled:
        updates = _fill_from_checkpoint(run, found, state, events, title)
    else:
        if found.is_checkpoint and not found.is_verified and (damage := verify(found.path, run.mesh)):
            raise ConfigError(title, damage, is_same_on_all_ranks=True)
        updates = one_outcome(run.mesh, title, lambda: _fill_from_weights(run, found, state, events))
    run.optimizer.set_updates(updates)
    run.engine.publish_weights()
    events.append(f"begun from {found.path} ({load})")
    return Progress(updates=updates)


@contextmanager
def _as_given(title: str) -> Iterator[None]:
    """Tell what verifying and loading find wrong, the same on all ranks, as a mistake in what was given."""
    try:
        yield
    except (ValueError, CheckpointError) as error:
        raise ConfigError(title, str(error).splitlines(), is_same_on_all_ranks=True) from None


def _fill_from_checkpoint(run: Run, found: Source, state: dict[str, Any], events: list[str], title: str) -> int:
    """Read this rank's parts; return how many updates the moments hold, 0 without them."""
    with_moments = run.run_file.init.load == "weights+optimizer"
    kept, wanted = one_outcome(run.mesh, f"init.from = {found.path}", lambda: _kept_and_wanted(run, found.path, state))
    expect = Expect(None, may_stay_unread=("optimizer.", BUFFERS), same_dtype=False, is_verified=found.is_verified)
    with _as_given(title):
        load_checkpoint(found.path, wanted, run.mesh, expect)
    events += kept.notes
    try:
        events += _differences(run, run_file_of(state, found.path).model)
    except ConfigError as error:  # of a version with other keys: its weights are taken by name and shape all the same
        events.append(
            f"{error.source} is not readable ({error.problems[0]}): whether [model] differs was not looked at"
        )
    return int(state["updates"]) if with_moments and kept.keeps_updates else 0


def _kept_and_wanted(run: Run, path: Path, state: dict[str, Any]) -> tuple[Kept, dict[str, HeldPart]]:
    """Return what is kept of the moments there, and this rank's parts of all that is read."""
    with_moments = run.run_file.init.load == "weights+optimizer"
    there = saved_tensors(path)
    kept = kept_moments(run_file_of(state, path), run.run_file) if with_moments else Kept()
    # Routers choose by buffers, so these are as much of the model as weights are. But they belong to a setting of the
    # routers, which a branch may change: what is not there begins as in a new run.
    return kept, {
        name: part
        for name, part in kept.of(held_tensors(run, optimizer=with_moments)).items()
        if not name.startswith(BUFFERS) or name in there
    }


def _differences(run: Run, there: ModelConfig) -> list[str]:
    """Return the line for the keys by which the weights compute something else here than there, if there are any."""
    init = run.run_file.init
    if init.upcycle != "none":
        return training_line(run.run_file.model)  # all else was refused
    found = differing_keys(there, run.run_file.model)
    told = [str(change) for change in found if not (init.pool_kv_heads and change.key == "num_kv_heads")]
    line = f"the weights compute something else than at init.from, where [model] differs: {'; '.join(told)}"
    return [line] if told else []


def _upcycled(run: Run, weights: Weights, there: ModelConfig) -> Weights:
    """Return the weights that are made of a dense model's.

    Raises:
        ValueError: naming every key, and every weight, with which that cannot be done.
    """
    model, init, problems = run.run_file.model, run.run_file.init, list[str]()
    if line := not_dense(there, init):
        raise ValueError(line)
    try:
        made = Upcycled(weights, model, init, run.run_file.run.seed, lambda name: _fresh(run, name))
    except ValueError as error:
        problems = str(error).splitlines()
    # Of other layers other weights follow: the line for the pattern says it.
    of_weights = [] if init.upcycle != "none" and not made_of(there, model) else problems
    problems = [*source_problems(there, model, init, same_shapes=not problems), *of_weights]
    if problems:
        raise ValueError("\n".join(first_told(problems)))
    return made


def _fill_from_weights(run: Run, found: Source, state: dict[str, Any] | None, events: list[str]) -> int:
    """Read this rank's part of every weight, of an export or of what a dense model makes.

    Raises:
        ValueError: naming every weight that is not there, or has another shape.
    """
    init = run.run_file.init
    if init.load != "weights":
        what = "an export has" if state is None else "heads that are pooled have"
        raise ValueError(f'{what} no optimizer state; init.load = "weights" would fit')
    weights: Weights
    if state is None:
        weights = opened = ExportWeights(found.path)
        model = opened.config
    else:
        weights, opened = CheckpointWeights(found.path, is_verified=True), None
        model = run_file_of(state, found.path).model
    if init.upcycle != "none" or init.pool_kv_heads:
        weights = _upcycled(run, weights, model)
    # Of the whole model, whose other weights other ranks hold: all ranks find the same mistakes.
    wanted, there = parameter_shapes(run.run_file.model), weights.shapes()
    wrong = [
        f"{name} is {list(there[name]) if name in there else 'missing'}, the run file has {list(shape)}"
        for name, shape in wanted.items()
        if there.get(name) != shape
    ]
    tensors = held_tensors(run, optimizer=False)
    wrong += [f"{name} has no place in the model" for name in sorted(there.keys() - wanted.keys())]
    buffers = weights.buffers()
    whole_model = build_model(run.run_file.model, device="meta")
    known = {BUFFERS + name: tuple(buffer.shape) for name, buffer in whole_model.named_buffers()}
    fitting = {name for name, shape in buffers.items() if known.get(name) == shape}
    if opened:  # of an export all of it is used; for those of a run a branch may set its routers otherwise
        unfit = [name for name in buffers if name not in fitting]
        wrong += [f"{name} is {list(buffers[name])}, which the run file's model has not" for name in unfit]
    if wrong:
        raise ValueError("\n".join(wrong))
    for name, part in tensors.items():
        # Buffers that are not there are of training alone, or of another setting of the routers.
        if (name in there or name in fitting) and part.tensor.numel():
            whole = Box((0,) * part.tensor.dim(), part.global_shape)
            rows, *columns = Box(part.offset, tuple(part.tensor.shape)).within(whole)
            part.tensor.copy_(weights.read(name, (rows.start, rows.stop))[(slice(None), *columns)])
    if opened:
        opened.check_finite()
    events += _differences(run, model)
    return 0


def _fresh(run: Run, name: str) -> Tensor:
    """Return a whole weight as a new run begins with it."""
    shape = parameter_shapes(run.run_file.model)[name]
    whole, seed = torch.empty(shape, dtype=held_dtype(run.run_file)), run.run_file.run.seed
    fill(whole, init_rules(run.model)[name], seed=seed, name=name, global_shape=shape, offset=(0,) * len(shape))
    return whole


def _check_tokenizer(run: Run, found: Source, state: dict[str, Any] | None, events: list[str]) -> None:
    """Compare the tokenizer that the weights were trained under with that of the run's store; `state`: a checkpoint's.

    Raises:
        ValueError: if a token has another number.
    """
    ours = run.store.path / TOKENIZER_NAME
    if state is not None:
        if state["tokenizer"] == run.store.meta.tokenizer.sha256:
            return
        theirs = found.run_folder / TOKENIZER_NAME if found.run_folder else None
    else:
        theirs = found.path / TOKENIZER_NAME
        if theirs.is_file() and hashlib.sha256(theirs.read_bytes()).hexdigest() == run.store.meta.tokenizer.sha256:
            return
    if theirs is None or not theirs.is_file():
        if state is not None:
            raise ValueError(f"it was trained under another tokenizer than that of data.store = {run.store.path}")
        events.append(
            f"{found.path} has no tokenizer.json: whether its tokens are those of the store was not looked at"
        )
        return
    if _numbers_of_tokens(theirs) != _numbers_of_tokens(ours):
        raise ValueError(
            f"its tokenizer ({theirs}) gives tokens other numbers than that of data.store = {run.store.path};"
            f" prepare the store with --tokenizer {theirs}"
        )


def _numbers_of_tokens(path: Path) -> dict[str, int]:
    try:
        return Tokenizer.from_file(str(path)).get_vocab()
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} cannot be read as a tokenizer: {error}") from None
