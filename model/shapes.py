"""Every parameter of a model by global name, with its global shape, from the config alone.

    embedding.weight [v, h]
    layers.<n>.mixer.norm.weight [h]          layers.<n>.mixer.part.{q, k, v, output}.{weight, bias}, {q, k}_norm.weight
    layers.<n>.feedforward.norm.weight [h]    layers.<n>.feedforward.part.{gate, up, down}.{weight, bias}
                                              ... .part.router.weight [e, h], .part.experts.{gate, up, down} [e, ., .]
                                              ... .part.experts.{gate, up, down}_bias [e, .], .part.shared.*
    final_norm.weight [h]   output.weight [v, h] unless tied

What is chosen by name is so checked before a rank is started, and counted on a machine that could not hold the model.
A test compares the table with the models that `model/parts.py` builds. Nothing here loads torch.
"""

from collections.abc import Iterator

from meshwright.model.config import ModelConfig
from meshwright.model.pattern import LayerKinds

Named = Iterator[tuple[str, tuple[int, ...]]]


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes, in the order of the model's parameters; the config must have passed its checks."""
    h, table = config.hidden_size, (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": table}
    for number, kinds in enumerate(config.layers):
        shapes |= layer_shapes(config, number, kinds)
    shapes["final_norm.weight"] = (h,)
    if not config.tie_embeddings:
        shapes["output.weight"] = table
    return shapes


def layer_shapes(config: ModelConfig, number: int, kinds: LayerKinds) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one layer, in the order of its parameters."""
    return {f"layers.{number}.{name}": shape for name, shape in _layer(config, kinds)}


def is_expert(name: str) -> bool:
    """Say whether a parameter is a stack over the routed experts."""
    return ".experts." in name


def _layer(config: ModelConfig, kinds: LayerKinds) -> Named:
    h = config.hidden_size
    if kinds.mixer == "attention":
        yield "mixer.norm.weight", (h,)
        yield from _attention(config)
    if kinds.feedforward:
        yield "feedforward.norm.weight", (h,)
    if kinds.feedforward == "mlp":
        yield from _mlp(config, "feedforward.part", config.ffn_hidden_size)
    elif kinds.feedforward == "moe":
        yield from _moe(config)


def _attention(config: ModelConfig) -> Named:
    h, queries, keys = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for place, shape in {"q": (queries, h), "k": (keys, h), "v": (keys, h), "output": (h, queries)}.items():
        yield f"mixer.part.{place}.weight", shape
        if place in config.bias:
            yield f"mixer.part.{place}.bias", shape[:1]
    if config.qk_norm:
        yield "mixer.part.q_norm.weight", (config.head_dim,)
        yield "mixer.part.k_norm.weight", (config.head_dim,)


def _mlp(config: ModelConfig, prefix: str, width: int) -> Named:
    for place, shape in _gated(config.hidden_size, width):
        yield f"{prefix}.{place}.weight", shape
        if "ffn" in config.bias:
            yield f"{prefix}.{place}.bias", shape[:1]


def _moe(config: ModelConfig) -> Named:
    moe, prefix = config.moe, "feedforward.part"
    assert moe is not None, "the checks see to it that E has its table"
    yield f"{prefix}.router.weight", (moe.num_experts, config.hidden_size)
    stacks = [(place, (moe.num_experts, *shape)) for place, shape in _gated(config.hidden_size, moe.expert_hidden_size)]
    for place, shape in stacks:
        yield f"{prefix}.experts.{place}", shape
    for place, shape in stacks if "ffn" in config.bias else ():
        yield f"{prefix}.experts.{place}_bias", shape[:2]
    if moe.num_shared_experts:
        yield from _mlp(config, f"{prefix}.shared", moe.shared_hidden_size)


def _gated(h: int, width: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the three matrices of a gated feed-forward."""
    yield from (("gate", (width, h)), ("up", (width, h)), ("down", (h, width)))
