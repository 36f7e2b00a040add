"""Whatever is kept of a part's forward pass, its gradients are bitwise those of a pass that keeps everything."""

import pytest
import torch
from engine_cases import BATCH, SEQ
from part_samples import SAMPLES
from torch import Tensor

from meshwright.kernels.attention import tiles
from meshwright.kernels.choose import Choices, use
from meshwright.model.config import ModelConfig
from meshwright.model.library import tally_of
from meshwright.model.parts import build_model
from meshwright.parallel.mesh import NO_TP
from meshwright.parallel.recompute.policy import Recompute, keep_less, recompute_layers
from meshwright.parallel.tally import Tally
from meshwright.parallel.where import place

WAYS = {
    "full": Recompute("full"),
    "attention": Recompute("selective", save=("attention",)),
    "products": Recompute("selective", save=("matmul",)),
    "both": Recompute("selective", save=("attention", "matmul")),
}
OURS = Choices("onednn", "onednn", "onednn", fp32_attention="blocks")


def gradients(config: ModelConfig, how: Recompute, *, apart: bool, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Return those of one step of one process; `apart`: with documents that do not see each other."""
    model = build_model(config, seed=0, dtype=dtype).train()
    tally = tally_of(model)
    keep_less(list(model.layers.values()), tally, how, torch.device("cpu"))
    text = torch.randint(0, config.vocab_size, (SEQ + 1, BATCH), generator=torch.Generator().manual_seed(0))
    document = (torch.arange(SEQ)[:, None] >= torch.tensor([5, 8])[torch.arange(BATCH) % 2]).long()
    more = {"step": 1, "step_tokens": float(SEQ * BATCH), "mask_documents": apart}
    counted = torch.ones(SEQ, BATCH, dtype=torch.bool)
    where = place(torch.arange(BATCH), document, counted, torch.arange(SEQ), NO_TP, **more)
    model(text[:-1], text[1:], where, tally).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# One for each kind of attention, and what decides, draws or goes by other products; all others are slow tests.
DEFAULT = ("attention", "sliding_attention", "latent_attention", "depth around alibi in a window", "dropouts", "mamba2")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in SAMPLES]
)
def test_gradients_are_those_of_a_pass_that_keeps_everything(name: str) -> None:
    config = SAMPLES[name]
    for apart, dtype, choices in ((False, torch.float64, Choices()), (True, torch.float32, OURS)):
        use(choices)
        wanted = gradients(config, Recompute(), apart=apart, dtype=dtype)
        for how, recompute in WAYS.items():
            found = gradients(config, recompute, apart=apart, dtype=dtype)
            wrong = [key for key in wanted if not _same(found[key], wanted[key])]
            assert not wrong, (how, dtype)


def _same(found: Tensor | None, wanted: Tensor | None) -> bool:
    if found is None or wanted is None:
        return found is wanted
    return torch.equal(found, wanted)


@pytest.mark.parametrize(("save", "calls"), [(("attention",), 1), (("matmul",), 2), (("attention", "matmul"), 1)])
def test_attention_by_tiles_is_one_result_that_may_be_kept(
    save: tuple[str, ...], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, made = SAMPLES["alibi"].model_copy(update={"num_layers": 1}), []
    usual = tiles._tiled
    monkeypatch.setattr(tiles, "_tiled", lambda *given: made.append(given) or usual(*given))
    gradients(config, Recompute("selective", save=save), apart=False, dtype=torch.float64)
    assert len(made) == calls


def test_a_kept_result_that_is_written_to_is_told() -> None:
    class Overwrites(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x @ x
            with torch.no_grad():
                z = (x @ x).mul_(2.0)
            return y * z

    layer = Overwrites()
    recompute_layers([layer], Tally({}), ("matmul",))
    y = layer(torch.randn(3, 3, requires_grad=True))
    with pytest.raises(RuntimeError, match="kept for the backward pass was written to in place"):
        y.sum().backward()
