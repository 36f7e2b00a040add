"""What a model costs: parameters and floating-point operations, counted from its config alone.

Parameters of a layer (n*d = num_heads * head_dim, k*d = num_kv_heads * head_dim; biases and QK-norms where there are):

    attention  h*(n*d) q + 2*h*(k*d) k, v + (n*d)*h output        norm h
    mlp        3*h*f                                              norm h
    moe        e*h router + e*3*h*f experts + 3*h*f_shared        norm h

    whole model = layers + final norm h + embedding v*h + output v*h (0 when tied)
    active      = the same with top_k of the e experts: what one token meets

Operations of one token, a multiplication and an addition being two:

    forward    2 for each active weight of a product (the embedding is looked up, not multiplied; the output is)
               + 4*n*d for each position it attends to (scores and values), in each attention layer
    training   three times the forward: the backward makes two products of each one

*Causal convention*: a token of a sequence of s attends to itself and to those before it, (s + 1)/2 positions on
average, and only these are counted. `causal=False` counts all s, as PaLM's formula and many reports do. Norms,
softmax, RoPE and the optimizer are left out, and so is recomputation: these are the model's operations, not the
machine's. MFU = training operations per second / the device's dense peak.

Counts of parameters are whole numbers, operations floats.
"""

from typing import NamedTuple

from meshwright.model.config import ModelConfig
from meshwright.model.pattern import LayerKinds


class WeightCounts(NamedTuple):
    """Numbers of weights by what cuts them; their sum is all."""

    whole: int = 0
    """Nothing: norms, routers, biases that are added after a sum."""
    tp: int = 0
    kv_heads: int = 0
    """tp, as far as there are key and value heads; beyond that neighbours hold copies."""
    experts: int = 0
    """ep and etp."""
    expert_biases: int = 0
    """ep: the biases of the experts' outputs."""


# The backward computes a gradient for the input and one for the weight of each product.
TRAINING_TO_FORWARD = 3.0


def parameter_count(config: ModelConfig) -> int:
    """Return the number of weights in the whole model, as published counts have it (a tied matrix counts once)."""
    layers = sum(layer_parameters(config, kinds) for kinds in config.layers)
    return layers + config.hidden_size + embedding_parameters(config)


def active_parameter_count(config: ModelConfig) -> int:
    """Return the number of weights that one token meets: all but the experts it is not sent to."""
    return parameter_count(config) - sum(_idle_parameters(config, kinds) for kinds in config.layers)


def embedding_parameters(config: ModelConfig) -> int:
    """Return the weights of the embedding and, unless it is tied, of the output."""
    return config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)


def layer_parameters(config: ModelConfig, kinds: LayerKinds) -> int:
    """Return the number of weights in one layer, the norms before its parts included."""
    return sum(layer_weights(config, kinds))


def layer_weights(config: ModelConfig, kinds: LayerKinds) -> WeightCounts:
    """Return the weights of one layer by which axes cut them."""
    parts = (_mixer_weights(config, kinds), _feedforward_weights(config, kinds))
    return WeightCounts(*(sum(column) for column in zip(*parts, strict=True)))


def layer_forward_flops(config: ModelConfig, kinds: LayerKinds, seq_len: int, *, causal: bool = True) -> float:
    """Return the operations of one token in one layer's forward pass; a stack is cut into stages by these."""
    weights = _product_weights(config, kinds)
    return 2.0 * weights + _attention_flops(config, kinds, seq_len, causal=causal)


def output_forward_flops(config: ModelConfig) -> float:
    """Return the operations of one token in the output matrix's forward pass."""
    return 2.0 * config.vocab_size * config.hidden_size


def forward_flops_per_token(config: ModelConfig, seq_len: int, *, causal: bool = True) -> float:
    """Return the operations of one token in the whole forward pass, averaged over a sequence of `seq_len`."""
    layers = sum(layer_forward_flops(config, kinds, seq_len, causal=causal) for kinds in config.layers)
    return layers + output_forward_flops(config)


def training_flops_per_token(config: ModelConfig, seq_len: int, *, causal: bool = True) -> float:
    """Return the operations of one token in forward and backward: 6 for each active weight, and attention's."""
    return TRAINING_TO_FORWARD * forward_flops_per_token(config, seq_len, causal=causal)


def _mixer_weights(config: ModelConfig, kinds: LayerKinds) -> WeightCounts:
    if kinds.mixer is None:
        return WeightCounts()
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    kv_biases = ("k" in config.bias) + ("v" in config.bias)
    return WeightCounts(
        whole=config.hidden_size * (1 + ("output" in config.bias)) + (2 * config.head_dim if config.qk_norm else 0),
        tp=2 * config.hidden_size * queries + (queries if "q" in config.bias else 0),
        kv_heads=2 * config.hidden_size * keys + kv_biases * keys,
    )


def _feedforward_weights(config: ModelConfig, kinds: LayerKinds) -> WeightCounts:
    h, has_bias = config.hidden_size, "ffn" in config.bias
    if kinds.feedforward == "mlp":
        return WeightCounts(whole=h * (1 + has_bias), tp=_cut_of_mlp(config, config.ffn_hidden_size))
    if kinds.feedforward == "moe":
        assert config.moe is not None, "the checks see to it that E has its table"
        moe, shared = config.moe, config.moe.num_shared_experts > 0
        return WeightCounts(
            whole=h * (1 + moe.num_experts + (shared and has_bias)),
            tp=_cut_of_mlp(config, moe.shared_hidden_size),
            experts=moe.num_experts * _cut_of_mlp(config, moe.expert_hidden_size),
            expert_biases=moe.num_experts * h * has_bias,
        )
    return WeightCounts()


def _cut_of_mlp(config: ModelConfig, width: int) -> int:
    """Return the weights of one gated MLP that are cut along its inner width: all but the last bias."""
    return 3 * config.hidden_size * width + (2 * width if "ffn" in config.bias else 0)


def _mixer_products(config: ModelConfig) -> int:
    """Return the weights of q, k, v and output."""
    return 2 * config.hidden_size * config.head_dim * (config.num_heads + config.num_kv_heads)


def _mlp(config: ModelConfig, width: int) -> int:
    """Return the weights, and biases, of one gated MLP."""
    biases = 2 * width + config.hidden_size if "ffn" in config.bias else 0
    return 3 * config.hidden_size * width + biases


def _idle_parameters(config: ModelConfig, kinds: LayerKinds) -> int:
    """Return the weights of a layer's experts that a token is not sent to."""
    if kinds.feedforward != "moe" or config.moe is None:
        return 0
    return (config.moe.num_experts - config.moe.top_k) * _mlp(config, config.moe.expert_hidden_size)


def _product_weights(config: ModelConfig, kinds: LayerKinds) -> int:
    """Return the weights that one token is multiplied with in a layer; norms and biases are not."""
    weights = _mixer_products(config) if kinds.mixer else 0
    if kinds.feedforward == "mlp":
        weights += 3 * config.hidden_size * config.ffn_hidden_size
    if kinds.feedforward == "moe" and config.moe is not None:
        moe = config.moe
        width = moe.top_k * moe.expert_hidden_size + moe.shared_hidden_size
        weights += config.hidden_size * (moe.num_experts + 3 * width)
    return weights


def _attention_flops(config: ModelConfig, kinds: LayerKinds, seq_len: int, *, causal: bool) -> float:
    """Return the operations of the scores and of the values' sum, for one token."""
    if kinds.mixer != "attention":
        return 0.0
    positions = (seq_len + 1) / 2 if causal else float(seq_len)
    return 4.0 * config.num_heads * config.head_dim * positions
