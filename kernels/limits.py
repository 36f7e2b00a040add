"""How much is worked on at a time, in numbers: work that is larger is cut, and what comes out is the same.

    what is cut                       into                                    by
    the loss                          chunks of tokens                        matmul/cross_entropy.py, parallel/tensor/
    attention within documents        slabs of query rows                     kernels/attention/flash.py
    dropout, jitter                   stretches of tokens                     parallel/dropout.py
    initial weights                   stretches of elements                   parallel/initialise.py
    gradients and updated weights     buckets, each with its own messages     parallel/zero/buckets.py
    the gradient's norm               stretches of elements, on a CPU         parallel/grad_norm.py
    Muon's matrices                   exchanges, and products within one      launcher/training/muon.py

They stand together and low down because layers, the engine and the optimizer all take theirs from one `Limits`, which
a run is built with: `prove` builds its small ranks with smaller ones, so that a second bucket and a second chunk are
there. Memory is predicted from them too, so no torch here. They are no keys of a run file: they change speed and memory
alone, and no measurement asks for other values.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The most that is worked on at a time; one row, matrix or parameter at least."""

    logits_on_cpu: int = 1 << 23
    """Logits in a chunk of the loss: 32 MiB of fp32. A quarter of it is 3 to 10 percent slower, an eighth 15."""
    logits_on_gpu: int = 1 << 27
    mask_entries: int = 1 << 24
    """Entries of a mask of documents on the CPU: 64 MiB of fp32."""
    factors_on_cpu: int = 1 << 17
    """Factors of dropout and jitter: enough to keep a device busy, few enough for a processor's cache."""
    factors_on_gpu: int = 1 << 22
    initial_weights: int = 1 << 20
    """Elements of a parameter that are drawn."""
    bucket_bytes: int = 32 << 20
    """A bucket takes one parameter more as long as it holds less: all ranks' rows, in the type that is summed in."""
    squares: int = 1 << 14
    """Squares that a CPU adds up in the gradient's own type; `grad_norm.py` says why."""
    muon_exchanged: int = 1 << 25
    """Elements of whole matrices that one exchange brings to a rank."""
    muon_multiplied: int = 1 << 23
    """Elements of matrices of one shape in one batched product."""

    def logits(self, device: str) -> int:
        """Return how many logits are in a chunk on a type of device."""
        return self.logits_on_cpu if device == "cpu" else self.logits_on_gpu

    def factors(self, device: str) -> int:
        """Return how many factors exist on a type of device."""
        return self.factors_on_cpu if device == "cpu" else self.factors_on_gpu


NARROW, MANY_TOKENS = 128, 256
"""Products with at most so many features, of at least so many tokens, may be one (parallel/tensor/linear.py)."""

USUAL = Limits()
"""What runs train with."""
