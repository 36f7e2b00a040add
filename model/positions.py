"""Where a token stands, told to attention or added to the embedding.

    rotary        pairs of a head's features are turned by an angle that grows with the position (Su et al. 2021)
    ALiBi         -slope * distance is added to the scores, a slope for each head (Press et al. 2022)
    T5            a learned number for each head and bucket of distances is added (Raffel et al. 2020)
    sinusoidal    a fixed row for each position is added to the embedding (Vaswani et al. 2017)
    learned       a learned row for each position is added to the embedding

Rotary positions are half-split, as Llama and Qwen have them: of the first r = fraction * d features of a head, feature
i is paired with feature i + r/2 and turned by position * f_i, f_i = base^(-2i/r). What a model was trained for is
stretched to longer samples by changing f (`RopeScaling`):

    linear    f / factor                                       ntk     base * factor^(r / (r - 2)) in place of base
    yarn      f where a pair turns often in the original length, f / factor where it turns seldom, a ramp between;
              cosines and sines are multiplied by an attention factor (Peng et al. 2023)
    llama3    the same by wavelengths, and no attention factor
"""

import math
from functools import cache, lru_cache
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from meshwright.model.kinds.mixers.positions import bucket_problems, stretching_problems
from meshwright.parallel.initialise import InitPolicy, InitRule
from meshwright.parallel.mesh import NO_TP, Axis
from meshwright.parallel.placement import Placement, Split, partial_over
from meshwright.parallel.where import Where

Stretching = Literal["linear", "ntk", "yarn", "llama3"]


class RopeScaling(NamedTuple):
    """How the frequencies of rotary positions are stretched to longer samples."""

    kind: Stretching
    factor: float
    """How many times as long."""
    original_length: int = 0
    """yarn, llama3: positions that the model was trained for before."""
    beta_fast: float = 32.0
    """yarn: pairs that turn more often than this in the original length stay as they are,"""
    beta_slow: float = 1.0
    """those that turn less often than this are stretched by the whole factor."""
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    """yarn: where both are given, the attention factor is the ratio of theirs (DeepSeek)."""
    attention_factor: float = 0.0
    """yarn: 0 takes 0.1 ln(factor) + 1, or the ratio."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    """llama3: wavelengths above original_length / low are stretched, below original_length / high they stay."""

    def problems(self) -> list[str]:
        """Return which of the numbers cannot be, each by itself."""
        if self.kind not in get_args(Stretching):
            return [
                f"rope_scaling.kind = {self.kind!r}: is unknown; one of {', '.join(get_args(Stretching))} would fit"
            ]
        found = []
        if not 1.0 <= self.factor < math.inf:
            found.append(f"rope_scaling.factor = {self.factor}: must be at least 1 and finite; 4.0 would fit")
        for name in ("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"):
            value = getattr(self, name)
            if not 0.0 < value < math.inf:
                usual = self._field_defaults[name]
                found.append(f"rope_scaling.{name} = {value}: must be above 0 and finite; {usual} would fit")
        for name in ("original_length", "mscale", "mscale_all_dim", "attention_factor"):
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                found.append(f"rope_scaling.{name} = {value}: must not be negative, and finite; leave it out")
        return found

    def cosine_factor(self) -> float:
        """Return what cosines and sines are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_scale(self.factor, self.mscale) / yarn_scale(self.factor, self.mscale_all_dim)
        return yarn_scale(self.factor, 1.0)


def yarn_scale(factor: float, mscale: float) -> float:
    """Return 0.1 mscale ln(factor) + 1, by which YaRN sharpens attention over longer samples."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


class Rope(NamedTuple):
    """Rotary positions."""

    base: float = 10_000.0
    fraction: float = 1.0
    """How much of a head is turned, from its first feature on."""
    scaling: RopeScaling | None = None
    start: int = 0
    """The position of a sample's first token."""

    def problems(self, head_dim: int) -> list[str]:
        """Return every reason why heads of this width cannot be turned so."""
        found, size, scaling = [], int(head_dim * self.fraction), self.scaling
        of = f"rope_fraction = {self.fraction} of head_dim = {head_dim}"
        if size < 2 or size % 2 or size > head_dim:
            found.append(
                f"{of}: turns {size} features, which must be"
                " an even number from 2 to head_dim; 1.0 would fit an even head_dim"
            )
        if not 0.0 < self.base < math.inf:
            found.append(f"rope_base = {self.base}: must be above 0 and finite; 10000.0 would fit")
        if scaling is None:
            return found
        found += scaling.problems()
        return found or stretching_problems(scaling, size, of, {"rope_base": self.base}, "rope_scaling.")

    def turned(self, head_dim: int) -> int:
        """Return how many features of a head are turned.

        Raises:
            ValueError: with every reason why they cannot be.
        """
        if problems := self.problems(head_dim):
            raise ValueError("\n".join(problems))
        return int(head_dim * self.fraction)

    def frequencies(self, head_dim: int) -> Float64[Tensor, " half"]:
        """Return the angle from one position to the next of each pair, in fp64."""
        size, base, scaling = self.turned(head_dim), self.base, self.scaling
        if scaling is not None and scaling.kind == "ntk":
            base *= scaling.factor ** (size / (size - 2))
        plain = base ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
        if scaling is None or scaling.kind == "ntk":
            return plain
        stretched = plain / scaling.factor
        if scaling.kind == "linear":
            return stretched
        kept = _kept_by_yarn(scaling, size, base) if scaling.kind == "yarn" else _kept_by_llama3(scaling, plain)
        return stretched * (1.0 - kept) + plain * kept

    def angles(
        self, position: Int[Tensor, " s"], head_dim: int, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "s half"], Float[Tensor, "s half"]]:
        """Return the cosines and sines of each position's angles, in at least fp32."""
        wide = torch.float32 if position.device.type == "mps" else torch.float64
        frequency = self.frequencies(head_dim).to(device=position.device, dtype=wide)
        angle = (position + self.start).to(wide)[:, None] * frequency
        at_least = torch.promote_types(dtype, torch.float32)
        factor = 1.0 if self.scaling is None else self.scaling.cosine_factor()
        return (angle.cos() * factor).to(at_least), (angle.sin() * factor).to(at_least)

    def angles_at(
        self, where: Where, head_dim: int, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "s half"], Float[Tensor, "s half"]]:
        """Return the angles of the tokens that a mixer sees, made once for all layers of a micro-batch."""
        key = f"rope/{head_dim}/{dtype}/{self}"
        return where.derive(key, lambda: self.angles(where.position_mixed, head_dim, dtype))

    def angles_from(
        self, begin: int, count: int, head_dim: int, like: Tensor
    ) -> tuple[Float[Tensor, "s half"], Float[Tensor, "s half"]]:
        """Return the angles of tokens that follow on each other, made once for all layers of a step of generation."""
        return _angles_from(self, begin, count, head_dim, like.dtype, like.device, torch.is_inference_mode_enabled())


@lru_cache(maxsize=4)
def _angles_from(
    rope: Rope, begin: int, count: int, head_dim: int, dtype: torch.dtype, device: torch.device, is_inference: bool
) -> tuple[Tensor, Tensor]:
    """Return and remember; tensors that inference mode has made are of no use outside it."""
    return rope.angles(torch.arange(begin, begin + count, device=device), head_dim, dtype)


class Alibi(NamedTuple):
    """Scores fall with the distance, by a slope for each head."""


class T5(NamedTuple):
    """Scores have a learned number for each bucket of distances; a bucket far away holds many distances."""

    num_buckets: int = 32
    max_distance: int = 128
    """All distances from here on are one bucket."""

    def problems(self) -> list[str]:
        """Return every reason why there cannot be such buckets."""
        return bucket_problems(self.num_buckets, self.max_distance, ("num_buckets", "max_distance"))


Position = Rope | Alibi | T5 | None
"""How attention is told where tokens stand; None: not at all."""


def _kept_by_yarn(scaling: RopeScaling, size: int, base: float) -> Tensor:
    """Return how much of each frequency stays: 1 where a pair turns fast, 0 where it is slow."""

    def dim_of(turns: float) -> float:  # where a pair turns so often in the original length
        return size * math.log(scaling.original_length / (turns * 2.0 * math.pi)) / (2.0 * math.log(base))

    low = max(math.floor(dim_of(scaling.beta_fast)), 0)
    high: float = min(math.ceil(dim_of(scaling.beta_slow)), size - 1)
    high = high + 0.001 if low == high else high
    ramp = (torch.arange(size // 2, dtype=torch.float64) - low) / (high - low)
    return 1.0 - ramp.clamp(0.0, 1.0)


def _kept_by_llama3(scaling: RopeScaling, plain: Tensor) -> Tensor:
    """Return how much of each frequency stays: 1 for short wavelengths, 0 for long ones."""
    turns = scaling.original_length * plain / (2.0 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns - low) / (high - low)).clamp(0.0, 1.0)


@cache
def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """Return 2^(-8/n), 2^(-16/n), ... for n heads, a power of 2; else those of the power below, and every other one of
    the power above, as Bloom has them.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (at + 1) / power) for at in range(power)]
    return tuple(slopes + [2.0 ** (-4.0 * (2 * at + 1) / power) for at in range(num_heads - power)])


def t5_buckets(
    distance: Int[Tensor, " c"], num_buckets: int, max_distance: int, *, is_causal: bool
) -> Int[Tensor, " c"]:
    """Return the bucket of each distance (query's position - key's): half of them one distance each, the others by its
    logarithm. To both sides the upper half of the buckets is for keys that come after the query.
    """
    first = torch.zeros_like(distance)
    if is_causal:
        distance = distance.clamp(min=0)
    else:
        num_buckets //= 2
        first = (distance < 0).to(distance.dtype) * num_buckets
        distance = distance.abs()
    exact = num_buckets // 2
    # In fp32, as T5's own: a distance at the edge of two buckets is where its checkpoints have it.
    ratio = torch.log(distance.clamp(min=1).to(torch.float32) / exact) / math.log(max_distance / exact)
    far = exact + (ratio * (num_buckets - exact)).to(distance.dtype)
    return first + torch.where(distance < exact, distance, far.clamp(max=num_buckets - 1))


class AlibiBias(nn.Module):
    """ALiBi's biases of this rank's heads."""

    def __init__(self, num_heads: int, *, tp: Axis = NO_TP) -> None:
        """Take the number of all heads, of which a rank of `tp` has a stretch."""
        super().__init__()
        count = num_heads // tp.size
        self.slopes = alibi_slopes(num_heads)[tp.rank * count : (tp.rank + 1) * count]

    def forward(self, distance: Int[Tensor, " c"], is_causal: bool, like: Tensor) -> Float[Tensor, "n_local c"]:
        """Return -slope * |distance|, in at least fp32."""
        wide = torch.promote_types(like.dtype, torch.float32)
        slopes = torch.tensor(self.slopes, dtype=wide, device=like.device)
        return -slopes[:, None] * distance.abs().to(wide)


class T5Bias(nn.Module):
    """T5's biases of this rank's heads."""

    def __init__(self, t5: T5, num_heads: int, *, init: InitPolicy | None = None, tp: Axis = NO_TP) -> None:
        """Take the number of all heads, of which a rank of `tp` has a stretch.

        Raises:
            ValueError: if there cannot be such buckets.
        """
        super().__init__()
        if problems := t5.problems():
            raise ValueError("\n".join(problems))
        self.t5, self.tp = t5, tp
        self.rule = (init or InitPolicy()).embedding(t5.num_buckets, num_heads)
        self.table = nn.Parameter(torch.empty(t5.num_buckets, num_heads // tp.size))

    def placements(self) -> dict[str, Placement]:
        """Say that the table is cut along the heads."""
        return {"table": Placement((Split(1, self.tp),))}

    def init_rules(self) -> dict[str, InitRule]:
        """Say how the table begins."""
        return {"table": self.rule}

    def forward(self, distance: Int[Tensor, " c"], is_causal: bool, like: Tensor) -> Float[Tensor, "n_local c"]:
        """Look up each distance's bucket."""
        bucket = t5_buckets(distance, self.t5.num_buckets, self.t5.max_distance, is_causal=is_causal)
        return F.embedding(bucket, self.table).T


def bias_of(position: Position, num_heads: int, init: InitPolicy, tp: Axis) -> AlibiBias | T5Bias | None:
    """Return what makes the biases of scores, None for positions that make none."""
    if isinstance(position, T5):
        return T5Bias(position, num_heads, init=init, tp=tp)
    return AlibiBias(num_heads, tp=tp) if isinstance(position, Alibi) else None


class SinusoidalPositions(nn.Module):
    """A fixed row for each position: sines in the even features, cosines in the odd ones."""

    def __init__(self, hidden_size: int, *, base: float = 10_000.0) -> None:
        """Take the width, an even number.

        Raises:
            ValueError: if it is odd.
        """
        super().__init__()
        if hidden_size % 2:
            raise ValueError(
                f"hidden_size = {hidden_size}: must be even for sinusoidal positions; {hidden_size + 1} fits"
            )
        self.rope, self.hidden_size = Rope(base), hidden_size

    def forward(self, x: Float[Tensor, "s b h"], position: Int[Tensor, " s"]) -> Float[Tensor, "s b h"]:
        """Add each token's row; `position` is that of the tokens that this rank holds."""
        cos, sin = self.rope.angles(position, self.hidden_size, x.dtype)
        return x + torch.stack([sin, cos], -1).flatten(1)[:, None].to(x.dtype)


class LearnedPositions(nn.Module):
    """A learned row for each position."""

    def __init__(
        self, max_positions: int, hidden_size: int, *, init: InitPolicy | None = None, tp: Axis = NO_TP
    ) -> None:
        """Take the number of positions that have a row; each rank of `tp` holds other tokens."""
        super().__init__()
        self.tp = tp
        self.rule = (init or InitPolicy()).embedding(max_positions, hidden_size)
        self.weight = nn.Parameter(torch.empty(max_positions, hidden_size))

    def placements(self) -> dict[str, Placement]:
        """Say that the table is whole, and its gradient the sum of the ranks'."""
        return {"weight": Placement(grad_sum=partial_over(self.tp))}

    def init_rules(self) -> dict[str, InitRule]:
        """Say how the table begins."""
        return {"weight": self.rule}

    def forward(self, x: Float[Tensor, "s b h"], position: Int[Tensor, " s"]) -> Float[Tensor, "s b h"]:
        """Add each token's row; `position` is that of the tokens that this rank holds."""
        return x + F.embedding(position, self.weight)[:, None].to(x.dtype)
