"""What a checkpoint of a run must hold, by name and global shape, known from the run file alone.

    weights    model/counts/shapes.py's table
    moments    of each weight, by the optimizer that its name and shape fall to
    buffers    those of the model's modules

The saver is not asked: what it left out, it would leave out here too.
"""

from meshwright.launcher.build import with_vocab_of
from meshwright.launcher.proof.counted import counted_store
from meshwright.launcher.runfile.optimizer_rules import Kind, settings_of
from meshwright.launcher.runfile.tables import RunFile
from meshwright.model.counts.shapes import parameter_shapes
from meshwright.model.parts import build_model

_MOMENTS: dict[Kind, tuple[str, ...]] = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum",)}


def expected_tensors(run_file: RunFile) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that a checkpoint of this run, on counted tokens, must have."""
    model = with_vocab_of(
        run_file, counted_store(run_file.data.seq_len, run_file.model.vocab_size, run_file.run.seed)
    ).model
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in parameter_shapes(model).items():
        expected[name] = shape
        kind = settings_of(name, shape, run_file.optimizer).kind
        expected |= {f"optimizer.{moment}.{name}": shape for moment in _MOMENTS[kind]}
    buffers = build_model(model, device="meta").named_buffers()
    return expected | {f"buffers.{name}": tuple(buffer.shape) for name, buffer in buffers}
