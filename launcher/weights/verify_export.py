"""Loads an export in `transformers` and compares it with our model: tensors, tokens, logits, greedy choices.

    tensors      every tensor of the class is in the files and is ours, bit for bit (after rounding to the dtype);
                 none is missing, left over or ignored by the class
    tokenizer    the exported tokenizer gives our tokens
    logits       max |theirs - ours| <= 1e-4 * max(1, largest |logit|), on real text
    greedy       both choose the same next token at every position, and while the class generates with its own
                 cache; where they differ, the two best logits must be closer than twice the measured difference

Both sides compute in fp32. An export in bf16 is held against our model with its weights rounded to bf16, so that
the same bound shows any mistake; what the rounding itself changes is reported beside it.

Ours comes in as a callable, so that nothing here depends on how a model is built.
"""

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn

from meshwright.launcher.weights.export_report import (
    ExportReport,
    GreedyDifference,
    GreedyReport,
    LogitsReport,
    TensorsReport,
)
from meshwright.launcher.weights.hf_writer import EXPORT_DTYPES, Weights, read_row
from meshwright.model.config import ModelConfig
from meshwright.model.families.choose import choose_family
from meshwright.model.families.family import Row

RELATIVE_LIMIT = 1e-4
MOST_LISTED = 20
# How the class is loaded: as it lies on this disk, in fp32, and with experts one after the other, as their grouped
# product takes no rows whose bytes are no multiple of 16 (experts of width 6, say).
LOADED: Mapping[str, Any] = {"dtype": torch.float32, "local_files_only": True, "experts_implementation": "eager"}

Logits = Callable[[Int64[Tensor, "s b"]], Float[Tensor, "s b v"]]


@dataclass(frozen=True)
class VerificationText:
    """Real text to compare on."""

    tokens: Int64[Tensor, "s b"]
    origin: str
    """Where the text is from, for the report."""
    tokenizer_json: str
    """The tokenizer.json that gave the tokens."""


def verify_export(
    folder: Path,
    config: ModelConfig,
    weights: Weights,
    logits: Logits,
    text: VerificationText,
    *,
    dtype: str,
    new_tokens: int = 32,
) -> ExportReport:
    """Compare a written folder with our model and return what was found; nothing is written.

    `logits` must be those of the weights as exported: rounded to `dtype`.
    """
    transformers = import_transformers()
    family = choose_family(config)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **LOADED)
    model.eval()
    with torch.no_grad():
        compared, choices = compare_logits(logits, lambda tokens: their_logits(model, tokens), text.tokens)
        generated = _generate(model, text.tokens, new_tokens)
        choices += generated_choices(logits, generated, len(text.tokens) // 2)
    tensors = compare_tensors(folder, list(family.mapping(config)), weights, loading, EXPORT_DTYPES[dtype])
    return ExportReport(
        class_name=type(model).__name__,
        expected_class=family.class_name,
        dtype=dtype,
        text=text.origin,
        positions=text.tokens.numel(),
        tensors=tensors,
        logits=compared,
        greedy=judge_choices(choices, compared.max_difference),
        tokenizer_differences=tokenizer_differences(folder, text),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
    )


def import_transformers() -> Any:
    """Return the library, told to stay off the network and to draw no progress bars.

    Raises:
        ValueError: if it is not installed, with the way out.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is first imported; every path here is local anyway
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ValueError(
            f"the export is verified in transformers, which cannot be imported ({error}); "
            "pip install 'meshwright[export]', or --skip-verify"
        ) from None
    transformers.utils.logging.disable_progress_bar()
    return transformers


@dataclass(frozen=True)
class Choice:
    """The next token that each side takes at one position, and how far apart our two best logits are."""

    where: str
    ours: int
    theirs: int
    margin: float


def compare_logits(ours: Logits, theirs: Logits, tokens: Int64[Tensor, "s b"]) -> tuple[LogitsReport, list[Choice]]:
    """Compare all logits, one sample at a time, and return the figures and every differing choice."""
    largest, worst, total, count, finite = 0.0, 0.0, 0.0, 0, True
    choices: list[Choice] = []
    for sample in range(tokens.shape[1]):
        column = tokens[:, sample : sample + 1]
        a, b = ours(column)[:, 0].cpu().double(), theirs(column)[:, 0].cpu().double()
        if a.shape != b.shape:
            raise ValueError(f"our logits are {list(a.shape)}, those of the export {list(b.shape)}")
        difference = (a - b).abs()
        finite = finite and bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())
        largest = max(largest, float(a.abs().max()), float(b.abs().max()))
        worst = max(worst, float(difference.max()))
        total += float(difference.sum())
        count += difference.numel()
        choices += choices_of(a, b.argmax(-1).tolist(), f"sample {sample}, position")
    limit = RELATIVE_LIMIT * max(1.0, largest)
    return LogitsReport(worst, total / count, largest, limit, finite), choices


def choices_of(ours: Float[Tensor, "s v"], theirs: Sequence[int], where: str) -> list[Choice]:
    """Return what each side chooses at each position; `where` stands before the position's number."""
    best = ours.topk(2, dim=-1)
    margins = (best.values[:, 0] - best.values[:, 1]).tolist()
    mine = best.indices[:, 0].tolist()
    return [Choice(f"{where} {at}", mine[at], token, margins[at]) for at, token in enumerate(theirs)]


def generated_choices(logits: Logits, generated: Int64[Tensor, "s b"], prompt: int) -> list[Choice]:
    """Return, for each token that the class generated with its cache, what we would take after the same text."""
    ours = logits(generated)[prompt - 1 : -1, 0].cpu().double()
    return choices_of(ours, generated[prompt:, 0].tolist(), "generated token")


def judge_choices(choices: Sequence[Choice], max_difference: float) -> GreedyReport:
    """Count the positions where the sides choose differently, and those that a near tie does not excuse."""
    differing = [choice for choice in choices if choice.ours != choice.theirs]
    judged = [
        GreedyDifference(c.where, c.ours, c.theirs, c.margin, excused=c.margin < 2 * max_difference) for c in differing
    ]
    wrong = [difference for difference in judged if not difference.excused]
    excused = [difference for difference in judged if difference.excused]
    return GreedyReport(len(choices), len(excused), len(wrong), (wrong + excused)[:MOST_LISTED])


def compare_tensors(
    folder: Path, rows: Sequence[Row], weights: Weights, loading: Mapping[str, Any], dtype: torch.dtype
) -> TensorsReport:
    """Read every tensor back and compare its bits with ours; gather what the class missed or ignored."""
    wanted = {row.theirs: row for row in rows}
    found: set[str] = set()
    changed: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no dict, but the library's handle
                found.add(name)
                if name in wanted and not _same_bits(file.get_tensor(name), read_row(weights, wanted[name]), dtype):
                    changed.append(name)
    ignored = [*loading["missing_keys"], *loading["unexpected_keys"], *(str(it) for it in loading["mismatched_keys"])]
    return TensorsReport(
        expected=len(wanted),
        written=len(found),
        missing=sorted(wanted.keys() - found),
        left_over=sorted(found - wanted.keys()),
        changed=sorted(changed),
        not_loaded=sorted(ignored),
    )


def tokenizer_differences(folder: Path, text: VerificationText) -> int:
    """Return how many samples the exported tokenizer encodes otherwise than the one that the model was trained with."""
    own = Tokenizer.from_str(text.tokenizer_json)
    own.no_truncation()
    own.no_padding()
    theirs = import_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    samples = [own.decode(column.tolist(), skip_special_tokens=False) for column in text.tokens.T]
    return sum(own.encode(sample).ids != theirs(sample)["input_ids"] for sample in samples)


@torch.no_grad()
def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round a model's weights to a dtype, in place, while they keep their own."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype).to(parameter.dtype))


def rounding_effect(
    before: Float[Tensor, "s b v"], after: Float[Tensor, "s b v"], tokens: Int64[Tensor, "s b"]
) -> dict[str, float]:
    """Return what rounding the weights changed in our logits of a text, and in the loss of its next tokens."""

    def losses(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[:-1].flatten(0, 1).double(), tokens[1:].flatten(), reduction="none")

    change = losses(after) - losses(before)
    return {
        "largest difference of logits": float((before - after).abs().max()),
        "mean change of the loss": float(change.mean()),
        "mean change of the loss, absolute": float(change.abs().mean()),
    }


def their_logits(model: Any, tokens: Tensor) -> Tensor:
    """Call a class of transformers, which is batch first, with our order of dims."""
    logits: Tensor = model(input_ids=tokens.T, use_cache=False).logits
    return logits.transpose(0, 1)


def _generate(model: Any, tokens: Tensor, new_tokens: int) -> Tensor:
    """Return the first half of the first sample with what the class generates after it, [s, 1].

    No more than the class has positions for: beyond them transformers only warns.
    """
    prompt = tokens[: len(tokens) // 2, :1].T
    room = getattr(model.config, "max_position_embeddings", len(tokens) + new_tokens) - prompt.shape[1]
    generated: Tensor = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=min(new_tokens, room), do_sample=False
    )
    return generated.T


def _same_bits(written: Tensor, ours: Tensor, dtype: torch.dtype) -> bool:
    rounded = ours.detach().cpu().to(dtype)
    if written.dtype != dtype or written.shape != rounded.shape:
        return False
    return bool(torch.equal(written.contiguous().view(torch.uint8), rounded.contiguous().view(torch.uint8)))
