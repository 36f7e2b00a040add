"""One token more of the recurrence of Mamba-2, from the state before it: `ssd` where nothing is cut in chunks.

    h' = exp(dt a) h + dt x B^T      y = h' C + skip x       h [d, N] for each head; groups of heads share B, C

Few small operations, because that is what generation costs; there is no backward of its own.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from meshwright.kernels.precision import at_least_fp32, without_autocast


def ssd_step(
    x: Float[Tensor, "1 b n d"],
    dt: Float[Tensor, "1 b n"],
    a: Float[Tensor, " n"],
    b: Float[Tensor, "1 b g N"],
    c: Float[Tensor, "1 b g N"],
    skip: Float[Tensor, " n"] | None,
    state: Float[Tensor, "b n d N"],
) -> tuple[Float[Tensor, "1 b n d"], Float[Tensor, "b n d N"]]:
    """Return y, in x's type, and the state after the token, in at least fp32."""
    batch, n, d = x.shape[1:]
    groups, size = b.shape[2:]
    with without_autocast(x):
        wide, dt, b, c = (at_least_fp32(each[0]) for each in (x, dt, b, c))
        h = at_least_fp32(state) * torch.exp(dt * a)[..., None, None]
        rows = h.view(batch, groups, -1, size)
        rows.addcmul_((wide * dt[..., None]).view(batch, groups, -1, 1), b[:, :, None])
        y = torch.matmul(rows, c[..., None]).view(batch, n, d)
        if skip is not None:
            y.addcmul_(wide, skip[:, None].to(y.dtype))
    return y[None].to(x.dtype), h
