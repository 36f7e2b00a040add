"""Kinds of attention from a config: what a window bounds, and what is refused."""

import pytest

from meshwright.model.config import ModelConfig
from meshwright.model.counts.costs import layer_forward_flops
from meshwright.model.kinds.table import KINDS
from meshwright.model.kinds.unread import keys_read

SIZES = {"num_layers": 2, "hidden_size": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "vocab_size": 64}
LATENT = {"kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "q_lora_rank": 40}
YARN = {"kind": "yarn", "factor": 4.0, "original_length": 64, "mscale": 1.0, "mscale_all_dim": 1.0}
OF_LATENTS = ["q", "k", "v", "output"]
CONFIGS = {
    "sliding": {"pattern": "L-", "sliding": {"window": 64}, "position": "alibi", "attention_scale": 0.1},
    "block sparse": {"pattern": "B-", "block_sparse": {"block_size": 16, "local_blocks": 3}, "position": "none"},
    "latent": {"pattern": "+-", "latent": LATENT, "rope_scaling": YARN},
    "latent without queries' latent": {"pattern": "+-", "latent": LATENT | {"q_lora_rank": 0}, "bias": OF_LATENTS},
    "switch head": {"pattern": "H-", "position": "t5"},
    "gate": {"pattern": "*-", "attention_gate": True, "rope_fraction": 0.5, "bias": ["q"]},
    "norms of tokens": {"pattern": "*-", "qk_norm": True, "qk_norm_over": "tokens", "rope_scaling": YARN},
    "hybrid norm": {"pattern": "*-", "norm_placement": "hybrid_norm", "position": "t5", "t5_buckets": 8},
}


def config_of(name: str, **changes: object) -> ModelConfig:
    keys = {"ffn_hidden_size": 160} | CONFIGS[name] | changes
    return ModelConfig.model_validate(keys_read(str(keys["pattern"]), SIZES) | keys)


def test_a_window_bounds_operations_and_memory() -> None:
    config, kind = config_of("sliding"), KINDS["sliding_attention"]
    layer = config.layers[0]
    long, longer = (layer_forward_flops(config, layer, seq_len) for seq_len in (10_000, 20_000))
    assert longer < 1.001 * long
    assert kind.mixing_flops(config, 3, causal=True) == 4 * 4 * 16 * 2  # 1, 2 and 3 tokens
    assert kind.state_bytes(config, 10**6, 2) == 2 * 2 * 16 * 64 * 2
    latent = config_of("latent")
    assert KINDS["latent_attention"].state_bytes(latent, 10, 2) == (24 + 8) * 10 * 2


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("latent", {"latent": LATENT | {"qk_rope_head_dim": 7}}, "model.latent.qk_rope_head_dim = 7: must be even"),
        ("latent", {"position": "alibi", "rope_scaling": None}, 'model.position = "alibi": latent attention'),
        (
            "switch head",
            {"switch_head": {"num_experts": 2, "top_k": 3}},
            "model.switch_head.top_k = 3: must not exceed",
        ),
        ("gate", {"rope_fraction": 0.2}, "model.rope_fraction = 0.2: turns 3 of model.head_dim = 16 features"),
        ("gate", {"rope_scaling": {"kind": "yarn", "factor": 2.0}}, "model.rope_scaling.original_length = 0"),
        ("sliding", {"rope_scaling": YARN}, 'model.position = "alibi": has nothing for [model.rope_scaling]'),
        ("norms of tokens", {"norm": "rmsnorm_zero_centred"}, 'model.qk_norm_over = "tokens"'),
        (
            "hybrid norm",
            {"t5_max_distance": 4},
            "model.t5_max_distance = 4: must be above 4, half of model.t5_buckets = 8, whose distances have a bucket"
            " each; 32 would fit",
        ),
        ("hybrid norm", {"t5_buckets": 9}, "model.t5_buckets = 9: must be even and at least 4, because half of them"),
        (
            "gate",
            {"rope_fraction": 0.125, "rope_scaling": {"kind": "ntk", "factor": 2.0}},
            'model.rope_scaling.kind = "ntk": changes the base, of which the first pair of features knows nothing, and'
            ' model.head_dim = 16 * rope_fraction turns no other; 4 features or more, or "linear", would fit',
        ),
        (
            "latent",
            {"latent": LATENT | {"qk_rope_head_dim": 2}, "rope_scaling": {"kind": "ntk", "factor": 2.0}},
            "and model.latent.qk_rope_head_dim = 2 turns no other; 4 features or more",
        ),
        (
            "latent",
            {"rope_base": 1.0},
            'model.rope_base = 1.0: must be above 1 where model.rope_scaling.kind = "yarn"; 10000.0 would fit',
        ),
        (
            "sliding",
            {"position": "rope", "rope_scaling": YARN, "sliding": {"rope_base": 1.0}},
            "model.sliding.rope_base = 1.0: must be above 1",
        ),
        (
            "gate",
            {"rope_base": 0.5, "rope_scaling": {"kind": "ntk", "factor": 2.0}},
            'model.rope_base = 0.5: must be above 1 where model.rope_scaling.kind = "ntk"',
        ),
        ("latent", {"rope_scaling": YARN | {"original_length": 0}}, "model.rope_scaling.original_length = 0"),
        (
            "latent",
            {"rope_scaling": {"kind": "llama3", "factor": 2.0}},
            'model.rope_scaling.original_length = 0: kind = "llama3" needs the length before; 4096 would fit',
        ),
        (
            "gate",
            {"rope_scaling": {"kind": "llama3", "factor": 2.0, "original_length": 64, "low_freq_factor": 4.0}},
            "model.rope_scaling.low_freq_factor = 4.0: must be below model.rope_scaling.high_freq_factor = 4.0;"
            " 1.0 would fit",
        ),
        (
            "norms of tokens",
            {"rope_scaling": YARN | {"beta_fast": 1.0}},
            "model.rope_scaling.beta_fast = 1.0: must be above model.rope_scaling.beta_slow = 1.0; 32.0 would fit",
        ),
        ("sliding", {"pattern": "*-"}, "nothing uses the table [model.sliding]"),
    ],
)
def test_what_cannot_be_is_named(name: str, changes: dict[str, object], says: str) -> None:
    assert any(says in line for line in config_of(name, **changes).problems())


def test_what_is_said_to_fit_fits() -> None:
    assert config_of("hybrid norm", t5_max_distance=32).problems() == []
    assert config_of("hybrid norm", t5_max_distance=5).problems() == []
    ntk = {"kind": "ntk", "factor": 2.0}
    assert config_of("gate", rope_fraction=0.25, rope_scaling=ntk).problems() == []
    assert config_of("latent", latent=LATENT | {"qk_rope_head_dim": 4}, rope_scaling=ntk).problems() == []
    # Keys of another kind of stretching say nothing, and look as if they did.
    (line,) = config_of("gate", rope_scaling={"kind": "linear", "factor": 2.0, "beta_fast": 1.0}).problems()
    assert line.endswith('is for model.rope_scaling.kind = "yarn", and it is "linear"; 32.0 would fit')
