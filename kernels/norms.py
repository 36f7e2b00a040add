"""Root-mean-square normalisation."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from meshwright.kernels.precision import at_least_fp32


def rms_norm(x: Float[Tensor, "*tokens h"], weight: Float[Tensor, " h"], eps: float) -> Float[Tensor, "*tokens h"]:
    """Divide each vector by its root mean square and scale each feature; sums in at least fp32, result in x's dtype."""
    wide = at_least_fp32(x)
    return F.rms_norm(wide, (x.shape[-1],), weight.to(wide.dtype), eps).to(x.dtype)
