"""Sizes that the axes do not divide are named with sizes that would fit; and those sizes do fit."""

import re
from typing import Any

import pytest
from runfile_cases import MOE, run_file

from meshwright.launcher.runfile.cross_checks import check
from meshwright.launcher.runfile.read import examine

WIDE = {**MOE, "moe": {"num_experts": 12, "expert_hidden_size": 40, "num_shared_experts": 1}}
SOUND: dict[str, dict[str, Any]] = {
    "run": {"name": "x"},
    "data": {"store": "s", "seq_len": 64},
    "train": {"steps": 100, "global_batch_size": 24},
    "learning_rate": {"peak": 1e-3},
}
DROPPED = {**MOE, "moe": {**MOE["moe"], "expert_dropout": 0.1}}


@pytest.mark.parametrize(
    ("tables", "world_size", "lines"),
    [
        (
            {"parallel": {"tp": 3}, "data": {"seq_len": 66}, "train": {"global_batch_size": 24}},
            3,
            ["parallel.tp = 3: must divide model.num_heads = 4; one of [1] would fit"],
        ),
        (
            {"parallel": {"tp": 4}, "model": {"num_heads": 12, "num_kv_heads": 6, "head_dim": 8}},
            4,
            ["parallel.tp = 4: must divide model.num_kv_heads = 6, or be a multiple of it; one of [1, 2] would fit"],
        ),
        (
            {"parallel": {"tp": 4}, "model": {"ffn_hidden_size": 106}},
            4,
            ["parallel.tp = 4: must divide model.ffn_hidden_size = 106; one of [1, 2] would fit"],
        ),
        (
            {
                "parallel": {"tp": 4},
                "model": {"hidden_size": 54, "num_heads": 4, "head_dim": 8, "ffn_hidden_size": 96, "multi_token": {}},
            },
            4,
            ["parallel.tp = 4: must divide model.hidden_size = 54; one of [1, 2] would fit"],
        ),
        (
            {"parallel": {"tp": 4}, "data": {"seq_len": 66}},
            4,
            [
                "data.seq_len = 66: must be a multiple of parallel.tp = 4, whose ranks share its tokens between"
                " layers; one of [64, 68] would fit"
            ],
        ),
        (
            {"parallel": {"cp": 2, "tp": 4}, "data": {"seq_len": 68}},
            8,
            [
                "data.seq_len = 68: must be a multiple of 8: each rank of cp = 2 holds two chunks of it, each rank of"
                " tp = 4 a stretch of these; one of [64, 72] would fit"
            ],
        ),
        (
            {"parallel": {"cp": 4, "tp": 2, "context": "ulysses"}},
            8,
            [
                'parallel.context = "ulysses": cp * tp = 8 must divide model.num_heads = 4; "ring", or one of [1, 2] as'
                " parallel.cp, would fit"
            ],
        ),
        (
            {"parallel": {"etp": 3}, "model": WIDE},
            3,
            [
                "parallel.etp = 3: must divide model.moe.expert_hidden_size = 40; one of [1] would fit",
            ],
        ),
        (
            {"parallel": {"expert_exchange": "deep_ep"}, "model": DROPPED, "run": {"device": "cpu"}},
            2,
            [
                f'parallel.expert_exchange = "deep_ep": {rule}; "all_to_all" would fit'
                for rule in (
                    "exchanges tokens over parallel.ep, which is 1",
                    'runs on NVIDIA GPUs, not on run.device = "cpu"',
                    "does not send the numbers that model.moe.expert_dropout is drawn by",
                    'moves bf16, and train.precision = "fp32"',
                )
            ],
        ),
        (
            {"parallel": {"ep": 2, "etp": 2}},
            4,
            [
                "parallel.ep = 2: splits experts, and the model has none (no table [model.moe]); 1 would fit",
                "parallel.etp = 2: splits experts, and the model has none (no table [model.moe]); 1 would fit",
            ],
        ),
    ],
)
def test_a_size_that_an_axis_does_not_divide_is_named(
    tables: dict[str, Any], world_size: int, lines: list[str]
) -> None:
    assert check(run_file(**tables), world_size) == lines


@pytest.mark.parametrize("key", ["tp", "etp"])
@pytest.mark.parametrize("size", [3, 5, 6, 7, 16])
def test_a_size_of_an_axis_that_is_said_to_fit_fits(key: str, size: int) -> None:
    def lines(size: int) -> list[str]:
        sizes = {"num_heads": 12, "num_kv_heads": 6, "head_dim": 8, "hidden_size": 96}
        tables = {"model": {**WIDE, **sizes}, "parallel": {key: size}, "data": {"seq_len": 5040}}
        return check(run_file(train={"global_batch_size": 5040}, **tables), size)

    for line in lines(size):
        fits = [int(text) for text in re.findall(r"\d+", line.partition("one of [")[2].partition("]")[0])]
        assert fits
        assert any(not [found for found in lines(fit) if found.startswith(line.partition(":")[0][:12])] for fit in fits)


def test_context_parallelism_fits_where_its_chunks_and_heads_divide() -> None:
    for parallel in ({"cp": 2}, {"cp": 16}, {"cp": 8, "tp": 2}, {"cp": 2, "tp": 2, "context": "ulysses"}):
        assert check(run_file(parallel=parallel), 16 if 16 in parallel.values() or "tp" in parallel else 2) == []


def test_more_ranks_than_key_heads_and_an_uneven_vocabulary_fit() -> None:
    assert check(run_file(parallel={"tp": 4}, model={"num_kv_heads": 1, "vocab_size": 1001}), 8) == []
    assert check(run_file(parallel={"dp_replicate": 2, "tp": 2}, zero={"stage": 3}), 8) == []


@pytest.mark.parametrize(("pattern", "table"), [("*E", "moe"), ("+-", "latent")])
@pytest.mark.parametrize("parallel", [{"cp": 2, "context": "ulysses"}, {"tp": 2}, {"ep": 2}, {"pp": 2}])
def test_a_part_without_its_table_is_told_on_any_layout(pattern: str, table: str, parallel: dict[str, Any]) -> None:
    model = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "pattern": pattern}
    _, found = examine({**SOUND, "model": model, "parallel": parallel}, world_size=2)
    assert any(f"a table [model.{table}]" in line for line in found)


def test_only_the_key_that_is_wrong_is_named() -> None:
    latent = {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
    model = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "pattern": "+-", "latent": latent}
    _, found = examine({**SOUND, "model": {**model, "position": "alibi"}})
    assert [line.split(":")[0] for line in found] == ['model.position = "alibi"']
    _, found = examine({**SOUND, "model": {**model, "rope_fraction": 0.5}})
    assert [line.split(":")[0] for line in found] == ["model.rope_fraction = 0.5"]


def test_a_text_that_must_be_there_is_told_in_words() -> None:
    _, found = examine({**SOUND, "data": {"store": "", "seq_len": 64}, "model": {"preset": "dense-tiny"}})
    assert found == ['data.store = "": must not be empty; name the folder that prepare wrote']
