"""Writes a Hugging Face folder: weights tensor by tensor, configuration, tokenizer.

    config.json             the family's keys, in the new and in the old spelling: transformers 5 reads
                            rope_parameters and dtype, MLX and llama.cpp's converter rope_theta and torch_dtype
    generation_config.json  greedy, and the token at which to stop
    model*.safetensors      on-disk names; an index when there are several files
    tokenizer files         see hf_tokenizer.py

It writes into an empty folder, which becomes the export when it is verified (launcher/weights/destination.py).

At no time is more than one of their tensors in memory, and what it is made of: where the class has a tensor for each
expert, an expert's matrix, not a layer's.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from meshwright.launcher.weights.hf_tokenizer import token_id, write_tokenizer
from meshwright.launcher.weights.rows import joined
from meshwright.launcher.weights.safetensors_stream import (
    DEFAULT_MAX_SHARD_BYTES,
    NamedShape,
    write_safetensors,
    write_text,
)
from meshwright.model.config import ModelConfig
from meshwright.model.families.choose import choose_family
from meshwright.model.families.family import BUFFERS, Row, Source, our_shapes

EXPORT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DTYPE_KEYS = {"fp32": "float32", "bf16": "bfloat16"}
# Beginnings of names of what no class computes with: other buffers of routers, what predicts further tokens.
OF_TRAINING = (BUFFERS, "multi_token.")


@runtime_checkable
class Weights(Protocol):
    """Where weights come from: any part of a global tensor, by our name."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return every weight's global shape."""
        ...

    def buffers(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of what is kept with the weights and is no parameter, with "buffers." before its name."""
        ...

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Return a whole weight, or its rows from the first to before the second."""
        ...


@dataclass(frozen=True)
class ExportSettings:
    """What a user may choose about an export, and what goes with the weights."""

    tokenizer_json: str
    """The text of the tokenizer.json that the model was trained with."""
    end_token: str | None
    """The token that ends a document; None where the tokenizer has none."""
    max_positions: int
    """The longest sequence that the model was trained on."""
    dtype: str = "fp32"
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES


def write_hf_folder(folder: Path, config: ModelConfig, weights: Weights, settings: ExportSettings) -> None:
    """Write all files of an export into an empty folder.

    Raises:
        NotRepresentableError: if no class is exactly this model.
        ValueError: if the weights are not those of the configuration, naming every tensor at fault.
    """
    family = choose_family(config)
    rows = list(family.mapping(config))
    problems = coverage_problems(rows, {**weights.shapes(), **weights.buffers()})
    if problems:
        raise ValueError("the weights are not those of the configuration:\n  " + "\n  ".join(problems))
    write_text(folder / "config.json", json.dumps(foreign_config(config, settings), indent=2) + "\n")
    write_text(folder / "generation_config.json", json.dumps(_generation_config(settings), indent=2) + "\n")
    write_tokenizer(folder, settings.tokenizer_json, end_token=settings.end_token, max_positions=settings.max_positions)
    by_name = {row.theirs: row for row in rows}
    write_safetensors(
        folder,
        [NamedShape(row.theirs, row.shape) for row in rows],
        lambda name: read_row(weights, by_name[name]),
        EXPORT_DTYPES[settings.dtype],
        settings.max_shard_bytes,
    )


def read_row(weights: Weights, row: Row) -> Tensor:
    """Return the values of one foreign tensor."""
    return joined(row, [_read_source(weights, source) for source in row.sources])


def _read_source(weights: Weights, source: Source) -> Tensor:
    if source.at is None:
        return weights.read(source.ours)
    return weights.read(source.ours, (source.at, source.at + 1)).squeeze(0)


def coverage_problems(rows: Sequence[Row], held: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return every tensor that is missing, left over, or of another shape; each must be used exactly once."""
    wanted = our_shapes(rows)
    problems = [f"{name} {list(wanted[name])} is missing" for name in wanted if name not in held]
    problems += [
        f"{name} {list(shape)} has no place in the class"
        for name, shape in held.items()
        if name not in wanted and not name.startswith(OF_TRAINING)
    ]
    for name in wanted.keys() & held.keys():
        if wanted[name] != tuple(held[name]):
            problems.append(f"{name} has the shape {list(held[name])}, the configuration says {list(wanted[name])}")
    return sorted(problems)


def foreign_config(config: ModelConfig, settings: ExportSettings) -> dict[str, Any]:
    """Return the whole config.json."""
    family = choose_family(config)
    return {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "max_position_embeddings": settings.max_positions,
        **{key: values[0] for key, values in family.fixed.items()},
        **family.to_foreign(config),
        # A null says that there is none; a missing key would mean the class's own default, such as 1 for Llama.
        "bos_token_id": None,
        "eos_token_id": _end_id(settings),
        # Named here, the padding token's embedding would get no gradient, and it is the end token, which must learn;
        # generating and batching find it in generation_config.json and with the tokenizer.
        "pad_token_id": None,
        "use_cache": True,
        "dtype": DTYPE_KEYS[settings.dtype],
        "torch_dtype": DTYPE_KEYS[settings.dtype],
    }


def export_bytes(config: ModelConfig, settings: ExportSettings) -> int:
    """Return how many bytes the weights and the tokenizer of an export take; the rest is a few thousand."""
    rows, item = choose_family(config).mapping(config), EXPORT_DTYPES[settings.dtype].itemsize
    return sum(prod(row.shape) for row in rows) * item + len(settings.tokenizer_json.encode())


def _generation_config(settings: ExportSettings) -> dict[str, Any]:
    end = _end_id(settings)
    return {"do_sample": False, "bos_token_id": None, "eos_token_id": end, "pad_token_id": end}


def _end_id(settings: ExportSettings) -> int | None:
    return None if settings.end_token is None else token_id(settings.tokenizer_json, settings.end_token)
