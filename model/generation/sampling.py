"""The choice of the next token: greedy, temperature, top-k, top-p (nucleus).

Each row of the logits [b, v] is sorted once, the highest first, ties by the lower token id. Every rule then keeps
a beginning of that order, and the token is drawn from what is kept by the inverse of its distribution:

    sorted probabilities   .40 .25 .15 .10 .06 .04      after the temperature
    top_k = 4              .40 .25 .15 .10              exactly k, also among equals
    top_p = 0.7            .44 .28                      the shortest beginning whose sum reaches p, of what top-k left
    uniform = 0.7     0 ---------.61----------- 1       the token under uniform * (sum of what is kept): the second

The random number is an argument, so the functions are pure; `uniforms_at` makes it from (seed, step, sequence): a
generation is repeated by its seed, and sequence i draws the same however many others stand beside it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from meshwright.parallel.counter_rng import uniform_at
from meshwright.parallel.fits import is_whole_number

# No vocabulary is larger; a count that no tensor can be cut at would end in a traceback.
MOST_TOP_K = 2**24


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The default draws from the model's own distribution."""

    temperature: float = 1.0
    """Divides the logits: below 1 sharper, above 1 flatter; 0 is greedy, always the likeliest. Usual: 0.6 to 1."""
    top_k: int = 0
    """Draw from the k likeliest tokens only; 0 is off. Usual: 20 to 100."""
    top_p: float = 1.0
    """Draw from the fewest tokens that together have this probability; 1 is off. Usual: 0.9 to 0.95."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            ValueError: naming every such value.
        """
        problems = []
        if not 0.0 <= self.temperature < float("inf"):
            problems.append(f"temperature = {self.temperature}: must be 0 (greedy) or a positive number")
        if not is_whole_number(self.top_k) or not 0 <= self.top_k <= MOST_TOP_K:
            problems.append(f"top_k = {self.top_k}: must be 0 (off) or a whole number of tokens, at most {MOST_TOP_K}")
        if not 0.0 < self.top_p <= 1.0:
            problems.append(f"top_p = {self.top_p}: must be above 0 and at most 1 (off)")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def is_greedy(self) -> bool:
        """Say whether the likeliest token is always taken, so that no random number is used."""
        return self.temperature == 0.0 or self.top_k == 1


def next_tokens(logits: Float[Tensor, "b v"], sampling: Sampling, uniform: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
    """Choose one token for each row; `uniform` holds a number in [0, 1) for each.

    Raises:
        ValueError: if a row allows no token, or holds a NaN or +inf.
    """
    highest = logits.amax(dim=-1)  # NaN if any logit of the row is
    if not bool(torch.isfinite(highest).all()):
        rows = torch.nonzero(~torch.isfinite(highest)).flatten().tolist()
        raise ValueError(f"the logits of rows {rows} hold NaN or +inf, or allow no token: none can be chosen")
    if sampling.is_greedy:
        return _likeliest(logits)
    probabilities, tokens = kept_probabilities(logits, sampling)
    cumulative = probabilities.cumsum(dim=-1)
    threshold = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, threshold, right=True)
    # Rounding may put the threshold at the very end, beyond the last token that is kept.
    last_kept = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
    return tokens.gather(1, place.minimum(last_kept)).flatten().to(logits.device)


def kept_probabilities(
    logits: Float[Tensor, "b v"], sampling: Sampling
) -> tuple[Float[Tensor, "b v"], Int[Tensor, "b v"]]:
    """Return, the likeliest token first, the probabilities that may be drawn (0 beyond them) and their tokens.

    They sum to what top-k and top-p kept, not to 1. Temperature comes first, then top-k, then top-p of what is left.
    """
    # In fp64: over a large vocabulary a sum in fp32 would shift the borders between tokens. mps has none.
    exact = logits.to(device="cpu" if logits.device.type == "mps" else None, dtype=torch.float64)
    if sampling.temperature > 0.0:
        # Only distances to the highest count; so that it stays 0, and the others at most become -inf, however small
        # the temperature is.
        exact = (exact - exact.amax(dim=-1, keepdim=True)) / sampling.temperature
        exact = exact.nan_to_num(nan=0.0, neginf=float("-inf"))  # 0 / 0, where a subnormal counts as zero
    ordered, tokens = exact.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k > 0:
        ordered[:, sampling.top_k :] = float("-inf")
    probabilities = ordered.softmax(dim=-1)
    if sampling.top_p < 1.0:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)  # never the first: 0 is before it
    return probabilities, tokens


def uniforms_at(seed: int, step: int, num_sequences: int) -> Float[Tensor, " b"]:
    """Return the numbers of one step of the generation for sequences 0 to b - 1, as `next_tokens` takes them."""
    return uniform_at(seed, f"sampling/{step}", torch.arange(num_sequences))


def _likeliest(logits: Float[Tensor, "b v"]) -> Int[Tensor, " b"]:
    """Return the likeliest token of each row; among equals the lowest id, which argmax does not promise."""
    vocab_size = logits.shape[-1]
    ids = torch.arange(vocab_size, device=logits.device)
    is_highest = logits == logits.amax(dim=-1, keepdim=True)
    return torch.where(is_highest, ids, vocab_size).amin(dim=-1)
