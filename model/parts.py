"""The tables of parts, and how a config becomes a model: a new kind is one file and one line here.

    MIXERS["attention"]      a function (config, number, mesh, init, ways) -> module
    FEEDFORWARDS["moe"]      the same

`build_model` returns an ordinary `nn.Module`; with a mesh each part holds what its rank holds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from meshwright.model.block import Block, Layer
from meshwright.model.config import ModelConfig
from meshwright.model.feedforward.mlp import Mlp
from meshwright.model.feedforward.moe import Experts, Moe, RouterLosses
from meshwright.model.mixers.attention import Attention, Heads, Spread, copies_of_kv_heads
from meshwright.model.norms import RMSNorm
from meshwright.model.routers.topk import TopKRouter
from meshwright.model.stack import LanguageModel
from meshwright.model.stage import HeldStages
from meshwright.parallel.config import ContextWay, ExpertExchange
from meshwright.parallel.experts.deep_ep import DeepEpExchange
from meshwright.parallel.experts.exchange import AllToAll
from meshwright.parallel.initialise import InitPolicy, fill, init_rules
from meshwright.parallel.mesh import Mesh, single_process_mesh
from meshwright.parallel.placement import placement_table, without_padding
from meshwright.parallel.tensor.vocabulary import Embedding, VocabularyRows


@dataclass(frozen=True)
class Ways:
    """How parts reach what lies on other ranks, where there is more than one way to the same result."""

    context: ContextWay = "ring"
    """How attention reaches the positions of a sample over cp."""
    expert_exchange: ExpertExchange = "all_to_all"
    """How tokens reach their experts over ep."""


MakePart = Callable[[ModelConfig, int, Mesh, InitPolicy, Ways], nn.Module]


def make_attention(config: ModelConfig, number: int, mesh: Mesh, init: InitPolicy, ways: Ways) -> nn.Module:
    """Return attention as the config has it."""
    copies = mesh.neighbours(copies_of_kv_heads(config.num_kv_heads, mesh.tp.size))
    return Attention(
        config.hidden_size,
        Heads(config.num_heads, config.num_kv_heads, config.head_dim),
        rope_base=config.rope_base,
        qk_norm_eps=config.norm_eps if config.qk_norm else None,
        bias=frozenset(config.bias),
        init=init,
        spread=Spread(mesh.tp, copies, mesh.cp, ways.context),
    )


def make_mlp(config: ModelConfig, number: int, mesh: Mesh, init: InitPolicy, ways: Ways) -> nn.Module:
    """Return the dense feed-forward."""
    return Mlp(config.hidden_size, config.ffn_hidden_size, bias="ffn" in config.bias, init=init, tp=mesh.tp)


def make_moe(config: ModelConfig, number: int, mesh: Mesh, init: InitPolicy, ways: Ways) -> nn.Module:
    """Return the mixture of experts, of which this rank holds 1/(ep * etp)."""
    moe, h, bias = config.moe, config.hidden_size, "ffn" in config.bias
    assert moe is not None, "the checks let no E pass without a [model.moe]"
    shared = Mlp(h, moe.shared_hidden_size, bias=bias, init=init, tp=mesh.tp) if moe.num_shared_experts else None
    exchange = {"all_to_all": AllToAll, "deep_ep": DeepEpExchange}[ways.expert_exchange](moe.num_experts, mesh.ep)
    sizes = (h, moe.expert_hidden_size, moe.num_experts)
    experts = Experts(*sizes, ep=mesh.ep, etp=mesh.etp, bias=bias, init=init, exchange=exchange)
    return Moe(
        TopKRouter(h, moe.num_experts, moe.top_k, normalise=moe.normalise_top_k, init=init, tp=mesh.tp),
        experts,
        name=f"layers.{number}",
        shared=shared,
        losses=RouterLosses(moe.load_balancing, moe.load_balancing_weight, moe.z_loss_weight),
        capacity_factor=moe.capacity_factor,
        router_jitter=moe.router_jitter,
        token=mesh.token,
    )


MIXERS: dict[str, MakePart] = {"attention": make_attention}
FEEDFORWARDS: dict[str, MakePart] = {"mlp": make_mlp, "moe": make_moe}
PARTS = {"mixer": MIXERS, "feedforward": FEEDFORWARDS}


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
    problems = config.problems() + (["model.vocab_size = 0: give the size here"] if not config.vocab_size else [])
    if problems:
        raise ValueError("\n".join(problems))
    mesh = mesh or single_process_mesh()
    with torch.device(device):
        model = _assemble(config, mesh, held or HeldStages({0: range(config.num_layers)}, 1), ways or Ways())
        for parameter in model.parameters():  # not `model.to`: buffers keep their type
            parameter.data = parameter.data.to(dtype)
    if torch.device(device).type != "meta":
        initialise(model, seed)
    return model


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
    depth = 2 * config.num_layers if config.init_depth_scaled else 0
    init = InitPolicy(config.init, config.init_std, residual_depth=depth)

    def block(place: str, kind: str | None, number: int) -> Block | None:
        if kind is None:
            return None
        norm = RMSNorm(config.hidden_size, config.norm_eps, tp=mesh.tp)
        part = PARTS[place][kind](config, number, mesh, init, ways)
        return Block(norm, part, residual_dropout=config.residual_dropout, name=f"layers.{number}.{place}")

    layers = {
        number: Layer(block("mixer", kinds.mixer, number), block("feedforward", kinds.feedforward, number))
        for number, kinds in enumerate(config.layers)
        if number in held.layers
    }
    v, h, tied = config.vocab_size, config.hidden_size, config.tie_embeddings
    embedding = output = None
    if held.has_first or (held.has_last and tied):
        has_copy = tied and held.has_first != held.has_last
        embedding = Embedding(v, h, init=init, tp=mesh.tp, copies=mesh.ends if has_copy else None)
    if held.has_last and not tied:
        output = VocabularyRows(v, h, rule=init.matrix(h, v), tp=mesh.tp)
    final_norm = RMSNorm(h, config.norm_eps, tp=mesh.tp) if held.has_last else None
    return LanguageModel(layers, embedding=embedding, final_norm=final_norm, output=output)
