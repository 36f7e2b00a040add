"""Every test of a kernel begins with PyTorch's own ways and the same random numbers."""

from collections.abc import Iterator

import pytest
import torch

from meshwright.kernels.choose import Choices, use


@pytest.fixture(autouse=True)
def _own_ways() -> Iterator[None]:
    torch.manual_seed(0)
    use(Choices())
    yield
    use(Choices())
