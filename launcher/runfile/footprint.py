"""What a rank holds from step to step, in bytes: weights, masters, gradients and moments under each ZeRO stage.

    N weights over d ranks that shard state; c bytes in the type computed with, m in the type updated in (at least fp32)

    stage   weights   masters             gradients   moments
    0       c*N       m*N if c < m        m*N         2*m*N
    1       c*N       m*N/d if c < m      m*N         2*m*N/d
    2       c*N       m*N/d               m*N/d       2*m*N/d        the weights are gathered for each pass
    3       -         m*N/d               m*N/d       2*m*N/d        one layer at a time is gathered, not counted

Dense weights have d = dp_shard * cp; routed experts are N/ep on a rank, and d = edp. With d = 1 stages 1 to 3 are
stage 0. Activations, the layer that is gathered, send buffers and the library's own memory come on top.
"""

from typing import NamedTuple

from meshwright.launcher.runfile.tables import RunFile
from meshwright.model.costs import parameter_count, routed_parameter_count

COMPUTE_BYTES = {"fp32": 4, "bf16_autocast": 4, "bf16": 2, "fp64": 8}
UPDATE_BYTES = {"fp32": 4, "bf16_autocast": 4, "bf16": 4, "fp64": 8}


class StateBytes(NamedTuple):
    """Bytes on one rank, by what they hold."""

    weights: float
    masters: float
    gradients: float
    moments: float

    @property
    def total(self) -> float:
        """Return the sum."""
        return sum(self)


def state_bytes(run_file: RunFile, world_size: int) -> StateBytes:
    """Return what one rank of `world_size` holds; the run file must have passed its checks.

    With `model.vocab_size` = 0 the embedding is not counted: nobody knows its size yet.
    """
    parallel, model = run_file.parallel, run_file.model
    routed = routed_parameter_count(model)
    dense = (float(parameter_count(model) - routed), parallel.dp_shard_in(world_size) * parallel.cp)
    experts = (routed / parallel.ep, parallel.edp_in(world_size))
    parts = [_bytes_of(*held, run_file.zero.stage, run_file.train.precision) for held in (dense, experts)]
    return StateBytes(*(sum(column) for column in zip(*parts, strict=True)))


def _bytes_of(number: float, shards: int, stage: int, precision: str) -> StateBytes:
    """Return the bytes of so many weights, whose state is cut over `shards` ranks."""
    compute, update = COMPUTE_BYTES[precision], UPDATE_BYTES[precision]
    stage = stage if shards > 1 else 0
    part = number / shards
    has_masters = compute < update or stage >= 2
    return StateBytes(
        weights=0.0 if stage == 3 else compute * number,
        masters=update * (part if stage >= 1 else number) if has_masters else 0.0,
        gradients=update * (part if stage >= 2 else number),
        moments=2 * update * (part if stage >= 1 else number),
    )
