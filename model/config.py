"""The [model] table and those of its kinds of parts: what is computed, in global sizes, whatever it runs on.

Sizes that follow from others may be left out (or 0) and are filled in when the table is made: nobody meets a 0 later.

    num_kv_heads     = num_heads
    head_dim         = hidden_size / num_heads
    ffn_hidden_size  = 8/3 * hidden_size, rounded up to a multiple of 64

Only `vocab_size` may stay 0, until the tokenizer is read: `with_vocab` fills it in. The table of a kind that the
pattern has may be left out where all of its keys have defaults.
"""

from typing import Annotated, Any, Literal, TypeGuard

from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat
from pydantic import model_validator as validator

from meshwright.model.kinds.depth import DepthConfig
from meshwright.model.kinds.feedforward.mlp import FfnActivation
from meshwright.model.kinds.feedforward.moe import MoeConfig
from meshwright.model.kinds.kind import Choose, Kind
from meshwright.model.kinds.mixers.attention_keys import (
    BlockSparseConfig,
    LatentConfig,
    PositionName,
    RopeScalingConfig,
    SlidingConfig,
    SwitchHeadConfig,
)
from meshwright.model.kinds.mixers.gated_delta import GatedDeltaConfig
from meshwright.model.kinds.mixers.mamba1 import Mamba1Config
from meshwright.model.kinds.mixers.mamba2 import Mamba2Config
from meshwright.model.kinds.mixers.s4d import S4dConfig
from meshwright.model.kinds.multi_token import MultiTokenConfig
from meshwright.model.kinds.norms import FORMS, Form, NormName, Placing, deepnorm_alpha
from meshwright.model.kinds.sizes import MAX_LAYERS, TABLE, Size, SizeOrZero, round_up, usual_width
from meshwright.model.kinds.stack import required_keys, stack_problems
from meshwright.model.kinds.table import ALL
from meshwright.model.kinds.unread import unread_problems
from meshwright.model.pattern import LayerKinds, kinds_in, layers_of

BiasPlace = Literal["q", "k", "v", "output", "ffn"]


class ModelConfig(BaseModel):
    """A decoder: a pattern of layers, and the sizes that they share."""

    model_config = TABLE

    preset: str = ""
    """Name of a public or prepared shape, such as "llama3-8b"; keys that are written beside it win."""
    pattern: str = "*-"
    """Layers: mixers `*` `L` `B` `+` `H` `M` `m` `G` `S`, feed-forwards `-` `E`, `[ ]` for some tokens only (each is in
    docs/models.md). `2(*-)6(*E)` repeats, all repeat to num_layers; `*E @0 *-` places."""
    num_layers: Annotated[int, Field(gt=0, le=MAX_LAYERS)]
    """Layers of the stack; a layer is a mixer (attention) with the feed-forward that follows it. 12 to 126."""
    distinct_layers: SizeOrZero = 0
    """Layers that have weights of their own; layer n uses those of layer n modulo this (ALBERT: 1). 0 = every one."""
    hidden_size: Size
    """Width of the residual stream; 768 (small) to 16384 (the largest public dense model)."""
    num_heads: SizeOrZero = 0
    """Attention heads (of the queries); needed where the pattern has attention."""
    num_kv_heads: SizeOrZero = 0
    """Key and value heads, shared by groups of query heads (GQA); 0 = num_heads. 8 is usual in large models."""
    head_dim: SizeOrZero = 0
    """Width of one head; 0 = hidden_size / num_heads. 64 or 128 are usual."""
    ffn_hidden_size: SizeOrZero = 0
    """Inner width of the MLP; 0 = 8/3 of hidden_size, rounded up to a multiple of 64."""
    ffn_activation: FfnActivation = "swiglu"
    """What the MLP and the experts compute between their products; names that end in glu are gated (three matrices)."""
    vocab_size: SizeOrZero = 0
    """Rows of the embedding; 0 = the tokenizer's size, rounded up to a multiple of 64, once the store is read."""
    norm: NormName = "rmsnorm"
    """Which norm stands around the parts; docs/parts.md shows each."""
    norm_placement: Placing = "pre"
    """Where: before each part, behind the sum ("post", "deepnorm"), around the part ("sandwich"), behind it ("branch");
    "pre_post" before mixers and behind feed-forwards; "hybrid_norm" on q, k and v of *, L, B, before feed-forwards."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the mean square in a norm; 1e-5 or 1e-6 are usual."""
    embedding_norm: bool = False
    """A norm behind the embedding, as Bloom has it."""
    final_norm: bool = True
    """A norm before the output matrix; "post" and "deepnorm" can do without."""
    embedding_multiplier: PositiveFloat = 1.0
    """Multiplies the embedding: sqrt(hidden_size) in Gemma, 12 in Granite (muP)."""
    residual_multiplier: PositiveFloat = 1.0
    """Multiplies what each part adds to the residual stream: 0.22 in Granite (muP)."""
    logits_scaling: PositiveFloat = 1.0
    """Divides the logits: 8 in Granite (muP)."""
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys, before RoPE, as Qwen3 does; steadies large learning rates."""
    qk_norm_over: Literal["heads", "tokens"] = "heads"
    """What qk_norm's mean is taken over: each head's features, or those of all heads of a token, as in OLMo 2."""
    position: PositionName = "rope"
    """How positions are told: rotary, "alibi" (Bloom), "t5" (learned by distance), "learned" rows or "sinusoidal" ones
    that are added to the embedding (GPT-2), or "none"."""
    max_positions: SizeOrZero = 0
    """Rows of position = "learned"; data.seq_len must not exceed it."""
    rope_base: PositiveFloat = 10_000.0
    """Base of the rotary positions; 10000 for contexts of 2k to 4k, 500000 or more for longer ones."""
    rope_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """How much of a head is turned, from its first feature on; 0.25 in GPT-NeoX and Qwen3-Next."""
    rope_scaling: RopeScalingConfig | None = None
    """Stretches the rotary positions to longer samples; left out where the model is trained at its length."""
    t5_buckets: Annotated[int, Field(ge=4, le=4096)] = 32
    """Buckets of distances with position = "t5", an even number."""
    t5_max_distance: Size = 128
    """With position = "t5": all distances from here on share a bucket."""
    attention_scale: NonNegativeFloat = 0.0
    """What products of queries and keys are multiplied by; 0 = 1 / sqrt(head_dim). 0.0078125 in Granite (muP)."""
    attention_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of attention's weights that is dropped in training; they are then made by plain products, which is slow."""
    attention_gate: bool = False
    """Multiply what attention mixed by the sigmoid of a product of its own, as Qwen3-Next does."""
    bias: Annotated[tuple[BiasPlace, ...], Field(strict=False)] = ()
    """Which products have a bias: any of "q", "k", "v", "output" (of attention; latent: all four or none), "ffn"."""
    tie_embeddings: bool = False
    """Use the embedding as the output matrix too; saves much in models below 2 B parameters."""
    embedding_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the embedded features that is zeroed in training; 0 is usual in pretraining."""
    residual_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of what each part adds to the residual stream that is zeroed in training; 0 is usual in pretraining."""
    ffn_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the MLP's inner numbers, and of shared experts', that is zeroed in training; 0 is usual."""
    init: Literal["normal", "xavier_uniform", "xavier_normal", "scaled"] = "normal"
    """How weights begin: normal(init_std), Xavier uniform or normal (DeepNorm's), or normal with 1/sqrt(fan_in)."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of `init = "normal"`; 0.006 to 0.02 are usual."""
    init_depth_scaled: bool = True
    """Divide the initial weights that write to the residual stream by sqrt(2 * num_layers)."""
    sliding: SlidingConfig | None = None
    """Attention within a window; there if, and only if, the pattern has an L."""
    block_sparse: BlockSparseConfig | None = None
    """Block-sparse attention; there if, and only if, the pattern has a B."""
    latent: LatentConfig | None = None
    """Latent attention; there if, and only if, the pattern has a +."""
    switch_head: SwitchHeadConfig | None = None
    """SwitchHead attention; there if, and only if, the pattern has an H."""
    multi_token: MultiTokenConfig | None = None
    """Predict further tokens too, in training; there if it is to be done."""
    moe: MoeConfig | None = None
    """The experts; there if, and only if, the pattern has an E."""
    mamba2: Mamba2Config | None = None
    """The Mamba-2 mixers; may be left out where its keys' usual values are meant."""
    mamba1: Mamba1Config | None = None
    """The Mamba-1 mixers; may be left out where its keys' usual values are meant."""
    gated_delta: GatedDeltaConfig | None = None
    """The gated delta nets; may be left out where its keys' usual values are meant."""
    s4d: S4dConfig | None = None
    """The S4D mixers; may be left out where its keys' usual values are meant."""
    depth: DepthConfig | None = None
    """Mixture-of-Depths; there if, and only if, the pattern has a layer in [ ], which lets only some tokens in."""

    @validator(mode="before")
    @classmethod
    def _fill_in_sizes(cls, table: Any) -> Any:
        """Fill in the sizes that follow from others; what is wrong is left for the checks to find."""
        if not isinstance(table, dict):
            return table
        hidden_size, num_heads = table.get("hidden_size"), table.get("num_heads")
        filled = dict(table)
        if not filled.get("num_kv_heads") and _is_size(num_heads):
            filled["num_kv_heads"] = num_heads
        if not filled.get("head_dim") and _is_size(hidden_size) and _is_size(num_heads):
            filled["head_dim"] = hidden_size // num_heads if hidden_size % num_heads == 0 else 0
        if not filled.get("ffn_hidden_size") and _is_size(hidden_size):
            filled["ffn_hidden_size"] = usual_width(hidden_size)
        for kind in _kinds_written(filled):
            if kind.table and filled.get(kind.table) is None and not required_keys(cls, kind):
                filled[kind.table] = {}
        if "[" in str(filled.get("pattern", "")) and filled.get("depth") is None:
            filled["depth"] = {}
        return filled

    @property
    def layers(self) -> tuple[LayerKinds, ...]:
        """Return the kinds of every layer's parts, from the first to the last."""
        return layers_of(self.pattern, self.num_layers)

    @property
    def layer_kinds(self) -> frozenset[LayerKinds]:
        """Return the kinds of layers, each once; none where the pattern cannot be read."""
        return kinds_in(self.pattern)

    @property
    def part_kinds(self) -> list[Kind]:
        """Return the kinds of parts that there are, in the order of their table."""
        names = {name for layer in self.layer_kinds for name in layer.names}
        return [kind for kind in ALL if kind.name in names]

    @property
    def known_kinds(self) -> list[Kind]:
        """Return those of them that can be asked: whose table, if they have one, is not missing (told elsewhere)."""
        return [kind for kind in self.part_kinds if not kind.table or getattr(self, kind.table) is not None]

    @property
    def held_layers(self) -> int:
        """Return how many layers have weights of their own."""
        return self.distinct_layers or self.num_layers

    @property
    def further_tokens(self) -> int:
        """Return how many tokens behind the next one are predicted in training."""
        return self.multi_token.depth if self.multi_token else 0

    @property
    def last_layer(self) -> LayerKinds:
        """Return the kinds of the last layer, which those that predict further tokens have too."""
        return self.layers[-1]._replace(is_routed=False)

    @property
    def embeds_at_both_ends(self) -> bool:
        """Return whether the last stage of a pipeline has the embedding too."""
        return self.tie_embeddings or self.further_tokens > 0

    @property
    def stream_multiplier(self) -> float:
        """Return what the residual stream is multiplied by before a part's result is added."""
        return deepnorm_alpha(self.num_layers) if self.norm_placement == "deepnorm" else 1.0

    @property
    def forms(self) -> dict[str, Form]:
        """Return where the blocks of mixers and of feed-forwards have their norms."""
        return FORMS[self.norm_placement]

    @property
    def num_moe_layers(self) -> int:
        """Return how many layers have experts."""
        return sum(layer.feedforward == "moe" for layer in self.layers)

    def has(self, kind: str) -> bool:
        """Say whether some layer has a part of this kind."""
        return any(kind in layer.names for layer in self.layer_kinds)

    def with_vocab(self, tokenizer_size: int) -> "ModelConfig":
        """Return this config with `vocab_size` filled in from the tokenizer's, if it was left at 0.

        Raises:
            ValueError: if a vocabulary was given that has no room for the tokenizer's.
        """
        if self.vocab_size == 0:
            return self.model_copy(update={"vocab_size": round_up(tokenizer_size)})
        if problems := self.vocab_problems(tokenizer_size):
            raise ValueError(*problems)
        return self

    def vocab_problems(self, tokenizer_size: int) -> list[str]:
        """Return the reason why this model has no room for the ids of a tokenizer, if it has none."""
        if self.vocab_size == 0 or self.vocab_size >= tokenizer_size:
            return []
        return [
            f"model.vocab_size = {self.vocab_size}: must hold the tokenizer's {tokenizer_size} tokens;"
            f" {round_up(tokenizer_size)} or 0 (the tokenizer's size) would fit"
        ]

    def problems(self, choose: Choose = lambda _key, others: list(others)) -> list[str]:
        """Return every reason why these sizes make no model; empty means that they do.

        `choose` leaves, of the sizes that would make one, those that also go with what else is known of the run.
        """
        found = [*stack_problems(self, choose), *unread_problems(self)]
        for kind in self.known_kinds:
            found += [line for line in kind.problems(self, choose) if line not in found]
        return found


def _kinds_written(table: dict[str, Any]) -> list[Kind]:
    """Return the kinds whose letters stand in the pattern of a table that is not checked yet."""
    pattern = table.get("pattern", "")
    return [kind for kind in ALL if isinstance(pattern, str) and kind.letter in pattern]


def _is_size(value: object) -> TypeGuard[int]:
    """Say whether this is a whole number of 1 or more; True is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
