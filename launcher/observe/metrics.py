"""The named numbers of a step, from raw ones: throughput, MFU, memory, seconds, load of the experts.

    what the loop counted           -> what is shown and written (docs/metrics.md has each unit and formula)
    tokens, laps.total, world_size  -> tokens_per_second, tokens_per_second_per_rank
      and flops_per_token, peak     -> mfu, mfu_of (the denominator's name)
    expert_counts of each layer     -> expert_max_over_mean/layer_3, expert_entropy/layer_3, and the worst of all layers
    dropped of droppable            -> dropped_tokens
    depth                           -> depth_predictor_loss, depth_predictor_right, depth_chosen

This file knows neither the loop nor a sink; raw numbers are already those of all ranks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import psutil
import torch

from meshwright.launcher.observe.clock import Laps
from meshwright.launcher.observe.peak import Peak

Value = float | int | str | bool | None
Numbers = dict[str, Value]
Count = int | float  # a whole number; a float where it comes from a reduced fp64 vector


class DepthCounts(NamedTuple):
    """What layers that only some tokens go through (Mixture-of-Depths) counted, over all of them."""

    predictor_loss: float
    """The sum over their tokens, in nats, without its weight."""
    right: Count
    """Tokens of which the predictor told whether they are chosen."""
    chosen: Count
    """Tokens that went through."""
    tokens: Count
    """All that came to them."""


@dataclass(frozen=True)
class RawStep:
    """What the training loop knows after one update; sums and counts are over all ranks."""

    step: int
    """Updates made, this one included: the first is 1, and the checkpoint after it is step_00000001."""
    loss: float
    """Cross entropy of a counted token in nats, without the router's losses."""
    learning_rate: float
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    tokens: int
    """Tokens that went through the model in this step."""
    samples: int
    """Samples consumed since the run began."""
    laps: Laps
    memory_bytes: int
    """What `memory_in_use` says, of the rank that uses most."""
    skipped: bool = False
    """Whether the update was left out because its norm spiked."""
    expert_counts: Mapping[int, Sequence[Count]] = field(default_factory=dict)
    """By global layer number: tokens that each expert [e] received in this step."""
    router_losses: Mapping[str, float] = field(default_factory=dict)
    """By name, as added to the loss: load_balancing, z."""
    dropped: Count = 0
    """Choices of an expert for which it had no room, or tokens that no expert chose, over all layers."""
    droppable: Count | None = None
    """All choices, or all tokens, over all layers; None where nothing can be dropped."""
    depth: DepthCounts | None = None
    """Of the layers for some tokens; None where there are none."""


@dataclass(frozen=True)
class Meter:
    """Turn raw numbers into named ones; the same in every step of a run."""

    world_size: int
    flops_per_token: float
    """Of the model, forward and backward, without recompute."""
    peak: Peak
    """Of one rank."""

    def numbers(self, raw: RawStep) -> Numbers:
        """Return the named numbers of one step, flat, in the order in which they are read."""
        per_second = raw.tokens / raw.laps.total
        numbers: Numbers = {
            "step": raw.step,
            "loss": raw.loss,
            "learning_rate": raw.learning_rate,
            "grad_norm": raw.grad_norm,
            "skipped": raw.skipped,
            "tokens": raw.tokens,
            "samples": raw.samples,
            "tokens_per_second": per_second,
            "tokens_per_second_per_rank": per_second / self.world_size,
            "mfu": self.flops_per_token * per_second / (self.peak.flops * self.world_size),
            "mfu_of": self.peak.name,
            "memory_gib": raw.memory_bytes / 2**30,
            "seconds": raw.laps.total,
            "seconds_data": raw.laps.data,
            "seconds_forward_backward": raw.laps.forward_backward,
            "seconds_optimizer": raw.laps.optimizer,
            "seconds_other": raw.laps.other,
        }
        numbers |= {f"router_loss/{name}": loss for name, loss in raw.router_losses.items()}
        if raw.droppable is not None:
            numbers["dropped_tokens"] = share(raw.dropped, raw.droppable)
        return numbers | depth_numbers(raw.depth) | expert_numbers(raw.expert_counts)


def depth_numbers(counts: DepthCounts | None) -> Numbers:
    """Return what layers for some tokens did with them, for each token; nothing for a model without such layers."""
    if counts is None:
        return {}
    return {
        "depth_predictor_loss": share(counts.predictor_loss, counts.tokens),
        "depth_predictor_right": share(counts.right, counts.tokens),
        "depth_chosen": share(counts.chosen, counts.tokens),
    }


def share(part: Count, whole: Count) -> float:
    """Return `part` over `whole`; NaN of nothing."""
    return part / whole if whole else math.nan


def expert_numbers(counts: Mapping[int, Sequence[Count]]) -> Numbers:
    """Return how evenly each layer's experts were used, and the worst layer; nothing for a model without experts."""
    if not counts:
        return {}
    ratios = {layer: max_over_mean(of_layer) for layer, of_layer in sorted(counts.items())}
    entropies = {layer: normalised_entropy(of_layer) for layer, of_layer in sorted(counts.items())}
    numbers: Numbers = {"expert_max_over_mean": max(ratios.values()), "expert_entropy": min(entropies.values())}
    numbers |= {f"expert_max_over_mean/layer_{layer}": ratio for layer, ratio in ratios.items()}
    return numbers | {f"expert_entropy/layer_{layer}": entropy for layer, entropy in entropies.items()}


def max_over_mean(counts: Sequence[Count]) -> float:
    """Return the busiest expert's load over the mean load: 1 is even, e is all on one; NaN if no token was routed."""
    total = sum(counts)
    return max(counts) * len(counts) / total if total > 0 else math.nan


def normalised_entropy(counts: Sequence[Count]) -> float:
    """Return the entropy of the load over that of an even one: 1 is even, 0 is all on one; NaN if none was routed."""
    total = sum(counts)
    if total <= 0:
        return math.nan
    if len(counts) == 1:
        return 1.0
    shares = [count / total for count in counts if count > 0]
    return max(0.0, -sum(share * math.log(share) for share in shares) / math.log(len(counts)))


def memory_in_use(device: torch.device) -> int:
    """Return bytes: on a GPU the most that tensors took since the start, elsewhere the resident memory of this rank."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
