"""Whole sequences that lie on several ranks: everyone's rows in the order of positions, and some of them re-cut.

    rank 0  positions 0 1 6 7     rank 1  positions 2 3 4 5        held between layers (cp = 2)
    whole   0 1 2 3 4 5 6 7       on both

All ranks find the same, so whatever is decided of whole sequences is decided alike everywhere. Tokens that were chosen
of each sequence, in other numbers on every rank, are cut anew as if they were a sequence of their own, and come back:

    chosen  1 2 3 6       rank 0  1 6     rank 1  2 3              in chunks, as positions were
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor

from meshwright.parallel.collectives import exchange_rows, gather
from meshwright.parallel.context.order import positions_to_ranks
from meshwright.parallel.experts.exchange import put_rows, take_rows
from meshwright.parallel.mesh import Axis
from meshwright.parallel.where import Where


class Order(NamedTuple):
    """How the tokens of whole sequences lie on the ranks."""

    by_position: Int64[Tensor, " s"]
    """In which of the gathered rows each token stands, by position."""
    position: Int64[Tensor, " s"]
    """Their positions, ascending."""
    counted: Bool[Tensor, "s b"]
    """Which of them count, by position."""
    held: Int64[Tensor, " s_held"]
    """Which of them are held here, in the order in which they are held."""


def order_of(where: Where, token: Axis) -> Order:
    """Return how the tokens of a micro-batch's sequences lie along `token`; found once for all layers."""

    def find() -> Order:
        s = len(where.position)
        whole = gather(torch.cat((where.position[:, None], where.counted.to(where.position.dtype)), dim=1), token)
        by_position = torch.argsort(whole[:, 0], stable=True)
        place = torch.empty_like(by_position)
        place[by_position] = torch.arange(len(by_position), device=by_position.device)
        held = place[token.rank * s : (token.rank + 1) * s]
        return Order(by_position, whole[by_position, 0], whole[by_position, 1:].bool(), held)

    return where.derive(f"counted/order of whole sequences/{token.size}", find)


def whole_sequences(x: Shaped[Tensor, "s_held b *rest"], where: Where, token: Axis) -> Shaped[Tensor, "s b *rest"]:
    """Return everyone's rows by position; nothing goes back from them to a gradient."""
    return gather(x.detach(), token)[order_of(where, token).by_position]


@dataclass(frozen=True)
class Recut:
    """Which rows go from which rank to which, and back; rows are of [s, b, ...] with both first dims in one."""

    token: Axis
    sent: Int64[Tensor, " sent"]
    """Rows that leave, by the rank they go to."""
    received: Int64[Tensor, " received"]
    """Where those that arrive stand, by the rank they come from."""
    send: list[int]
    receive: list[int]
    before: tuple[int, int]
    """Rows and samples held between layers."""
    after: tuple[int, int]
    """Rows and samples held of those that were chosen."""

    def bring(self, x: Shaped[Tensor, "s_held b h"]) -> Shaped[Tensor, "r_held b h"]:
        """Return this rank's part of the chosen tokens; zeros behind a sequence's last."""
        return self._moved(x, self.sent, self.received, (self.send, self.receive), self.after)

    def bring_back(self, x: Shaped[Tensor, "r_held b h"]) -> Shaped[Tensor, "s_held b h"]:
        """Return the chosen tokens to where they came from, with zeros between them."""
        return self._moved(x, self.received, self.sent, (self.receive, self.send), self.before)

    def _moved(
        self, x: Tensor, of: Tensor, to: Tensor, numbers: tuple[list[int], list[int]], shape: tuple[int, int]
    ) -> Tensor:
        arrived = exchange_rows(take_rows(x.flatten(0, 1), of), *numbers, self.token)
        return put_rows(arrived, to, shape[0] * shape[1]).view(*shape, x.shape[2])


def rows_in_parts(at_least: int, cp: Axis, tp: Axis) -> int:
    """Return the fewest rows that lie evenly on cp, in two chunks each, and on tp within."""
    each = 2 * cp.size if cp.is_split else 1
    rows = max(1, -(-at_least // each)) * each
    while rows // cp.size % tp.size:
        rows += each
    return rows


def recut(chosen: Bool[Tensor, "s b"], rows: int, order: Order, cp: Axis, token: Axis) -> Recut:
    """Cut the chosen tokens of each sequence, `rows` of them with what is missing, over the ranks of `token`.

    `chosen` is by position; no sequence may have more than `rows`.
    """
    (s, b), size, me = chosen.shape, token.size, token.rank
    s_held, r_held = s // size, rows // size
    nth = chosen.to(torch.int64).cumsum(0) - 1
    at, sample = chosen.nonzero(as_tuple=True)
    slots = torch.arange(rows, device=chosen.device)
    by_rank = positions_to_ranks(slots, cp) if cp.is_split else slots
    slot = torch.empty_like(by_rank)
    slot[by_rank] = slots
    goes = slot[nth[at, sample]]
    owner, target = order.by_position[at] // s_held, goes // r_held
    mine = (order.by_position[at] % s_held) * b + sample
    theirs = (goes % r_held) * b + sample

    leaving, arriving = owner == me, target == me
    by_target = torch.argsort((target * r_held * b + theirs)[leaving])
    by_owner = torch.argsort((owner * r_held * b + theirs)[arriving])
    return Recut(
        token,
        mine[leaving][by_target],
        theirs[arriving][by_owner],
        torch.bincount(target[leaving], minlength=size).tolist(),
        torch.bincount(owner[arriving], minlength=size).tolist(),
        (s_held, b),
        (r_held, b),
    )
