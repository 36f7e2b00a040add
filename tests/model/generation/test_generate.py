"""Generation: greedy as transformers does it, ends, seeds, and what it leaves behind."""

import pytest
import torch
from engine_cases import moe_config
from part_samples import sample
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from meshwright.model.config import ModelConfig
from meshwright.model.generation.generate import generate
from meshwright.model.generation.sampling import Sampling
from meshwright.model.parts import build_model
from meshwright.model.routing_record import replay_routing
from meshwright.model.stack import LanguageModel

GREEDY, FREE = Sampling(temperature=0.0), Sampling(temperature=1.0)
CONFIG = ModelConfig(
    num_layers=2, hidden_size=16, num_heads=4, num_kv_heads=2, ffn_hidden_size=24, vocab_size=50, init_std=0.5
)


def model_of(seed: int = 0) -> LanguageModel:
    return build_model(CONFIG, seed=seed, dtype=torch.float64)


def prompt(s: int = 5, b: int = 3) -> Tensor:
    return torch.randint(0, 50, (s, b), generator=torch.Generator().manual_seed(0))


def tokens_of(model: LanguageModel, start: Tensor, count: int, **options: object) -> Tensor:
    return torch.stack(list(generate(model, start, count, **({"sampling": GREEDY} | options))))


def llama_of(model: LanguageModel) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=CONFIG.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": CONFIG.rope_base},
        tie_word_embeddings=False,
        eos_token_id=None,
        pad_token_id=0,
        bos_token_id=None,
    )
    llama = LlamaForCausalLM(config).double().eval()
    pairs: list[tuple[nn.Parameter, nn.Parameter]] = [
        (llama.model.embed_tokens.weight, model.embedding.weight),
        (llama.model.norm.weight, model.final_norm.weight),
        (llama.lm_head.weight, model.output_rows.weight),
    ]
    for theirs, ours in zip(llama.model.layers, model.layers.values(), strict=True):
        mixer, mlp = ours.mixer.part, ours.feedforward.part
        pairs += [(theirs.input_layernorm.weight, ours.mixer.norm.weight)]
        pairs += [(theirs.post_attention_layernorm.weight, ours.feedforward.norm.weight)]
        for name, part in (("q_proj", mixer.q), ("k_proj", mixer.k), ("v_proj", mixer.v), ("o_proj", mixer.output)):
            pairs.append((getattr(theirs.self_attn, name).weight, part.weight))
        for name, part in (("gate_proj", mlp.gate), ("up_proj", mlp.up), ("down_proj", mlp.down)):
            pairs.append((getattr(theirs.mlp, name).weight, part.weight))
    with torch.no_grad():
        for theirs, ours in pairs:
            theirs.copy_(ours)
    return llama


def test_greedy_tokens_are_those_of_transformers() -> None:
    model, start = model_of(), prompt()
    llama = llama_of(model)
    with torch.no_grad():
        torch.testing.assert_close(
            model(start), llama(start.T).logits.transpose(0, 1), rtol=1e-5, atol=1e-5
        )  # transformers turns by fp32 angles
    ones = torch.ones_like(start.T)
    expected = llama.generate(input_ids=start.T, attention_mask=ones, max_new_tokens=12, do_sample=False)
    found = tokens_of(model, start, 12)
    assert found.T.tolist() == expected[:, 5:].tolist()
    assert len(found.unique()) > 3  # not one token over and over, which a broken cache could give as well


def test_greedy_tokens_are_those_of_the_whole_sequence_computed_anew_each_time() -> None:
    model, tokens = model_of(1), prompt()
    found = tokens_of(model, tokens, 6)
    with torch.no_grad():
        for expected in found:
            assert model(tokens)[-1].argmax(-1).tolist() == expected.tolist()
            tokens = torch.cat([tokens, expected[None]])


def test_a_sample_that_has_ended_gives_the_end_token_and_all_ended_stops() -> None:
    model, start = model_of(), prompt()
    free = tokens_of(model, start, 8)
    end = int(free[2, 0])  # so that sample 0 ends at its third token at the latest
    found = tokens_of(model, start, 8, end_token=end)
    for column, undisturbed in zip(found.T.tolist(), free.T.tolist(), strict=True):
        length = undisturbed.index(end) + 1 if end in undisturbed else len(undisturbed)
        assert column == (undisturbed[:length] + [end] * 8)[: len(column)]
    assert len(tokens_of(model, start[:, :1], 8, end_token=end)) <= 3


def test_the_same_seed_gives_the_same_tokens_and_another_others() -> None:
    model, start = model_of(), prompt()
    first, again, other = (tokens_of(model, start, 10, sampling=FREE, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    alone = tokens_of(model, start[:, :2], 10, sampling=FREE, seed=4)
    assert torch.equal(alone, first[:, :2])  # sequence 1 draws the same whoever stands beside it


def test_samples_of_one_prompt_differ_from_each_other_and_from_step_to_step() -> None:
    start = prompt(b=1).expand(-1, 8)
    found = tokens_of(model_of(), start, 10, sampling=Sampling(temperature=5.0))
    assert len({tuple(column) for column in found.T.tolist()}) == 8
    assert all(len(set(column)) > 2 for column in found.T.tolist())


def test_every_step_and_sequence_draws_a_number_of_its_own() -> None:
    model = model_of()
    with torch.no_grad():
        model.output_rows.weight.zero_()  # every token is as likely, whatever came before
    found = tokens_of(model, prompt(b=8), 40, sampling=FREE)
    for row in [*found, *found.T]:
        assert len(set(row.tolist())) > len(row) / 2
    assert abs(found.double().mean().item() - 24.5) < 4 * 14.4 / 320**0.5  # four standard errors of an even draw


def test_taking_tokens_does_not_switch_off_gradients_for_who_takes_them() -> None:
    model = model_of()
    made = generate(model, prompt(), 3, sampling=GREEDY)
    chosen = next(made)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    loss = model(chosen[None], chosen[None])
    loss.backward()
    assert model.embedding.weight.grad is not None
    assert torch.equal(torch.stack([chosen, *made]), tokens_of(model, prompt(), 3))


def test_no_tokens_are_asked_for_or_none_are_there() -> None:
    assert list(generate(model_of(), prompt(), 0, sampling=GREEDY)) == []
    with pytest.raises(ValueError, match=r"^max_new_tokens = -1: must be at least 0$"):
        list(generate(model_of(), prompt(), -1, sampling=GREEDY))
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        next(generate(model_of(), prompt(s=0), 3, sampling=GREEDY))


def test_of_a_prompt_the_logits_of_its_last_position_alone_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = model_of(), []
    usual = model.logits
    monkeypatch.setattr(model, "logits", lambda x: made.append(len(x)) or usual(x))
    assert len(tokens_of(model, prompt(9), 3)) == 3
    assert made == [1, 1, 1]
    whole, last = (model.step(prompt(9), model.initial_state(3), only_last=only) for only in (False, True))
    torch.testing.assert_close(last, whole[-1:])
    assert model.step(prompt(0), model.initial_state(3), only_last=True).shape == (0, *whole.shape[1:])


REPLAYED = {
    "softmax": moe_config(num_layers=2),
    "expert_choice": moe_config(num_layers=2, router="expert_choice"),
    "switch_head": sample("H-"),
    "switch_head and experts": sample("HE"),
}


def move_routers(model: LanguageModel) -> None:
    """Give everything that chooses experts other weights."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".router." in name or ".predictor." in name or name.endswith((".source", ".destination")):
                parameter.normal_()


@pytest.mark.parametrize("name", REPLAYED)
def test_recorded_routing_is_replayed_whatever_the_routers_say(name: str) -> None:
    model = build_model(REPLAYED[name], seed=5).eval()
    tokens = torch.randint(0, 8, (9, 2))
    recorded = model.initial_state(2, 9)
    first = torch.cat([model.step(tokens[:4], recorded), model.step(tokens[4:], recorded)])
    move_routers(model)
    assert not torch.equal(model.step(tokens, model.initial_state(2, 9)), first)
    again = replay_routing(model.initial_state(2, 9), recorded)
    torch.testing.assert_close(model.step(tokens, again), first)
    longer = replay_routing(model.initial_state(2, 20), recorded)
    model.step(tokens, longer)
    with pytest.raises(ValueError, match=r"recorded routing is of \[9, 2\]"):
        model.step(tokens[:1], longer)
    with pytest.raises(ValueError, match=r"the state has \d records of routing, the recorded one \d: both must be of"):
        replay_routing(model.initial_state(2, 9), recorded.layers[0])


@pytest.mark.parametrize("pattern", ["[H-]", "[*E]", "[M-]"])
def test_which_tokens_go_through_a_layer_is_replayed_with_the_routing_within(pattern: str) -> None:
    model, tokens = build_model(sample(pattern), seed=5, dtype=torch.float64).eval(), prompt(9, 2) % 37
    recorded = model.initial_state(2)
    first = torch.cat([model.step(piece, recorded) for piece in tokens.split([4, 5])])
    through = [state.routing.read()[0] >= 0 for state in recorded.layers]
    assert all(len(each) == 9 for each in through)
    assert 0 < sum(int(each.sum()) for each in through) < 9 * 2 * len(through), "some go through, and some do not"
    move_routers(model)
    assert not torch.equal(model.step(tokens, model.initial_state(2)), first)
    again = replay_routing(model.initial_state(2), recorded)
    found = torch.cat([model.step(piece, again) for piece in tokens.split([2, 7])])
    torch.testing.assert_close(found, first)


def test_routing_of_another_number_of_choices_is_not_replayed() -> None:
    one, other = (build_model(sample("H-", switch_head={"num_experts": 3, "top_k": k})) for k in (1, 2))
    with pytest.raises(ValueError, match=r"has \[4, 1\] choices of a token, the recorded one \[4, 2\]: both must be"):
        replay_routing(one.initial_state(2), other.initial_state(2))


def test_tokens_beyond_the_learned_positions_are_refused() -> None:
    model = build_model(CONFIG.model_copy(update={"position": "learned", "max_positions": 8}), seed=0)
    assert len(tokens_of(model, prompt(5), 4)) == 4
    with pytest.raises(ValueError, match=r"max_new_tokens = 5: behind a prompt of 5 tokens needs 9 positions.* 1 to 4"):
        tokens_of(model, prompt(5), 5)
    with pytest.raises(ValueError, match="the prompt has 9 tokens, and the model positions for 8"):
        tokens_of(model, prompt(9), 1)
