"""Tiny models of every family, a tokenizer, runs and exports of them, for the tests of exporting."""

from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from meshwright.data.prepare import PrepareOptions, prepare
from meshwright.data.store import TokenStore
from meshwright.launcher.runfile.tables import RunFile
from meshwright.launcher.runfile.write import write_resolved
from meshwright.launcher.weights.hf_writer import ExportSettings, write_hf_folder
from meshwright.model.config import ModelConfig, MoeConfig
from meshwright.model.parts import build_model
from meshwright.model.stack import LanguageModel
from meshwright.parallel.checkpoint.save import save_checkpoint
from meshwright.parallel.mesh import single_process_mesh

END = "<|endoftext|>"
TEXT = "def area(width, height):\n    return width * height  # in square metres\n\nprint(area(2, 3))\n" * 8

MOE = MoeConfig(
    num_experts=4, top_k=2, expert_hidden_size=20, load_balancing="none", load_balancing_weight=0.0, z_loss_weight=0.0
)
# Every size is another one, and head_dim is not hidden_size / num_heads, so that no swap passes unseen.
SIZES = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "vocab_size": 320,
    "ffn_hidden_size": 24,
    "init_std": 0.2,
}
ALL_ATTENTION = ("q", "k", "v", "output")


class ModelWeights:
    """The weights of a model in this process, which holds all of them."""

    def __init__(self, model: nn.Module) -> None:
        """Take a model that was built without a mesh; a tied embedding stands under its first name."""
        self._tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Return a whole weight, or its rows from the first to before the second."""
        return self._tensors[name] if rows is None else self._tensors[name][slice(*rows)]


def tiny_config(**changes: object) -> ModelConfig:
    return ModelConfig(**(SIZES | changes))  # type: ignore[arg-type]


CONFIGS = {
    "llama": tiny_config(rope_base=500.0),
    "llama tied with biases": tiny_config(tie_embeddings=True, bias=(*ALL_ATTENTION, "ffn")),
    "qwen3": tiny_config(qk_norm=True, norm_eps=1e-3),
    "mixtral": tiny_config(pattern="*E", moe=MOE),
    "qwen3_moe": tiny_config(pattern="*E", moe=MOE, qk_norm=True),
    "qwen3_moe un-normalised, mixed, with biases": tiny_config(
        pattern="*-*E", moe=MOE.model_copy(update={"normalise_top_k": False}), qk_norm=True, bias=ALL_ATTENTION
    ),
}


def tiny_model(config: ModelConfig) -> LanguageModel:
    """Build a model with nothing left at 0 or 1, where a mistake would not be seen."""
    model = build_model(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tiny_tokenizer() -> str:
    """Train a byte-level BPE, as `prepare` does, of 300 tokens: fewer than the model's vocabulary of 320."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer.to_str()


def tiny_tokens(seq_len: int = 24, batch: int = 2) -> torch.Tensor:
    """Return real text as token ids [s, b], with an end of text in it."""
    tokenizer = Tokenizer.from_str(tiny_tokenizer())
    ids = tokenizer.encode(TEXT).ids
    ids[5] = tokenizer.token_to_id(END)
    return torch.tensor(ids[: seq_len * batch]).view(batch, seq_len).T.contiguous()


def write_tiny_export(
    folder: Path, model: LanguageModel, config: ModelConfig, *, dtype: str = "fp32", max_shard_bytes: int = 10**9
) -> ExportSettings:
    """Export a model of this process."""
    settings = ExportSettings(tiny_tokenizer(), END, max_positions=32, dtype=dtype, max_shard_bytes=max_shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    write_hf_folder(folder, config, ModelWeights(model), settings)
    return settings


def write_tiny_store(folder: Path, *, extra: str = "") -> TokenStore:
    """Prepare a store from TEXT with the tiny tokenizer."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(tiny_tokenizer())
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"# file {number}\n{TEXT}{extra}")
    options = PrepareOptions(
        folder / "store",
        (str(folder / "*.txt"),),
        tokenizer=folder / "tokenizer.json",
        validation_fraction=0.4,
        workers=1,
    )
    return TokenStore.open(prepare(options).store)


def write_tiny_run(folder: Path, config: ModelConfig, store: TokenStore, *, step: int = 7, seq_len: int = 24) -> Path:
    """Write what training leaves: run.toml, the tokenizer and one checkpoint, with moments and buffers in it."""
    run_file = RunFile.model_validate(
        {
            "run": {"name": "tiny", "folder": str(folder)},
            "model": config.model_dump(exclude_none=True),
            "data": {"store": str(store.path), "seq_len": seq_len},
            "train": {"steps": 10, "global_batch_size": 1},
            "learning_rate": {"peak": 1e-3},
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.toml").write_text(write_resolved(run_file))
    (folder / "tokenizer.json").write_bytes((store.path / "tokenizer.json").read_bytes())
    weights = {name: parameter.detach() for name, parameter in tiny_model(config).named_parameters()}
    others = {f"optimizer.exp_avg.{name}": tensor + 1 for name, tensor in weights.items()}
    others["buffers.layers.0.load"] = torch.ones(3)
    state = {
        "step": step,
        "run_file": write_resolved(run_file),
        "store": store.fingerprint,
        "end_of_text": store.meta.tokenizer.end_of_text,
    }
    return save_checkpoint(folder / "checkpoints", step, weights | others, state, single_process_mesh(), "tiny")
