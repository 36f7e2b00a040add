"""What layers choose for each token, heard in the method that chooses; something else may be chosen in its place.

    router               [t, k]    the token's experts
    experts' choice      [t, e]    of each expert its number if it takes the token, else e
    SwitchHead           [t, k]    of each of a rank's heads the experts
    Mixture-of-Depths    [t, 1]    of whole sequences: 1 if the token goes through, else 0

A margin is by how much the last that was chosen won. Who takes the best of a sequence's tokens goes by levels, and
whether rounding decides is nothing that one token shows: of these the margin is infinite.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from meshwright.model.depth import MixtureOfDepths
from meshwright.model.mixers.switch_head import SwitchHead
from meshwright.model.routers.expert_choice import ExpertChoiceRouter
from meshwright.model.routers.router import Router
from meshwright.parallel.sequence_order import Order
from meshwright.parallel.where import Where

Hear = Callable[[str, Tensor, Tensor, Where | None, Tensor | None], Tensor]
"""(name, chosen [t, k], margins [t], the tokens' place and positions if others than the layer's) -> what is chosen."""


def watch_choices(module: nn.Module, name: str, hear: Hear) -> None:
    """Let `hear` have the last word on what a module chooses; one that chooses nothing is left alone."""
    if isinstance(module, ExpertChoiceRouter):
        _watch_experts(module, name, hear)
    elif isinstance(module, Router):
        _watch_router(module, name, hear)
    elif isinstance(module, SwitchHead):
        _watch_heads(module, name, hear)
    elif isinstance(module, MixtureOfDepths):
        _watch_depth(module, name, hear)


def _watch_router(router: Router, name: str, hear: Hear) -> None:
    choose = router.choose

    def watched(ranking: Tensor) -> Tensor:
        chosen = choose(ranking)
        return hear(name, chosen, _margin(ranking, chosen), None, None)

    setattr(router, "choose", watched)  # noqa: B010  (a module takes a function as an attribute)


def _watch_experts(router: ExpertChoiceRouter, name: str, hear: Hear) -> None:
    take = router.take

    def watched(probability: Tensor, trained: Where | None) -> Tensor:
        takes = take(probability, trained)
        experts = torch.arange(takes.shape[-1])
        chosen = torch.where(takes, experts, len(experts)).flatten(0, -2)
        return (hear(name, chosen, _no_margin(chosen), None, None) == experts).view(takes.shape)

    setattr(router, "take", watched)  # noqa: B010


def _watch_heads(mixer: SwitchHead, name: str, hear: Hear) -> None:
    choose = mixer.choose

    def watched(scores: Tensor, what: str) -> Tensor:
        chosen = choose(scores, what)
        margin = _margin(scores, chosen)
        first = mixer.spread.tp.rank * scores.shape[2]
        heads = [
            hear(f"{name}.{what}, head {first + i}", of_head.flatten(0, 1), margin[:, :, i].flatten(), None, None)
            for i, of_head in enumerate(chosen.unbind(2))
        ]
        return torch.stack(heads, dim=1).view(chosen.shape)

    setattr(mixer, "choose", watched)  # noqa: B010


def _watch_depth(layer: MixtureOfDepths, name: str, hear: Hear) -> None:
    choose = layer.choose

    def watched(score: Tensor, predicted: Tensor, where: Where, order: Order) -> Tensor:
        goes = choose(score, predicted, where, order)
        chosen = goes.long().flatten()[:, None]
        decided = hear(f"{name}.router", chosen, _no_margin(chosen), where, order.position)
        return decided.view(goes.shape).bool()

    setattr(layer, "choose", watched)  # noqa: B010


def _margin(ranking: Tensor, chosen: Tensor) -> Tensor:
    """Return by how much the lowest of those chosen is above the highest of the others."""
    ranking = ranking.detach()
    return ranking.gather(-1, chosen).amin(-1) - ranking.scatter(-1, chosen, -torch.inf).amax(-1)


def _no_margin(chosen: Tensor) -> Tensor:
    return torch.full((len(chosen),), torch.inf)
