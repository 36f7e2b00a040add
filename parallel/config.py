"""The [parallel], [pipeline], [zero] and [recompute] tables: how a model is spread over the ranks, and what they keep.

    world = pp x dp_replicate x dp_shard x cp x tp        attention, norms, embeddings
    world = pp x edp x ep x etp                           experts; edp is what remains

None of these keys changes what is computed, only where: a checkpoint of one layout loads into any other.
"""

import json
from collections.abc import Callable
from math import lcm
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from meshwright.parallel.fits import divisors, nearest, up_to

DENSE_DIMS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Axes of the dense layers, the slowest first: ranks that differ in tp alone are neighbours."""
AXES = (*DENSE_DIMS, "ep", "etp")
# More ranks than any cluster has: beyond it is a slip of the keyboard.
MAX_RANKS = 2**20
Degree = Annotated[int, Field(gt=0, le=MAX_RANKS)]
SavedOp = Literal["attention", "matmul"]
RecomputedModule = Literal["norm", "activation", "mixer", "feedforward", "experts"]
ContextWay = Literal["ring", "ulysses"]
ExpertExchange = Literal["all_to_all", "deep_ep"]

Schedule = Literal["1f1b", "gpipe", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"]
ONE_STAGE = ("1f1b", "gpipe")
# A rank holds a stage of each half, so that the first and the last meet on rank 0.
V_SHAPED = ("zbv", "dualpipev")
# The gradients of activations come first, and those of weights when a rank would wait.
ZERO_BUBBLE = ("interleaved_zero_bubble", "zbv", "dualpipev")

# What the world is cut by before dp_shard.
_DENSE_AXES = ("tp", "pp", "cp", "dp_replicate")
Suits = Callable[["ParallelConfig"], bool]


class ParallelConfig(BaseModel):
    """Sizes are counts of ranks; 1 turns an axis off. Data parallelism is what remains of the world."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    tp: Degree = 1
    """Tensor parallel, with sequence parallel: splits each weight matrix, and the tokens between them. 1 to 8: it talks
    most, so keep it within a node. Must divide the heads and the inner widths; a vocabulary is padded."""
    pp: Degree = 1
    """Pipeline parallel: splits the stack into stages, as [pipeline] says. For models that no node holds."""
    cp: Degree = 1
    """Context parallel: splits each sample over ranks, for samples that one rank has no memory for."""
    context: ContextWay = "ring"
    """Attention over cp: ring passes keys and values around; ulysses exchanges heads (cp * tp divides num_heads)."""
    ep: Degree = 1
    """Expert parallel: splits the experts of each MoE layer over ranks that also share the data. 1 to num_experts.
    ep * etp divides dp * cp * tp: experts lie on the ranks of a stage in a way of their own."""
    etp: Degree = 1
    """Expert tensor parallel: splits each expert's matrices; for experts that are too wide for a rank. 1 is usual."""
    expert_exchange: ExpertExchange = "all_to_all"
    """How tokens reach their experts: NCCL's all-to-all, or DeepEP where it is installed (Hopper GPUs, bf16)."""
    dp_replicate: Degree = 1
    """Copies of the sharded state (hybrid sharding): ZeRO shards over dp_shard ranks and repeats that so often, so that
    weights are gathered within a node or a few. 1 is usual; the experts' state is shared by all."""
    dp_shard: Annotated[int, Field(ge=0, le=MAX_RANKS)] = 0
    """Data-parallel ranks that ZeRO shards over; 0 = all ranks that the other axes leave."""

    def dp_shard_in(self, world_size: int) -> int:
        """Return `dp_shard`, with 0 filled in as what the other axes leave of `world_size`; 0 if they leave none."""
        return self.dp_shard or world_size // self._without_dp_shard

    def dp_in(self, world_size: int) -> int:
        """Return how many ranks get samples of their own."""
        return self.dp_replicate * self.dp_shard_in(world_size)

    def edp_in(self, world_size: int) -> int:
        """Return how many ranks hold the same experts."""
        return world_size // (self.pp * self.ep * self.etp)

    @property
    def _without_dp_shard(self) -> int:
        return self.tp * self.pp * self.cp * self.dp_replicate

    def problems(self, world_size: int, suits: Suits = lambda _: True) -> list[str]:
        """Return every reason why this table cannot run on `world_size` ranks; empty means that it can.

        `suits` says whether a table, another or this one, goes with the model, so that only sizes that do are said to
        fit, and another world only where these axes could run on one.
        """
        found = []
        if world_size % self._without_dp_shard != 0:
            found.append(self._axes_problem(world_size, suits))
        elif not self.makes_up(world_size):
            used = self._without_dp_shard
            found.append(
                f"parallel.dp_shard = {self.dp_shard}: tp * pp * cp * dp_replicate * dp_shard ="
                f" {used * self.dp_shard} must be the world size {world_size}; {world_size // used} or 0 (what remains)"
                " would fit"
            )
        if world_size % self.pp == 0 and not self._gives_experts_ranks(world_size):
            found.append(self._experts_problem(world_size, suits))
        return found

    def smallest_world(self) -> int | None:
        """Return the fewest ranks that the axes make up, those of the experts too; None if no number of ranks does."""
        used = self._without_dp_shard
        world = used * self.dp_shard or lcm(used, self.pp * self.ep * self.etp)
        return world if world <= MAX_RANKS and self._gives_experts_ranks(world) else None

    def makes_up(self, world_size: int) -> bool:
        """Say whether the axes of the dense layers make up this world."""
        used = self._without_dp_shard
        return world_size == used * self.dp_shard if self.dp_shard else world_size % used == 0

    def _gives_experts_ranks(self, world_size: int) -> bool:
        """Say whether the axes of the experts divide the ranks of a stage."""
        return world_size // self.pp % (self.ep * self.etp) == 0

    def _axes_problem(self, world_size: int, suits: Suits) -> str:
        """Name the axes that are above 1, and what would fit: another size of one of them, or another world."""
        axes = {axis: getattr(self, axis) for axis in _DENSE_AXES if getattr(self, axis) > 1}
        used, ways = self._without_dp_shard, []
        # Where the experts' own sizes do not go with this world, that is told beside it, with what would.
        is_told = world_size % self.pp == 0 and not self._gives_experts_ranks(world_size)
        for axis, size in axes.items():
            others = [self.model_copy(update={axis: other}) for other in divisors(world_size)]
            others = [other for other in others if other.makes_up(world_size) and suits(other)]
            fits = [getattr(other, axis) for other in others if is_told or other._gives_experts_ranks(world_size)]
            if fits:
                ways.append(f"parallel.{axis} of {nearest(fits, size, 4)}")
        # The experts' axes must divide the world, too.
        step = lcm(used, self.pp * self.ep * self.etp)
        below = world_size // step * step
        worlds = [used * self.dp_shard] if self.dp_shard else [below, below + step]
        worlds = [world for world in worlds if 0 < world <= MAX_RANKS and self._gives_experts_ranks(world)]
        if worlds and suits(self):
            ways.append(f"a world size of {worlds}")
        given = ", ".join(f"parallel.{axis} = {size}" for axis, size in axes.items())
        return (
            f"{given}: tp * pp * cp * dp_replicate = {used} must divide the world size {world_size};"
            f" {' or '.join(ways) or 'smaller sizes'} would fit"
        )

    def _experts_problem(self, world_size: int, suits: Suits) -> str:
        """Name etp where no ep would fit beside it, else ep; and which sizes would."""
        stage, fits = world_size // self.pp, list[int]()
        for key in ("ep", "etp"):
            others = [self.model_copy(update={key: size}) for size in divisors(stage)]
            fits = [getattr(other, key) for other in others if stage % (other.ep * other.etp) == 0 and suits(other)]
            if fits:
                break
        rule = (
            f"ep * etp = {self.ep * self.etp} must divide the {stage} ranks of a stage (world size {world_size} / pp)"
        )
        if not fits:
            return f"parallel.etp = {self.etp}, parallel.ep = {self.ep}: {rule}; 1 for each would fit"
        size = getattr(self, key)
        return f"parallel.{key} = {size}: {rule}; one of {nearest(fits, size)} would fit"


class PipelineConfig(BaseModel):
    """In which order the stages of a pipeline work; counts only with parallel.pp above 1."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    schedule: Schedule = "1f1b"
    """1f1b is usual; interleaved_1f1b waits less and sends more; the last three split the backward to wait least."""
    stages_per_rank: Annotated[int, Field(ge=0, le=2**14)] = 0
    """Stages that each rank holds; 0 = 1 for gpipe and 1f1b, 2 for the others (zbv and dualpipev take no other)."""

    @property
    def stages_held(self) -> int:
        """Return `stages_per_rank` with 0 filled in."""
        return self.stages_per_rank or (1 if self.schedule in ONE_STAGE else 2)

    def problems(self) -> list[str]:
        """Return every reason why the schedule cannot hold so many stages; empty means that it can."""
        given, schedule = self.stages_per_rank, json.dumps(self.schedule)
        if given == 0:
            return []
        if self.schedule in ONE_STAGE and given != 1:
            return [
                f"pipeline.stages_per_rank = {given}: pipeline.schedule = {schedule} holds one stage on a rank;"
                ' 1, or schedule "interleaved_1f1b", would fit'
            ]
        if self.schedule in V_SHAPED and given != 2:
            return [
                f"pipeline.stages_per_rank = {given}: pipeline.schedule = {schedule} holds two stages on a rank;"
                " 2 or 0 would fit"
            ]
        return []


class ZeroConfig(BaseModel):
    """What the data-parallel ranks share out instead of each holding a copy (ZeRO)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    stage: Annotated[int, Field(ge=0, le=3)] = 0
    """0 nothing; 1 optimizer state; 2 also gradients; 3 also weights (gathered layer by layer). 1 is usual."""


class RecomputeConfig(BaseModel):
    """What the backward pass computes again, so that the forward pass need not keep it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    mode: Literal["none", "full", "selective", "modules"] = "none"
    """none keeps all; full keeps a layer's input (a third more compute); selective keeps `save`; modules see there."""
    every: Annotated[int, Field(gt=0, le=2**14)] = 1
    """With mode = "full": recompute every n-th layer that a rank holds, from its first; 1 is all of them."""
    save: Annotated[tuple[SavedOp, ...], Field(strict=False)] = ("attention", "matmul")
    """With mode = "selective": the results to keep, any of "attention", "matmul"; all others are recomputed."""
    modules: Annotated[tuple[RecomputedModule, ...], Field(strict=False)] = ("norm", "activation")
    """With mode = "modules": what is recomputed: "norm", "activation" (cheap), "mixer", "feedforward", "experts"."""
    offload: bool = False
    """With any mode: what is kept lies in the host's memory between forward and backward; costs transfers."""

    @property
    def runs_parts_again(self) -> bool:
        """Say whether whole parts of a layer are run again, their products with weights too."""
        if self.mode == "modules":
            return any(name in ("mixer", "feedforward", "experts") for name in self.modules)
        return self.mode != "none"

    def problems(self, num_layers: int) -> list[str]:
        """Return every reason why a stack of `num_layers` cannot recompute like this; empty means that it can."""
        if self.mode == "none":
            return []  # a file keeps its keys while `recompute.mode=none` on the command line turns recompute off
        found = self._keys_of_other_modes()
        if self.every > num_layers:
            found.append(
                f"recompute.every = {self.every}: must not exceed model.num_layers = {num_layers};"
                f" {up_to(num_layers)} would fit"
            )
        if self.mode == "selective" and not self.save:
            found.append(
                'recompute.save = []: mode = "selective" must keep something; "attention", or mode = "full", would fit'
            )
        if self.mode == "modules" and not self.modules:
            found.append(
                'recompute.modules = []: mode = "modules" must recompute something; "norm", or mode = "none", would fit'
            )
        inner = [name for name in ("activation", "experts") if name in self.modules]
        if self.mode == "modules" and "feedforward" in self.modules and inner:
            rest = [name for name in self.modules if name not in inner]
            found.append(
                f"recompute.modules = {json.dumps(self.modules)}: {' and '.join(inner)} stand within the feedforward,"
                f" which is recomputed with all that it has; {json.dumps(rest)} would fit"
            )
        return found

    def _keys_of_other_modes(self) -> list[str]:
        """Return a line for each key that was given and that only another mode reads."""
        usual = RecomputeConfig()
        return [
            f'recompute.{key} = {json.dumps(getattr(self, key))}: counts only with recompute.mode = "{mode}", and the'
            f' mode is "{self.mode}"; leave it out'
            for key, mode in (("every", "full"), ("save", "selective"), ("modules", "modules"))
            if self.mode != mode and getattr(self, key) != getattr(usual, key)
        ]
