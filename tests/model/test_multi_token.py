"""Predicting further tokens: by hand, on every layout, and what it costs."""

from dataclasses import replace

import pytest
import torch
from engine_cases import dense_config, moe_config
from torch import Tensor
from torch.nn import functional as F

from meshwright.kernels.matmul.cross_entropy import NOT_COUNTED
from meshwright.model.config import ModelConfig
from meshwright.model.counts.costs import forward_flops_per_token, further_tokens_flops
from meshwright.model.counts.shapes import parameter_shapes
from meshwright.model.multi_token import shifted
from meshwright.model.parts import build_model
from meshwright.parallel.mesh import NO_TP, single_process_mesh
from meshwright.parallel.sequence_order import order_of
from meshwright.parallel.tally import Tally, declared_entries
from meshwright.parallel.where import Where, place, where_of_plain_tokens

S, B = 8, 2


def config(**changes: object) -> ModelConfig:
    return dense_config(**{"num_layers": 2, "multi_token": {"depth": 2, "loss_weight": 0.5}, **changes})


def loss_of(model: torch.nn.Module, tokens: Tensor, targets: Tensor, where: Where) -> tuple[Tensor, dict[str, Tensor]]:
    tally = Tally(declared_entries(model), torch.device("cpu"))
    loss = model(tokens, targets, where, tally)
    return loss, tally.reduce(single_process_mesh())


# A norm that divides by nothing: RMSNorm would all but undo the multiplier.
@pytest.mark.parametrize("changes", [{}, {"embedding_multiplier": 3.0, "logits_scaling": 5.0, "norm": "dynamic_tanh"}])
def test_further_tokens_are_predicted_as_by_hand(changes: dict[str, object]) -> None:
    of = config(**changes)
    model = build_model(of, dtype=torch.float64, seed=3).train()
    text = torch.randint(0, of.vocab_size, (S + 1, B))
    tokens, targets = text[:-1], text[1:]
    where = where_of_plain_tokens(tokens)
    loss, sums = loss_of(model, tokens, targets, where)
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    x = model.begin(tokens, where)
    for layer in model.layers.values():
        x = layer(x, where, None)
    stream, extra = x, []
    for by, further in enumerate(model.multi_token, start=1):
        ahead = torch.cat([tokens[by:], tokens[-1:].expand(by, B)])
        embedded = model.embedding(ahead) * of.embedding_multiplier
        both = torch.cat([further.hidden_norm(stream), further.embedding_norm(embedded)], dim=-1)
        stream = further.layer(both @ further.projection.weight.T, where, None)
        logits = further.final_norm(stream)[: S - by] @ model.output_rows.weight.T / of.logits_scaling
        extra.append(F.cross_entropy(logits.flatten(0, 1), targets[by:].flatten(), reduction="sum") / (S * B))
    main = F.cross_entropy(model.logits(x).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, main)  # what is returned is the next token's alone
    found_losses = [sums[f"multi_token.{k}.loss"].item() for k in (0, 1)]
    assert found_losses == pytest.approx([each.item() for each in extra])
    (main + 0.5 * sum(extra) / 2).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)


def test_evaluation_and_generation_compute_nothing_of_it() -> None:
    model = build_model(config()).eval()
    model.multi_token.register_forward_hook(lambda *_: pytest.fail("was run"))
    for further in model.multi_token:
        further.register_forward_hook(lambda *_: pytest.fail("was run"))
    tokens = torch.randint(0, 8, (S, B))
    model(tokens, tokens)
    model.step(tokens, model.initial_state(B, S))


def test_there_is_no_target_behind_the_end_of_a_sample_or_of_its_document() -> None:
    tokens = torch.arange(6)[:, None]
    where = where_of_plain_tokens(tokens)
    ahead = shifted(where, tokens, tokens + 1, 2)
    assert ahead.targets[:, 0].tolist() == [3, 4, 5, 6, NOT_COUNTED, NOT_COUNTED]
    assert ahead.tokens[:4, 0].tolist() == [2, 3, 4, 5]
    document = torch.tensor([0, 0, 0, 1, 1, 1])[:, None]
    apart = replace(where, document_whole=document, mask_documents=True)
    ahead = shifted(apart, tokens, tokens + 1, 1)
    assert ahead.targets[:, 0].tolist() == [2, 3, NOT_COUNTED, 5, 6, NOT_COUNTED]
    assert ahead.tokens[:, 0].tolist() == [1, 2, 2, 4, 5, 5]
    assert ahead.where.counted[:, 0].tolist() == [True, True, False] * 2
    assert ahead.where.sequence_tokens.tolist() == [4]


def test_what_was_found_of_counted_tokens_is_found_again_and_the_rest_is_not() -> None:
    tokens = torch.arange(6)[:, None]
    where = where_of_plain_tokens(tokens)
    assert order_of(where, NO_TP).counted.all()
    angles = where.derive("rope", torch.Tensor)
    ahead = shifted(where, tokens, tokens + 1, 2).where
    assert order_of(ahead, NO_TP).counted[:, 0].tolist() == [True] * 4 + [False] * 2
    assert ahead.derive("rope", lambda: torch.empty(0)) is angles


@pytest.mark.parametrize("router", ["none", "softmax", "expert_choice"])
def test_documents_that_do_not_count_move_no_gradient(router: str) -> None:
    balancing = {"load_balancing_weight": 0.1} if router == "softmax" else {}
    experts = {"pattern": "*-*E", "router": router, "z_loss_weight": 0.1, **balancing}
    of = config() if router == "none" else moe_config(num_layers=2, multi_token={}, **experts)
    model = build_model(of, dtype=torch.float64, seed=3).train()
    document = torch.tensor([[0] * 3 + [1] * 6 + [2] * 3, [0] * 7 + [1] * 5]).T
    counted = torch.zeros(12, 2, dtype=torch.bool)
    counted[3:9, 0] = True
    more = {"step": 0, "step_tokens": 6.0, "mask_documents": True}
    where = place(torch.arange(2), document, counted, torch.arange(12), NO_TP, **more)
    text = torch.randint(0, of.vocab_size, (12, 2), generator=torch.Generator().manual_seed(1))

    def gradients(text: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        loss_of(model, text, torch.where(counted, (text + 1) % of.vocab_size, NOT_COUNTED), where)[0].backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    first, second = gradients(text), gradients(torch.where(counted, text, (text + 5) % of.vocab_size))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-12, atol=1e-14, msg=name)  # sums in another order


def test_the_tables_count_it() -> None:
    for of in (config(), moe_config(multi_token={"depth": 1})):
        model = build_model(of)
        assert {name: tuple(p.shape) for name, p in model.named_parameters()} == parameter_shapes(of)
        plain = forward_flops_per_token(of.model_copy(update={"multi_token": None}), 16)
        assert forward_flops_per_token(of, 16) == plain + further_tokens_flops(of, 16) > plain
