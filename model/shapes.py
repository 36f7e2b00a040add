"""Every parameter of a model by global name, with its global shape, from the config alone.

    embedding.weight [v, h]
    layers.<n>.mixer.norm.weight [h]          layers.<n>.mixer.part.{q, k, v, output}.{weight, bias}, {q, k}_norm.weight
    layers.<n>.feedforward.norm.weight [h]    layers.<n>.feedforward.part.{gate, up, down}.{weight, bias}
                                              ... .part.router.weight [e, h], .part.experts.{gate, up, down} [e, ., .]
                                              ... .part.experts.{gate, up, down}_bias [e, .], .part.shared.*
    final_norm.weight [h]   output.weight [v, h] unless tied

Beside its shape stand what cuts a parameter, and whether a token is multiplied with it. Counts of parameters, of
operations (`model/costs.py`) and of bytes are made of this table: a new part is described here, once.

What is chosen by name is so checked before a rank is started, and counted on a machine that could not hold the model.
Tests compare the table with the models that `model/parts.py` builds, whole and cut. Nothing here loads torch.
"""

from collections.abc import Callable, Iterator
from math import prod
from typing import Literal, NamedTuple

from meshwright.model.config import ModelConfig
from meshwright.model.pattern import LayerKinds

Cut = Literal["none", "tp", "kv_heads", "vocabulary", "experts", "expert_outputs"]
"""What cuts a parameter.

    none             norms, routers, biases that are added after a sum
    kv_heads         tp, as far as there are key and value heads; beyond that neighbours hold copies
    vocabulary       tp, in equal rows with padding
    experts          ep and etp
    expert_outputs   ep: the biases of the experts' outputs
"""


class Weight(NamedTuple):
    """One parameter as the whole model has it."""

    shape: tuple[int, ...]
    cut: Cut
    is_product: bool
    """Whether a token that meets it is multiplied with it; the embedding is looked up."""

    @property
    def number(self) -> int:
        """Return how many numbers it has."""
        return prod(self.shape)

    @property
    def is_of_experts(self) -> bool:
        """Say whether it is a stack over the routed experts."""
        return self.cut in ("experts", "expert_outputs")


Named = Iterator[tuple[str, Weight]]


def weights(config: ModelConfig) -> dict[str, Weight]:
    """Return every parameter, in the order of the model's; the config must have passed its checks."""
    found = embedding_weights(config)
    for number, kinds in enumerate(config.layers):
        found |= {f"layers.{number}.{name}": weight for name, weight in layer_weights(config, kinds).items()}
    return found | head_weights(config)


def embedding_weights(config: ModelConfig) -> dict[str, Weight]:
    """Return what stands before the layers."""
    return {"embedding.weight": Weight((config.vocab_size, config.hidden_size), "vocabulary", is_product=False)}


def layer_weights(config: ModelConfig, kinds: LayerKinds) -> dict[str, Weight]:
    """Return the parameters of one layer, by their names within it, in their order."""
    parts = (("mixer", _MIXERS, kinds.mixer), ("feedforward", _FEEDFORWARDS, kinds.feedforward))
    found: dict[str, Weight] = {}
    for place, table, kind in parts:
        if kind is not None:
            found[f"{place}.norm.weight"] = _whole(config.hidden_size)
            found |= {f"{place}.part.{name}": weight for name, weight in table[kind](config)}
    return found


def head_weights(config: ModelConfig) -> dict[str, Weight]:
    """Return what stands behind the layers: the final norm and, unless it is tied, the output."""
    found = {"final_norm.weight": _whole(config.hidden_size)}
    if not config.tie_embeddings:
        found["output.weight"] = Weight((config.vocab_size, config.hidden_size), "vocabulary", is_product=True)
    return found


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes alone."""
    return {name: weight.shape for name, weight in weights(config).items()}


def _whole(size: int) -> Weight:
    return Weight((size,), "none", is_product=False)


def _matrix(rows: int, columns: int, cut: Cut) -> Weight:
    return Weight((rows, columns), cut, is_product=True)


def _bias(size: int, cut: Cut) -> Weight:
    return Weight((size,), cut, is_product=False)


def _attention(config: ModelConfig) -> Named:
    h, queries, keys = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    matrices = {
        "q": (_matrix(queries, h, "tp"), _bias(queries, "tp")),
        "k": (_matrix(keys, h, "kv_heads"), _bias(keys, "kv_heads")),
        "v": (_matrix(keys, h, "kv_heads"), _bias(keys, "kv_heads")),
        "output": (_matrix(h, queries, "tp"), _bias(h, "none")),
    }
    for name, (matrix, bias) in matrices.items():
        yield f"{name}.weight", matrix
        if name in config.bias:
            yield f"{name}.bias", bias
    if config.qk_norm:
        yield "q_norm.weight", _whole(config.head_dim)
        yield "k_norm.weight", _whole(config.head_dim)


def _mlp(config: ModelConfig) -> Named:
    return _gated(config, config.ffn_hidden_size)


def _gated(config: ModelConfig, width: int) -> Named:
    """Yield the three matrices of a gated feed-forward."""
    h = config.hidden_size
    matrices = {
        "gate": (_matrix(width, h, "tp"), _bias(width, "tp")),
        "up": (_matrix(width, h, "tp"), _bias(width, "tp")),
        "down": (_matrix(h, width, "tp"), _bias(h, "none")),
    }
    for name, (matrix, bias) in matrices.items():
        yield f"{name}.weight", matrix
        if "ffn" in config.bias:
            yield f"{name}.bias", bias


def _moe(config: ModelConfig) -> Named:
    moe, h = config.moe, config.hidden_size
    assert moe is not None, "the checks see to it that E has its table"
    e, width = moe.num_experts, moe.expert_hidden_size
    yield "router.weight", _matrix(e, h, "none")
    for name, rows, columns in (("gate", width, h), ("up", width, h), ("down", h, width)):
        yield f"experts.{name}", Weight((e, rows, columns), "experts", is_product=True)
    if "ffn" in config.bias:
        yield "experts.gate_bias", Weight((e, width), "experts", is_product=False)
        yield "experts.up_bias", Weight((e, width), "experts", is_product=False)
        yield "experts.down_bias", Weight((e, h), "expert_outputs", is_product=False)
    if moe.num_shared_experts:
        yield from ((f"shared.{name}", weight) for name, weight in _gated(config, moe.shared_hidden_size))


_MIXERS: dict[str, Callable[[ModelConfig], Named]] = {"attention": _attention}
_FEEDFORWARDS: dict[str, Callable[[ModelConfig], Named]] = {"mlp": _mlp, "moe": _moe}
