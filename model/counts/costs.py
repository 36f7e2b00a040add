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

A layer in [ ] (Mixture-of-Depths) computes `capacity` of the tokens, which mix with each other alone; its weights all
count as met.

*Causal convention*: a token of a sequence of s attends to itself and to those before it, (s + 1)/2 positions on
average, and only these are counted. `causal=False` counts all s, as PaLM's formula and many reports do. Norms,
softmax, RoPE and the optimizer are left out, and so is recomputation: these are the model's operations, not the
machine's. MFU = training operations per second / the device's dense peak.

Counts of parameters are whole numbers, operations floats.
"""

from meshwright.model.config import ModelConfig
from meshwright.model.counts.shapes import layer_weights, weights
from meshwright.model.kinds.depth import depth_of
from meshwright.model.kinds.table import KINDS
from meshwright.model.pattern import LayerKinds

# The backward computes a gradient for the input and one for the weight of each product.
TRAINING_TO_FORWARD = 3.0


def parameter_count(config: ModelConfig) -> int:
    """Return the number of weights in the whole model, as published counts have it (a tied matrix counts once)."""
    return sum(weight.number for weight in weights(config).values())


def active_parameter_count(config: ModelConfig) -> int:
    """Return the number of weights that one token meets: all but the experts it is not sent to."""
    return sum(weight.met for weight in weights(config).values())


def layer_forward_flops(config: ModelConfig, kinds: LayerKinds, seq_len: int, *, causal: bool = True) -> float:
    """Return the operations of one token in one layer's forward pass; a stack is cut into stages by these."""
    found = layer_weights(config, kinds)
    passing = sum(weight.met for name, weight in found.items() if weight.is_product and not _is_of_part(name))
    products = sum(weight.met for name, weight in found.items() if weight.is_product and _is_of_part(name))
    share = depth_of(config).capacity if kinds.is_routed else 1.0
    length = max(1, round(share * seq_len))
    mixing = sum(KINDS[name].mixing_flops(config, length, causal=causal) for name in kinds.names)
    return 2.0 * passing + share * (2.0 * products + mixing)


def _is_of_part(name: str) -> bool:
    """Say whether a layer's parameter is of one of its parts, not of the router around them."""
    return name.startswith(("mixer.", "feedforward."))


def embedding_forward_flops(config: ModelConfig) -> float:
    """Return what looking a token up costs beside products, where a stack is cut: 2 for each of its h numbers.

    No multiplication: forward h numbers are read and written, backward h are added into the matrix's gradient. The
    count of a product's weight that is met once is what comes nearest; MFU has none of it.
    """
    return 2.0 * config.hidden_size


def output_forward_flops(config: ModelConfig) -> float:
    """Return the operations of one token in the output matrix's forward pass."""
    return 2.0 * config.vocab_size * config.hidden_size


def further_tokens_flops(config: ModelConfig, seq_len: int, *, causal: bool = True) -> float:
    """Return the operations by which one token's further tokens are predicted, each by a layer and the output."""
    if not config.further_tokens:
        return 0.0
    layer = layer_forward_flops(config, config.last_layer, seq_len, causal=causal)
    projection = 4.0 * config.hidden_size**2
    return config.further_tokens * (projection + layer + output_forward_flops(config))


def forward_flops_per_token(config: ModelConfig, seq_len: int, *, causal: bool = True) -> float:
    """Return the operations of one token in the whole forward pass, averaged over a sequence of `seq_len`."""
    layers = sum(layer_forward_flops(config, kinds, seq_len, causal=causal) for kinds in config.layers)
    return layers + output_forward_flops(config) + further_tokens_flops(config, seq_len, causal=causal)


def training_flops_per_token(config: ModelConfig, seq_len: int, *, causal: bool = True) -> float:
    """Return the operations of one token in forward and backward: 6 for each active weight, and attention's."""
    return TRAINING_TO_FORWARD * forward_flops_per_token(config, seq_len, causal=causal)
