"""What every kind of attention does with its queries, keys and values: places them, mixes the values, decodes.

    q, k, v  --rotary positions--> q, k  --context_attention, with biases of scores, windows, dropout--> mixed

    decoding: the same with a cache, whose room is that of the window where there is one

A mixer makes q [s, b, n, d], k [s, b, k, d] and v [s, b, k, e] of this rank's heads, and gives the mixed values
[s, b, n, e] to its output. Rotary positions are the tokens' own; windows, ALiBi and T5 count the tokens between two of
the sequence that the mixer sees, which are fewer where layers let some pass by (model/depth.py). This file knows no
weights but those of T5's biases.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meshwright.kernels.attention.rope import apply_rope
from meshwright.kernels.attention.seen import Blocks, Seen
from meshwright.model.config import ModelConfig
from meshwright.model.mixers.attention_cache import KeyValueCache, empty_cache
from meshwright.model.positions import T5, Alibi, Position, Rope, RopeScaling, bias_of
from meshwright.parallel.config import ContextWay
from meshwright.parallel.context.attend import context_attention
from meshwright.parallel.context.dropped import dropped_weights
from meshwright.parallel.context.order import NO_DOCUMENTS, Documents, meetings
from meshwright.parallel.initialise import InitPolicy
from meshwright.parallel.mesh import NO_CP, NO_TP, Axis
from meshwright.parallel.tensor.linear import NO_COPIES
from meshwright.parallel.where import Where


class Spread(NamedTuple):
    """The axes over which heads and samples are spread."""

    tp: Axis = NO_TP
    kv_copies: Axis = NO_COPIES
    """The neighbouring ranks of `tp` that hold the same key and value head (`copies_of_kv_heads`)."""
    cp: Axis = NO_CP
    context: ContextWay = "ring"
    """How positions of a sample on other ranks of `cp` are attended to."""


ONE_RANK = Spread()


class Look(NamedTuple):
    """How attention looks at a sample: what it is told of positions, what it sees, how scores are weighed."""

    position: Position = Rope()
    is_causal: bool = True
    window: int = 0
    """How many tokens one sees to a side, itself among them; 0: all."""
    blocks: Blocks | None = None
    """Block-sparse attention."""
    scale: float | None = None
    """What the products of queries and keys are multiplied by; None: 1 / sqrt(head_dim)."""
    dropout: float = 0.0
    """Of the weights, in training; they are then made by plain products."""
    only_fused: bool = False
    """Whether only fused operators may be used, so that what they cannot do is refused."""

    def problems(self, cp: Axis) -> list[str]:
        """Return every reason why this cannot be."""
        found = Seen(self.is_causal, self.window, self.blocks).problems()
        if not isinstance(self.position, Position):
            found.append(f"position = {self.position!r}: must be Rope(...), Alibi(), T5(...), or None for no positions")
        if self.scale is not None and not 0.0 < self.scale < math.inf:
            found.append(f"scale = {self.scale}: must be above 0 and finite; None takes 1 / sqrt(head_dim)")
        if not 0.0 <= self.dropout < 1.0:
            found.append(f"attention_dropout = {self.dropout}: must be at least 0 and below 1; 0.1 would fit")
        if self.only_fused and self.dropout:
            found.append(
                f"attention_dropout = {self.dropout}: fused attention makes no weights that could be dropped; 0, or"
                " plain attention, would fit"
            )
        if self.blocks is not None and cp.is_split:
            found.append(f"block-sparse attention does not go over cp = {cp.size}; cp = 1, or a window, would fit")
        return found


USUAL_LOOK = Look()


def look_of(config: ModelConfig, *, rope_base: float = 0.0) -> Look:
    """Return what the keys of [model] say of all attention; another base of rotary positions, if it is given."""
    position: Position = None
    if config.position == "rope":
        scaling = config.rope_scaling
        stretched = None if scaling is None else RopeScaling(**scaling.model_dump())
        position = Rope(rope_base or config.rope_base, config.rope_fraction, stretched)
    elif config.position == "alibi":
        position = Alibi()
    elif config.position == "t5":
        position = T5(config.t5_buckets, config.t5_max_distance)
    return Look(position, scale=config.attention_scale or None, dropout=config.attention_dropout)


class AttentionCore(nn.Module):
    """Positions, mixing and decoding, of this rank's heads."""

    def __init__(
        self,
        num_heads: int,
        look: Look = USUAL_LOOK,
        *,
        name: str = "attention",
        init: InitPolicy | None = None,
        spread: Spread = ONE_RANK,
    ) -> None:
        """Take the number of all query heads; `name` is the layer's global name, under which weights are dropped.

        Raises:
            ValueError: naming every reason why this is no way to look.
        """
        super().__init__()
        if problems := look.problems(spread.cp):
            raise ValueError("\n".join(problems))
        self.look, self.name, self.spread = look, name, spread
        self.num_heads = num_heads
        self.bias = bias_of(look.position, num_heads, init or InitPolicy(), spread.tp)

    @property
    def sees_later_tokens(self) -> bool:
        """Say whether a token is mixed with those behind it, which a decoder's must not be (model/stack.py)."""
        return not self.look.is_causal

    @property
    def is_plain(self) -> bool:
        """Say whether order alone decides what is seen and how it is weighed, which every flash operator can do."""
        look = self.look
        return self.bias is None and not look.window and look.blocks is None and not look.dropout

    def turned(self, q: Tensor, k: Tensor, where: Where) -> tuple[Tensor, Tensor]:
        """Turn queries and keys by their positions, where positions are rotary."""
        rope = self.look.position
        if not isinstance(rope, Rope):
            return q, k
        angles = rope.angles_at(where, q.shape[3], q.dtype)
        return apply_rope(q, *angles), apply_rope(k, *angles)

    def forward(
        self, q: Float[Tensor, "s b n d"], k: Float[Tensor, "s b k d"], v: Float[Tensor, "s b k e"], where: Where
    ) -> Float[Tensor, "s b n e"]:
        """Mix the values of what each token sees; queries and keys are turned already."""
        cp, seen = self.spread.cp, self._seen(len(where.document_whole), q)
        if self.training and self.look.dropout:
            first = self.spread.tp.rank * (self.num_heads // self.spread.tp.size)
            seen = seen._replace(drop=dropped_weights(self.look.dropout, where, f"{self.name}/weights", first))
        documents = NO_DOCUMENTS
        if where.mask_documents:
            meet = None
            if cp.is_split:
                meet = where.derive("context/meetings", lambda: meetings(where.document_whole, cp))
            documents = Documents(where.document_whole, meet)
        entries = where.limits.mask_entries
        return context_attention(q, k, v, cp, self.spread.context, documents, seen, entries)

    def empty_cache(
        self, batch: int, max_len: int | None, num_kv_heads: int, widths: tuple[int, int], like: Tensor
    ) -> KeyValueCache:
        """Return an empty cache of keys and values of these widths, of as many tokens as are seen.

        Raises:
            ValueError: if tokens see those after them, so that there is no next one.
        """
        if not self.look.is_causal:
            raise ValueError("is_causal = False: attention to later tokens cannot decode; True would fit")
        return empty_cache(batch, max_len, self.look.window, num_kv_heads, widths, like)

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: KeyValueCache) -> Float[Tensor, "s b n e"]:
        """Mix the values that the next tokens see, and hold theirs; queries and keys are not turned yet."""
        end = state.next_rows(len(q)).stop
        rope = self.look.position
        if isinstance(rope, Rope):
            angles = (
                rope.angles_from(state.length, len(q), q.shape[3], q)
                if state.at is None
                else rope.angles(state.at, q.shape[3], q.dtype)
            )
            q, k = torch.split(apply_rope(torch.cat([q, k], dim=2), *angles), [q.shape[2], k.shape[2]], 2)
        return state.attend(q, k, v, self._seen(end, q))

    def _seen(self, length: int, like: Tensor) -> Seen:
        """Return what is seen within `length` positions."""
        look, bias = self.look, None
        if self.bias is not None:
            reach = min(length, look.window or length)
            distance = torch.arange(0 if look.is_causal else 1 - reach, reach, device=like.device)
            bias = self.bias(distance, look.is_causal, like)
        return Seen(look.is_causal, look.window, look.blocks, look.scale, bias)
