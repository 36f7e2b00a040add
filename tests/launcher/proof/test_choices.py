"""What layers choose is heard and can be decided: experts, tokens that experts take, tokens that are let in."""

from pathlib import Path

import pytest
import torch
from part_samples import SAMPLES
from torch import Tensor

from meshwright.launcher.proof.choices import Hear, watch_choices
from meshwright.launcher.proof.prove import Plan, plan_proof, prove
from meshwright.launcher.runfile.read import read_run_file
from meshwright.model.parts import build_model
from meshwright.parallel.mesh import NO_TP
from meshwright.parallel.tally import Tally, declared_entries
from meshwright.parallel.where import Where, place

RUNS = Path(__file__).resolve().parents[3] / "runs" / "parts"
S = 12
HEADS = [f"layers.0.mixer.part.{what}, head {head}" for what in ("source", "destination") for head in range(4)]
CHOOSING = {
    "router softmax": ["layers.0.feedforward.part.router"],
    "router expert_choice": ["layers.0.feedforward.part.router"],
    "switch_head": HEADS,
    "depth around *E": ["layers.0.router", "layers.0.feedforward.part.router"],
}


def place_of_one_sample() -> Where:
    zeros = torch.zeros(S, 1, dtype=torch.int64)
    counted = torch.ones(S, 1, dtype=torch.bool)
    return place(
        torch.zeros(1, dtype=torch.int64), zeros, counted, torch.arange(S), NO_TP, step=0, step_tokens=float(S)
    )


def loss_of(name: str, hear: Hear | None) -> Tensor:
    model = build_model(SAMPLES[name], seed=4, dtype=torch.float64)
    for of_module, module in model.named_modules():
        if hear is not None:
            watch_choices(module, of_module, hear)
    tokens = torch.arange(S)[:, None] % SAMPLES[name].vocab_size
    tally = Tally(declared_entries(model), torch.device("cpu"))
    loss: Tensor = model(tokens, tokens.roll(-1, 0), place_of_one_sample(), tally)
    return loss.detach()


@pytest.mark.parametrize("name", CHOOSING)
def test_what_a_layer_chooses_is_heard(name: str) -> None:
    heard: dict[str, tuple[int, int]] = {}

    def hear(at: str, chosen: Tensor, margin: Tensor, where: Where | None, position: Tensor | None) -> Tensor:
        heard[at] = (len(chosen), len(margin))
        assert (margin >= 0).all()
        assert (where is None) == (position is None) == (at not in ("layers.0.router", "layers.1.router"))
        return chosen

    assert torch.equal(loss_of(name, hear), loss_of(name, None))
    of_first_layer = {at: sizes for at, sizes in heard.items() if at.startswith("layers.0.")}
    assert list(of_first_layer) == CHOOSING[name]
    within = 5 if "depth" in name else S  # ceil(0.4 * 12) tokens are let in
    for at, sizes in of_first_layer.items():
        assert sizes == ((S, S) if at == "layers.0.router" else (within, within))


@pytest.mark.parametrize(("name", "at"), [(name, at) for name, places in CHOOSING.items() for at in places])
def test_something_else_can_be_chosen_in_its_place(name: str, at: str) -> None:
    def hear(of: str, chosen: Tensor, *_: object) -> Tensor:
        return chosen.roll(1, 0) if of == at else chosen

    assert not torch.equal(loss_of(name, hear), loss_of(name, None))


def test_in_bf16_what_fp64_chose_is_taken_over() -> None:
    """Else a rank's experts take other tokens: in their gradients it is 7.7 times as far off as one process."""
    changes = ["train.precision=bf16", "parallel.ep=1", "parallel.tp=2"]
    plan = plan_proof(read_run_file(RUNS / "expert_choice.toml", changes, world_size=2), 2)
    done = prove(Plan(plan.run_file, plan.target, plan.cover, plan.narrowed, ("own",)))
    assert done.is_same, [result.first for result in done.results]
