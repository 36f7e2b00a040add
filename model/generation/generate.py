"""Generation, token by token, from the state that each layer keeps; for any model with `initial_state` and `step`.

    prompt [s, b] --step--> state, logits of its last position --choose--> token [b] --step--> ...

The whole prompt goes through in one step. Samples of a batch have prompts of one length; a sample that has ended
goes on being computed and its tokens are given as the end token.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from meshwright.model.generation.sampling import Sampling, next_tokens, uniforms_at
from meshwright.model.positions import LearnedPositions
from meshwright.model.stack import LanguageModel
from meshwright.parallel.fits import check_sizes, up_to


def generate(
    model: LanguageModel,
    prompt: Int[Tensor, "s b"],
    max_new_tokens: int,
    *,
    sampling: Sampling,
    seed: int = 0,
    end_token: int | None = None,
) -> Iterator[Int[Tensor, " b"]]:
    """Yield the next token of each sample until all have ended or `max_new_tokens` were given.

    Only ids that `model` has a row for are given; with the same seed the tokens are the same.

    Raises:
        ValueError: if the prompt is empty, `max_new_tokens` is below 0, or the tokens are more than the model has
            learned positions for.
    """
    check_sizes({"max_new_tokens": max_new_tokens}, may_be_none=("max_new_tokens",))
    length, batch = prompt.shape
    if length == 0:
        raise ValueError("the prompt has no tokens: give a text, or begin from the end-of-text token")
    if problem := too_long(model, length, max_new_tokens):
        raise ValueError(problem)
    state = model.initial_state(batch, length + max_new_tokens)
    ended = torch.zeros(batch, dtype=torch.bool, device=prompt.device)
    no_draw = torch.zeros(batch)
    tokens = prompt
    for count in range(max_new_tokens):
        # Closed before each yield: whoever takes the tokens goes on in this thread, perhaps to train.
        with torch.no_grad():
            logits = model.step(tokens, state, only_last=True)[-1]
        uniform = no_draw if sampling.is_greedy else uniforms_at(seed, count, batch)
        chosen = next_tokens(logits, sampling, uniform)
        if end_token is not None:
            chosen = torch.where(ended, end_token, chosen)
            ended |= chosen == end_token
        yield chosen
        if bool(ended.all()):
            return
        tokens = chosen[None]


def too_long(model: LanguageModel, length: int, max_new_tokens: int, key: str = "max_new_tokens") -> str:
    """Return why so many tokens cannot follow a prompt of `length`: learned positions end; empty if they can.

    The last new token needs no position, as nothing is made from it.
    """
    if not isinstance(model.positions, LearnedPositions):
        return ""
    rows, needed = model.positions.weight.shape[0], length + max_new_tokens - 1
    if needed <= rows:
        return ""
    if length > rows:
        return (
            f"the prompt has {length} tokens, and the model positions for {rows} (max_positions); a prompt of"
            f" {up_to(rows)} would fit"
        )
    return (
        f"{key} = {max_new_tokens}: behind a prompt of {length} token{'s' if length > 1 else ''} needs {needed}"
        f" positions, and the model has {rows} (max_positions); {up_to(rows - length + 1)} would fit"
    )
