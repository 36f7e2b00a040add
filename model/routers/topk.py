"""Softmax top-k routing (Shazeer et al. 2017 without noise; Mixtral, Qwen3, OLMoE), and Switch's top-1.

probability = softmax(scores), ranking = probability, in groups as DeepSeek-V2 has them (a group's best expert is
its score). Weights are normalised (Mixtral, Qwen3) or not (OLMoE, DeepSeekMoE).
"""

from typing import Any

from meshwright.model.routers.router import Router


class TopKRouter(Router):
    """A linear score for each expert, softmax, and the k largest."""

    normalises = True
    best_of_group = 1


class SwitchRouter(Router):
    """One expert for each token, weighed by its probability (Fedus et al. 2021); meant for a capacity of 1.25."""

    normalises = None

    def __init__(self, hidden_size: int, num_experts: int, top_k: int = 1, *more: Any, **named: Any) -> None:
        """Take what every router takes.

        Raises:
            ValueError: if top_k is not 1.
        """
        if top_k != 1:
            raise ValueError(f"top_k = {top_k}: a Switch router sends a token to one expert; 1 would fit")
        super().__init__(hidden_size, num_experts, top_k, *more, **named)
