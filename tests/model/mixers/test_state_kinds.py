"""What does not fit in the tables of mixers that carry a state; their states in bf16."""

import pytest
import torch

from meshwright.model.config import ModelConfig
from meshwright.model.kinds.mixers.mamba2 import Mamba2Config
from meshwright.model.kinds.table import KINDS
from meshwright.model.parts import build_model

SIZES = {"num_layers": 2, "hidden_size": 96, "vocab_size": 4096, "ffn_hidden_size": 160}
MAMBA2 = Mamba2Config(num_heads=6, head_dim=24, num_groups=2, state_size=16, chunk_size=32)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"pattern": "M-", "mamba2": {"head_dim": 5}},
            "model.mamba2.head_dim = 5: must divide 2 * model.hidden_size = 192, or model.mamba2.num_heads be given;"
            " one of [",
        ),
        (
            {"pattern": "M-", "mamba2": {"num_groups": 4}},
            "model.mamba2.num_groups = 4: must divide the 3 heads of model.mamba2; one of [1, 3] would fit",
        ),
        (
            {"pattern": "M-", "mamba2": {"time_step_low": 0.5}},
            "model.mamba2.time_step_low = 0.5: must be below model.mamba2.time_step_high = 0.1; 0.001 would fit",
        ),
        (
            {"pattern": "G-", "gated_delta": {"num_heads": 6, "num_key_heads": 4}},
            "model.gated_delta.num_key_heads = 4: must divide the 6 value heads of model.gated_delta; one of [",
        ),
        ({"pattern": "S-", "s4d": {"state_size": 7}}, "model.s4d.state_size = 7: must be even, because states are"),
        (
            {"pattern": "S-", "s4d": {"state_size": 1}},
            "model.s4d.state_size = 1: must be even, because states are conjugate pairs; 2 would fit",
        ),
        ({"pattern": "*-", "num_heads": 4, "mamba2": {}}, "has no M, so nothing uses the table [model.mamba2]"),
    ],
)
def test_what_makes_no_mixer_is_told(changes: dict[str, object], text: str) -> None:
    (problem,) = ModelConfig(**SIZES | changes).problems()
    assert text in problem


def test_tables_with_usual_values_may_be_left_out() -> None:
    config = ModelConfig(pattern="MmGS-", **{**SIZES, "num_layers": 4})
    assert config.problems() == []
    assert config.mamba2 == Mamba2Config()
    assert KINDS["s4d"].refuses == {"cp": "convolves whole samples"}


def test_a_bf16_model_mixes_states_in_fp32() -> None:
    model = build_model(ModelConfig(pattern="M-", mamba2=MAMBA2, **SIZES), dtype=torch.bfloat16)
    part = model.layers["0"].mixer.part
    state = part.initial_state(2, max_len=9)
    y = part.step(torch.randn(9, 2, 96, dtype=torch.bfloat16), state)
    assert (y.dtype, state.state.dtype) == (torch.bfloat16, torch.float32)
