"""Models with a state become small, pass their checks, and relate to tp as the large ones do."""

import pytest

from meshwright.launcher.proof.narrow import narrow
from meshwright.launcher.runfile.tables import RunFile
from meshwright.model.config import ModelConfig
from meshwright.parallel.mesh import Sizes


def narrowed(model: dict[str, object], target: Sizes, layouts: list[Sizes]) -> ModelConfig:
    sizes = {"num_layers": 8, "hidden_size": 512, "vocab_size": 1000}
    run_file = RunFile.model_validate(
        {
            "run": {"name": "x"},
            "model": sizes | model,
            "data": {"store": "none", "seq_len": 256},
            "train": {"steps": 1000, "global_batch_size": 64},
            "learning_rate": {"peak": 1e-3},
        }
    )
    return narrow(run_file, target, layouts).run_file.model


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_a_hybrid_becomes_small_and_passes_its_checks(tp: int) -> None:
    model: dict[str, object] = {
        "pattern": "M-m-G-*-",
        "num_heads": 16,
        "mamba2": {"num_groups": 2},
        "gated_delta": {"num_heads": 8, "num_key_heads": 4},
    }
    layouts = [Sizes(tp=each) for each in (2, 4, 8) if each <= tp]
    small = narrowed(model, Sizes(tp=tp), layouts or [Sizes()])
    assert small.problems() == []
    assert small.pattern == "M-m-G-*-"
    assert small.mamba2 is not None
    assert small.mamba1 is not None
    assert small.gated_delta is not None
    h = small.hidden_size
    assert small.mamba2.heads(h) * small.mamba2.head_dim <= 512
    assert small.mamba2.chunk_size == small.mamba1.chunk_size == small.gated_delta.chunk_size == 8  # several a sample
    for kind in small.part_kinds:
        for need in kind.needs(small):
            assert all(need.allows(sizes.tp) for sizes in layouts), (kind.name, need)
    if tp > 2:  # several ranks hold copies of a group still
        assert small.mamba2.num_groups < tp
    widths = [small.mamba2.heads(h) * small.mamba2.head_dim, small.mamba1.channels(h)]
    assert len({h, small.ffn_hidden_size, *widths}) == 4, "a swapped dim would pass unseen"


@pytest.mark.parametrize("tp", [2, 3])
def test_s4d_keeps_features_that_tp_divides(tp: int) -> None:
    small = narrowed({"pattern": "S-", "hidden_size": 96 * tp}, Sizes(tp=tp), [Sizes(tp=tp)])
    assert small.problems() == []
    assert small.hidden_size % tp == 0
    assert small.s4d is not None
    assert small.s4d.chunk_size == 8
