"""Which of several ways each kernel goes on this CPU; `measure.py` finds the fastest.

Which library multiplies fastest depends on the processor, not on the model:

    fp32 products     MKL, or oneDNN            on AMD with AVX512 oneDNN is twice MKL, with AVX2 they are equal
    bf16 products     native, or in fp32 and    without bf16 instructions native is 40 times slower than fp32,
                      rounded once              with them two to four times faster
    attention         torch's flash operator, or blocks of query rows (`attention/blocks.py`), which lose at long
                      samples what they gain at short ones: each length has a choice of its own

The products of experts go by the same choices, through F.grouped_mm where they are PyTorch's own.

Nothing is measured behind the caller's back: until `use` is called every kernel goes PyTorch's own way, so two
processes that do not ask are bitwise the same. A run measures on one rank, hands the `Choices` to the others,
and keeps them with the run: a resumed run that uses them again is bitwise the unbroken one.

    measured = measure()           on one rank (`measure.py`): choices, and a line of reason for each
    use(measured.choices)          on every rank; `use(Choices())` goes back to PyTorch's way

GPUs are not measured: there the kernels are PyTorch's own. fp64 always goes PyTorch's way.
"""

from dataclasses import asdict, dataclass
from typing import Literal, get_args, get_type_hints

Library = Literal["mkl", "onednn"]
LONG = 2048
"""Tokens from which on a sample is long for attention."""


@dataclass(frozen=True)
class Choices:
    """One way for each kind of work on the CPU; the defaults are PyTorch's own. Plain strings, to be stored as JSON."""

    fp32_output: Library = "mkl"
    """x W^T in fp32."""
    fp32_input_gradient: Library = "mkl"
    """g W in fp32."""
    fp32_weight_gradient: Library = "mkl"
    """g^T x in fp32; oneDNN needs a transposed copy here."""
    bf16_products: Literal["native", "fp32"] = "native"
    """`fp32` multiplies in fp32, by the three choices above, and rounds the result to bf16 once."""
    fp32_attention: Literal["flash", "blocks"] = "flash"
    """`flash` is torch's operator."""
    bf16_attention: Literal["flash", "blocks", "blocks_fp32"] = "flash"
    """`blocks` makes the scores in fp32 and the other products in bf16, `blocks_fp32` makes all in fp32."""
    fp32_long_attention: Literal["flash", "blocks"] = "flash"
    """The same for samples of `LONG` tokens and more."""
    bf16_long_attention: Literal["flash", "blocks", "blocks_fp32"] = "flash"

    def to_dict(self) -> dict[str, str]:
        """Return the choices by name, to be stored with a run."""
        return asdict(self)


def choices_from_dict(stored: dict[str, str]) -> Choices:
    """Return the choices that `Choices.to_dict` stored.

    Raises:
        ValueError: if a name or a way is not known here.
    """
    ways = {name: get_args(hint) for name, hint in get_type_hints(Choices).items()}
    for name, way in stored.items():
        if way not in ways.get(name, ()):
            raise ValueError(
                f"kernel choice {name} = {way!r} is not known; {name} is one of {list(ways.get(name, ()))}"
            )
    return Choices(**stored)  # type: ignore[arg-type]


_current = Choices()


def use(choices: Choices) -> None:
    """Let every kernel of this process go this way from now on."""
    global _current
    _current = choices


def current() -> Choices:
    """Return the choices that the kernels go by."""
    return _current
