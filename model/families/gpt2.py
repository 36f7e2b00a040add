"""`gpt2`, GPT2LMHeadModel: learned positions, LayerNorm, GELU, biases everywhere; weights of products are [in, out].

layers.N.mixer.part.q, k, v    transformer.h.N.attn.c_attn   [h, 3h], bias [3h]   one behind the other
layers.N.mixer.part.output     transformer.h.N.attn.c_proj   [h, h]
layers.N.feedforward.part.up   transformer.h.N.mlp.c_fc      [h, f]               (down -> c_proj [f, h])
positions.weight               transformer.wpe.weight        [positions, h]

Old files leave `transformer.` out and hold the causal masks.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from meshwright.model.config import ModelConfig
from meshwright.model.families.bloom import plain_reasons
from meshwright.model.families.family import Family, Row
from meshwright.model.families.rules import Parts, only, reasons
from meshwright.model.families.ssm import joined_rows
from meshwright.model.families.table import ATTENTION_BIASES, Names, stack_rows

NAMES = Names(
    "transformer.wte",
    "transformer.h",
    {"mixer": "ln_1", "feedforward": "ln_2"},
    final="transformer.ln_f",
    positions="transformer.wpe",
)
PARTS = Parts(("attention",), ("mlp",), "'*-'")
RULES = {"position": only("learned"), "norm": only("layernorm"), "ffn_activation": only("gelu_tanh")}
FIXED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
}
NEEDED = ("vocab_size", "n_embd", "n_layer", "n_head")


def reasons_against(config: ModelConfig) -> list[str]:
    """Return every reason why a GPT2 cannot be this model."""
    return reasons(config, PARTS, RULES) + plain_reasons(config, "GPT2", None)


def mapping(config: ModelConfig) -> Iterator[Row]:
    """Yield all tensors of a GPT2."""
    return stack_rows(config, {"attention": _attention_rows, "mlp": _mlp_rows}, NAMES)


def _attention_rows(config: ModelConfig, ours: str, theirs: str) -> Iterator[Row]:
    h = config.hidden_size
    yield from _transposed(ours, f"{theirs}.attn.c_attn", dict.fromkeys(("q", "k", "v"), h), h)
    yield from _transposed(ours, f"{theirs}.attn.c_proj", {"output": h}, h)


def _mlp_rows(config: ModelConfig, ours: str, theirs: str) -> Iterator[Row]:
    h, f = config.hidden_size, config.ffn_hidden_size
    yield from _transposed(ours, f"{theirs}.mlp.c_fc", {"up": f}, h)
    yield from _transposed(ours, f"{theirs}.mlp.c_proj", {"down": h}, f)


def _transposed(ours: str, theirs: str, columns: dict[str, int], inputs: int) -> Iterator[Row]:
    for row in joined_rows(ours, theirs, columns, (inputs,), bias=True):
        is_weight = row.theirs.endswith(".weight")
        yield row._replace(shape=row.shape[::-1], is_transposed=True) if is_weight else row


def to_foreign(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of a GPT2's config.json."""
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.ffn_hidden_size,
        "n_positions": config.max_positions,
        "max_position_embeddings": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "embd_pdrop": config.embedding_dropout,
        "resid_pdrop": config.residual_dropout,
        "attn_pdrop": config.attention_dropout,
        "tie_word_embeddings": config.tie_embeddings,
    }


def to_ours(foreign: Mapping[str, Any]) -> dict[str, Any]:
    """Return our [model] keys from a GPT2's config.json."""
    return {
        "pattern": "*-",
        "vocab_size": foreign["vocab_size"],
        "hidden_size": foreign["n_embd"],
        "num_layers": foreign["n_layer"],
        "num_heads": foreign["n_head"],
        "ffn_hidden_size": foreign.get("n_inner") or 4 * foreign["n_embd"],
        "ffn_activation": "gelu_tanh",
        "position": "learned",
        "max_positions": foreign.get("n_positions", 1024),
        "norm": "layernorm",
        "norm_eps": float(foreign.get("layer_norm_epsilon", 1e-5)),
        "bias": [*ATTENTION_BIASES, "ffn"],
        "init_std": float(foreign.get("initializer_range", 0.02)),
        "tie_embeddings": foreign.get("tie_word_embeddings", True),
        "embedding_dropout": float(foreign.get("embd_pdrop", 0.1)),
        "residual_dropout": float(foreign.get("resid_pdrop", 0.1)),
        "attention_dropout": float(foreign.get("attn_pdrop", 0.1)),
    }


GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    reasons_against,
    mapping,
    to_foreign,
    to_ours,
    NEEDED,
    FIXED,
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    prefix="transformer.",
    ignored=r"\.attn\.(masked_)?bias$",
)
