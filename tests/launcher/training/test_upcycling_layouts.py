"""A mixture of experts that begins from an exported dense model: the same weights and first loss in every layout."""

from pathlib import Path

import pytest
import torch
from rank_pool import run_mesh
from tiny_run import build, numbers, start, start_on, write_run_file
from torch import Tensor

from meshwright.launcher.training.branching import begin_from
from meshwright.launcher.weights.export_run import ExportRequest, export_run
from meshwright.parallel.mesh import Mesh, Sizes

EXPERTS = ("[model.moe]", "num_experts = 4", "top_k = 2", "num_shared_experts = 1", 'load_balancing = "step"')
FROZEN = ("learning_rate.peak=1e-12", "train.steps=1", "evaluation.every=1")
PIECES = ("model.moe.expert_hidden_size=16", "model.moe.num_experts=8", "model.moe.top_k=4")
HOW = {
    "copy": ("init.upcycle=copy", "model.moe.num_shared_experts=0", "model.moe.expert_hidden_size=64"),
    "partition": ("init.upcycle=partition", "model.moe.num_shared_experts=0", *PIECES),
}
LAYOUTS = {
    "tp=2": (Sizes(tp=2), ["parallel.tp=2"]),
    "pp=2": (Sizes(pp=2), ["parallel.pp=2"]),
    "ep=2": (Sizes(dp_shard=2, ep=2), ["parallel.ep=2"]),
    "ep=2, ZeRO-3": (Sizes(dp_shard=2, ep=2), ["parallel.ep=2", "zero.stage=3"]),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a dense run and export it; return its folder."""
    folder = tmp_path_factory.mktemp("dense")
    path = write_run_file(folder)
    lines = path.read_text().replace('"*E"', '"*-"').replace("num_kv_heads = 1", "num_kv_heads = 2").splitlines()
    path.write_text("\n".join(line for line in lines if line not in EXPERTS and "expert_hidden" not in line))
    start(folder)
    export_run(ExportRequest(folder / "run", verify=False))
    return folder


def begun(mesh: Mesh | None, folder: Path, export: Path, overrides: list[str]) -> dict[str, tuple[Tensor, list[slice]]]:
    """Return each part of a run that begins from the export, and where in the whole it lies."""
    run = build(folder, overrides, mesh)
    begin_from(run, export, [])
    found = {}
    for name, part in run.engine.parts.items():
        held = part.real(part.parameter).detach().clone()
        where = [slice(begin, begin + size) for begin, size in zip(part.offset, held.shape, strict=True)]
        found[name] = (held, where)
    return found


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_holds_its_part_of_what_one_process_makes(
    layout: str, how: str, dense: Path, tmp_path: Path
) -> None:
    export, (sizes, axes) = dense / "run" / "export", LAYOUTS[layout]
    overrides = [f'init.from="{export}"', "model.num_kv_heads=2", "init.upcycle_noise=0.1", *HOW[how]]
    whole = {name: held for name, (held, _) in begun(None, tmp_path, export, overrides).items()}
    seen = {name: torch.zeros_like(held, dtype=torch.bool) for name, held in whole.items()}
    for parts in run_mesh(sizes, begun, tmp_path, export, [*overrides, *axes]):
        for name, (held, where) in parts.items():
            assert torch.equal(held, whole[name][tuple(where)]), name
            seen[name][tuple(where)] = True
    assert all(reached.all() for reached in seen.values())


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_loss_is_the_dense_models_in_every_layout(layout: str, how: str, dense: Path, tmp_path: Path) -> None:
    sizes, axes = LAYOUTS[layout]
    source = [f'init.from="{dense / "run" / "export"}"', "model.num_kv_heads=2"]
    run_mesh(sizes, start_on, tmp_path, [*source, *FROZEN, *HOW[how], *axes])
    loss = numbers(dense, "validation_loss", "evaluation")[-1]
    found = numbers(tmp_path, "validation_loss", "evaluation")[0]
    assert found == pytest.approx(loss, rel=1e-5)  # experts' products round otherwise
