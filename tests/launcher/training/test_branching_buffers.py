"""An export whose routers choose by buffers is begun from in a pipeline: each stage takes those of its own layers."""

from pathlib import Path

import torch
from rank_pool import run_mesh
from tiny_exports import CONFIGS, ModelWeights, tiny_model
from tiny_run import tiny_store

from meshwright.data.store import TokenStore
from meshwright.launcher.build import build_run, with_vocab_of
from meshwright.launcher.runfile.read import read_run_file
from meshwright.launcher.training.branching import begin_from
from meshwright.launcher.weights.hf_writer import ExportSettings, write_hf_folder
from meshwright.launcher.weights.import_run import ImportRequest, import_run
from meshwright.parallel.mesh import Mesh, Sizes

OVERRIDES = ["data.seq_len=16", "train.global_batch_size=4", "train.micro_batch_size=1", "train.steps=200"]


def begun(mesh: Mesh, run_file: Path, overrides: list[str]) -> dict[str, list[float]]:
    """Return the buffers of this rank's layers, in a run that began from the export."""
    read = read_run_file(run_file, overrides, world_size=mesh.world.size)
    store = TokenStore.open(read.data.store)
    run = build_run(with_vocab_of(read, store), store, mesh, torch.device("cpu"))
    begin_from(run, Path(read.init.source), [])
    return {name: buffer.tolist() for name, buffer in run.buffers().items()}


def test_each_stage_takes_the_buffers_of_its_layers(tmp_path: Path) -> None:
    config = CONFIGS["deepseek_v3"]
    model = tiny_model(config)
    for buffer in model.buffers():
        torch.nn.init.normal_(buffer)
    tokenizer = (TokenStore.open(tiny_store()).path / "tokenizer.json").read_text()
    (tmp_path / "export").mkdir()
    write_hf_folder(tmp_path / "export", config, ModelWeights(model), ExportSettings(tokenizer, None, max_positions=32))
    run_file = tmp_path / "run.toml"
    import_run(ImportRequest(tmp_path / "export", run_file, store=str(tiny_store()), verify=False))
    overrides = [*OVERRIDES, f"run.folder={tmp_path / 'run'}", "run.device=cpu", "parallel.pp=2"]
    stages = run_mesh(Sizes(pp=2), begun, run_file, overrides)
    found = {name: values for stage in stages for name, values in stage.items()}
    assert found == {name: buffer.tolist() for name, buffer in model.named_buffers()}
    assert found
