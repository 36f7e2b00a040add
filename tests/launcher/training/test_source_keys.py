"""A run that begins from weights of the same shapes and another model: told, or refused where they are made over."""

from pathlib import Path

import pytest
from tiny_run import metrics, start, write_run_file

from meshwright.launcher.runfile.messages import ConfigError

EXPERTS = ("[model.moe]", "num_experts = 4", "top_k = 2", "num_shared_experts = 1", 'load_balancing = "step"')
ONE_STEP = ("train.steps=1", "evaluation.every=0")
COPY = ("init.upcycle=copy", "model.moe.num_shared_experts=0", "model.moe.expert_hidden_size=64")
SIZES = ("model.head_dim=8", "model.ffn_hidden_size=64", "model.qk_norm=false")


def dense_file(folder: Path) -> Path:
    path = write_run_file(folder)
    lines = path.read_text().replace('"*E"', '"*-"').splitlines()
    path.write_text(
        "\n".join(line for line in lines if line not in (*EXPERTS, "qk_norm = true") and "expert_hidden" not in line)
    )
    return path


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a dense run of two heads of keys; return its folder."""
    folder = tmp_path_factory.mktemp("dense")
    dense_file(folder)
    start(folder, *ONE_STEP, "model.num_kv_heads=2")
    return folder


def refused(folder: Path, dense: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        start(folder, f'init.from="{dense / "run"}"', *ONE_STEP, *overrides)
    assert not (folder / "run" / "checkpoints").exists()
    return list(error.value.problems)


@pytest.mark.parametrize("upcycle", [("init.upcycle=none",), ("init.pool_kv_heads=true",)])
def test_keys_that_make_another_model_of_the_same_weights_are_told(
    dense: Path, tmp_path: Path, upcycle: tuple[str, ...]
) -> None:
    dense_file(tmp_path)
    source = (f'init.from="{dense / "run"}"', "model.num_kv_heads=2")
    start(tmp_path, *source, *ONE_STEP, *upcycle, "model.rope_base=100.0", "model.ffn_activation=geglu")
    told = [record["text"] for record in metrics(tmp_path) if "init.from" in record.get("text", "")]
    changes = 'ffn_activation: "swiglu" -> "geglu"; rope_base: 10000.0 -> 100.0'
    assert told == [f"the weights compute something else than at init.from, where [model] differs: {changes}"]


def test_experts_are_made_of_a_model_with_the_same_keys_alone(dense: Path, tmp_path: Path) -> None:
    found = refused(tmp_path, dense, *COPY, *SIZES, "model.num_kv_heads=2", "model.ffn_activation=geglu")
    assert found == [
        'model.ffn_activation = "geglu": must be as at init.from, or its weights compute something else;'
        ' "swiglu" would fit'
    ]


def test_another_pattern_is_refused_without_the_weights_that_follow_from_it(dense: Path, tmp_path: Path) -> None:
    (line,) = refused(tmp_path, dense, *COPY, *SIZES, "model.num_kv_heads=2", 'model.pattern="[*E]"')
    assert line.startswith('model.pattern = "[*E]": must be that at init.from, "*-", with an E for each -')


def test_a_capacity_is_told_where_experts_are_made(dense: Path, tmp_path: Path) -> None:
    write_run_file(tmp_path)
    source, experts = f'init.from="{dense / "run"}"', (*COPY, *SIZES, "model.num_kv_heads=2")
    start(tmp_path, source, *ONE_STEP, *experts, "model.moe.capacity_factor=0.5")
    told = [record["text"] for record in metrics(tmp_path) if "dense model" in record.get("text", "")]
    assert [line.partition(":")[0] for line in told] == ["model.moe.capacity_factor = 0.5"]


def test_a_model_without_feed_forwards_is_refused_for_that_alone(tmp_path: Path) -> None:
    dense_file(tmp_path)
    start(tmp_path, *ONE_STEP, 'model.pattern="*"', "model.ffn_hidden_size=0")
    (tmp_path / "here").mkdir()
    found = refused(tmp_path / "here", tmp_path, *COPY, "model.ffn_hidden_size=64")
    assert [line.partition("(")[0] for line in found] == [
        'init.upcycle = "copy": makes experts of dense layers, and the model at init.from has no feed-forwards '
    ]


def test_heads_of_another_cut_are_not_pooled(dense: Path, tmp_path: Path) -> None:
    dense_file(tmp_path)
    # 2 heads of 8 there; 4 of 4 have the same shapes.
    found = refused(tmp_path, dense, "init.pool_kv_heads=true", "model.num_heads=4", "model.num_kv_heads=2")
    assert [line.partition(":")[0] for line in found] == ["model.num_heads = 4"]


def test_another_width_is_refused_by_its_key_and_each_weight(dense: Path, tmp_path: Path) -> None:
    found = refused(tmp_path, dense, *COPY, "model.num_kv_heads=2", "model.hidden_size=32", *SIZES)
    assert found[0].startswith("model.hidden_size = 32: must be as at init.from")
    assert found[0].endswith("16 would fit")
    assert any(line.startswith("embedding.weight is [320, 16], the run file's model has [320, 32]") for line in found)
