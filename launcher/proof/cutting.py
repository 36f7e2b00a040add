"""The limits that the small ranks work with, so that what a large run cuts is cut in them too.

A narrow model lies within every limit of `kernels/limits.py`: it has one bucket, one chunk of the loss, one exchange of
Muon's. Here they shrink with it. One process keeps the usual ones: it works on everything at once, and a fault of the
cutting shows as a difference.

    chunks of the loss       a third of a micro-batch's tokens, rounded down: three and often a rest
    slabs, dropout           fewer tokens than a rank has, no divisor of them
    buckets                  a matrix alone, or several vectors and one; five to thirty
    initial weights, norm    stretches that end within rows
    Muon                     two of the largest matrices for each rank in an exchange, two smaller ones in a product
"""

from meshwright.kernels.limits import Limits
from meshwright.launcher.runfile.tables import RunFile

_BUCKET_BYTES = 1 << 11
_ELEMENTS = 100
_SLAB = 5
"""Positions: a rank of a narrow run has eight at least in each of its chunks, or cp is 4."""


def narrow_limits(run_file: RunFile) -> Limits:
    """Return the limits of a rank of a narrow run, of whose vocabulary the size is known."""
    model, parallel, batch = run_file.model, run_file.parallel, run_file.train.micro_batch_size
    mixed = run_file.data.seq_len // parallel.cp
    rows = -(-model.vocab_size // parallel.tp)
    inner = max(model.ffn_hidden_size, model.moe.expert_hidden_size if model.moe is not None else 0)
    matrix = model.hidden_size * inner
    return Limits(
        logits_on_cpu=max(1, mixed * batch // 3) * rows,
        mask_entries=_SLAB * mixed * batch,
        factors_on_cpu=max(1, mixed // parallel.tp // 3) * batch * model.hidden_size,
        initial_weights=_ELEMENTS,
        bucket_bytes=_BUCKET_BYTES,
        squares=_ELEMENTS,
        muon_exchanged=2 * matrix,
        muon_multiplied=matrix,
    )
