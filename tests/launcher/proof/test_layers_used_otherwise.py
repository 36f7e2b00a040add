"""Layers that not every token comes to, or that are used more than once: the proof tells each use from the others."""

from pathlib import Path

import numpy as np
import pytest

from meshwright.launcher.proof.passes import choices_in
from meshwright.launcher.proof.prove import Judge, Plan, plan_proof, prove
from meshwright.launcher.proof.record import AtTokens, RankRecord, StepRecord
from meshwright.launcher.runfile.read import read_run_file

RUNS = Path(__file__).resolve().parents[3] / "runs"
SOME = "parts/mixture_of_depths.toml"
FURTHER, STAGES = "model.multi_token.depth=2", "parallel.pp=2"
SHARED = "model.distinct_layers=2"


def plan_of(name: str, *overrides: str, passes: tuple[str, ...] = ("exact",)) -> Plan:
    plan = plan_proof(read_run_file(RUNS / name, overrides, world_size=2), 2)
    return Plan(plan.run_file, plan.target, plan.cover, plan.narrowed, passes)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        (SOME, (FURTHER,)),  # the embedding runs again behind a layer that only some tokens go through
        (SOME, ("parallel.cp=1",)),  # ranks of which one has no token of it
        ("dense_tiny.toml", (FURTHER, STAGES)),  # the embedding runs again on another rank
    ],
)
def test_further_tokens_and_layers_of_some_tokens_are_proved(name: str, overrides: tuple[str, ...]) -> None:
    done = prove(plan_of(name, *overrides))
    assert done.is_same, [result.first for result in done.results]


def test_what_a_further_token_is_given_is_compared_too() -> None:
    step = Judge(plan_of("dense_tiny.toml", FURTHER).narrowed.run_file, ("exact",)).one["exact"].steps[0]
    here, ahead = (step.at_tokens[f"embedding{of} output"] for of in ("", " for multi_token.1"))
    assert here.values.shape == ahead.values.shape
    assert not np.array_equal(here.values, ahead.values)


def test_a_layer_that_is_used_again_has_choices_of_each_use() -> None:
    one = Judge(plan_of("moe_tiny.toml", SHARED).narrowed.run_file, ("exact",)).one["exact"]
    router = "layers.0.feedforward.part.router"
    first, again = (choices_in(one)[0, f"{router}{lap}"].experts for lap in ("", ", lap 2"))
    assert first.shape == again.shape
    assert not np.array_equal(first, again)


def test_a_token_that_did_not_come_to_a_router_keeps_what_is_chosen_now() -> None:
    sample, position = np.repeat([4, 5], 3), np.tile([0, 1, 2], 2)
    came = np.array([0, 4])
    rows = {
        "tokens": AtTokens(sample, position, np.arange(6)),
        "router experts": AtTokens(sample[came], position[came], np.array([[2, 3], [1, 3]])),
        "router margin": AtTokens(sample[came], position[came], np.array([0.5, 1e-7])),
    }
    chosen = choices_in(RankRecord([StepRecord(at_tokens=rows)]))[0, "router"]
    now = np.tile([0, 1], (6, 1))
    replayed, near = (chosen.taken_over(sample, position, now, up_to=up_to) for up_to in (np.inf, 1e-5))
    assert replayed.tolist() == [[2, 3], [0, 1], [0, 1], [0, 1], [1, 3], [0, 1]]
    assert near.tolist() == [[0, 1], [0, 1], [0, 1], [0, 1], [1, 3], [0, 1]]
