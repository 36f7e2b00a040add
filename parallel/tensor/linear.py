"""Linear layers split over the tensor-parallel axis, with sequence parallelism between them.

A dim written `f/tp` is held in tp equal parts, one on each rank; tokens lie on all ranks inside a pair of layers,
and on one rank each between pairs:

    column_products    x [s/tp, b, i]  weights [o/tp, i]  ->  [s, b, o/tp] each   gathered once (gathered.py)
    ColumnLinear   x [s, b, i]      weight [o/tp, i]   ->  [s, b, o/tp]
    RowLinear      x [s, b, i/tp]   weight [o, i/tp]   ->  [s/tp, b, o]       summed over the ranks once, at the end

Where tp exceeds what can be cut (key and value heads), `copies` neighbouring ranks hold the same part, and each has
a part of its gradient. A row layer adds its bias after the sum, so once. Without an axis they are plain layers.
This file knows axes; it knows no model.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meshwright.kernels.limits import MANY_TOKENS, NARROW
from meshwright.kernels.matmul.linear import linear
from meshwright.parallel.collectives import scatter_sum
from meshwright.parallel.initialise import ZEROS, InitRule
from meshwright.parallel.mesh import NO_TP, Axis
from meshwright.parallel.placement import Placement, Split, partial_over
from meshwright.parallel.tensor.gathered import Matrix, products_of_gathered

NO_COPIES = Axis("copies")


class ColumnLinear(nn.Module):
    """y = x W^T + b with the output features split over `tp`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rule: InitRule,
        bias: bool = False,
        tp: Axis = NO_TP,
        copies: Axis = NO_COPIES,
    ) -> None:
        """Take the global sizes and the rule that the weight begins with; a bias begins at zero.

        `copies` are the neighbouring ranks of `tp` that hold the same part.
        """
        super().__init__()
        self.rule = rule
        self.split = Split(0, tp, copies=copies.size)
        self.copies = copies
        out_local = divide(out_features, self.split.parts, what="out_features", by=f"{tp.name} / copies")
        self.weight = nn.Parameter(torch.empty(out_local, in_features))
        self.bias = nn.Parameter(torch.empty(out_local)) if bias else None

    def placements(self) -> dict[str, Placement]:
        """Say that weight and bias are cut along the output features."""
        return dict.fromkeys(("weight", "bias"), Placement((self.split,), grad_sum=partial_over(self.copies)))

    def init_rules(self) -> dict[str, InitRule]:
        """Say how each parameter begins."""
        return {"weight": self.rule} | ({"bias": ZEROS} if self.bias is not None else {})

    def forward(self, x: Float[Tensor, "*tokens i"]) -> Float[Tensor, "*tokens o_local"]:
        """Multiply by the weight and add the bias."""
        return linear(x, self.weight, self.bias)


class RowLinear(nn.Module):
    """y = x W^T + b with the input features split over `tp`; each rank is left with its stretch of the tokens."""

    def __init__(
        self, in_features: int, out_features: int, *, rule: InitRule, bias: bool = False, tp: Axis = NO_TP
    ) -> None:
        """Take the global sizes and the rule that the weight begins with; a bias begins at zero."""
        super().__init__()
        self.rule, self.tp = rule, tp
        in_local = divide(in_features, tp.size, what="in_features", by=tp.name)
        self.weight = nn.Parameter(torch.empty(out_features, in_local))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def placements(self) -> dict[str, Placement]:
        """Say that the weight is cut along the input features; the bias is whole, and sees this rank's tokens only."""
        return {"weight": Placement((Split(1, self.tp),)), "bias": Placement(grad_sum=partial_over(self.tp))}

    def init_rules(self) -> dict[str, InitRule]:
        """Say how each parameter begins."""
        return {"weight": self.rule} | ({"bias": ZEROS} if self.bias is not None else {})

    def forward(self, x: Float[Tensor, "*tokens i_local"]) -> Float[Tensor, "*tokens_local o"]:
        """Multiply, sum the ranks' partial products, and add the bias."""
        if not self.tp.is_split:
            return linear(x, self.weight, self.bias)
        y = scatter_sum(linear(x, self.weight), self.tp)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def column_products(
    x: Float[Tensor, "s_local *rest i"], columns: Sequence[ColumnLinear], tp: Axis, *, joins_narrow: bool = False
) -> list[Float[Tensor, "s *rest o_local"]]:
    """Return what each of the layers makes of all ranks' tokens.

    `joins_narrow`: narrow layers may share one product on one rank. Their results then lie in one tensor, which is kept
    as a whole if one of them is; for callers that keep them all.
    """
    if not tp.is_split:
        return _products(x, columns) if joins_narrow else [column(x) for column in columns]
    results: list[Tensor] = products_of_gathered(x, [Matrix(column.weight, column.bias) for column in columns], tp)
    return results


def _products(x: Tensor, columns: Sequence[ColumnLinear]) -> list[Tensor]:
    """Return what each of the layers makes of x; narrow ones share one product, if there are tokens enough."""
    # Layers of few features (B, C and dt of Mamba-2) are slow one by one; joining costs a copy of their weights.
    narrow = [at for at, column in enumerate(columns) if column.weight.shape[0] <= NARROW and column.bias is None]
    if len(narrow) < 2 or x.numel() < MANY_TOKENS * x.shape[-1]:
        return [column(x) for column in columns]
    weights: list[Tensor] = [columns[at].weight for at in narrow]
    joined = torch.split(linear(x, torch.cat(weights)), [len(weight) for weight in weights], -1)
    of_narrow = dict(zip(narrow, joined, strict=True))
    return [of_narrow[at] if at in of_narrow else column(x) for at, column in enumerate(columns)]


def divide(size: int, parts: int, *, what: str, by: str) -> int:
    """Return one part of `size` cut evenly.

    Raises:
        ValueError: if it does not divide.
    """
    if size % parts != 0:
        raise ValueError(f"{what} = {size} does not divide by {by} = {parts}")
    return size // parts


def copies_of(units: int, ranks: int, *, what: str) -> int:
    """Return on how many neighbouring ranks of tp each of the units (groups, key heads) lies that it cuts.

    Raises:
        ValueError: if neither divides the other.
    """
    return 1 if units % ranks == 0 else divide(ranks, units, what="tp", by=what)
