"""The [model] and [model.moe] tables: what is computed, in global sizes, whatever it runs on.

Sizes that follow from others may be left out (or 0) and are filled in when the table is made, so that a reader of
a `ModelConfig` never meets a 0:

    num_kv_heads     = num_heads
    head_dim         = hidden_size / num_heads
    ffn_hidden_size  = 8/3 * hidden_size, rounded up to a multiple of 64

Only `vocab_size` may stay 0, until the tokenizer is read: `with_vocab` fills it in.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeGuard

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat
from pydantic import model_validator as validator

from meshwright.model.pattern import LayerKinds, layers_of, parse_pattern
from meshwright.parallel.fits import divisors, nearest, up_to

# Takes a key and the config with each of the sizes that the broken rule allows; returns those that are said to fit.
Choose = Callable[[str, Mapping[int, "ModelConfig"]], list[int]]
BiasPlace = Literal["q", "k", "v", "output", "ffn"]

# Sizes are rounded up to this, so that products and their parts stay aligned.
ALIGNMENT = 64

# No model comes near these bounds: what is beyond them is a slip of the keyboard, and would only end without memory.
MAX_SIZE, MAX_LAYERS = 2**24, 2**14
Size = Annotated[int, Field(gt=0, le=MAX_SIZE)]
SizeOrZero = Annotated[int, Field(ge=0, le=MAX_SIZE)]


class MoeConfig(BaseModel):
    """The mixture of experts that stands at each `E` of the pattern; softmax router."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    num_experts: Size
    """Routed experts in each MoE layer; 8 to 256 are usual. `parallel.ep` must divide it."""
    top_k: Size
    """Experts that each token is sent to; 1 to 8 are usual."""
    expert_hidden_size: Size
    """Inner width of one expert (SwiGLU); fine-grained experts use a quarter of a dense layer's, or less."""
    num_shared_experts: SizeOrZero = 0
    """Experts that see every token, besides the routed ones; held as one MLP of this many times the width."""
    normalise_top_k: bool = True
    """Divide the chosen experts' weights by their sum, as Mixtral and Qwen3 do."""
    load_balancing: Literal["sequence", "step", "none"] = "sequence"
    """What the load-balancing loss counts: each sequence by itself, the previous step's global load, or no loss."""
    load_balancing_weight: NonNegativeFloat = 0.01
    """Weight of the load-balancing loss; 0.001 to 0.02 are usual."""
    z_loss_weight: NonNegativeFloat = 0.001
    """Weight of the router's z-loss, which keeps its scores small; 0 turns it off, 0.001 is usual."""
    capacity_factor: Annotated[float, Field(ge=0.0, le=1024.0)] = 0.0
    """0 = dropless; else an expert takes ceil(this * top_k * tokens / num_experts) of a sequence in training."""
    router_jitter: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """In training the router's input is multiplied by numbers from 1 - this to 1 + this (Switch: 0.01); 0 = not."""

    @property
    def shared_hidden_size(self) -> int:
        """Return the width of the one MLP that all shared experts make together."""
        return self.num_shared_experts * self.expert_hidden_size


class ModelConfig(BaseModel):
    """A decoder: a pattern of layers, and the sizes that they share."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    preset: str = ""
    """Name of a public or prepared shape, such as "llama3-8b"; keys that are written beside it win."""
    pattern: str = "*-"
    """One period of layers: `*` attention, `-` MLP, `E` MoE, `2(*-)6(*E)` repeats; repeated up to num_layers."""
    num_layers: Annotated[int, Field(gt=0, le=MAX_LAYERS)]
    """Layers of the stack; a layer is a mixer (attention) with the feed-forward that follows it. 12 to 126."""
    hidden_size: Size
    """Width of the residual stream; 768 (small) to 16384 (the largest public dense model)."""
    num_heads: Size
    """Attention heads (of the queries)."""
    num_kv_heads: SizeOrZero = 0
    """Key and value heads, shared by groups of query heads (GQA); 0 = num_heads. 8 is usual in large models."""
    head_dim: SizeOrZero = 0
    """Width of one head; 0 = hidden_size / num_heads. 64 or 128 are usual."""
    ffn_hidden_size: SizeOrZero = 0
    """Inner width of the MLP (SwiGLU); 0 = 8/3 of hidden_size, rounded up to a multiple of 64."""
    vocab_size: SizeOrZero = 0
    """Rows of the embedding; 0 = the tokenizer's size, rounded up to a multiple of 64, once the store is read."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the mean square in RMSNorm; 1e-5 or 1e-6 are usual."""
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys, before RoPE, as Qwen3 does; steadies large learning rates."""
    rope_base: PositiveFloat = 10_000.0
    """Base of the rotary positions; 10000 for contexts of 2k to 4k, 500000 or more for longer ones."""
    bias: Annotated[tuple[BiasPlace, ...], Field(strict=False)] = ()
    """Which products have a bias: any of "q", "k", "v", "output" (of attention), "ffn"."""
    tie_embeddings: bool = False
    """Use the embedding as the output matrix too; saves much in models below 2 B parameters."""
    residual_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of what each part adds to the residual stream that is zeroed in training; 0 is usual in pretraining."""
    init: Literal["normal", "xavier_uniform", "scaled"] = "normal"
    """How weights begin: normal(init_std), Xavier-uniform, or normal with 1/sqrt(fan_in)."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of `init = "normal"`; 0.006 to 0.02 are usual."""
    init_depth_scaled: bool = True
    """Divide the initial weights that write to the residual stream by sqrt(2 * num_layers)."""
    moe: MoeConfig | None = None
    """The experts; there if, and only if, the pattern has an E."""

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
            filled["ffn_hidden_size"] = round_up(-(-8 * hidden_size // 3))
        return filled

    @property
    def layers(self) -> tuple[LayerKinds, ...]:
        """Return the kinds of every layer's parts, from the first to the last."""
        return layers_of(self.pattern, self.num_layers)

    @property
    def num_moe_layers(self) -> int:
        """Return how many layers have experts."""
        return sum(layer.feedforward == "moe" for layer in self.layers)

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
        return [*self._pattern_problems(choose), *self._attention_problems(choose), *self._moe_problems()]

    def _pattern_problems(self, choose: Choose) -> list[str]:
        try:
            period = parse_pattern(self.pattern)
        except ValueError as error:
            return [f'model.pattern = "{self.pattern}": {error}; "*-" is a dense decoder, "*E" one of experts']
        found = []
        if self.num_layers % len(period) != 0:
            others = self._with_each("num_layers", _multiples_near(self.num_layers, len(period)))
            fits = choose("model.num_layers", others)
            below, above = [size for size in fits if size < self.num_layers], [s for s in fits if s > self.num_layers]
            fits = [*below[-1:], *above[:1]]
            found.append(
                f"model.num_layers = {self.num_layers}: must be a multiple of the {len(period)} layers of"
                f' model.pattern = "{self.pattern}"; '
                + (f"one of {fits} would fit" if fits else f"a pattern of at most {MAX_LAYERS} layers would fit")
            )
        if any(layer.mixer == "mamba2" for layer in period):
            found.append(
                f'model.pattern = "{self.pattern}": the letter M (Mamba-2) is not in this version;'
                " * (attention) would fit"
            )
        return found

    def _attention_problems(self, choose: Choose) -> list[str]:
        found = []
        if self.head_dim == 0:
            fits = choose("model.num_heads", self._with_other_heads())
            found.append(
                f"model.num_heads = {self.num_heads}: must divide model.hidden_size = {self.hidden_size}, or"
                f" model.head_dim be given" + (f"; one of {nearest(fits, self.num_heads)} would fit" if fits else "")
            )
        elif self.head_dim % 2 != 0:
            fits = [size for size in (self.head_dim - 1, self.head_dim + 1) if size > 0]
            found.append(
                f"model.head_dim = {self.head_dim}: must be even, because RoPE turns pairs;"
                f" {' or '.join(map(str, fits))} would fit"
            )
        if self.num_heads % self.num_kv_heads != 0:
            fits = choose("model.num_kv_heads", self._with_each("num_kv_heads", divisors(self.num_heads)))
            found.append(
                f"model.num_kv_heads = {self.num_kv_heads}: must divide model.num_heads = {self.num_heads};"
                f" one of {nearest(fits, self.num_kv_heads)} would fit"
            )
        return found

    def _with_each(self, key: str, sizes: list[int]) -> dict[int, "ModelConfig"]:
        return {size: self.model_copy(update={key: size}) for size in sizes}

    def _with_other_heads(self) -> dict[int, "ModelConfig"]:
        """Return the config with each number of heads of an even width, and what is filled in from it."""
        found = {}
        for size in divisors(self.hidden_size):
            if self.hidden_size // size % 2 == 0:
                kv_heads = size if self.num_kv_heads == self.num_heads else self.num_kv_heads
                sizes = {"num_heads": size, "num_kv_heads": kv_heads, "head_dim": self.hidden_size // size}
                found[size] = self.model_copy(update=sizes)
        return found

    def _moe_problems(self) -> list[str]:
        has_experts = "E" in self.pattern
        if self.moe is None:
            if not has_experts:
                return []
            return [
                f'model.pattern = "{self.pattern}": has an E, so a table [model.moe] with num_experts, top_k and'
                ' expert_hidden_size must be there; or write "-" (MLP) for E'
            ]
        found = []
        if not has_experts:
            found.append(
                f'model.pattern = "{self.pattern}": has no E, so nothing uses the table [model.moe];'
                ' "*E" would use it, or leave the table out'
            )
        if self.moe.top_k > self.moe.num_experts:
            found.append(
                f"model.moe.top_k = {self.moe.top_k}: must not exceed model.moe.num_experts = {self.moe.num_experts};"
                f" {up_to(self.moe.num_experts)} would fit"
            )
        return found


def round_up(size: int, multiple: int = ALIGNMENT) -> int:
    """Return the smallest multiple that is not below `size`."""
    return -(-size // multiple) * multiple


def _multiples_near(value: int, step: int) -> list[int]:
    """Return the few multiples below `value`, and some more above it: a pipeline may ask for many layers."""
    below = value // step
    return [times * step for times in range(max(1, below - 3), below + 65) if times * step <= MAX_LAYERS]


def _is_size(value: object) -> TypeGuard[int]:
    """Say whether this is a whole number of 1 or more; True is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
