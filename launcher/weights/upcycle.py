"""A dense model's weights as those that a mixture of experts begins with (sparse upcycling, Komatsuzaki et al. 2023).

    copy         every expert is the dense feed-forward; noise makes them differ, if any is asked for
    partition    the feed-forward's inner width is cut in G pieces, G = ffn_hidden_size / expert_hidden_size; expert e
                 has piece e mod G, and the rows of the router are equal for the G experts of a group, so that a token
                 goes to all pieces of a group (He et al. 2024, "virtual group initialization"); the outputs are
                 multiplied by G, as each weight is 1/G of what one expert's would be
    pooled       a key head is the mean of the MHA heads of its group (GQA; Ainslie et al. 2023, section 2.1)

The chosen experts' weights are made to sum to 1, so that without noise the first loss is the dense model's, unless what
acts in training alone (a capacity, dropout) changes it. A router of experts begins as in a new run. What lies in the
dense model under the same name and shape is taken as it is; layers that stay dense too. Noise is counter-based:
N(0, (noise * std of the dense matrix)^2), the same in every layout.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from meshwright.kernels.precision import at_least_fp32
from meshwright.launcher.runfile.tables import InitConfig
from meshwright.model.config import ModelConfig
from meshwright.model.counts.shapes import parameter_shapes
from meshwright.model.families.family import BUFFERS
from meshwright.parallel.counter_rng import normal_from_uniform, uniform_range

# Of a mixture's part, by which name the dense part has it: experts.gate -> gate.weight, experts.gate_bias -> gate.bias.
DENSE_OF = {
    f"experts.{name}{end}": f"{name}.{of}"
    for name in ("gate", "up", "down")
    for end, of in (("", "weight"), ("_bias", "bias"))
}
FRESH = ("router.weight", "router.noise_weight")


@runtime_checkable
class Weights(Protocol):
    """Whatever reads weights by our names."""

    path: Path

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return every weight's global shape."""

    def buffers(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of what is kept with the weights and is no parameter."""

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Return a weight, or some of its rows."""


@dataclass(frozen=True)
class _Expert:
    """How one of the stacked tensors is made of a dense one."""

    source: str
    pieces: int
    """In how many pieces the inner width is cut; 1 = every expert is the whole."""
    dim: int | None
    """The dim of the dense tensor along which it is cut; None = it is not."""
    factor: float


class Upcycled:
    """The dense weights, as the model that is wanted begins with them; read like any others."""

    def __init__(
        self, dense: Weights, model: ModelConfig, init: InitConfig, seed: int, fresh: Callable[[str], Tensor]
    ) -> None:
        """Take the dense weights, and what gives a whole weight as a new run begins with it.

        Raises:
            ValueError: naming everything that the dense model has not, has in another shape, or has besides.
        """
        self.path, self._dense, self._model, self._init, self._seed = dense.path, dense, model, init, seed
        self._fresh, self._there, self._wanted = fresh, dense.shapes(), parameter_shapes(model)
        self._experts = {name: made for name in self._wanted if (made := self._expert(name)) is not None}
        if problems := list(self._problems()):
            raise ValueError("\n".join(problems))

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return every weight's global shape."""
        return self._wanted

    def buffers(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of the buffers of routers that are there already."""
        return self._dense.buffers()

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Return a whole weight, or its rows from the first to before the second."""
        if name.startswith(BUFFERS):
            return self._dense.read(name, rows)
        shape = self._wanted[name]
        first, end = rows or (0, shape[0])
        if self._is_fresh(name):
            whole = self._fresh(name)
            group = self._pieces() if self._init.upcycle == "partition" else 1
            return whole[torch.arange(first, end) // group * group]
        if name in self._experts:
            return torch.stack([self._read_expert(name, at) for at in range(first, end)])
        if self._there[name] != shape:
            return self._pooled(name)[first:end]
        return self._dense.read(name, (first, end))

    def _is_fresh(self, name: str) -> bool:
        """Say whether a weight begins as in a new run: a router's, of experts that are made here."""
        return self._init.upcycle != "none" and name.rpartition(".feedforward.part.")[2] in FRESH

    def _read_expert(self, name: str, at: int) -> Tensor:
        made = self._experts[name]
        dense = self._dense.read(made.source)
        piece = dense
        if made.dim is not None:
            piece = dense.chunk(made.pieces, dim=made.dim)[at % made.pieces]
        piece = at_least_fp32(piece) * made.factor
        if self._init.upcycle_noise:
            size = prod(self._wanted[name][1:])
            uniform = uniform_range(self._seed, f"{name}/upcycle", at * size, (at + 1) * size)
            deviation = self._init.upcycle_noise * at_least_fp32(dense).std().item() * made.factor
            piece = piece + (normal_from_uniform(uniform) * deviation).view_as(piece).to(piece.dtype)
        return piece.to(dense.dtype)

    def _pooled(self, name: str) -> Tensor:
        """Return key or value heads, each the mean of a group of the dense model's."""
        dense, heads = self._dense.read(name), self._model.num_kv_heads
        grouped = at_least_fp32(dense).view(heads, -1, self._model.head_dim, *dense.shape[1:])
        return grouped.mean(1).flatten(0, 1).to(dense.dtype)

    def _pieces(self) -> int:
        if self._init.upcycle != "partition" or self._model.moe is None:
            return 1
        return max(1, self._model.ffn_hidden_size // self._model.moe.expert_hidden_size)

    def _expert(self, name: str) -> _Expert | None:
        layer, _, part = name.partition(".feedforward.part.")
        if part not in DENSE_OF or self._model.moe is None or self._init.upcycle == "none":
            return None
        pieces, scale = self._pieces(), self._model.moe.weight_scale
        is_outward = part.startswith("experts.down")
        dim = 1 if part == "experts.down" else 0
        factor = 1.0 / scale if is_outward else 1.0
        if part == "experts.down":
            factor *= pieces
        is_cut = pieces > 1 and part != "experts.down_bias"
        return _Expert(f"{layer}.feedforward.part.{DENSE_OF[part]}", pieces, dim if is_cut else None, factor)

    def _problems(self) -> Iterator[str]:
        used: set[str] = set()
        for name, shape in self._wanted.items():
            if self._is_fresh(name):
                continue
            made = self._experts.get(name)
            source = made.source if made else name
            used.add(source)
            wanted = list(shape)
            if made:
                wanted = wanted[1:]
                if made.dim is not None:
                    wanted[made.dim] *= made.pieces
            if source not in self._there:
                yield f"{source} is missing, of which {name} is to be made" if made else f"{name} is missing"
            elif list(self._there[source]) != wanted and not self._can_pool(name):
                needs = f"{name} is made of one of {wanted}" if made else f"the run file's model has {wanted}"
                yield f"{source} is {list(self._there[source])}, {needs}"
        yield from (f"{name} has no place in the model" for name in sorted(self._there.keys() - used))

    def _can_pool(self, name: str) -> bool:
        if not self._init.pool_kv_heads or name.rpartition(".mixer.part.")[2].partition(".")[0] not in ("k", "v"):
            return False
        there, wanted = self._there[name], self._wanted[name]
        return there[1:] == wanted[1:] and there[0] % wanted[0] == 0
