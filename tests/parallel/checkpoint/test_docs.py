"""The Python that docs/checkpoints.md shows runs, from saving to reading the files without us."""

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[3] / "docs" / "checkpoints.md"


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the page's four lines leave files to be closed by Python
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_hand, from_python = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(from_python, names)
    assert names["state"] == {"samples": 12800}

    monkeypatch.chdir(tmp_path / "checkpoints")
    saved = names["weight"]
    exec(by_hand.replace("final_norm.weight", "weight"), names)
    assert isinstance(saved, torch.Tensor)
    assert isinstance(names["whole"], torch.Tensor)
    assert torch.equal(names["whole"], saved)
