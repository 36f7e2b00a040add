"""The Python that docs/library.md and docs/parts.md show runs as it stands, and computes what the pages say."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from meshwright.model import library

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "library.md"
PARTS = re.findall(r"```python\n(.*?)```", (DOCS / "parts.md").read_text(), re.DOTALL)
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_blocks_of_the_page_run_in_order() -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, PAGE.name, "exec"), names)
    shape = {name: tuple(names[name].shape) for name in ("logits", "chosen", "first", "second", "y", "load")}
    assert shape == {
        "logits": (63, 2, 512),
        "chosen": (8, 2),
        "first": (1, 2, 512),
        "second": (1, 2, 512),
        "y": (63, 2, 64),
        "load": (8,),
    }
    assert names["losses"][2] < names["losses"][0]
    assert names["load"].sum() == 63 * 2 * 2
    # The spread model begins with the weights of the plain one, from the same seed, so its loss is the same.
    assert names["spread_loss"].item() == pytest.approx(names["losses"][0], rel=1e-6)
    assert all(isinstance(names[name], nn.Module) for name in ("model", "hybrid", "attention", "moe", "own", "spread"))
    assert next(names["hybrid"].parameters()).dtype == torch.bfloat16
    assert torch.isfinite(names["own_loss"])
    check_that_the_tally_trains(names["complete"], names["further_loss"])


def check_that_the_tally_trains(model: nn.Module, further_loss: torch.Tensor) -> None:
    """Hold what the page's last training lines left: gradients of every loss, and a bias that moved."""
    assert further_loss > 0.0
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    moved = {
        name: parameter.grad.abs().max() > 0.0
        for name, parameter in model.named_parameters()
        if "predictor" in name or "multi_token" in name
    }
    assert len(moved) > 2
    assert all(moved.values())
    bias = model.layers["1"].feedforward.part.router.bias
    assert bias.abs().max() > 0.0


def test_routers_learn_from_their_losses_only_with_a_tally() -> None:
    tokens = torch.randint(0, 64, (17, 2), generator=torch.Generator().manual_seed(0))
    losses = {"load_balancing_weight": 1.0, "z_loss_weight": 1.0}
    model = library.build_model(library.preset("moe-tiny", vocab_size=64, moe=losses))
    router = model.layers["0"].feedforward.part.router.weight
    found = {}
    for name, tally in (("without", None), ("with", library.tally_of(model))):
        model.zero_grad()
        model(tokens[:-1], tokens[1:], tally=tally).backward()
        found[name] = router.grad.clone()
    assert (found["with"] - found["without"]).norm() > 0.1 * found["without"].norm()


def test_the_training_lines_of_the_pages_use_the_tally() -> None:
    assert [block for block in [*PARTS, *BLOCKS] if ".backward()" in block and "tally" not in block] == []


def test_the_page_has_all_its_blocks() -> None:
    assert len(BLOCKS) == 12


def test_every_part_works_in_a_few_lines() -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in PARTS:
        exec(compile(block, "parts.md", "exec"), names)
    assert names["text"].shape == (8, 2)
    decoder, projection = names["decoder"], names["decoder"].multi_token[0].projection.weight
    assert names["further_loss"] > 0.0
    assert projection.grad.abs().max() > 0.0  # the further token's loss reached it
    assert [name for name, each in decoder.named_parameters() if each.grad is None] == []


def test_the_pages_show_all_that_is_importable() -> None:
    shown = set(re.findall(r"\w+", "\n".join([*PARTS, *BLOCKS])))
    assert set(library.__all__) - shown == set()
