"""Attention by every look, norm and gate: on meshes as on one process, by steps as all at once."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from mixer_parity import assert_documents_do_not_leak, assert_steps_are_the_whole, built, errors_on, too_far, where_of
from rank_pool import run_mesh
from torch import nn

from meshwright.kernels.attention.seen import Blocks
from meshwright.model.mixers.attention import Attention, Heads, Look, Products, Spread, copies_of_kv_heads, rms_norms
from meshwright.model.mixers.attention_norms import NO_NORMS
from meshwright.model.mixers.latent_attention import LatentAttention, LatentSizes
from meshwright.model.mixers.switch_head import SwitchHead, SwitchSizes
from meshwright.model.positions import T5, Alibi, Rope, RopeScaling
from meshwright.parallel.initialise import InitPolicy
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh
from meshwright.parallel.where import where_of_plain_tokens

S, B, H, N, K, D = 24, 2, 12, 6, 2, 4
F64 = torch.float64
DOCUMENT = (torch.arange(S)[:, None] >= torch.tensor([5, 17])).long()
ALL_BIASES = frozenset({"q", "k", "v", "output", "gate"})

PARTS = {
    "window": (Look(window=5), NO_NORMS, Products()),
    "t5": (Look(T5(8, 10)), rms_norms(1e-3), Products()),
    "t5 to both sides, window": (Look(T5(8, 10), is_causal=False, window=7), NO_NORMS, Products()),
    "alibi, window, scale": (Look(Alibi(), window=9, scale=0.3), rms_norms(1e-3, "qkv"), Products()),
    "norms of tokens, gate": (Look(Rope(50.0, 0.5)), rms_norms(1e-3, over="tokens"), Products(ALL_BIASES, True)),
    "nothing, dropout": (Look(None, dropout=0.3), NO_NORMS, Products()),
    "rope stretched, to both sides": (
        Look(Rope(50.0, scaling=RopeScaling("yarn", 4.0, 8)), is_causal=False), NO_NORMS, Products()
    ),
    "blocks": (Look(blocks=Blocks(4, 2, 1)), NO_NORMS, Products()),
}  # fmt: skip
SPREAD = [kind for kind in PARTS if kind != "blocks"]


def make(kind: str, mesh: Mesh, way: str = "ring", kv_heads: int = K) -> nn.Module:
    look, norms, products = PARTS[kind]
    copies = mesh.neighbours(copies_of_kv_heads(kv_heads, mesh.tp.size))
    spread = Spread(mesh.tp, copies, mesh.cp, way)
    init = InitPolicy("normal", std=0.4)
    named = {"look": look, "norms": norms, "products": products, "init": init, "spread": spread}
    return Attention(H, Heads(N, kv_heads, D), name="layers.3", **named)


def x_of(s: int = S) -> torch.Tensor:
    return torch.randn(s, B, H, dtype=F64, generator=torch.Generator().manual_seed(1))


def of_one_key_head(mesh: Mesh) -> dict[str, float]:
    kinds = ("norms of tokens, gate", "alibi, window, scale")
    found = {}
    for kind in kinds:
        errors = errors_on(mesh, lambda on, kind=kind: make(kind, on, kv_heads=1), x_of(), DOCUMENT, True, True)
        found |= {f"{kind}, {name}": error for name, error in errors.items()}
    return found


def test_copies_of_a_key_head_are_counted_once() -> None:
    assert too_far(run_mesh(Sizes(tp=2), of_one_key_head)) == {}


def case(mesh: Mesh, way: str, kinds: list[str]) -> dict[str, float]:
    found = {}
    for kind in kinds:
        errors = errors_on(mesh, lambda on, kind=kind: make(kind, on, way), x_of(), DOCUMENT, kind != "window", True)
        found |= {f"{kind}, {name}": error for name, error in errors.items()}
    return found


@pytest.mark.parametrize(
    ("sizes", "way", "kinds"),
    [
        (Sizes(tp=2), "ring", list(PARTS)),
        (Sizes(cp=2), "ring", SPREAD),
        (Sizes(cp=2), "ulysses", SPREAD),
        pytest.param(Sizes(tp=2, cp=2), "ring", SPREAD, marks=pytest.mark.slow),
        pytest.param(Sizes(cp=3), "ring", SPREAD, marks=pytest.mark.slow),
        pytest.param(Sizes(cp=3), "ulysses", SPREAD, marks=pytest.mark.slow),
    ],
)
def test_every_look_on_a_mesh_is_that_of_one_process(sizes: Sizes, way: str, kinds: list[str]) -> None:
    assert too_far(run_mesh(sizes, case, way, kinds)) == {}


@pytest.mark.parametrize("kind", [kind for kind, (look, _, _) in PARTS.items() if look.is_causal])
@pytest.mark.parametrize("cuts", [[3, 1, 12, 1, 1, 6], [S]])
def test_steps_are_the_full_pass(kind: str, cuts: list[int]) -> None:
    part = built(lambda mesh: make(kind, mesh))
    state = assert_steps_are_the_whole(part, x_of(), cuts)
    window = PARTS[kind][0].window
    assert len(state.keys) == len(state.values) == (window or S)
    with pytest.raises(ValueError, match="the cache has room for 24 tokens, 25 are needed"):
        part.step(x_of(1), state)


@pytest.mark.parametrize("kind", PARTS)
def test_documents_do_not_leak(kind: str) -> None:
    document = torch.stack([torch.arange(S) // 9, torch.zeros(S, dtype=torch.int64)], 1)
    assert_documents_do_not_leak(built(lambda mesh: make(kind, mesh)), x_of(), document)


def test_weights_are_dropped_in_training_alone_and_by_the_layers_name() -> None:
    x, where = x_of(), where_of(DOCUMENT, single_process_mesh(), by_document=False)
    part = built(lambda mesh: make("nothing, dropout", mesh))
    y = part.train()(x, where, None)
    assert torch.equal(y, part(x, where, None))
    assert not torch.allclose(y, part.eval()(x, where, None))
    other = built(lambda mesh: make("nothing, dropout", mesh)).train()
    other.core.name = "layers.4"
    assert not torch.allclose(y, other(x, where, None))


def test_the_mean_over_dropped_weights_is_the_undropped() -> None:
    part, x = built(lambda mesh: make("nothing, dropout", mesh)), x_of(4)
    document = torch.zeros(4, B, dtype=torch.int64)
    where = where_of(document, single_process_mesh(), by_document=False)
    wanted = part.eval()(x, where, None)
    part.train()
    steps = [replace(where, step=step) for step in range(100)]
    mean = torch.stack([part(x, step, None) for step in steps]).mean(0)
    spread = wanted.abs().max() * (0.3 / 0.7 / 100) ** 0.5
    assert (mean - wanted).abs().max() < 6 * spread


# Each was taken for no positions at all.
NO_POSITIONS: list[Any] = ["rope", "alibi", "t5", "none", Rope, Alibi, 3]
BAD_SCALES = [0.0, -1.0, math.nan, math.inf]


@pytest.mark.parametrize(
    ("look", "says"),
    [
        (Look(dropout=0.1, only_fused=True), "attention_dropout = 0.1: fused attention makes no weights"),
        (Look(dropout=1.0), "attention_dropout = 1.0: must be at least 0 and below 1"),
        (Look(window=-2), "window = -2: must be a whole number of at least 1, or 0"),
        (Look(window=2.5), r"window = 2\.5: must be a whole number of at least 1, or 0 for none; 1 would fit"),
        (Look(blocks=Blocks(2.5, 1)), "size and local must be whole numbers of 1 or more"),
        *((Look(scale=scale), f"scale = {scale}: must be above 0 and finite; None takes") for scale in BAD_SCALES),
        *((Look(position), "position = .*: must be Rope.*, Alibi.*, T5.*, or None for") for position in NO_POSITIONS),
        (Look(is_causal=False, blocks=Blocks(4, 1)), "block-sparse attention is causal"),
        (Look(Rope(fraction=0.3)), "rope_fraction = 0.3 of head_dim = 4: turns 1 features"),
    ],
)
def test_looks_that_cannot_be_say_why(look: Look, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Attention(H, Heads(N, K, D), look=look)


OF_ATTENTION = {
    **{f"{position}": Attention(H, Heads(N, K, D), look=Look(position)) for position in (None, Rope(), Alibi(), T5())},
    "switch head": SwitchHead(H, SwitchSizes(N, D, 3), look=Look(Alibi())),
    "latent": LatentAttention(H, LatentSizes(N, 5, 4, 4, 3)),
}


@pytest.mark.parametrize("name", OF_ATTENTION)
@pytest.mark.parametrize("there", [(20, B), (S + 1, B), (S, B + 1)])
def test_a_place_of_other_tokens_is_refused(name: str, there: tuple[int, int]) -> None:
    where = where_of_plain_tokens(torch.zeros(there, dtype=torch.int64))
    line = rf"^x = \[24, 2\] tokens and samples: must be those of where, \[{there[0]}, {there[1]}\]; where_of_plain"
    with pytest.raises(ValueError, match=line):
        OF_ATTENTION[name](torch.zeros(S, B, H), where, None)


def test_attention_to_both_sides_does_not_decode() -> None:
    part = Attention(H, Heads(N, K, D), look=Look(is_causal=False))
    with pytest.raises(ValueError, match="attention to later tokens cannot decode"):
        part.initial_state(1, 4)


def test_a_local_cache_does_not_grow() -> None:
    part = built(lambda mesh: make("window", mesh))
    short, long = (part.initial_state(1, length) for length in (100, 1_000_000))
    assert short.keys.shape == long.keys.shape == (5, 1, K, D)
