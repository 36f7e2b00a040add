"""Attention to a part of the sample as descriptions: a window, or blocks (module: mixers/attention.py).

Weights, and what is kept, are those of attention to all; operations are those of what is seen, and a window bounds what
decoding holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meshwright.model.kinds.mixers.attention import AttentionKind
from meshwright.model.kinds.mixers.attention_keys import BlockSparseConfig, SlidingConfig

if TYPE_CHECKING:
    from meshwright.model.config import ModelConfig
    from meshwright.model.kinds.small import Small


@dataclass(frozen=True, eq=False)
class SlidingKind(AttentionKind):
    """Attention within a window."""

    def reads_of(self, model: ModelConfig) -> frozenset[str]:
        """Return what attention reads; the model's rope_base where the table has none."""
        has_own = model.sliding is not None and model.sliding.rope_base > 0
        return super().reads_of(model) - ({"rope_base"} if has_own else frozenset())

    def mixing_flops(self, model: ModelConfig, seq_len: int, *, causal: bool) -> float:
        """Return the operations of the scores and of the values' sum within the window."""
        seen = min(_sliding(model).window, seq_len)
        # The first `seen` tokens see 1, 2, ... of them, all others as many.
        positions = seen - seen * (seen - 1) / (2 * seq_len) if causal else float(seen)
        return 4.0 * model.num_heads * model.head_dim * positions

    def state_bytes(self, model: ModelConfig, tokens: int, width: int) -> float:
        """Return the bytes of the keys and values of the window."""
        return super().state_bytes(model, min(tokens, _sliding(model).window), width)

    def narrowed(self, model: ModelConfig, small: Small, above: int) -> dict[str, Any]:
        """Return a window that is shorter than the small sample."""
        window = min(_sliding(model).window, 11)
        return {"sliding": _sliding(model).model_copy(update={"window": window})}


@dataclass(frozen=True, eq=False)
class BlockSparseKind(AttentionKind):
    """Attention to the nearest blocks and the first."""

    def mixing_flops(self, model: ModelConfig, seq_len: int, *, causal: bool) -> float:
        """Return the operations of the scores and of the values' sum in the blocks that a token sees."""
        table = _block_sparse(model)
        size, others = table.block_size, table.local_blocks - 1 + table.leading_blocks
        blocks, rest = divmod(seq_len, size)
        # Block by block: the token's own up to it, and whole ones before, at most `others` of them.
        few = min(blocks, others)
        before = size * size * (few * (few - 1) // 2 + others * (blocks - few)) + rest * size * min(blocks, others)
        own = blocks * size * (size + 1) / 2 + rest * (rest + 1) / 2 if causal else blocks * size**2 + rest**2
        return 4.0 * model.num_heads * model.head_dim * (before + own) / seq_len

    def narrowed(self, model: ModelConfig, small: Small, above: int) -> dict[str, Any]:
        """Return blocks of which the small sample has several."""
        table = _block_sparse(model)
        sizes = {
            "block_size": min(table.block_size, 4),
            "local_blocks": min(table.local_blocks, 2),
            "leading_blocks": min(table.leading_blocks, 1),
        }
        return {"block_sparse": table.model_copy(update=sizes)}


def _sliding(model: ModelConfig) -> SlidingConfig:
    assert model.sliding is not None, "the checks let no L pass without a [model.sliding]"
    return model.sliding


def _block_sparse(model: ModelConfig) -> BlockSparseConfig:
    assert model.block_sparse is not None, "the checks let no B pass without a [model.block_sparse]"
    return model.block_sparse
