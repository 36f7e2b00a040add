"""`check` says what the run will be, and looks at the store where it is there."""

import hashlib
from pathlib import Path

import pytest

from meshwright.data.meta import SplitMeta, StoreMeta, TokenizerMeta
from meshwright.launcher.commands.check import check
from meshwright.launcher.runfile.messages import ConfigError

RUNS = Path(__file__).resolve().parents[3] / "runs"


def write_store(folder: Path, *, vocab_size: int, num_tokens: int) -> str:
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(b"{}")
    meta = StoreMeta(
        format="meshwright-tokens",
        version=1,
        corpus="none",
        vocab_size=vocab_size,
        dtype="uint16",
        tokenizer=TokenizerMeta(
            sha256=hashlib.sha256(b"{}").hexdigest(), origin="none", end_of_text="x", end_of_text_id=0
        ),
        splits={"train": SplitMeta(num_tokens=num_tokens, num_documents=1, arrays={})},
        validation_unigram_nats=None,
        sources=[],
        recipe={},
        written_with={},
    )
    (folder / "meta.json").write_text(meta.to_json(), encoding="utf-8")
    return f"data.store={folder}"


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Return what was printed, by the name that begins each line."""
    return {line[2:14].strip(): line[14:] for line in capsys.readouterr().out.splitlines()[1:] if line[2] != " "}


def test_a_large_run_is_summed_up(capsys: pytest.CaptureFixture[str]) -> None:
    check(RUNS / "qwen3_30b_a3b.toml", [], world_size=64)
    said = lines(capsys)
    assert said["layout"] == "dp 64, ep 8 x edp 8, ZeRO-3, recompute full, bf16_autocast"
    assert "30.53 B (30,532,122,624) weights, 3.35 B (3,353,032,704) active" in said["model"]
    assert said["step"] == "512 samples x 4096 = 2,097,152 tokens; on each rank 4 micro-batches of 2"
    assert said["length"].startswith("200,000 steps, 419,430,400,000 tokens in all, 125 for each active weight")
    assert said["schedule"] == "wsd, peak 0.0004 after 2000 steps, end 4e-05"
    # 16 bytes for each of 30.5 B weights over 64 ranks, and 8 for each of the embedding and the output together
    assert said["state"].startswith("11.7 GiB on each rank: weights 0 B, masters 1.8 GiB, gradients 6.4 GiB")


def test_no_ranks_are_refused_with_a_number_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        check(RUNS / "dense_tiny.toml", ["parallel.tp=2"], world_size=0)
    assert refused.value.problems == ("world size = 0: must be at least 1; 2 would fit",)


@pytest.mark.parametrize(("key", "begins"), [("data.store", ""), ("init.from", ""), ("run.folder", "/tmp/")])
def test_a_path_that_the_system_refuses_is_told_beside_the_rest(key: str, begins: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check(RUNS / "dense_tiny.toml", [f"{key}={begins}{'a' * 300}", "parallel.tp=77"], world_size=77)
    tp, *_, path = refused.value.problems
    assert tp.startswith("parallel.tp = 77: must divide")
    assert path.startswith(f'{key} = "{begins}aaa')
    assert ": File name too long; " in path


@pytest.mark.parametrize(
    ("name", "override", "told"),
    [
        ("llama3_8b", "train.steps=9000", "llama3-8b"),
        ("llama3_8b", "model.num_layers=2", "llama3-8b, but for num_layers"),
        ("qwen3_30b_a3b", "model.moe.top_k=4", "qwen3-30b-a3b, but for moe.top_k"),
        # Its own sizes win: of a preset that is named on the command line next to nothing is used, and it is said.
        ("moe_tiny", "model.preset=moe-tiny", "moe-tiny, but for num_layers, hidden_size"),
    ],
)
def test_what_a_run_file_has_otherwise_than_its_preset_is_named(
    capsys: pytest.CaptureFixture[str], name: str, override: str, told: str
) -> None:
    check(RUNS / f"{name}.toml", [override], world_size=64 if name != "moe_tiny" else 2)
    assert lines(capsys)["preset"].startswith(told)


def test_the_tokens_of_a_ramp_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    check(RUNS / "llama3_8b.toml", ["train.steps=3", "learning_rate.warmup_steps=1"], world_size=64)
    said = lines(capsys)
    assert said["step"].endswith("2 micro-batches of 1, after a ramp over [64]")
    assert said["length"].startswith(f"3 steps, {3 * 64 * 8192:,} tokens in all")


def test_a_store_that_is_there_gives_the_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = write_store(tmp_path / "store", vocab_size=1000, num_tokens=5000)
    check(RUNS / "dense_tiny.toml", [store], world_size=1)
    said = lines(capsys)
    assert said["data"].endswith("train 5,000 tokens; vocabulary 1,000")
    assert "(without the embedding" not in said["model"]
    assert f"({98_624 + 2 * 1024 * 64:,})" in said["model"]


def test_a_store_that_is_not_there_yet_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(RUNS / "dense_tiny.toml", [f"data.store={tmp_path}/none"], world_size=1)
    said = lines(capsys)
    assert "the store is not here yet" in said["data"]
    assert "(without the embedding" in said["model"]


def problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(RUNS / "dense_tiny.toml", list(overrides), world_size=1)
    return list(caught.value.problems)


def test_a_store_that_does_not_fit_and_a_wrong_key_are_told_at_once(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", vocab_size=1000, num_tokens=100)
    wrong = ["model.vocab_size=512", "learning_rate.peak=-1", "evaluation.every=5", "model.num_kv_heads=3"]
    found = problems(store, *wrong, "init.from=/nowhere")
    beginnings = [
        "learning_rate.peak = -1: must be above 0",
        "model.num_kv_heads = 3: must divide",
        "data.seq_len = 128: one sample needs 129 tokens",
        "model.vocab_size = 512: must hold the tokenizer's 1000 tokens",
        "evaluation.every = 5: the store holds no validation split",
        'init.from = "/nowhere": there is no such folder',
    ]
    assert len(found) == len(beginnings)
    for line, beginning in zip(found, beginnings, strict=True):
        assert line.startswith(beginning)


def test_a_store_that_is_damaged_is_a_problem(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", vocab_size=1000, num_tokens=5000)
    (tmp_path / "store" / "tokenizer.json").unlink()
    assert problems(store)[0].startswith(f'data.store = "{tmp_path}/store": {tmp_path}/store/tokenizer.json is missing')
    (tmp_path / "store" / "meta.json").unlink()
    assert "is no token store: it has no meta.json" in problems(store)[0]


def test_a_folder_to_begin_from_is_not_needed_once_the_run_has_begun(tmp_path: Path) -> None:
    run = [f"run.folder={tmp_path}", "init.from=/nowhere", f"data.store={tmp_path}/none"]
    assert len(problems(*run)) == 1
    (tmp_path / "checkpoints" / "step_00000003").mkdir(parents=True)
    check(RUNS / "dense_tiny.toml", run, world_size=1)


def test_the_stages_of_a_pipeline_and_its_predicted_wait_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["parallel.pp=4", "pipeline.schedule=zbv", "zero.stage=1", "recompute.mode=none"]
    check(RUNS / "llama3_8b.toml", overrides, world_size=64)
    printed = capsys.readouterr().out
    assert "layout      dp 16, pp 4" in printed
    assert "pipeline    zbv, 8 stages; layers by rank: 0-3 and 30-31, 4-7 and 25-29" in printed
    assert "predicted with 8 micro-batches: the ranks wait 10.7% of the time" in printed
    assert "at most [8, 8, 8, 8] stages' micro-batches at once" in printed


def test_what_the_machine_of_the_ranks_must_have_for_deep_ep_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    check(RUNS / "moe_tiny.toml", ["parallel.ep=2", "parallel.expert_exchange=deep_ep", "train.precision=bf16"], 2)
    assert "the package deep_ep" in lines(capsys)["exchange"]
    check(RUNS / "moe_tiny.toml", ["parallel.ep=2"], 2)
    assert "exchange" not in lines(capsys)


def test_a_step_of_very_many_micro_batches_is_predicted_from_some(capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["parallel.pp=2", "parallel.ep=1", "pipeline.schedule=zbv", "train.micro_batch_size=1"]
    check(RUNS / "moe_tiny.toml", ["train.global_batch_size=1000000", *layout], world_size=2)
    assert "predicted with 512 of the 1,000,000 micro-batches" in capsys.readouterr().out


def test_every_choice_of_a_key_is_listed() -> None:
    with pytest.raises(ConfigError, match='"interleaved_zero_bubble", "zbv", "dualpipev"]'):
        check(RUNS / "moe_tiny.toml", ["pipeline.schedule=foo"], world_size=2)
