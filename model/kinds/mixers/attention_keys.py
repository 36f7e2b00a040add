"""The tables of attention's kinds in a run file, beside the keys that stand in [model].

[model.rope_scaling]    rotary positions stretched to longer samples      of every attention with rotary positions
[model.sliding]         L    [model.block_sparse]   B
[model.latent]          +    [model.switch_head]    H
"""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat

from meshwright.model.kinds.sizes import TABLE, Size, SizeOrZero

PositionName = Literal["rope", "alibi", "t5", "learned", "sinusoidal", "none"]


class Table(BaseModel):
    """A closed table."""

    model_config = TABLE


class RopeScalingConfig(Table):
    """How the frequencies of rotary positions are stretched to samples longer than a model was trained for."""

    kind: Literal["linear", "ntk", "yarn", "llama3"]
    """All frequencies alike, by a larger base, or fast pairs less than slow ones (yarn, llama3)."""
    factor: Annotated[float, Field(ge=1.0)]
    """How many times as long."""
    original_length: SizeOrZero = 0
    """yarn and llama3: the length before."""
    beta_fast: PositiveFloat = 32.0
    """yarn: pairs that turn more often than this in the original length stay."""
    beta_slow: PositiveFloat = 1.0
    """yarn: pairs that turn less often than this are stretched by the whole factor."""
    mscale: NonNegativeFloat = 0.0
    """yarn of DeepSeek: cosines and sines are multiplied by its ratio to mscale_all_dim, and only beside it."""
    mscale_all_dim: NonNegativeFloat = 0.0
    """yarn of DeepSeek: sharpens the scores of latent attention, by its square; others need mscale beside it."""
    attention_factor: NonNegativeFloat = 0.0
    """yarn: what cosines and sines are multiplied by; 0 = by factor and mscale."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3: wavelengths above original_length / this are stretched."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3: wavelengths below original_length / this stay."""


class SlidingConfig(Table):
    """Attention within a window, at each `L` of the pattern."""

    window: Size = 4096
    """A token sees itself and the window - 1 before it; 512 to 4096 are usual. Memory of decoding is bounded by it."""
    rope_base: NonNegativeFloat = 0.0
    """Base of its rotary positions; 0 = the model's. Gemma 3 has 10000 here and 1000000 in the model."""


class BlockSparseConfig(Table):
    """Block-sparse attention, at each `B` of the pattern."""

    block_size: Size = 64
    """Positions of a block."""
    local_blocks: Size = 16
    """How many blocks a token sees up to its own."""
    leading_blocks: SizeOrZero = 1
    """How many blocks at the sample's begin every token sees."""


class LatentConfig(Table):
    """Multi-head latent attention, at each `+` of the pattern; its heads are model.num_heads."""

    kv_lora_rank: Size
    """Width of the latent that keys and values come from; 512 in DeepSeek-V3."""
    qk_nope_head_dim: Size
    """Features of a head's queries and keys that know no position; 128 in DeepSeek-V3."""
    qk_rope_head_dim: Size
    """Rotary features, an even number; the key's are shared by all heads; 64 in DeepSeek-V3."""
    v_head_dim: Size
    """Width of a head's values; 128 in DeepSeek-V3."""
    q_lora_rank: SizeOrZero = 0
    """Width of the latent that queries come from; 0 = none; 1536 in DeepSeek-V3."""


class SwitchHeadConfig(Table):
    """SwitchHead attention, at each `H` of the pattern; its heads are model.num_heads of model.head_dim."""

    num_experts: Size = 5
    """Experts of each head, for its values, and as many for its output; 2 to 8 in the paper."""
    top_k: Size = 2
    """How many of either a token chooses."""
