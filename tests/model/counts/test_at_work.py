"""What is held while attention over cp, and the loss, are at work: counted, and the most bytes that really lived."""

import gc
from collections.abc import Callable
from time import sleep

import pytest
import torch
from rank_pool import run_mesh
from storages import Peak
from torch import Tensor

from meshwright.kernels.limits import Limits
from meshwright.model.config import ModelConfig
from meshwright.model.counts.activations import gathered_bytes, layer_bytes, loss_bytes
from meshwright.model.kinds.kind import Degrees, Types
from meshwright.model.kinds.table import KINDS
from meshwright.parallel.config import ContextWay
from meshwright.parallel.context.attend import context_attention
from meshwright.parallel.initialise import ZEROS
from meshwright.parallel.mesh import Mesh, Sizes
from meshwright.parallel.tensor.vocabulary import VocabularyRows, next_token_loss

HEADS, WIDTH, LOCAL, VOCAB, HIDDEN = 8, 64, 64, 4096, 48
FP32, BF16, CAST = Types(), Types(2, 2), Types(4, 2, is_cast=True)
DTYPES = {4: torch.float32, 2: torch.bfloat16}


def model_of(num_kv_heads: int) -> ModelConfig:
    return ModelConfig(
        pattern="*-", num_layers=1, hidden_size=HIDDEN, num_heads=HEADS, num_kv_heads=num_kv_heads, head_dim=WIDTH,
        ffn_hidden_size=8, vocab_size=VOCAB,
    )  # fmt: skip


def attention_bytes(mesh: Mesh, way: ContextWay, num_kv_heads: int, types: Types) -> tuple[int, int]:
    """Return the bytes that attention keeps for its backward, and the most that it held."""
    sizes = [(LOCAL, 1, heads, WIDTH) for heads in (HEADS, num_kv_heads, num_kv_heads)]
    made = [torch.randn(size, dtype=DTYPES[types.product], requires_grad=True) for size in sizes]

    def layer() -> Tensor:
        q, k, v = (x * 1 for x in made)  # a layer holds them until attention is through
        return context_attention(q, k, v, mesh.cp, way)

    gc.disable()
    try:
        with Peak() as storages:
            mixed = layer()
            sleep(0.01)
            kept = storages.alive()
            mixed.backward(torch.ones_like(mixed))
    finally:
        gc.enable()
    return kept, storages.most


def least(mesh: Mesh, case: Callable[..., tuple[int, int]], *args: object) -> tuple[int, int]:
    """Return what a case keeps, and the most that it held besides."""
    # A thread of gloo lets go of what it sent a moment after that was waited for: the cases sleep for a moment before
    # they count, and the least of some counts.
    kept, most = zip(*(case(mesh, *args) for _ in range(4)), strict=True)
    return min(kept), min(most) - min(kept)


@pytest.mark.parametrize("types", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("way", ["ring", "ulysses"])
@pytest.mark.parametrize(("cp", "num_kv_heads"), [(2, 4), (2, 8), (4, 2), (4, 8)])  # over 4 ranks Ulysses repeats 2
def test_attention_over_cp_keeps_and_holds_what_is_counted(
    cp: int, num_kv_heads: int, way: ContextWay, types: Types
) -> None:
    config, spread = model_of(num_kv_heads), Degrees(cp=cp, context=way)
    [(kept_by_one, besides_by_one)] = run_mesh(Sizes(), least, attention_bytes, way, num_kv_heads, types)
    of_one, of_many = (layer_bytes(config, config.layers[0], each, types) for each in (Degrees(), spread))
    sums = HEADS * types.wide * LOCAL  # log-sum-exps, of which a merge has three
    found = run_mesh(Sizes(cp=cp), least, attention_bytes, way, num_kv_heads, types)
    assert [kept - kept_by_one for kept, _ in found] == [(of_many - of_one) * LOCAL] * cp
    besides = max(besides for _, besides in found) - besides_by_one
    counted = KINDS["attention"].at_work(config, spread, types) * LOCAL
    assert counted - sums <= besides <= counted + 3 * sums


def bytes_of_loss(mesh: Mesh, tokens: int, types: Types, logits: int) -> tuple[int, int]:
    """Return the bytes that a loss keeps for its backward, and the most that it held."""
    rows = VocabularyRows(VOCAB, HIDDEN, rule=ZEROS, tp=mesh.tp).to(DTYPES[types.stream])
    torch.nn.init.normal_(rows.weight)
    x = torch.randn(tokens // mesh.tp.size, 1, HIDDEN, dtype=DTYPES[types.stream], requires_grad=True)
    targets = torch.randint(0, VOCAB, (tokens, 1))
    gc.disable()
    try:
        with Peak() as storages, torch.autocast("cpu", torch.bfloat16, enabled=types.is_cast):
            loss = next_token_loss(x, rows, targets, float(tokens), Limits(logits_on_cpu=logits))
            sleep(0.01)
            kept = storages.alive()
        assert loss.requires_grad
    finally:
        gc.enable()
    return kept, storages.most


@pytest.mark.parametrize("types", [FP32, BF16, CAST], ids=["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("tp", [1, 2])
# Of 400; the logits of 16 tokens weigh less than the matrix.
@pytest.mark.parametrize("tokens_at_a_time", [200, pytest.param(16, marks=pytest.mark.slow), 1000])
def test_the_loss_holds_a_chunk_of_the_logits(tokens_at_a_time: int, tp: int, types: Types) -> None:
    config, spread, logits = model_of(4), Degrees(tp=tp), tokens_at_a_time * VOCAB // tp
    counted = loss_bytes(config, 400.0, spread, types, logits)
    counted += gathered_bytes(config, spread, types.product + types.wide) * 400
    # Over tp a rank's own part of the tokens' gradient, which is kept, is not yet there beside all ranks'.
    later = 0 if tp == 1 else HIDDEN / tp * types.stream * 400
    for _, found in run_mesh(Sizes(tp=tp), least, bytes_of_loss, 400, types, logits):
        # Left out: a chunk's inputs, which are h/v of its logits, and a few numbers for each token.
        assert counted - later <= found <= 1.1 * counted
