"""How every parameter of every part begins, against a table by hand: `init_rules()` of each tiny model.

    MATRIX     what the policy gives a product: N(0, init_std), or what model.init says of its two sizes
    VALUE      a matrix that goes through a part as a value: DeepNorm's beta times as large
    OUTWARD    one that writes to the residual stream: over sqrt(2 * num_layers), with DeepNorm beta times instead
    NORM       the weight of a norm of model.norm

Everything else is a rule of its own. A new parameter is a line here. That rules give the numbers that they say is
tests/parallel/test_initialise.py; what state mixers begin with, as numbers, is mixers/test_state_starts.py.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Literal

import pytest
import torch
from part_samples import OF_KINDS, SAMPLES
from torch import Tensor

from meshwright.model.config import ModelConfig
from meshwright.model.parts import build_model
from meshwright.parallel.initialise import ONES, ZEROS, InitRule, init_rules

Drawn = Literal["matrix", "value", "outward", "outward of heads"]
Start = Drawn | Literal["norm"] | InitRule

MATRIX: Drawn = "matrix"
VALUE: Drawn = "value"
OUTWARD: Drawn = "outward"
OF_HEADS: Drawn = "outward of heads"  # the matrices of SwitchHead's heads, which are summed: one product
NORM: Start = "norm"
CONV = InitRule("uniform", 3**-0.5)  # torch's Conv1d with a kernel of 3, which all samples have
STEPS = InitRule("softplus_inverse", low=0.001, high=0.1)

ATTENTION: Mapping[str, Start] = {
    "q.weight": MATRIX, "k.weight": MATRIX, "v.weight": VALUE, "gate.weight": MATRIX, "output.weight": OUTWARD,
    "q_norm.weight": NORM, "k_norm.weight": NORM, "v_norm.weight": NORM, "core.bias.table": MATRIX,
}  # fmt: skip
MLP: Mapping[str, Start] = {"gate.weight": VALUE, "up.weight": VALUE, "down.weight": OUTWARD}
PARTS: Mapping[str, Mapping[str, Start]] = {
    "attention": ATTENTION,
    "sliding_attention": ATTENTION,
    "block_sparse_attention": ATTENTION,
    "latent_attention": {
        "q.weight": MATRIX, "q_a.weight": MATRIX, "q_a_norm.weight": ONES, "q_b.weight": MATRIX, "kv_a.weight": MATRIX,
        "k_rope.weight": MATRIX, "kv_a_norm.weight": ONES, "k_b.weight": MATRIX, "v_b.weight": VALUE,
        "output.weight": OUTWARD,
    },
    "switch_head": {
        "q.weight": MATRIX, "k.weight": MATRIX, "source": MATRIX, "destination": MATRIX, "v": VALUE,
        "output": OF_HEADS, "core.bias.table": MATRIX,
    },
    "mamba2": {
        "z.weight": MATRIX, "x.weight": VALUE, "B.weight": MATRIX, "C.weight": MATRIX, "dt.weight": MATRIX,
        "conv_x.weight": CONV, "conv_B.weight": CONV, "conv_C.weight": CONV,
        "conv_x.bias": CONV, "conv_B.bias": CONV, "conv_C.bias": CONV,
        "A_log": InitRule("log_of_uniform", low=1.0, high=16.0), "D": ONES, "dt_bias": STEPS,
        "norm.weight": ONES, "output.weight": OUTWARD,
    },
    "mamba1": {
        "z.weight": MATRIX, "x.weight": VALUE, "B.weight": MATRIX, "C.weight": MATRIX, "dt_down.weight": MATRIX,
        "dt_up.weight": InitRule("uniform", 3**-0.5),  # over the root of the samples' dt_rank
        "conv_x.weight": CONV, "conv_x.bias": CONV, "A_log": InitRule("log_of_column"), "D": ONES, "dt_bias": STEPS,
        "output.weight": OUTWARD,
    },
    "gated_delta": {
        "q.weight": MATRIX, "k.weight": MATRIX, "v.weight": VALUE, "z.weight": MATRIX, "beta.weight": MATRIX,
        "a.weight": MATRIX, "conv_q.weight": CONV, "conv_k.weight": CONV, "conv_v.weight": CONV,
        "A_log": InitRule("log_of_uniform", low=0.01, high=16.0), "dt_bias": ONES,
        "norm.weight": ONES, "output.weight": OUTWARD,
    },
    "s4d": {
        "A_log": InitRule("constant", math.log(0.5)), "A_imag": InitRule("column", math.pi),
        "C": InitRule("normal", 0.5**0.5), "D": InitRule("normal", 1.0),
        "log_dt": InitRule("between", low=math.log(0.001), high=math.log(0.1)),
        "gate.weight": MATRIX, "output.weight": OUTWARD,
    },
    "mlp": MLP,
    "moe": {
        "router.weight": MATRIX, "router.noise_weight": ZEROS, "shared_gate.weight": MATRIX,
        "experts.gate": VALUE, "experts.up": VALUE, "experts.down": OUTWARD,
        "experts.gate_bias": ZEROS, "experts.up_bias": ZEROS, "experts.down_bias": ZEROS,
        **{f"shared.{name}": start for name, start in MLP.items()},
    },
}  # fmt: skip
"""By kind, then by the parameter's name in the part; a bias that is not named begins at 0."""

S4D_REAL: Mapping[str, Start] = {"A_log": InitRule("log_of_column"), "A_imag": ZEROS}
AROUND: Mapping[str, Start] = {
    "embedding.weight": MATRIX, "positions.weight": MATRIX, "output.weight": MATRIX, "projection.weight": MATRIX,
    "router.weight": MATRIX, "predictor.weight": MATRIX, "predictor.inward": MATRIX,  # of a Mixture-of-Depths
}  # fmt: skip
NORMS: Mapping[str, InitRule] = {"weight": ONES, "bias": ZEROS, "scale": ZEROS, "alpha": InitRule("constant", 0.5)}
PART = re.compile(r"(?:layers\.(\d+)|multi_token\.\d+\.layer)\.(mixer|feedforward)\.part\.(.+)")
PREFIX = re.compile(r"(layers\.\d+\.|multi_token\.\d+\.)")


def start_of(name: str, config: ModelConfig) -> Start:
    """Return what the table says of a parameter."""
    if found := PART.fullmatch(name):
        number, place, within = found.groups()
        kind = str(getattr(config.layers[int(number or -1)], place))
        table = {**PARTS[kind], **(S4D_REAL if config.s4d and config.s4d.start == "real" else {})}
        return ZEROS if within not in table and within.endswith(".bias") else table[within]
    around = PREFIX.sub("", name)
    return NORM if around.rpartition(".")[0].endswith("norm") else AROUND[around]


def rule_of(name: str, shape: tuple[int, ...], config: ModelConfig) -> InitRule:
    """Return the rule that the table stands for; the fans are the matrix's own two sizes."""
    start = start_of(name, config)
    if isinstance(start, InitRule):
        return start
    if start == "norm":
        own = name.rpartition(".")[2]
        return ZEROS if config.norm == "rmsnorm_zero_centred" and own == "weight" else NORMS[own]
    fan_out, fan_in = shape[-2:]
    if start == "outward of heads":
        fan_in = config.num_heads * config.head_dim
    spread = {"normal": config.init_std, "scaled": fan_in**-0.5, "xavier_uniform": (6 / (fan_in + fan_out)) ** 0.5}
    kind: Literal["uniform", "normal"] = "uniform" if config.init == "xavier_uniform" else "normal"
    return InitRule(kind, spread[config.init] * _gain(start, config))


def _gain(start: Drawn, config: ModelConfig) -> float:
    if start == "matrix":
        return 1.0
    if config.norm_placement == "deepnorm":
        return float((8 * config.num_layers) ** -0.25)  # Wang et al. 2022: beta of a decoder alone
    return 1.0 if start == "value" or not config.init_depth_scaled else (2 * config.num_layers) ** -0.5


MODELS = {
    **SAMPLES,
    **{f"{kind}, by fan-in": sample.model_copy(update={"init": "scaled"}) for kind, sample in OF_KINDS.items()},
    **{
        f"{kind}, DeepNorm": sample.model_copy(update={"norm_placement": "deepnorm"})
        for kind, sample in OF_KINDS.items()
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_begins_as_the_table_has_it(name: str) -> None:
    config = MODELS[name]
    model = build_model(config, device="meta")
    rules = init_rules(model)
    expected = {key: rule_of(key, tuple(held.shape), config) for key, held in model.named_parameters()}
    # Of the same formulas in another order of operations: some units in the last place.
    assert {key: _rounded(rules[key]) for key in expected} == {key: _rounded(rule) for key, rule in expected.items()}


def _rounded(rule: InitRule) -> tuple[str, ...]:
    return (rule.kind, *(f"{number:.12g}" for number in (rule.scale, rule.low, rule.high)))


@pytest.mark.parametrize("name", OF_KINDS)
def test_what_is_filled_spreads_as_the_table_has_it(name: str) -> None:
    config = OF_KINDS[name]
    drawn: dict[str, list[Tensor]] = defaultdict(list)
    for key, held in build_model(config, seed=1).named_parameters():
        start = start_of(key, config)
        if isinstance(start, str) and start != "norm":
            spread = rule_of(key, tuple(held.shape), config).scale
            drawn[start].append(held.detach().double().flatten() / spread)
    assert any(drawn_as.startswith("outward") for drawn_as in drawn)
    for drawn_as, pieces in drawn.items():
        every = torch.cat(pieces)
        # A standard deviation of n normal numbers is off by 1 / sqrt(2n); four times that are one seed in 16,000.
        assert every.std().item() == pytest.approx(1.0, abs=4 / math.sqrt(2 * len(every))), drawn_as
        assert len(every) > 500  # so that it is sharper than 13 %, and no missing root of the depth passes
