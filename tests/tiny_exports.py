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
from meshwright.model.config import ModelConfig
from meshwright.model.families.family import BUFFERS
from meshwright.model.kinds.feedforward.moe import MoeConfig
from meshwright.model.kinds.unread import keys_read
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
        self._buffers = {BUFFERS + name: buffer for name, buffer in model.named_buffers()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def buffers(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(buffer.shape) for name, buffer in self._buffers.items()}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Return a whole weight, or its rows from the first to before the second."""
        tensor = (self._tensors | self._buffers)[name]
        return tensor if rows is None else tensor[slice(*rows)]


def tiny_config(**changes: object) -> ModelConfig:
    return ModelConfig(**(keys_read(str(changes.get("pattern", "*-")), SIZES) | changes))  # type: ignore[arg-type]


QK_TOKENS = {"qk_norm": True, "qk_norm_over": "tokens"}
UN_NORMALISED = MOE.model_copy(update={"normalise_top_k": False})
# One of four experts in each of two groups is let in; the shared ones are two.
DEEPSEEK_MOE = MOE.model_copy(
    update={"router": "sigmoid", "num_experts": 8, "num_groups": 4, "top_groups": 2, "weight_scale": 2.5}
    | {"num_shared_experts": 2}
)
LATENT = {"kv_lora_rank": 14, "qk_nope_head_dim": 4, "qk_rope_head_dim": 6, "v_head_dim": 10}
GRANITE = {
    "head_dim": 4,
    "attention_scale": 0.3,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.7,
    "logits_scaling": 1.5,
}
MAMBA2 = {"num_heads": 4, "head_dim": 8, "num_groups": 1, "state_size": 5, "conv_kernel": 3, "chunk_size": 4}
DELTA = {"num_heads": 4, "num_key_heads": 2, "key_head_dim": 6, "value_head_dim": 5, "conv_kernel": 3}
NEXT = {"norm": "rmsnorm_zero_centred", "qk_norm": True, "attention_gate": True, "rope_fraction": 0.5, "head_dim": 8}
SHARED_GATED = MOE.model_copy(update={"num_shared_experts": 2, "shared_expert_gate": True})
YARN = {"kind": "yarn", "factor": 4.0, "original_length": 16, "mscale": 0.7, "mscale_all_dim": 1.1}
LLAMA3 = {"kind": "llama3", "factor": 4.0, "original_length": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
EVERYWHERE = (*ALL_ATTENTION, "ffn")
BLOOM = {
    "num_kv_heads": 4,
    "head_dim": 4,
    "ffn_hidden_size": 64,
    "ffn_activation": "gelu_tanh",
    "position": "alibi",
    "norm": "layernorm",
    "embedding_norm": True,
    "bias": EVERYWHERE,
}

CONFIGS = {
    "llama": tiny_config(rope_base=500.0),
    "llama tied with biases": tiny_config(tie_embeddings=True, bias=EVERYWHERE),
    "llama of longer samples": tiny_config(rope_scaling=LLAMA3),
    "qwen3": tiny_config(qk_norm=True, norm_eps=1e-3),
    "mixtral": tiny_config(pattern="*E", moe=MOE),
    "qwen3_moe": tiny_config(pattern="*E", moe=MOE, qk_norm=True),
    "qwen3_moe un-normalised, mixed, with biases": tiny_config(
        pattern="*-*E", moe=UN_NORMALISED, qk_norm=True, bias=ALL_ATTENTION
    ),
    "gemma": tiny_config(
        norm="rmsnorm_zero_centred", ffn_activation="geglu", embedding_multiplier=4.0, tie_embeddings=True
    ),
    "olmo2": tiny_config(norm_placement="branch", **QK_TOKENS),
    "olmoe": tiny_config(pattern="*E", moe=UN_NORMALISED, head_dim=4, **QK_TOKENS),
    "deepseek_v3": tiny_config(
        pattern="+E @0 +-", moe=DEEPSEEK_MOE, latent=LATENT | {"q_lora_rank": 12}, norm_eps=1e-6, rope_scaling=YARN
    ),
    "deepseek_v3 without latents of queries, with biases": tiny_config(
        pattern="+E", moe=DEEPSEEK_MOE, latent=LATENT, norm_eps=1e-6, bias=ALL_ATTENTION
    ),
    "granitemoehybrid": tiny_config(
        pattern="ME*E", moe=MOE.model_copy(update={"num_shared_experts": 1}), mamba2=MAMBA2, position="none", **GRANITE
    ),
    "granitemoehybrid dense, with RoPE and groups": tiny_config(
        pattern="M-*-", mamba2=MAMBA2 | {"num_groups": 2, "bias": True}, bias=ALL_ATTENTION, **GRANITE
    ),
    "mamba2": tiny_config(pattern="M", mamba2=MAMBA2 | {"num_groups": 2}),
    "mamba2 with biases": tiny_config(pattern="M", mamba2=MAMBA2 | {"bias": True}, tie_embeddings=True),
    "mamba": tiny_config(
        pattern="m", mamba1={"dt_rank": 3, "state_size": 5, "conv_kernel": 3, "chunk_size": 4}, tie_embeddings=True
    ),
    "qwen3_next": tiny_config(pattern="GE*E", moe=SHARED_GATED, gated_delta=DELTA, **NEXT),
    "qwen3_next mixed, with biases": tiny_config(
        pattern="G-*E", moe=SHARED_GATED, gated_delta=DELTA, bias=ALL_ATTENTION, **NEXT
    ),
    "gpt2": tiny_config(
        num_kv_heads=4,
        head_dim=4,
        ffn_activation="gelu_tanh",
        position="learned",
        max_positions=40,
        norm="layernorm",
        bias=EVERYWHERE,
        tie_embeddings=True,
    ),
    "bloom": tiny_config(tie_embeddings=True, **BLOOM),
}


def tiny_model(config: ModelConfig) -> LanguageModel:
    """Build a model with nothing left at 0 or 1, where a mistake would not be seen."""
    model = build_model(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("router.bias"):
                buffer.add_(0.2 * torch.randn(buffer.shape, generator=generator))
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
