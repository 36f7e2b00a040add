"""`meshwright export`: one command from a run to a verified folder, or a reason and nothing left behind."""

import json
import re
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors import safe_open
from tiny_exports import CONFIGS, MOE, tiny_config, write_tiny_run, write_tiny_store

from meshwright.data.store import TokenStore
from meshwright.launcher.__main__ import main
from meshwright.launcher.weights import export_run
from meshwright.model.config import ModelConfig
from meshwright.model.kinds.multi_token import MultiTokenConfig

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return write_tiny_store(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture
def run(store: TokenStore, tmp_path: Path) -> Path:
    write_tiny_run(tmp_path / "run", CONFIGS["mixtral"], store)
    return tmp_path / "run"


@pytest.fixture
def meshwright(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["meshwright", *(str(argument) for argument in arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    return call


def report_of(folder: Path) -> dict[str, object]:
    report: dict[str, object] = json.loads((folder / "export_report.json").read_text())
    return report


def test_a_run_is_exported_into_its_folder_and_verified_on_its_held_out_text(
    run: Path, meshwright: Callable[..., int], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert meshwright("export", run) == 0
    report = report_of(run / "export")
    assert (report["verified"], report["passed"], report["step"]) == (True, True, 7)
    assert report["class"] == report["class_name"] == "MixtralForCausalLM"
    assert "the validation split of" in str(report["text"])
    assert report["positions"] == 1008  # 42 samples of 24 tokens
    assert caplog.text == ""  # transformers warns where more is generated than it has positions for
    out = capsys.readouterr().out
    assert "verified in transformers" in out
    assert str(run / "export") in out
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "export", "run.toml", "tokenizer.json"]


def test_bf16_of_one_checkpoint_into_a_named_folder(run: Path, meshwright: Callable[..., int], tmp_path: Path) -> None:
    checkpoint = run / "checkpoints" / "step_00000007"
    assert meshwright("export", checkpoint, "--out", tmp_path / "hf", "--dtype", "bf16", "--max-file-gb", 2e-5) == 0
    report = report_of(tmp_path / "hf")
    assert report["passed"] is True
    assert report["rounding"]["largest difference of logits"] > 1e-3  # type: ignore[index]
    assert int(str(report["files"])) > 1


def test_a_failed_verification_names_the_figure_exits_1_and_leaves_the_older_export(
    run: Path, meshwright: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert meshwright("export", run, "--skip-verify") == 0
    write = export_run.write_hf_folder

    def write_another_rope_base(folder: Path, config: ModelConfig, *rest: object) -> None:
        write(folder, config.model_copy(update={"rope_base": 3.0}), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(export_run, "write_hf_folder", write_another_rope_base)
    assert meshwright("export", run, "--overwrite") == 1
    assert "the largest difference of logits is" in capsys.readouterr().err
    assert report_of(run / "export.failed")["passed"] is False
    assert report_of(run / "export")["verified"] is False  # the older one


def test_an_older_export_gives_way_and_what_is_not_of_it_does_not(
    run: Path, meshwright: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert meshwright("export", run, "--skip-verify", "--max-file-gb", 2e-5) == 0
    assert meshwright("export", run, "--skip-verify", "--overwrite") == 0  # all that an export writes is known as such
    (run / "export" / "NOTES.md").write_text("mine")
    (run / "export.partial").mkdir()
    (run / "export.partial" / "mine.txt").write_text("mine")
    capsys.readouterr()
    assert meshwright("export", run, "--overwrite", "--dtype", "x") == 2
    assert meshwright("export", run, "--overwrite", "--out", run / "export", "--dtype", "x") == 2
    err = capsys.readouterr().err
    assert err.count("--dtype") == 2
    assert "holds what no export writes: NOTES.md; move it away" in err
    assert "holds what no export writes: mine.txt; move it away" in err
    assert (run / "export" / "NOTES.md").read_text() == (run / "export.partial" / "mine.txt").read_text() == "mine"
    assert meshwright("export", run, "--overwrite") == 2
    assert (run / "export" / "NOTES.md").is_file()


def test_an_unverified_export_says_so(
    run: Path, meshwright: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert meshwright("export", run, "--skip-verify") == 0
    assert "not verified" in capsys.readouterr().out
    assert report_of(run / "export")["verified"] is False


def test_the_weights_told_are_those_in_the_files(
    store: TokenStore, meshwright: Callable[..., int], tmp_path: Path
) -> None:
    config = CONFIGS["mixtral"].model_copy(update={"multi_token": MultiTokenConfig()})  # further tokens are left out
    write_tiny_run(tmp_path / "run", config, store)
    assert meshwright("export", tmp_path / "run", "--skip-verify") == 0
    with safe_open(tmp_path / "run" / "export" / "model.safetensors", "pt") as file:
        held = [file.get_tensor(name).numel() for name in file.keys()]  # noqa: SIM118  (it is no dict)
    assert report_of(tmp_path / "run" / "export")["weights"] == sum(held)


def test_a_model_that_no_class_is_is_refused_with_every_reason_and_status_2(
    store: TokenStore, meshwright: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tiny_config(
        pattern="*E", moe=MOE.model_copy(update={"normalise_top_k": False}), bias=("v",), position="alibi"
    )
    write_tiny_run(tmp_path / "run", config, store)
    assert meshwright("export", tmp_path / "run") == 2
    told = capsys.readouterr().err
    for key in ('model.position = "alibi"', "model.moe.normalise_top_k = false", "model.bias has ['v']"):
        assert key in told
    assert "Traceback" not in told
    assert not (tmp_path / "run" / "export").exists()


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_is_told_with_what_is_needed_and_leaves_nothing(
    run: Path, meshwright: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with disk_of(20_000):
        assert meshwright("export", run) == 2
    line = rf"--out {run}/export: the export cannot be written \(File too large\): it needs at least ([\d,]+) bytes"
    needed = re.match(f"meshwright: {line}", capsys.readouterr().err)
    assert needed is not None
    assert int(needed[1].replace(",", "")) > 20_000
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "run.toml", "tokenizer.json"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--dtype", "fp16"], '--dtype "fp16": one of fp32, bf16 would fit'),
        (["--max-file-gb", "nan", "--dtype", "x"], "--max-file-gb nan: must be above 0"),
        (["--max-file-gb", "inf"], "--max-file-gb inf: must be above 0"),
        (["--max-file-gb", "nan", "--dtype", "x"], '--dtype "x": one of'),
        (["--text", "/dev/zero"], "--text /dev/zero: is a pipe, a socket or a device"),
        (["--max-file-gb", "0"], "--max-file-gb 0: must be above 0"),
        (["--text", "absent.txt"], "--text absent.txt: cannot be read"),
        (["--end-of-text", "</s>"], "</s>"),
    ],
)
def test_a_wrong_option_is_told_with_status_2(
    run: Path, meshwright: Callable[..., int], capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert meshwright("export", run, *arguments) == 2
    assert told in capsys.readouterr().err
    assert not (run / "export").exists()


def test_text_of_ones_own_serves_where_the_store_is_gone(
    meshwright: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    store = write_tiny_store(tmp_path / "text")
    write_tiny_run(tmp_path / "run", CONFIGS["llama"], store)
    shutil.rmtree(store.path)
    assert meshwright("export", tmp_path / "run") == 2
    assert "give a text with --text FILE, or --skip-verify" in capsys.readouterr().err
    (tmp_path / "own.txt").write_text("a text of one's own, long enough to compare on\n" * 3)
    assert meshwright("export", tmp_path / "run", "--text", tmp_path / "own.txt") == 0
    assert report_of(tmp_path / "run" / "export")["text"] == str(tmp_path / "own.txt")


def test_a_store_that_was_changed_since_is_not_verified_on(
    meshwright: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    store = write_tiny_store(tmp_path / "text")
    write_tiny_run(tmp_path / "run", CONFIGS["llama"], store)
    other = write_tiny_store(tmp_path / "other", extra="one more line")
    shutil.rmtree(store.path)
    shutil.copytree(other.path, store.path)
    assert meshwright("export", tmp_path / "run") == 2
    assert "holds other tokens than the run was trained on" in capsys.readouterr().err
