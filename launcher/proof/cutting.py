"""The limits that the small ranks work with, so that what a large run cuts is cut in them too.

A narrow model lies within every limit of `kernels/limits.py`: it has one bucket, one chunk of the loss, one exchange of
Muon's. Here they shrink with it. One process keeps the usual ones: it works on everything at once, and a fault of the
cutting shows as a difference.

    chunks of the loss       a third of a micro-batch's tokens, rounded down: three and often a rest
    slabs of a mask          five query rows or fewer
    dropout                  a third of the tokens between layers
    buckets                  a matrix, or several vectors and one
    initial weights, norm    stretches that end within rows
    Muon                     about four large matrices in an exchange of all ranks; in a product one square one
"""

from meshwright.kernels.limits import Limits
from meshwright.launcher.runfile.tables import RunFile

_BUCKET_BYTES = 1 << 11
_ELEMENTS = 100
_ROWS = 5


def narrow_limits(run_file: RunFile) -> Limits:
    """Return the limits of a rank of a narrow run, of whose vocabulary the size is known."""
    model, parallel, batch = run_file.model, run_file.parallel, run_file.train.micro_batch_size
    mixed = run_file.data.seq_len // parallel.cp
    keys = mixed // 2 if parallel.cp > 1 else mixed
    vocabulary = -(-model.vocab_size // parallel.tp)
    inner = max(model.ffn_hidden_size, model.moe.expert_hidden_size if model.moe is not None else 0)
    matrix = model.hidden_size * inner
    ranks = parallel.dp_replicate * parallel.dp_shard * parallel.cp * parallel.tp
    return Limits(
        logits_on_cpu=max(1, mixed * batch // 3) * vocabulary,
        mask_entries=_ROWS * keys * batch,
        factors_on_cpu=max(1, mixed // parallel.tp // 3) * batch * model.hidden_size,
        initial_weights=_ELEMENTS,
        bucket_bytes=_BUCKET_BYTES,
        squares=_ELEMENTS,
        muon_exchanged=matrix * max(1, 4 // ranks),
        muon_multiplied=model.hidden_size**2,
    )
