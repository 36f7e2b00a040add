"""`meshwright import`: from a Hugging Face folder to a run that begins from its weights, or every reason why not."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_exports import CONFIGS, ModelWeights, tiny_model, write_tiny_export, write_tiny_run, write_tiny_store

from meshwright.data.store import TokenStore
from meshwright.launcher.__main__ import main
from meshwright.launcher.runfile.messages import ConfigError
from meshwright.launcher.runfile.read import read_run_file
from meshwright.launcher.weights import import_run
from meshwright.launcher.weights.read_weights import ExportWeights, open_weights

transformers = pytest.importorskip("transformers")

# The bias of its router is no parameter, and must come along all the same.
NAME = "deepseek_v3 without latents of queries, with biases"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return write_tiny_store(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_export(tmp_path / "my model", tiny_model(CONFIGS[NAME]), CONFIGS[NAME])
    return tmp_path / "my model"


@pytest.fixture
def meshwright(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["meshwright", *(str(argument) for argument in arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    return call


def test_a_run_file_is_written_that_begins_from_the_weights(
    folder: Path,
    store: TokenStore,
    meshwright: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert meshwright("import", folder, "--store", store.path) == 0
    out = capsys.readouterr().out
    assert "DeepseekV3ForCausalLM, " in out
    assert "computes what transformers does: logits within" in out
    assert f"meshwright prepare --tokenizer {folder}/tokenizer.json" in out
    written = folder.parent / "my-model.toml"
    run_file = read_run_file(written, world_size=1, folders="needed")
    assert run_file.init.source == str(folder)
    assert run_file.model.layers == CONFIGS[NAME].layers
    assert run_file.model.latent == CONFIGS[NAME].latent


@pytest.mark.slow
def test_a_run_of_that_file_begins_with_these_weights(
    folder: Path, store: TokenStore, meshwright: Callable[..., int]
) -> None:
    assert meshwright("import", folder, "--store", store.path, "--out", "run.toml", "--skip-verify") == 0
    changes = ("train.steps=1", "train.global_batch_size=1", "learning_rate.peak=1e-30", "run.folder=run")
    no_warmup = ("learning_rate.warmup_steps=0", "model.moe.bias_rate=0.0", "optimizer.weight_decay=0.0")
    assert meshwright("train", "run.toml", *changes, *no_warmup) == 0
    trained, given = open_weights(Path("run")), ExportWeights(folder)
    assert trained.shapes() == given.shapes()
    for name in [*given.shapes(), *given.buffers()]:
        torch.testing.assert_close(trained.read(name), given.read(name), rtol=0.0, atol=1e-9)
    assert given.buffers()


def test_nothing_is_written_over(
    folder: Path, meshwright: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder.parent / "run.toml"
    out.write_text("mine")
    assert meshwright("import", folder, "--out", out, "--skip-verify") == 2
    assert "is there already; give another name, or --overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert meshwright("import", folder, "--out", out, "--skip-verify", "--overwrite") == 0
    assert "not compared with transformers" in capsys.readouterr().out
    assert out.read_text().startswith("# Goes on from the weights in")


def test_an_older_run_file_stays_until_the_new_one_is_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of one could lack the [init] table, and begin from nothing."""
    out = folder.parent / "run.toml"
    out.write_text("mine")

    def killed(self: Path, target: Path) -> None:
        assert "[init]" in self.read_text()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        import_run.import_run(import_run.ImportRequest(folder, out, verify=False, overwrite=True))
    assert out.read_text() == "mine"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["my model", "run.toml"]


def test_every_tensor_that_does_not_fit_is_told_at_once_with_status_2(
    folder: Path, meshwright: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"] = torch.ones(21, 16)
    save_file(tensors | {"extra": torch.ones(1)}, folder / "model.safetensors")
    assert meshwright("import", folder) == 2
    told = capsys.readouterr().err
    assert "model.norm.weight [16] is missing" in told
    assert "extra has no place in the class" in told
    assert "kv_a_proj_with_mqa.weight is [21, 16], config.json says [20, 16]" in told
    assert not (folder.parent / "my-model.toml").exists()


def test_every_key_that_asks_for_what_is_not_computed_is_told_with_status_2(
    folder: Path, meshwright: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((folder / "config.json").read_text())
    wrong = {"hidden_act": "gelu", "rope_interleave": False, "scoring_func": "softmax"}
    (folder / "config.json").write_text(json.dumps(config | wrong))
    assert meshwright("import", folder) == 2
    told = capsys.readouterr().err
    for line in ("hidden_act = 'gelu': only 'silu'", "rope_interleave = False: only True", "scoring_func = 'softmax'"):
        assert line in told


def test_another_result_than_that_of_transformers_writes_no_run_file(
    folder: Path,
    meshwright: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = ExportWeights.read

    def halved(self: ExportWeights, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        return read(self, name, rows) * (0.5 if name == "final_norm.weight" else 1.0)

    monkeypatch.setattr(ExportWeights, "read", halved)
    assert meshwright("import", folder) == 1
    assert "FAILED: the largest difference of logits is" in capsys.readouterr().err
    assert not (folder.parent / "my-model.toml").exists()


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_files_that_leave_the_beginning_of_names_out_are_read(name: str, tmp_path: Path) -> None:
    """As those on the Hub do, with causal masks and the tied output among the weights."""
    model = tiny_model(CONFIGS[name])
    write_tiny_export(tmp_path, model, CONFIGS[name])
    tensors = load_file(tmp_path / "model.safetensors")
    old = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    if name == "gpt2":
        old["h.0.attn.bias"] = torch.ones(1, 1, 40, 40)
    old["lm_head.weight"] = model.embedding.weight.detach().clone()  # type: ignore[union-attr]
    save_file(old, tmp_path / "model.safetensors")
    read, expected = ExportWeights(tmp_path), ModelWeights(model)
    assert read.shapes() == expected.shapes()
    for key in read.shapes():
        assert torch.equal(read.read(key), expected.read(key)), key


def test_a_run_of_ours_is_told_to_begin_from_as_it_is(
    store: TokenStore, meshwright: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_tiny_run(tmp_path / "run", CONFIGS["llama"], store)
    assert meshwright("import", tmp_path / "run") == 2
    assert "init.from in a run file takes it as it is" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run")
    assert meshwright("import", tmp_path / "run") == 2
    assert "there is nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("trips", "told"),
    [
        ("from_pretrained", "transformers cannot load the folder: KeyError: 'metadata'; a folder that save_pretrained"),
        (
            "forward",
            "transformers cannot compute with the folder: IndexError: here; a folder that save_pretrained wrote",
        ),
    ],
)
def test_where_transformers_trips_one_line_says_so(
    trips: str,
    told: str,
    folder: Path,
    meshwright: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if trips == "from_pretrained":  # which wants the index to have this key
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        names = load_file(folder / "model-00001-of-00001.safetensors")
        index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:

        def tripping(*_: object) -> None:
            raise IndexError("here")

        monkeypatch.setattr(import_run, "their_logits", tripping)
    assert meshwright("import", folder) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2:] == [f"{folder}: 1 problem, nothing was started", lines[-1]]
    assert lines[-1].strip().startswith(told)
    assert "--skip-verify to do without the comparison, would fit" in lines[-1]
    assert not (folder.parent / "my-model.toml").exists()
    assert meshwright("import", folder, "--skip-verify") == 0


@pytest.mark.parametrize(
    ("out", "why"),
    [
        ("taken", "is a folder"),
        ("file/a.toml", "file is no folder"),
        ("full/a.toml", os.strerror(errno.ENOSPC)),
        ("x" * 300, os.strerror(errno.ENAMETOOLONG)),
    ],
)
def test_a_run_file_that_cannot_be_written_names_the_option(
    out: str,
    why: str,
    folder: Path,
    meshwright: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "full")

    monkeypatch.setattr(import_run, "write_whole", full)
    (folder.parent / "taken").mkdir()
    (folder.parent / "file").touch()
    assert meshwright("import", folder, "--out", out, "--skip-verify", "--overwrite") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--out {out}: the run file cannot be written (" in line
    assert why in line
    assert line.endswith("a new name in a folder of yours would fit")


def test_weights_that_are_not_finite_write_no_run_file(
    folder: Path, meshwright: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][2] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    assert meshwright("import", folder) == 2
    assert "  model.norm.weight holds NaN or infinity: must be finite; " in capsys.readouterr().err
    assert not (folder.parent / "my-model.toml").exists()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # torch, of their model
def test_shared_experts_of_which_there_are_none_are_passed_over(
    meshwright: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = transformers.DeepseekV3Config(
        hidden_size=16, intermediate_size=20, moe_intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=70, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
        n_shared_experts=0, kv_lora_rank=8, q_lora_rank=6, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=5,
        first_k_dense_replace=1,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    empty = [name for name, tensor in tensors.items() if not tensor.numel()]
    assert [name.split(".")[-3] for name in empty] == ["shared_experts"] * 3
    assert meshwright("import", tmp_path / "theirs", "--store", "store") == 0
    assert "computes what transformers does: logits within" in capsys.readouterr().out
    assert not [name for name in ExportWeights(tmp_path / "theirs").shapes() if "shared" in name]
    without = {name: tensor for name, tensor in tensors.items() if name not in empty}
    save_file(without, tmp_path / "theirs" / "model.safetensors")
    ExportWeights(tmp_path / "theirs")
    save_file(tensors | {empty[0]: torch.ones(1, 16)}, tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(ConfigError) as refused:
        ExportWeights(tmp_path / "theirs")
    assert list(refused.value.problems) == [f"{empty[0]} has no place in the class"]
