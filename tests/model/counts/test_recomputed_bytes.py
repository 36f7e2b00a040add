"""What is kept where every n-th layer is recomputed: counted, and the bytes of all storages that really live."""

import gc

import pytest
import torch
from storages import Storages

from meshwright.model.config import ModelConfig
from meshwright.model.counts.activations import activation_bytes, held_by, layer_bytes
from meshwright.model.kinds.kind import Degrees, Types
from meshwright.model.parts import build_model
from meshwright.model.stage import HeldStages
from meshwright.parallel.recompute.policy import Recompute, keep_less
from meshwright.parallel.tally import Tally, declared_entries
from meshwright.parallel.where import where_of_plain_tokens

SEQ, BATCH, VOCAB = 512, 8, 64
# Three layers that keep very different numbers of bytes, so that it shows which one is recomputed.
SIZES = {
    "pattern": "*-*EM-", "hidden_size": 96, "num_heads": 4, "head_dim": 16, "ffn_hidden_size": 160, "vocab_size": VOCAB,
    "moe": {"num_experts": 4, "top_k": 2, "expert_hidden_size": 80},
    "mamba2": {"num_heads": 2, "head_dim": 16, "state_size": 16, "chunk_size": 32},
}  # fmt: skip
LAPS = ModelConfig(num_layers=6, distinct_layers=3, **SIZES)
FURTHER = ModelConfig(num_layers=3, multi_token={"depth": 2}, **SIZES)
BOTH = ModelConfig(num_layers=6, distinct_layers=3, multi_token={"depth": 1}, **SIZES)
PLAIN = ModelConfig(num_layers=6, **SIZES)
ALL = range(6)
# A model, the layers that a rank holds, n, and which of the uses of its layers are then recomputed.
CASES: dict[str, tuple[ModelConfig, range, int, set[int]]] = {
    "none": (PLAIN, ALL, 0, set()),
    "every one": (PLAIN, ALL, 1, {0, 1, 2, 3, 4, 5}),
    "every fourth": (PLAIN, ALL, 4, {0, 4}),
    "used twice, every second": (LAPS, ALL, 2, {0, 2, 3, 5}),
    "used twice, every third": (LAPS, ALL, 3, {0, 3}),
    "further tokens, every second": (FURTHER, range(3), 2, {0, 2, 4}),
    "further tokens, every fourth": (FURTHER, range(3), 4, {0, 4}),
    "used twice and a further token": (BOTH, ALL, 3, {0, 3, 6}),
    "a stage begins anew": (PLAIN, range(1, 4), 2, {1, 3}),
    "the last stage": (PLAIN, range(3, 6), 2, {3, 5}),
}


def living(config: ModelConfig, layers: range, every: int) -> int:
    """Return the bytes that live after a forward pass of these layers, and of the ends that stand beside them."""
    stage = 0 if layers.start == 0 else 1
    count = stage + (1 if layers.stop == config.num_layers else 2)
    model = build_model(config, held=HeldStages({stage: layers}, count))
    tally = Tally(declared_entries(model))
    if every:
        keep_less(model.held_layers, tally, Recompute("full", every=every), torch.device("cpu"))
    tokens = torch.randint(0, VOCAB, (SEQ, BATCH), generator=torch.Generator().manual_seed(0))
    where = where_of_plain_tokens(tokens)
    given = torch.randn(SEQ, BATCH, config.hidden_size, requires_grad=True)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    gc.collect()
    with Storages() as storages:
        x = model.begin(tokens, where) if model.embedding is not None and stage == 0 else given * 1
        for lap in range(model.laps):
            for layer in model.layers.values():
                x = layer(x, where.of_lap(lap), tally)
        y = model.loss(x, tokens, tokens, where, tally) if layers.stop == config.num_layers else x
    del x
    gc.collect()
    assert y.requires_grad
    sent = 0 if layers.stop == config.num_layers else y.nbytes  # to the next stage, which counts it as its own input
    return storages.alive(but=weights) - sent


@pytest.mark.parametrize("case", CASES)
def test_what_lives_is_what_is_counted(case: str) -> None:
    config, layers, every, recomputed = CASES[case]
    held = held_by(config, layers, every, (layers.start == 0, layers.stop == config.num_layers))
    assert held.recomputed == recomputed
    counted, lives = activation_bytes(config, SEQ * BATCH, Degrees(), Types(), held).kept, living(config, layers, every)
    # Left out: the norms' factors, the router's numbers, the token ids; no layer keeps so little that it could hide.
    assert counted <= lives <= 1.05 * counted
    least = min(layer_bytes(config, kinds, Degrees(), Types()) for kinds in config.layers) - config.hidden_size * 4
    assert 0.05 * counted < least * SEQ * BATCH
