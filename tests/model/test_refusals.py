"""What is wrong with a part's arguments, or with a preset's changes, is told in one line when it is made."""

from collections.abc import Callable
from functools import partial
from math import inf, nan

import pytest

from meshwright.model.library import (
    AdaptiveNorm,
    Attention,
    Block,
    DeltaSizes,
    Depth,
    Ends,
    Experts,
    Extras,
    GatedDelta,
    HeadNorms,
    Heads,
    Inner,
    LanguageModel,
    LatentAttention,
    LatentSizes,
    LayerNorm,
    Mamba1,
    Mamba1Sizes,
    Mamba2,
    Mamba2Sizes,
    MixtureOfDepths,
    Mlp,
    Moe,
    Multipliers,
    Products,
    RMSNorm,
    RouterLosses,
    S4d,
    S4dSizes,
    SwitchHead,
    SwitchSizes,
    Ways,
    make_router,
    preset,
    rms_norms,
)
from meshwright.model.mixers.mamba2 import TimeStep
from meshwright.model.norms import NORMS

H, HEADS = 16, Heads(2, 2, 8)


def moe(num_experts: int = 4, hidden_size: int = H, **changes: object) -> Moe:
    return Moe(make_router("softmax", hidden_size, num_experts, 2), Experts(H, 8, 4), **changes)


def losses_of(load_balancing: str) -> RouterLosses:
    """Return losses of a name that is not checked when they are made: in a run of tests types are, elsewhere not."""
    losses = RouterLosses()
    object.__setattr__(losses, "load_balancing", load_balancing)
    return losses


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "bias": (
        lambda: Attention(H, Heads(2, 2, 8), products=Products(bias=frozenset({"query", "k"}))),
        "bias = 'query': must be of 'q', 'k', 'v', 'output', 'gate'",
    ),
    "norms": (
        lambda: Attention(H, Heads(2, 2, 8), norms=HeadNorms(frozenset({"keys"}))),
        "norms = 'keys': must be of 'q', 'k', 'v'",
    ),
    "what norms are over": (
        lambda: Attention(H, HEADS, norms=HeadNorms(frozenset("qk"), over="head")),
        "over = 'head': must be of 'heads', 'tokens'",
    ),
    "norms that nothing makes": (
        lambda: Attention(H, HEADS, norms=HeadNorms(frozenset("qk"))),
        "make = None: must be what makes a norm of (head_dim, tp); rms_norms(1e-6) would fit",
    ),
    "heads": (
        lambda: Attention(H, Heads(0, 0, 8)),
        "num_heads = 0: must be at least 1\nnum_kv_heads = 0: must be at least 1",
    ),
    "heads of no whole number": (
        lambda: Attention(H, Heads(2, 2.0, 0)),
        "num_kv_heads = 2.0: must be a whole number of at least 1\nhead_dim = 0: must be at least 1",
    ),
    "width": (lambda: Attention(0, Heads(2, 2, 8)), "hidden_size = 0: must be at least 1"),
    "latent": (lambda: LatentAttention(H, LatentSizes(2, 0, 8, 8, 8)), "kv_lora_rank = 0: must be at least 1"),
    "switch_head": (lambda: SwitchHead(H, SwitchSizes(0, 8, 4)), "num_heads = 0: must be at least 1"),
    "mamba1": (lambda: Mamba1(H, Mamba1Sizes(32, 0)), "dt_rank = 0: must be at least 1"),
    "mamba2": (lambda: Mamba2(H, Mamba2Sizes(4, 8, 0)), "num_groups = 0: must be at least 1"),
    "delta": (lambda: GatedDelta(H, DeltaSizes(4, 0, 8, 8)), "num_key_heads = 0: must be at least 1"),
    "s4d": (lambda: S4d(H, S4dSizes(chunk_size=0)), "chunk_size = 0: must be at least 1"),
    "s4d's start": (lambda: S4d(H, S4dSizes(start="reel")), "start = 'reel': must be of 'linear', 'real'"),
    "first time steps": (
        lambda: Mamba2(H, Mamba2Sizes(4, 8), time_step=TimeStep(0.5, 0.1)),
        "time_step.low = 0.5, high = 0.1: must be above 0 and finite, the lower one first; low = 0.001, high = 0.1"
        " would fit",
    ),
    "time steps of 0, and their limit": (
        lambda: Mamba2(H, Mamba2Sizes(4, 8), time_step=TimeStep(0.0, limit=(5, 1))),
        "time_step.low = 0.0, high = 0.1: must be above 0 and finite, the lower one first; low = 0.001, high = 0.1"
        " would fit\ntime_step.limit = (5, 1): must be at least 0, the lower one first; (0.0, inf) would fit",
    ),
    "mlp": (lambda: Mlp(H, 0), "ffn_hidden_size = 0: must be at least 1"),
    "experts": (lambda: Experts(H, 8, -4), "num_experts = -4: must be at least 1"),
    "mlp's dropout": (
        lambda: Mlp(H, 8, Inner(dropout=1.5)),
        "dropout = 1.5: must be at least 0 and below 1; 0.1 would fit",
    ),
    "experts' dropout": (
        lambda: Experts(H, 8, 4, Inner(dropout=-0.5)),
        "dropout = -0.5: must be at least 0 and below 1; 0.1 would fit",
    ),
    **{
        f"eps of {name}": (make, f"{key} = {eps}: must be at least 0 and finite; {usual} would fit")
        for name, make, key, eps, usual in (
            *((norm, partial(make, H, -1.0), "eps", -1.0, 1e-5) for norm, make in NORMS.items()),
            ("no number", lambda: RMSNorm(H, nan), "eps", nan, 1e-5),
            ("no end", lambda: LayerNorm(H, inf), "eps", inf, 1e-5),
            ("tokens", lambda: Attention(H, HEADS, norms=rms_norms(-1.0, over="tokens")), "eps", -1.0, 1e-6),
            ("mamba2", lambda: Mamba2(H, Mamba2Sizes(4, 8), norm_eps=nan), "norm_eps", nan, 1e-5),
        )
    },
    "multipliers": (
        lambda: Block(Mlp(H, 8), norm=RMSNorm(H, 1e-5), multipliers=Multipliers(nan, inf)),
        "multipliers.stream = nan: must be finite; 1.0 would fit\n"
        "multipliers.branch = inf: must be finite; 1.0 would fit",
    ),
    "depth's gate": (
        lambda: MixtureOfDepths(None, None, H, Depth(gate="scores")),
        "gate = 'scores': must be of 'score', 'sigmoid'",
    ),
    "depth's predictor": (
        lambda: MixtureOfDepths(None, None, H, Depth(predictor_size=-1)),
        "predictor_size = -1: must be at least 0",
    ),
    "depth's weight of the predictor": (
        lambda: MixtureOfDepths(None, None, H, Depth(predictor_weight=nan)),
        "predictor_weight = nan: must be at least 0 and finite; 0 turns it off",
    ),
    "norm with a condition": (
        lambda: Block(Mlp(H, 8), norm=AdaptiveNorm(H, 1e-6, condition_size=10)),
        "norm = AdaptiveNorm: must be without a condition, as a block has none to give it; condition_size = 0, or"
        " a call of the norm by yourself, would fit",
    ),
    "norms of a model with a condition": (
        lambda: LanguageModel(
            {},
            embedding=None,
            output=None,
            final_norm=AdaptiveNorm(H, 1e-6, condition_size=10),
            extras=Extras(embedding_norm=AdaptiveNorm(H, 1e-6, condition_size=3)),
        ),
        "embedding_norm = AdaptiveNorm: must be without a condition, as a LanguageModel has none to give it;"
        " condition_size = 0, or a call of the norm by yourself, would fit\n"
        "final_norm = AdaptiveNorm: must be without a condition, as a LanguageModel has none to give it;"
        " condition_size = 0, or a call of the norm by yourself, would fit",
    ),
    "branch's dropout": (
        lambda: Block(Mlp(H, 8), norm=RMSNorm(H, 1e-5), residual_dropout=1.0),
        "residual_dropout = 1.0: must be at least 0 and below 1; 0.1 would fit",
    ),
    "embedding's dropout": (
        lambda: LanguageModel({}, embedding=None, output=None, ends=Ends(embedding_dropout=2.0)),
        "embedding_dropout = 2.0: must be at least 0 and below 1; 0.1 would fit",
    ),
    **{
        f"capacity of {factor}": (
            lambda factor=factor: moe(capacity_factor=factor),
            f"capacity_factor = {factor}: must be from 0, which turns it off, to 1024; 1.25 would fit",
        )
        for factor in (-1.0, nan, inf, 1e30)
    },
    "losses": (
        lambda: moe(losses=losses_of("foo")),
        "load_balancing = 'foo': must be of 'sequence', 'step', 'none'",
    ),
    "weights of losses": (
        lambda: moe(losses=RouterLosses(z_loss_weight=-0.1)),
        "z_loss_weight = -0.1: must be at least 0 and finite; 0 turns it off",
    ),
    "other experts": (lambda: moe(8), "num_experts = 8 of the router: must be that of the experts, 4"),
    "another width": (
        lambda: moe(hidden_size=2 * H),
        "hidden_size = 32 of the router: must be that of the experts, 16",
    ),
    "jitter": (
        lambda: make_router("softmax", H, 4, 2, Ways(jitter=1.5)),
        "jitter = 1.5: must be at least 0 and below 1; 0.1 would fit",
    ),
    "bias_rate": (
        lambda: make_router("sigmoid", H, 4, 2, Ways(bias_rate=-0.1)),
        "bias_rate = -0.1: must be at least 0 and finite; 0 turns it off",
    ),
    "scale of weights": (
        lambda: make_router("softmax", H, 4, 2, Ways(scale=nan)),
        "scale = nan: must be finite; 1.0 would fit",
    ),
    "a preset's value": (
        lambda: preset("moe-tiny", num_layers="4", moe={"top_k": 0}, bias=["k", "z"]),
        'model.num_layers = "4": must be a whole number; write 4 without quotes\n'
        'model.bias[1] = "z": must be one of ["q", "k", "v", "output", "ffn"]\n'
        "model.moe.top_k = 0: must be at least 1",
    ),
    "a preset's choice": (
        lambda: preset("dense-tiny", norm="rmsnorn", moe=3),
        'model.norm = "rmsnorn": must be one of ["rmsnorm", "rmsnorm_zero_centred", "layernorm", "dynamic_tanh",'
        ' "adaptive_rmsnorm", "adaptive_layernorm"]; did you mean "rmsnorm"?\nmodel.moe = 3: must be a table',
    ),
    "a preset's table without a key": (
        lambda: preset("dense-tiny", rope_scaling={"kind": "linear"}),
        "model.rope_scaling.factor: is missing; How many times as long.",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_argument_is_told_by_its_name(what: str) -> None:
    make, line = WRONG[what]
    with pytest.raises(ValueError, match=r"must be|is missing") as told:
        make()
    assert str(told.value) == line


@pytest.mark.parametrize(
    ("changes", "beginning"),
    [
        ({"hiden_size": 3}, "model.hiden_size: no such key; did you mean model.hidden_size? [model] has: preset,"),
        ({"moe": {"topk": 3}}, "model.moe.topk: no such key; did you mean model.moe.top_k? [model.moe] has: num_"),
        ({"zzz": 3}, "model.zzz: no such key; [model] has: preset,"),
    ],
)
def test_a_key_that_a_preset_has_not_is_told_with_the_nearest(changes: dict[str, object], beginning: str) -> None:
    with pytest.raises(ValueError, match="no such key") as told:
        preset("moe-tiny", **changes)
    assert str(told.value).startswith(beginning)


def test_a_preset_of_no_such_name_is_told_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"there is no such preset; the presets are: .*; did you mean llama3-8b\?$"):
        preset("lama3-8b")
