"""Every parameter of a model by global name, with its global shape, from the config alone.

    embedding.weight [v, h]   positions.weight [max_positions, h] where they are learned
    layers.<n>.mixer.norm.weight [h]          layers.<n>.mixer.part.*            as the kind of the part has them
    layers.<n>.feedforward.norm.weight [h]    layers.<n>.feedforward.part.*      (its file in kinds/); the norms where
                                                                                 their placement has them (norms.py)
    layers.<n>.router.*, .predictor.*         of a layer in [ ] (kinds/depth.py)
    final_norm.weight [h]   output.weight [v, h] unless tied   multi_token.<k>.*

Beside its shape stand what cuts a parameter, and whether a token is multiplied with it. Counts of parameters, of
operations (`model/counts/costs.py`) and of bytes are made of this table.

What is chosen by name is so checked before a rank is started, and counted on a machine that could not hold the model.
Tests compare the table with the models that `model/parts.py` builds, whole and cut. Nothing here loads torch.
"""

from meshwright.model.config import ModelConfig
from meshwright.model.kinds.depth import depth_weights
from meshwright.model.kinds.kind import VOCABULARY, Weight
from meshwright.model.kinds.multi_token import multi_token_weights
from meshwright.model.kinds.norms import norm_shapes
from meshwright.model.kinds.table import KINDS
from meshwright.model.pattern import LayerKinds


def weights(config: ModelConfig) -> dict[str, Weight]:
    """Return every parameter, in the order of the model's; the config must have passed its checks."""
    found = embedding_weights(config)
    for number, kinds in enumerate(config.layers[: config.held_layers]):
        found |= {f"layers.{number}.{name}": weight for name, weight in layer_weights(config, kinds).items()}
    return found | head_weights(config)


def embedding_weights(config: ModelConfig) -> dict[str, Weight]:
    """Return what stands before the layers."""
    found = {"embedding.weight": Weight((config.vocab_size, config.hidden_size), VOCABULARY)}
    if config.position == "learned":
        found["positions.weight"] = Weight((config.max_positions, config.hidden_size))
    return found | (_norm(config, "embedding_norm") if config.embedding_norm else {})


def layer_weights(config: ModelConfig, kinds: LayerKinds) -> dict[str, Weight]:
    """Return the parameters of one layer, by their names within it, in their order."""
    found: dict[str, Weight] = {}
    for kind in (KINDS[name] for name in kinds.names):
        form = config.forms[kind.place]
        found |= _norm(config, f"{kind.place}.norm") if form.before else {}
        found |= {f"{kind.place}.part.{name}": weight for name, weight in kind.weights(config)}
        found |= _norm(config, f"{kind.place}.post_norm") if "post_norm" in form.names else {}
    return found | (dict(depth_weights(config)) if kinds.is_routed else {})


def head_weights(config: ModelConfig) -> dict[str, Weight]:
    """Return what stands behind the layers: final norm, output unless it is tied, what predicts further tokens."""
    found = _norm(config, "final_norm") if config.final_norm else {}
    if not config.tie_embeddings:
        found["output.weight"] = Weight((config.vocab_size, config.hidden_size), VOCABULARY, is_product=True)
    if config.further_tokens:
        found |= dict(multi_token_weights(config, layer_weights(config, config.last_layer)))
    return found


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes alone."""
    return {name: weight.shape for name, weight in weights(config).items()}


def _norm(config: ModelConfig, name: str) -> dict[str, Weight]:
    return {f"{name}.{of}": Weight(shape) for of, shape in norm_shapes(config.norm, config.hidden_size)}
