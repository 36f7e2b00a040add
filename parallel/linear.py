"""The linear layer that every part is made of: a weight, perhaps a bias, and how they begin.

    Linear   x [s, b, i]   weight [o, i]   ->   [s, b, o]

It holds the weight whole. It knows no model.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meshwright.kernels.linear import linear
from meshwright.parallel.initialise import ZEROS, InitRule


class Linear(nn.Module):
    """y = x W^T + b."""

    def __init__(self, in_features: int, out_features: int, *, rule: InitRule, bias: bool = False) -> None:
        """Take the global sizes and the rule that the weight begins with; a bias begins at zero."""
        super().__init__()
        self.rule = rule
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def init_rules(self) -> dict[str, InitRule]:
        """Say how each parameter begins."""
        return {"weight": self.rule} | ({"bias": ZEROS} if self.bias is not None else {})

    def forward(self, x: Float[Tensor, "*tokens i"]) -> Float[Tensor, "*tokens o"]:
        """Multiply by the weight and add the bias."""
        return linear(x, self.weight, self.bias)
