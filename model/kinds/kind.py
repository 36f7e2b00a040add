"""What is known of a kind of part before it is built: weights, operations, bytes, what its sizes ask of a layout.

    Kind        one kind of mixer or feed-forward, `kinds/<name>.py`; the table of all is `kinds/table.py`
    Weight      one parameter as the whole model has it; Cut says what cuts it
    Degrees     over how many ranks samples and matrices are spread
    Types       bytes of the numbers
    Need        a size that must divide by the ranks of an axis

Checks of a run file, counts of parameters, operations and bytes, the cut into stages and the small model of a proof
ask the kinds and nothing else; `model/parts.py` builds the modules, and tests hold one against the other. Nothing here
loads torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from meshwright.parallel.config import ContextWay

if TYPE_CHECKING:
    from meshwright.model.config import ModelConfig
    from meshwright.model.kinds.small import Small

Place = Literal["mixer", "feedforward"]
CutAxis = Literal["tp", "ep", "etp"]

# Takes a key and the config with each of the sizes that the broken rule allows; returns those that are said to fit.
Choose = Callable[[str, "Mapping[int, ModelConfig]"], list[int]]


@runtime_checkable
class RankCounts(Protocol):
    """Whatever has the sizes of the axes that cut weights: [parallel], or the sizes of a mesh."""

    @property
    def tp(self) -> int:
        """Ranks of tensor parallelism."""

    @property
    def ep(self) -> int:
        """Ranks of expert parallelism."""

    @property
    def etp(self) -> int:
        """Ranks over which an expert is split."""


class Cut(NamedTuple):
    """What cuts a parameter."""

    axes: tuple[CutAxis, ...] = ()
    """The axes over which it lies in parts; none for norms, routers, biases that are added after a sum."""
    units: int = 0
    """Into how many parts it can be cut at most (KV heads, groups); beyond that neighbours hold copies. 0 = any."""
    is_padded: bool = False
    """Whether its rows are made equal with padding (the vocabulary); else the parts divide."""

    def parts(self, ranks: RankCounts) -> int:
        """Return in how many different parts it lies."""
        found: int = prod(getattr(ranks, axis) for axis in self.axes)
        return min(found, self.units) if self.units else found


UNCUT, OVER_TP, OVER_EXPERTS = Cut(), Cut(("tp",)), Cut(("ep", "etp"))
EXPERT_OUTPUTS = Cut(("ep",))
"""Of the biases of the experts' outputs, which are added after the sum over etp."""
VOCABULARY = Cut(("tp",), is_padded=True)


class Weight(NamedTuple):
    """One parameter as the whole model has it."""

    shape: tuple[int, ...]
    cut: Cut = UNCUT
    is_product: bool = False
    """Whether a token that meets it is multiplied with it; the embedding is looked up."""
    met_of: tuple[int, int] = (1, 1)
    """How many of its equal pieces one token meets, and how many there are: top_k of num_experts."""

    @property
    def number(self) -> int:
        """Return how many numbers it has."""
        return prod(self.shape)

    @property
    def met(self) -> int:
        """Return how many of its numbers one token meets."""
        met, pieces = self.met_of
        return self.number // pieces * met

    @property
    def is_of_experts(self) -> bool:
        """Say whether it is a stack over the routed experts."""
        return "ep" in self.cut.axes

    def on_a_rank(self, ranks: RankCounts) -> int:
        """Return how many of its numbers one rank computes with."""
        parts = self.cut.parts(ranks)
        if self.cut.is_padded:
            return -(-self.shape[0] // parts) * prod(self.shape[1:])
        return self.number // parts


Named = Iterator[tuple[str, Weight]]


def vector(size: int, cut: Cut = UNCUT) -> Weight:
    """Return a norm's weight, or a bias."""
    return Weight((size,), cut)


def matrix(rows: int, columns: int, cut: Cut = UNCUT) -> Weight:
    """Return the weight [rows, columns] of a product."""
    return Weight((rows, columns), cut, is_product=True)


class Types(NamedTuple):
    """Bytes of a number, by what it is of."""

    stream: int = 4
    """The residual stream between layers."""
    product: int = 4
    """What products take and give."""
    is_cast: bool = False
    """Whether every product keeps a copy of its input in its own type (autocast)."""

    @property
    def wide(self) -> int:
        """Return the bytes of what is summed in at least fp32."""
        return max(4, self.product)

    def inputs(self, products: int) -> int:
        """Return the bytes that so many products of one input keep of each number of it."""
        return self.product * (products if self.is_cast else 1)


class Degrees(NamedTuple):
    """Over how many ranks a sample and the matrices are spread, and how attention goes over those of a sample."""

    cp: int = 1
    tp: int = 1
    etp: int = 1
    context: ContextWay = "ring"


class Need(NamedTuple):
    """A size of the model that the ranks of an axis must divide."""

    axis: Literal["tp", "ep", "etp", "heads"]
    """`heads`: tp, and with Ulysses attention cp * tp."""
    name: str
    """The key, or the product of keys, as a user knows it."""
    size: int
    or_multiple: bool = False
    """Whether the axis may also be a multiple of it: neighbours then hold copies."""

    def allows(self, ranks: int) -> bool:
        """Say whether an axis of so many ranks goes with the size."""
        return self.size % ranks == 0 or (self.or_multiple and ranks % self.size == 0)

    @property
    def rule(self) -> str:
        """Return what is asked of the axis."""
        return f"must divide {self.name} = {self.size}" + (", or be a multiple of it" if self.or_multiple else "")


@dataclass(frozen=True, eq=False)
class Kind(ABC):
    """One kind of part; what it is asked, it answers for a whole model, whose keys give its sizes.

    Bytes are those of one rank for each token that its mixers see (there are b * s/cp); operations those of one token.
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    """What it reads of the keys of [model] that only some kinds do ("bias.q": a letter of bias): unread.py."""

    letter: str
    name: str
    place: Place
    words: str
    """What a user calls it."""
    table: str = ""
    """The table of its own keys is [model.<table>]; "" where they stand in [model]."""
    example: str = ""
    """A pattern that has it."""
    refuses: Mapping[str, str] = field(default_factory=dict)
    """Axes over which it cannot be spread, each with the reason."""

    def reads_of(self, model: ModelConfig) -> frozenset[str]:
        """Return what it reads of `reads` with its table as it is; and norm_eps if it has norms of its own."""
        return self.reads

    @abstractmethod
    def weights(self, model: ModelConfig) -> Named:
        """Yield its parameters by their names within the part, in their order."""

    def mixing_flops(self, model: ModelConfig, seq_len: int, *, causal: bool) -> float:
        """Return the operations of a forward pass that are not products with weights: scores, scans."""
        return 0.0

    @abstractmethod
    def kept(self, model: ModelConfig, degrees: Degrees, types: Types) -> float:
        """Return the bytes kept for the backward pass, the input of the block's norm among them."""

    def kept_once(self, model: ModelConfig, length: int, degrees: Degrees, types: Types) -> float:
        """Return the bytes kept besides by a call with any number of samples of `length` tokens."""
        return 0.0

    def kept_of_sample(self, model: ModelConfig, degrees: Degrees, types: Types) -> float:
        """Return the bytes kept besides for each sample, however many tokens it has."""
        return 0.0

    def at_work(self, model: ModelConfig, degrees: Degrees, types: Types) -> float:
        """Return the bytes that it holds besides while it is at work, beyond what it does on one rank."""
        return 0.0

    def state_bytes(self, model: ModelConfig, tokens: int, width: int) -> float:
        """Return the bytes of the state of one sample after so many tokens, with numbers of `width` bytes."""
        return 0.0

    def problems(self, model: ModelConfig, choose: Choose) -> list[str]:
        """Return every reason why these sizes make no such part."""
        return []

    def needs(self, model: ModelConfig) -> list[Need]:
        """Return which sizes the axes must divide."""
        return []

    def narrowed(self, model: ModelConfig, small: Small, above: int) -> dict[str, Any]:
        """Return the keys of [model] that make it small for a proof, alike in what divides by what.

        Widths are above `above`, so that no two dims of the small model are equal.
        """
        return {}
