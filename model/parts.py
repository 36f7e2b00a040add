"""How a config becomes a model: a new kind of part is one file, and one line here and in `kinds/table.py`.

    MAKERS["attention"]      a function (config, making) -> module, which stands beside the module

`build_model` returns an ordinary `nn.Module`; with a mesh each part holds what its rank holds.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from meshwright.model.block import Block, Layer, Multipliers
from meshwright.model.config import ModelConfig
from meshwright.model.depth import routed_layer
from meshwright.model.feedforward import mlp, moe
from meshwright.model.kinds.kind import Place
from meshwright.model.kinds.norms import deepnorm_gain
from meshwright.model.making import Making, Ways
from meshwright.model.mixers import attention, gated_delta, latent_attention, mamba1, mamba2, s4d, switch_head
from meshwright.model.multi_token import FurtherToken
from meshwright.model.norms import NORMS
from meshwright.model.pattern import LayerKinds
from meshwright.model.positions import LearnedPositions, SinusoidalPositions
from meshwright.model.presets import PRESETS
from meshwright.model.stack import Ends, Extras, LanguageModel
from meshwright.model.stage import HeldStages
from meshwright.model.wording import closest, problem, shown
from meshwright.parallel.initialise import InitPolicy, fill, init_rules
from meshwright.parallel.mesh import Mesh, single_process_mesh
from meshwright.parallel.placement import placement_table, without_padding
from meshwright.parallel.tensor.vocabulary import Embedding, VocabularyRows

MakePart = Callable[[ModelConfig, Making], nn.Module]

MAKERS: dict[str, MakePart] = {
    "attention": attention.make,
    "sliding_attention": attention.make_sliding,
    "block_sparse_attention": attention.make_block_sparse,
    "latent_attention": latent_attention.make,
    "switch_head": switch_head.make,
    "mamba2": mamba2.make,
    "mamba1": mamba1.make,
    "gated_delta": gated_delta.make,
    "s4d": s4d.make,
    "mlp": mlp.make,
    "moe": moe.make,
}


def build_model(
    config: ModelConfig,
    *,
    seed: int = 0,
    mesh: Mesh | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    held: HeldStages | None = None,
    ways: Ways | None = None,
) -> LanguageModel:
    """Return the model with its initial weights; on `device="meta"` without weights, to be placed and filled later.

    `held`: only these stages of it, as a rank of a pipeline holds them.

    Raises:
        ValueError: naming every reason why the config makes no model.
    """
    if problems := _problems(config):
        raise ValueError("\n".join(problems))
    mesh = mesh or single_process_mesh()
    with torch.device(device):
        model = _assemble(config, mesh, held or HeldStages({0: range(config.num_layers)}, 1), ways or Ways())
        for parameter in model.parameters():  # not `model.to`: buffers keep their type
            parameter.data = parameter.data.to(dtype)
    if torch.device(device).type != "meta":
        initialise(model, seed)
    return model


def _problems(config: object) -> list[str]:
    """Return every reason why a config, or what was given for one, makes no model."""
    if not isinstance(config, ModelConfig):
        name = (isinstance(config, str) and closest(config, PRESETS)) or "dense-tiny"
        way_out = f"build_model(preset({shown(name)}, vocab_size=32768)) would fit"
        return [problem("config", config, "must be a ModelConfig", way_out)]
    rule = "must be the number of tokens of the tokenizer"
    sizes = [] if config.vocab_size else [problem("model.vocab_size", 0, rule, "vocab_size=32768 would fit")]
    return config.problems() + sizes


def initialise(module: nn.Module, seed: int = 0) -> None:
    """Give a model, or a part of one that was made by itself, its initial weights and buffers."""
    rules, table = init_rules(module), placement_table(module)
    for name, parameter in module.named_parameters():
        shape, placement = tuple(parameter.shape), table[name]
        whole, offset = placement.global_shape(shape), placement.offset(shape)
        held = without_padding(parameter.detach().zero_(), whole, offset)
        fill(held, rules[name], seed=seed, name=name, global_shape=whole, offset=offset)
    reset_buffers(module)


def reset_buffers(model: nn.Module) -> None:
    """Give every module's buffers the values that a run begins with."""
    for module in model.modules():
        reset: Any = getattr(module, "reset_buffers", None)
        if callable(reset):
            reset()


def _assemble(config: ModelConfig, mesh: Mesh, held: HeldStages, ways: Ways) -> LanguageModel:
    init = _init_policy(config)

    def norm() -> nn.Module:
        return NORMS[config.norm](config.hidden_size, config.norm_eps, tp=mesh.tp)

    def block(place: Place, kind: str | None, name: str) -> Block | None:
        if kind is None:
            return None
        form = config.forms[place]
        return Block(
            MAKERS[kind](config, Making(name, mesh, init, ways)),
            **{norm_name: norm() for norm_name in form.names},
            form=form,
            multipliers=Multipliers(config.stream_multiplier, config.residual_multiplier),
            residual_dropout=config.residual_dropout,
            name=f"{name}.{place}",
        )

    def layer(number: int, kinds: LayerKinds) -> Layer:
        name = f"layers.{number}"
        blocks = block("mixer", kinds.mixer, name), block("feedforward", kinds.feedforward, name)
        return routed_layer(*blocks, config, Making(name, mesh, init, ways)) if kinds.is_routed else Layer(*blocks)

    def further(depth: int) -> FurtherToken:
        of_layer = layer(config.num_layers + depth, config.last_layer)
        norms = {place: norm() for place in ("hidden_norm", "embedding_norm", "final_norm")}
        name = f"multi_token.{depth}"
        return FurtherToken(of_layer, config.hidden_size, **norms, name=name, init=init, tp=mesh.tp)

    own = enumerate(config.layers[: config.held_layers])
    layers = {number: layer(number, kinds) for number, kinds in own if number in held.layers}
    v, h, tied = config.vocab_size, config.hidden_size, config.tie_embeddings
    embedding = output = None
    if held.has_first or (held.has_last and config.embeds_at_both_ends):
        has_copy = config.embeds_at_both_ends and held.has_first != held.has_last
        embedding = Embedding(v, h, init=init, tp=mesh.tp, copies=mesh.ends if has_copy else None)
    if held.has_last and not tied:
        output = VocabularyRows(v, h, rule=init.matrix(h, v), tp=mesh.tp)
    return LanguageModel(
        layers,
        embedding=embedding,
        output=output,
        final_norm=norm() if held.has_last and config.final_norm else None,
        extras=Extras(
            positions=_positions(config, init, mesh) if held.has_first else None,
            embedding_norm=norm() if held.has_first and config.embedding_norm else None,
            further=[further(depth) for depth in range(config.further_tokens)] if held.has_last else [],
        ),
        ends=Ends(
            config.embedding_multiplier,
            config.embedding_dropout,
            config.logits_scaling,
            config.multi_token.loss_weight if config.multi_token else 0.0,
        ),
        laps=config.num_layers // config.held_layers,
    )


def _positions(config: ModelConfig, init: InitPolicy, mesh: Mesh) -> nn.Module | None:
    """Return what adds a row for its position to each embedded token, if anything does."""
    if config.position == "learned":
        return LearnedPositions(config.max_positions, config.hidden_size, init=init, tp=mesh.tp)
    return SinusoidalPositions(config.hidden_size) if config.position == "sinusoidal" else None


def _init_policy(config: ModelConfig) -> InitPolicy:
    """Return how the matrices begin; DeepNorm's gain takes the place of the depth's root."""
    if config.norm_placement == "deepnorm":
        return InitPolicy(config.init, config.init_std, value_gain=deepnorm_gain(config.num_layers))
    depth = 2 * config.num_layers if config.init_depth_scaled else 0
    return InitPolicy(config.init, config.init_std, residual_depth=depth)
