"""What is planted and changes nothing: the proof must pass.

Each is at work on the ranks, and not on the one process that they are compared with, or not as there.
"""

from mutations.fault import MOE, Fault

HARMLESS = [
    Fault(
        "S7: rows beyond the last expert's are not zeroed, and nobody reads them",
        "parallel/experts/exchange.py",
        "return x.new_zeros((size, *x.shape[1:])).index_copy_(0, place, x)",
        "return x.new_full((size, *x.shape[1:]), 0.5).index_copy_(0, place, x)",
        model=MOE,
        layout={"dp_shard": 4, "ep": 2, "etp": 2},
    ),
    Fault(
        "experts' rows padded with ones, which nobody takes",
        "parallel/experts/exchange.py",
        "torch.nn.functional.pad(rows, (0, 0, 0, padded - own))",
        "torch.nn.functional.pad(rows, (0, 0, 0, padded - own), value=1.0)",
        model=MOE,
        layout={"dp_shard": 2, "etp": 2},
    ),
    Fault(
        "buckets filled in the parameters' order, not in that of the backward",
        "parallel/zero/buckets.py",
        "for name, parameter in reversed(parameters.items()):",
        "for name, parameter in parameters.items():",
        layout={"dp_shard": 2},
    ),
    Fault(
        "buckets of one parameter each",
        "launcher/proof/cutting.py",
        "bucket_bytes=_BUCKET_BYTES,",
        "bucket_bytes=1,",
        layout={"dp_shard": 2, "dp_replicate": 2},
    ),
    Fault(
        "the squares of the norm summed from the last gradient to the first, in stretches of another size",
        "parallel/grad_norm.py",
        "norms = torch.stack(torch._foreach_norm(_pieces(gradients, at_once)))",
        "norms = torch.stack(torch._foreach_norm(_pieces(gradients[::-1], 1 + at_once // 3)))",
    ),
    Fault(
        "what a rank of the ring has so far is merged into what it meets",
        "parallel/context/ring.py",
        "out[at], lse[at] = merge_parts(out[at], lse[at], *part)",
        "out[at], lse[at] = merge_parts(*part, out[at], lse[at])",
        layout={"cp": 4, "dp_shard": 1},
        mask_documents=True,
    ),
    Fault(
        "a sum of the ranks' parts is made from the last rank to the first",
        "parallel/collectives.py",
        "out, pending = start_scatter_sum_of_rows(x, axis)",
        "out, pending = sum(gather_rows(x, axis).chunk(axis.size)[::-1]).chunk(axis.size)[axis.rank].clone(), DONE",
        layout={"tp": 4, "dp_shard": 1},
    ),
]
