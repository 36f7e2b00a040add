"""Positions are those of transformers: frequencies of rotary ones, ALiBi's slopes, T5's buckets."""

import math
import re

import pytest
import torch
from rank_pool import run_mesh
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from meshwright.kernels.attention.rope import apply_rope
from meshwright.model.mixers.attention import Attention, Heads
from meshwright.model.mixers.attention_core import Look
from meshwright.model.mixers.latent_attention import LatentAttention, LatentSizes
from meshwright.model.mixers.switch_head import SwitchHead, SwitchSizes
from meshwright.model.parts import initialise
from meshwright.model.positions import (
    T5,
    LearnedPositions,
    Rope,
    RopeScaling,
    SinusoidalPositions,
    T5Bias,
    alibi_slopes,
    t5_buckets,
)  # fmt: skip
from meshwright.parallel.mesh import Mesh, Sizes
from meshwright.parallel.placement import placement_table

D, BASE, LENGTH = 32, 500.0, 64
FACTOR = 4.0
OF_YARN = {"rope_type": "yarn", "factor": FACTOR, "original_max_position_embeddings": LENGTH}
OF_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": LENGTH,
}  # fmt: skip
SCALINGS = {
    "linear": (RopeScaling("linear", FACTOR), {"rope_type": "linear", "factor": FACTOR}),
    "ntk": (RopeScaling("ntk", FACTOR), {"rope_type": "dynamic", "factor": FACTOR}),
    "yarn": (RopeScaling("yarn", FACTOR, LENGTH), OF_YARN),
    "yarn, other turns": (
        RopeScaling("yarn", FACTOR, LENGTH, beta_fast=8.0, beta_slow=2.0),
        OF_YARN | {"beta_fast": 8.0, "beta_slow": 2.0},
    ),
    "yarn of DeepSeek": (
        RopeScaling("yarn", FACTOR, LENGTH, mscale=0.7, mscale_all_dim=1.3),
        OF_YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
    ),
    "yarn, factor": (RopeScaling("yarn", FACTOR, LENGTH, attention_factor=1.7), OF_YARN | {"attention_factor": 1.7}),
    "llama3": (RopeScaling("llama3", 8.0, LENGTH), OF_LLAMA3),
}


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("kind", SCALINGS)
def test_stretched_frequencies_are_those_of_transformers(kind: str, fraction: float) -> None:
    scaling, theirs = SCALINGS[kind]
    config = LlamaConfig(
        hidden_size=4 * D, num_attention_heads=4, head_dim=D, max_position_embeddings=4 * LENGTH,
        rope_parameters={**theirs, "rope_theta": BASE, "partial_rotary_factor": fraction},
    )  # fmt: skip
    # The dynamic one takes the length of the sample; with this one its stretch is the whole factor.
    more = {"seq_len": int(4 * LENGTH * (2 * FACTOR - 1) / FACTOR)} if kind == "ntk" else {}
    expected, factor = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, device="cpu", **more)
    rope = Rope(BASE, fraction, scaling)
    torch.testing.assert_close(rope.frequencies(D).float(), expected, rtol=2e-6, atol=0)
    assert scaling.cosine_factor() == pytest.approx(factor)
    cos, sin = rope.angles(torch.tensor([3]), D, torch.float64)
    torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, factor**2))


@pytest.mark.parametrize(
    ("rope", "says"),
    [
        (Rope(scaling=RopeScaling("linear", 0.0)), "rope_scaling.factor = 0.0: must be at least 1 and finite; 4.0"),
        (Rope(scaling=RopeScaling("yarn", math.nan, 8)), "rope_scaling.factor = nan: must be at least 1"),
        (Rope(scaling=RopeScaling("dynamic", 2.0)), "rope_scaling.kind = 'dynamic': is unknown; one of linear, ntk"),
        (Rope(scaling=RopeScaling("yarn", 2.0)), 'rope_scaling.original_length = 0: kind = "yarn" needs the length'),
        (Rope(scaling=RopeScaling("llama3", 2.0, -8)), "rope_scaling.original_length = -8: must not be negative"),
        (Rope(scaling=RopeScaling("yarn", 2.0, 8, beta_fast=0.0)), "rope_scaling.beta_fast = 0.0: must be above 0"),
        (Rope(scaling=RopeScaling("yarn", 2.0, 8, beta_fast=1.0)), "rope_scaling.beta_fast = 1.0: must be above rope_"),
        (Rope(scaling=RopeScaling("llama3", 2.0, 8, low_freq_factor=4.0)), "rope_scaling.low_freq_factor = 4.0: must"),
        (Rope(0.5, scaling=RopeScaling("yarn", 2.0, 8)), "rope_base = 0.5: must be above 1 where rope_scaling.kind ="),
        (Rope(fraction=2 / D, scaling=RopeScaling("ntk", 2.0)), 'rope_scaling.kind = "ntk": changes the base, of'),
        (Rope(0.0), "rope_base = 0.0: must be above 0 and finite; 10000.0 would fit"),
        (Rope(fraction=0.1), "rope_fraction = 0.1 of head_dim = 32: turns 3 features"),
    ],
)
def test_rotary_positions_made_by_hand_of_wrong_numbers_are_refused(rope: Rope, says: str) -> None:
    looks = (
        lambda: Attention(64, Heads(2, 2, D), look=Look(rope)),
        lambda: SwitchHead(64, SwitchSizes(2, D, 3, 2), look=Look(rope)),
        lambda: rope.angles(torch.arange(3), D, torch.float32),
    )
    for make in looks:
        with pytest.raises(ValueError, match=re.escape(says)):
            make()


def test_latent_attention_refuses_wrong_numbers_of_stretching_too() -> None:
    look = Look(Rope(scaling=RopeScaling("linear", -1.0)))
    with pytest.raises(ValueError, match=r"rope_scaling\.factor = -1\.0: must be at least 1"):
        LatentAttention(64, LatentSizes(2, 8, 4, 4, 4), look=look)


def test_every_wrong_number_of_a_stretching_is_told_at_once() -> None:
    found = Rope(-1.0, 0.3, RopeScaling("yarn", 0.5, 8, beta_slow=-1.0)).problems(D)
    assert [line.split(" ")[0] for line in found] == [
        "rope_fraction", "rope_base", "rope_scaling.factor", "rope_scaling.beta_slow"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("t5", "says"),
    [
        (T5(7, 20), "num_buckets = 7: must be even and at least 4, because half of them hold one distance each; 8"),
        (T5(2, 20), "num_buckets = 2: must be even and at least 4"),
        (T5(0, 20), "num_buckets = 0: must be even and at least 4"),
        (
            T5(8, 4),
            "max_distance = 4: must be above 4, half of num_buckets = 8, whose distances have a bucket each; 32",
        ),
        (T5(8, -1), "max_distance = -1: must be above 4"),
    ],
)
def test_buckets_that_cannot_be_are_refused(t5: T5, says: str) -> None:
    for make in (lambda: T5Bias(t5, 2), lambda: Attention(64, Heads(2, 2, 16), look=Look(t5))):
        with pytest.raises(ValueError, match=re.escape(says)):
            make()


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_fewest_buckets_make_biases(is_causal: bool) -> None:
    bias = T5Bias(T5(4, 3), 2)
    initialise(bias)
    assert torch.isfinite(bias(torch.arange(-9, 9), is_causal, torch.ones(1))).all()


def test_a_start_moves_all_positions() -> None:
    moved, plain = (Rope(BASE, start=start).angles(torch.arange(5) + 9 - start, D, torch.float64) for start in (9, 0))
    assert torch.equal(moved[0], plain[0])
    assert torch.equal(moved[1], plain[1])


@pytest.mark.parametrize("num_heads", [1, 2, 6, 8, 12, 71])
def test_slopes_are_those_of_bloom(num_heads: int) -> None:
    theirs = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float64)[:, 0, 1]
    torch.testing.assert_close(torch.tensor(alibi_slopes(num_heads), dtype=torch.float64), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 20), (16, 1000)])
def test_buckets_are_those_of_t5(is_causal: bool, buckets: int, farthest: int) -> None:
    distance = torch.arange(-1500, 1500)
    theirs = T5Attention._relative_position_bucket(-distance, not is_causal, buckets, farthest)
    assert torch.equal(t5_buckets(distance, buckets, farthest, is_causal=is_causal), theirs)


def test_sinusoids_are_those_of_the_paper() -> None:
    added = SinusoidalPositions(6)(torch.zeros(4, 2, 6), torch.tensor([0, 1, 5, 900]))
    for row, position in zip(added[:, 1], (0, 1, 5, 900), strict=True):
        for i in range(3):
            angle = position / 10_000 ** (2 * i / 6)
            assert row[2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert row[2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
    with pytest.raises(ValueError, match="hidden_size = 7: must be even"):
        SinusoidalPositions(7)


def learned(mesh: Mesh) -> torch.Tensor:
    part = LearnedPositions(9, 4, tp=mesh.tp)
    initialise(part)
    position = torch.tensor([1, 5, 5, 8]).chunk(mesh.tp.size)[mesh.tp.rank]
    x = torch.zeros(len(position), 2, 4)
    y = part(x, position)
    assert torch.equal(y[0, 1], part.weight[position[0]])
    y.sum().backward()
    for axis in placement_table(part)["weight"].grad_sum:
        torch.distributed.all_reduce(part.weight.grad, group=axis.group)
    return part.weight.grad[:, 0]


def test_a_learned_tables_gradient_is_the_sum_over_the_tokens_of_all_ranks() -> None:
    for found in run_mesh(Sizes(tp=2), learned):
        assert found.tolist() == [0, 2, 0, 0, 0, 4, 0, 0, 2]


ROPES = {
    "plain": Rope(BASE),
    "of half a head": Rope(BASE, 0.5),
    "stretched": Rope(BASE, scaling=SCALINGS["yarn"][0]),
    "from another start": Rope(BASE, start=3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ROPES)
def test_angles_of_a_step_are_those_of_its_positions(name: str, dtype: torch.dtype) -> None:
    rope, like = ROPES[name], torch.empty(0, dtype=dtype)
    for begin, count in ((0, 5), (5, 1), (6, 1), (0, 1), (7, 40), (6, 1)):
        expected = rope.angles(torch.arange(begin, begin + count), D, dtype)
        for found, wanted in zip(rope.angles_from(begin, count, D, like), expected, strict=True):
            assert found.dtype == dtype
            assert torch.equal(found, wanted)


def test_angles_of_a_step_are_made_once_for_all_layers_of_one_kind() -> None:
    first, like = Rope(BASE), torch.empty(0)
    cos, sin = first.angles_from(9, 2, D, like)
    again = Rope(BASE).angles_from(9, 2, D, torch.ones(3))
    assert cos is again[0]
    assert sin is again[1]
    others = [
        first.angles_from(9, 2, D // 2, like), Rope(BASE + 1).angles_from(9, 2, D, like),
        first.angles_from(8, 2, D, like), first.angles_from(9, 2, D, like.double()),
    ]  # fmt: skip
    assert all(cos.shape != other.shape or not torch.equal(cos, other.to(cos)) for other, _ in others[:3])
    assert others[3][0].dtype == torch.float64


def test_angles_that_inference_mode_has_made_are_not_given_to_who_trains() -> None:
    rope, like = Rope(BASE, start=17), torch.randn(2, 1, 1, D)
    with torch.inference_mode():
        within = rope.angles_from(4, 2, D, like)
    x = like.clone().requires_grad_()
    outside = rope.angles_from(4, 2, D, like)
    apply_rope(x, *outside).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * like)  # turning changes no length
    assert torch.equal(within[0], outside[0])
