"""ZeRO-0 and ZeRO-1 on flat buckets: gradients reduced while the backward runs, state whole or in parts.

A bucket holds the gradients of some parameters, in at least fp32. Under ZeRO-1 it is rank-major: each parameter
is cut along dim 0 like `torch.chunk` in as many pieces as the axis has ranks, short pieces padded with zeros,
so that one reduce-scatter gives each rank a row of the bucket, which is a list of dim-0 parts:

    ranks 2, a [3, 4], b [2]     row 0   a[0:2] (8 numbers)            b[0:1]
                                 row 1   a[2:3] (4) + 4 of padding     b[1:2]

Under ZeRO-0, and wherever the ZeRO axis has one rank, there is one row and the sum is one all-reduce over all ranks
that have other samples: over copies and shards apart it would send up to twice the bytes. Gradients are summed, never
averaged: the loss was divided by the step's token count. A hook moves each gradient into its bucket as soon as it is
accumulated, and counts it: a bucket sets out when each of its parameters has had as many as the step has micro-batches,
buckets always in the same order on all ranks. When it is summed, a bucket of several rows is let go, at the latest when
the second bucket after it sets out: until the next step's first gradient comes, a rank keeps its own row.

Schedules of a pipeline that compute the gradients of weights apart write `.grad` without calling hooks (torch's
`stage_backward_weight`; checked with 2.13). For them the gradients are taken when the schedule is through.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from meshwright.kernels.limits import USUAL
from meshwright.parallel.collectives import DONE, Pending, all_gather, all_reduce, reduce_scatter
from meshwright.parallel.mesh import Axis, Mesh
from meshwright.parallel.placement import Placement, chunk_bounds
from meshwright.parallel.zero.part import Part, make_part


@dataclass
class _Slot:
    """One parameter's place in a bucket: columns `begin` to `end` of every row."""

    name: str
    parameter: nn.Parameter
    begin: int
    end: int
    lengths: list[int]
    """For each row that holds anything of the parameter, how much of its dim 0."""
    part: Part
    places: list[Tensor] = field(default_factory=list)
    """The gradient's pieces in the bucket, views in the shape of the parameter's."""
    arrived: int = 0
    """How many gradients of this step the bucket holds the sum of."""

    def pieces(self, tensor: Tensor) -> list[Tensor]:
        """Return the pieces of a parameter-shaped tensor, row by row."""
        return list(tensor.split_with_sizes(self.lengths))

    def places_in(self, rows: Tensor) -> list[Tensor]:
        """Return the places of the pieces in bucket-shaped `rows`."""
        rest = self.parameter.shape[1:]
        size = prod(rest)
        return [
            rows[row, self.begin : self.begin + length * size].view(length, *rest)
            for row, length in enumerate(self.lengths)
        ]


class _Bucket:
    def __init__(self, slots: list[_Slot], num_rows: int, axes: tuple[Axis, ...], dtype: torch.dtype) -> None:
        self.slots, self.axes, self.num_rows = slots, axes, num_rows
        self.mine = torch.zeros(slots[-1].end, dtype=dtype, device=slots[0].parameter.device)
        self.rows: Tensor | None = None
        """All ranks' rows while gradients are collected; with one row it is `mine`, which stays."""
        self.pending: Pending = DONE
        self.launched = False
        for slot in slots:
            held = slot.part.parameter
            held.grad = self.mine[slot.begin : slot.begin + held.numel()].view(held.shape)

    def open(self) -> None:
        """Make room for the gradients of a step, unless there is some."""
        if self.rows is None:
            shards = self.num_rows > 1
            # Zeros, for the padding; of what is large a system makes them as pages are first written.
            self.rows = self.mine.new_zeros(self.num_rows, len(self.mine)) if shards else self.mine[None]
            for slot in self.slots:
                slot.places = slot.places_in(self.rows)

    def _close(self) -> None:
        """Let go of the other ranks' rows, which have been summed."""
        if self.num_rows > 1:
            self.rows = None
            for slot in self.slots:
                slot.places = []

    def launch(self) -> None:
        """Start the sum over the last axis; the others follow when it is done."""
        assert not self.launched, f"the bucket of {self.slots[0].name} was reduced twice in one step"
        assert self.rows is not None, f"the bucket of {self.slots[0].name} holds no gradients"
        self.launched = True
        zero = self.axes[-1]
        if self.num_rows > 1:
            self.pending = reduce_scatter(self.mine, self.rows.view(-1), zero)
        else:
            self.pending = all_reduce(self.mine, zero, asynchronous=True)

    def land(self) -> None:
        """Wait for the sum over the last axis, and let go of what was sent; once more does nothing."""
        self.pending.wait()
        if self.pending is not DONE:
            self._close()
        self.pending = DONE

    def finish(self, expected: int) -> None:
        """Wait; sum over the remaining axes."""
        for slot in self.slots:
            assert slot.arrived == expected, (
                f"{slot.name} got no gradient in this step"
                if slot.arrived == 0
                else f"{slot.name} got {slot.arrived} of {expected} gradients in this step"
            )
        assert self.launched, f"the bucket of {self.slots[0].name} was not reduced in this step"
        self.land()
        for axis in self.axes[:-1]:
            all_reduce(self.mine, axis)
        self.launched = False


class BucketEngine:
    """Gradients and optimizer parts of plain parameters, under ZeRO-0 or ZeRO-1."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        table: dict[str, Placement],
        mesh: Mesh,
        *,
        shard_state: bool,
        take_at_end: bool = False,
        bucket_bytes: int = USUAL.bucket_bytes,
    ) -> None:
        """Make buckets for the parameters, in the reverse of their order, and hook them.

        `shard_state` is ZeRO-1: gradients after the reduction, masters and moments are cut over the ZeRO axis.
        `take_at_end`: no hooks; gradients add up in `.grad` and are taken by `finish_gradients`.
        `bucket_bytes`: a bucket that holds as many takes no further parameter.
        """
        self.mesh, self.shard_state, self.bucket_bytes = mesh, shard_state, bucket_bytes
        self.buckets: list[_Bucket] = []
        groups: dict[tuple[tuple[int, ...], ...], list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in reversed(parameters.items()):
            rows = self._num_rows(table[name])  # axes over the same ranks are cut for one kind and joined for another
            key = (*(axis.ranks for axis in self._axes(table[name])), (rows, parameter.element_size()))
            groups.setdefault(key, []).append((name, parameter))
        for members in groups.values():
            self._fill_buckets(members, table)
        self.parts = {slot.name: slot.part for bucket in self.buckets for slot in bucket.slots}
        self._expected = 0
        self._next = 0
        self._take_at_end = take_at_end
        for bucket in [] if take_at_end else self.buckets:
            for slot in bucket.slots:
                slot.parameter.register_post_accumulate_grad_hook(self._hook(bucket, slot))  # type: ignore[no-untyped-call]

    def _num_rows(self, placement: Placement) -> int:
        """Return in how many parts the state of a parameter is cut; 1 is not at all."""
        return placement.zero_axis(self.mesh).size if self.shard_state else 1

    def _axes(self, placement: Placement) -> tuple[Axis, ...]:
        """Return over what a gradient is summed, last the axis that goes along with the backward pass."""
        if self._num_rows(placement) > 1:
            return (*placement.grad_sum, *placement.data_axes(self.mesh))
        return (*placement.grad_sum, placement.data_axis(self.mesh))

    def _fill_buckets(self, members: list[tuple[str, nn.Parameter]], table: dict[str, Placement]) -> None:
        axes = self._axes(table[members[0][0]])
        num_rows = self._num_rows(table[members[0][0]])
        dtype = torch.promote_types(members[0][1].dtype, torch.float32)
        slots: list[_Slot] = []
        for name, parameter in members:
            if slots and slots[-1].end * num_rows * dtype.itemsize >= self.bucket_bytes:
                self.buckets.append(_Bucket(slots, num_rows, axes, dtype))
                slots = []
            slots.append(self._slot(name, parameter, table[name], num_rows, slots[-1].end if slots else 0))
        self.buckets.append(_Bucket(slots, num_rows, axes, dtype))

    def _slot(self, name: str, parameter: nn.Parameter, placement: Placement, num_rows: int, begin: int) -> _Slot:
        length = parameter.shape[0]
        bounds = [chunk_bounds(length, num_rows, row) for row in range(num_rows)]
        per_row = bounds[0][1] * (parameter.numel() // length)
        held = parameter.detach()
        if num_rows > 1:
            first, last = bounds[placement.zero_axis(self.mesh).rank]
            held = held[first:last]
        # The same memory where the type is already wide enough; else a master copy.
        held = held.to(torch.promote_types(held.dtype, torch.float32))
        part = make_part(held, tuple(parameter.shape), placement, self.mesh, is_zero_part=num_rows > 1)
        lengths = [last - first for first, last in bounds if last > first]
        return _Slot(name, parameter, begin, begin + per_row, lengths, part)

    def start_step(self, num_micro_batches: int) -> None:
        """Begin new sums, of as many gradients for each parameter as there are micro-batches."""
        self._expected = 1 if self._take_at_end else num_micro_batches
        self._next = 0
        for bucket in self.buckets:
            for slot in bucket.slots:
                slot.arrived = 0
                slot.parameter.grad = None

    def _hook(self, bucket: _Bucket, slot: _Slot) -> Callable[[nn.Parameter], None]:
        def take_gradient(parameter: nn.Parameter) -> None:
            self._take(bucket, slot)
            if slot.arrived == self._expected:
                self._launch_what_is_full()

        return take_gradient

    def _take(self, bucket: _Bucket, slot: _Slot) -> None:
        """Move a parameter's gradient into its bucket."""
        gradient = slot.parameter.grad
        assert gradient is not None, f"{slot.name} got no gradient in this step"
        assert slot.arrived < self._expected, f"{slot.name} got more than {self._expected} gradients in this step"
        bucket.open()
        move = torch._foreach_add_ if slot.arrived else torch._foreach_copy_
        move(slot.places, slot.pieces(gradient))
        slot.parameter.grad = None
        slot.arrived += 1

    def _launch_what_is_full(self) -> None:
        while self._next < len(self.buckets) and all(
            slot.arrived == self._expected for slot in self.buckets[self._next].slots
        ):
            self._launch(self._next)
            self._next += 1

    def _launch(self, number: int) -> None:
        """Let a bucket set out when all but one of those before it have landed."""
        if number > 1:
            self.buckets[number - 2].land()
        self.buckets[number].launch()

    def finish_gradients(self) -> None:
        """Wait for every bucket; each part's `grad` then holds the sum over all ranks that had a share in it."""
        if self._take_at_end:
            # First those that need no new memory: what they take lets go of the gradients that it was.
            self.buckets.sort(key=lambda bucket: bucket.num_rows > 1)
            for number, bucket in enumerate(self.buckets):
                for slot in bucket.slots:
                    self._take(bucket, slot)
                self._launch(number)
        for bucket in self.buckets:
            bucket.finish(self._expected)

    def publish_weights(self) -> None:
        """Bring the updated parts into the parameters: cast masters, gather the other ranks' rows."""
        for bucket in self.buckets:
            if bucket.num_rows == 1:
                for slot in bucket.slots:
                    if slot.part.parameter.data_ptr() != slot.parameter.data_ptr():
                        slot.parameter.detach().copy_(slot.part.parameter)
                continue
            self._gather(bucket)

    def _gather(self, bucket: _Bucket) -> None:
        dtype, slots = bucket.slots[0].parameter.dtype, bucket.slots
        row = torch.zeros_like(bucket.mine, dtype=dtype)
        parts = [slot.part.parameter.detach() for slot in slots]
        ours = [
            row[slot.begin : slot.begin + part.numel()].view_as(part) for slot, part in zip(slots, parts, strict=True)
        ]
        torch._foreach_copy_(ours, parts)
        rows = row.new_empty(bucket.num_rows, len(row))
        all_gather(rows.view(-1), row, bucket.axes[-1]).wait()
        weights = [piece for slot in slots for piece in slot.pieces(slot.parameter.detach())]
        torch._foreach_copy_(weights, [place for slot in slots for place in slot.places_in(rows)])
