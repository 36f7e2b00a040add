"""What is planted and changes nothing: the proof must pass."""

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
        "smaller buckets",
        "kernels/limits.py",
        "bucket_bytes: int = 32 << 20",
        "bucket_bytes: int = 1 << 10",
        layout={"dp_shard": 2},
    ),
    Fault(
        "the sum of squares in pieces of another size",
        "kernels/limits.py",
        "squares: int = 1 << 14",
        "squares: int = 1 << 5",
    ),
]
