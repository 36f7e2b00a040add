"""The weights of a benchmark's shape as transformers reads them, and the check that both compute the same.

The model that ours trains is written as `meshwright export` writes it; a peer starts from those weights. Before
anything is timed both give the logits of the same tokens, which must agree.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from cpu_task import Task, batches
from decode_cpu_systems import their_changes
from torch import Tensor, nn

from meshwright.data.store import TokenStore
from meshwright.launcher.build import build_run
from meshwright.launcher.runfile.read import read_run_file
from meshwright.launcher.weights.hf_writer import ExportSettings, write_hf_folder
from meshwright.parallel.mesh import single_process_mesh

COMPARED_TOKENS = 128
BOUND = 1e-4
"""Of the largest logit, or of 1 where that is smaller."""


class _Held:
    """The weights of a model in memory, as the exporter asks for them."""

    def __init__(self, model: nn.Module) -> None:
        self.held = dict(model.named_parameters())

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(weight.shape) for name, weight in self.held.items()}

    def buffers(self) -> Mapping[str, tuple[int, ...]]:
        return {}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        weight = self.held[name].detach()
        return weight if rows is None else weight[rows[0] : rows[1]]


def write_peer_weights(task: Task) -> float:
    """Write the folder that transformers reads; return the largest difference of logits, of the largest logit.

    Raises:
        RuntimeError: if the two do not compute the same.
    """
    from transformers import AutoModelForCausalLM

    run_file = read_run_file(Path(task.folder, f"{task.shape}.toml"), [])
    store = TokenStore.open(run_file.data.store)
    model = build_run(run_file, store, single_process_mesh(), torch.device("cpu")).model.eval()
    folder = Path(task.folder, task.shape)
    folder.mkdir()
    settings = ExportSettings(
        (store.path / "tokenizer.json").read_text(encoding="utf-8"), None, max_positions=max(task.seq_len, 2048)
    )
    write_hf_folder(folder, run_file.model, _Held(model), settings)
    peer = AutoModelForCausalLM.from_pretrained(folder, **their_changes(task)).eval()
    tokens = next(batches(task))[:, :COMPARED_TOKENS].contiguous()
    with torch.no_grad():
        mine, theirs = model(tokens.t()).transpose(0, 1), peer(tokens).logits
    difference = float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1.0))
    if not difference <= BOUND:
        raise RuntimeError(f"{task.shape}: the logits differ by {difference:.1e} of the largest; nothing was timed")
    return difference
