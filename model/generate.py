"""Generation, token by token, from the state that each layer keeps; for any model with `initial_state` and `step`.

    prompt [s, b] --step--> state, logits of its last position --choose--> token [b] --step--> ...

The whole prompt goes through in one step. Samples of a batch have prompts of one length; a sample that has ended
goes on being computed and its tokens are given as the end token.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from meshwright.model.sampling import Sampling, next_tokens, uniforms_at
from meshwright.model.stack import LanguageModel


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
        ValueError: if the prompt is empty.
    """
    length, batch = prompt.shape
    if length == 0:
        raise ValueError("the prompt has no tokens: give a text, or begin from the end-of-text token")
    state = model.initial_state(batch, length + max_new_tokens)
    ended = torch.zeros(batch, dtype=torch.bool, device=prompt.device)
    tokens = prompt
    for count in range(max_new_tokens):
        # Closed before each yield: whoever takes the tokens goes on in this thread, perhaps to train.
        with torch.no_grad():
            logits = model.step(tokens, state)[-1]
        chosen = next_tokens(logits, sampling, uniforms_at(seed, count, batch))
        if end_token is not None:
            chosen = torch.where(ended, end_token, chosen)
            ended |= chosen == end_token
        yield chosen
        if bool(ended.all()):
            return
        tokens = chosen[None]
