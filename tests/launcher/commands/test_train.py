"""`meshwright train` as a user runs it: signals, going on, launchers, and what it refuses before it begins."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faults.real_command import free_port, launch, own_environment, run, start, wait_until
from tiny_run import checkpoint_bytes, metrics, numbers, write_run_file

# A rank waits in its third step until it has a signal to stop, or a file is there.
WAIT_IN_STEP_3 = """
import os, time
from meshwright.launcher.training import loop
before = loop.one_step
def one_step(run, batch, at, *args, **kwargs):
    if at == 2:
        open({folder!r} + f"/waits{{rank}}", "w").close()
        while not kwargs["signals"]._stop and not os.path.exists({folder!r} + "/go"):
            time.sleep(0.01)
    return before(run, batch, at, *args, **kwargs)
loop.one_step = one_step
"""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of six steps on two ranks that nothing disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    run("train", write_run_file(folder), "parallel.ep=2", "checkpoint.keep_last=9", ranks=2).told(0)
    return folder


def is_as_unbroken(folder: Path, unbroken: Path) -> bool:
    """Say whether a run showed the same losses and holds the same last checkpoint, bitwise."""
    same = numbers(folder, "loss") == numbers(unbroken, "loss") and numbers(folder, "step") == [1, 2, 3, 4, 5, 6]
    return same and checkpoint_bytes(folder, 6) == checkpoint_bytes(unbroken, 6)


@pytest.mark.parametrize(
    "number",
    # The loop's own tests send each of them to a rank.
    [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)],
)
def test_a_signal_to_the_parent_saves_and_the_run_goes_on_bitwise(
    tmp_path: Path, unbroken: Path, number: signal.Signals
) -> None:
    command = ("train", write_run_file(tmp_path), "parallel.ep=2", "checkpoint.keep_last=9")
    running = launch(*command, "--ranks", 2, fault=WAIT_IN_STEP_3.format(folder=str(tmp_path)))
    wait_until(lambda: all((tmp_path / f"waits{rank}").exists() for rank in (0, 1)), "both ranks in step 3")
    running.send(number)
    running.wait().told(0, "2 ranks (started here) on cpu", "told to stop: ended after step 3 of 6")
    assert numbers(tmp_path, "step") == [1, 2, 3]
    run(*command, ranks=2).told(0, "resumed at step 3")
    assert is_as_unbroken(tmp_path, unbroken)


def test_a_run_goes_on_by_itself_and_a_finished_one_says_so(tmp_path: Path, unbroken: Path) -> None:
    shutil.copytree(unbroken / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000006")
    run_file = write_run_file(tmp_path)
    run("train", run_file, "parallel.ep=2", ranks=2).told(0, "resumed at step 3")
    assert is_as_unbroken(tmp_path, unbroken)
    run("train", run_file).told(0, "resumed at step 6", "all 6 steps are made")
    assert is_as_unbroken(tmp_path, unbroken)
    run("train", run_file, "train.steps=8").told(0, "resumed at step 6", "changed: train.steps: 6 -> 8")
    assert numbers(tmp_path, "step") == [1, 2, 3, 4, 5, 6, 7, 8]
    changed = run("train", run_file, "train.steps=9", "train.clip_norm=0.5")
    changed.told(2, "train.clip_norm = 0.5: the checkpoint has 1.0", "--allow-change train.clip_norm")
    allowed = run("train", run_file, "train.steps=9", "train.clip_norm=0.5", "--allow-change", "train.clip_norm")
    allowed.told(0, "changed: train.clip_norm: 1.0 -> 0.5")
    run("train", run_file, "--allow-change", "train.clip").told(2, "no such key; did you mean train.clip_norm?")


def test_every_launcher_shows_the_same_losses(tmp_path: Path, unbroken: Path) -> None:
    (tmp_path / "alone").mkdir()
    run("train", write_run_file(tmp_path / "alone")).told(0)
    assert numbers(tmp_path / "alone", "loss") == pytest.approx(numbers(unbroken, "loss"), rel=1e-5)
    text = next(record["text"] for record in metrics(unbroken) if "ranks (" in record.get("text", ""))
    assert text.startswith("2 ranks (torchrun) on cpu")


@pytest.mark.slow
def test_torchrun_itself_shows_the_same_losses(tmp_path: Path, unbroken: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    module = ["-m", "meshwright.launcher", "train", str(write_run_file(tmp_path)), "parallel.ep=2"]
    # In the tests' own cache: a near tie of two kernels may be decided otherwise in the user's.
    done = subprocess.run(
        [*torchrun, str(free_port()), *module], capture_output=True, text=True, timeout=300, env=own_environment()
    )
    assert done.returncode == 0, done.stderr
    assert numbers(tmp_path, "loss") == numbers(unbroken, "loss")


def test_a_store_that_is_not_there_is_told_with_the_command_that_makes_it(tmp_path: Path) -> None:
    refused = run("train", write_run_file(tmp_path), f"data.store={tmp_path / 'none'}")
    refused.told(2, "there is no such folder; meshwright prepare --out", "nothing was started")
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    run_file = write_run_file(tmp_path)
    run("train", run_file, "run.device=mps").told(
        2, 'run.device: 1 problem, nothing was started\n  "mps": this machine'
    )
    run("train", run_file, "run.device=mps", ranks=2).told(2, 'run.device = "mps": is for one process')
    hidden = {"CUDA_VISIBLE_DEVICES": ""}  # also on a machine that has GPUs
    refused = run("train", run_file, "run.device=cuda", environment=hidden)
    refused.told(2, '"cuda": local rank 0 finds 0 GPUs; "cpu" would fit')
    assert not (tmp_path / "run").exists()


def test_an_exchange_that_this_machine_lacks_is_refused_before_any_rank_is_started(tmp_path: Path) -> None:
    none_starts = "from meshwright.launcher.ranks import local_ranks\nlocal_ranks.run_local_ranks = lambda *given: 7"
    asked = ("parallel.ep=2", "parallel.expert_exchange=deep_ep", "train.precision=bf16", "run.device=auto")
    command = ("train", write_run_file(tmp_path), *asked, "--ranks", 2)
    refused = run(*command, fault=none_starts, environment={"CUDA_VISIBLE_DEVICES": ""})
    refused.told(2, "1 problem, nothing was started", 'parallel.expert_exchange = "deep_ep": runs on NVIDIA GPUs')
    assert refused.err.count("deep_ep") == 1 + refused.err.count("the package deep_ep is not installed")
    assert refused.err.endswith('; "all_to_all" would fit\n')
    assert not (tmp_path / "run").exists()


def test_two_runs_in_one_folder_at_once_are_refused_and_the_first_goes_on(tmp_path: Path, unbroken: Path) -> None:
    run_file = write_run_file(tmp_path)
    first = start("train", run_file, fault=WAIT_IN_STEP_3.format(folder=str(tmp_path)))
    wait_until((tmp_path / "waits0").exists, "the first run in step 3")
    second = run("train", run_file)
    second.told(2, "another run is at work there (process", "give this run another run.name or run.folder")
    (tmp_path / "go").touch()
    first.wait().told(0)
    assert numbers(tmp_path, "loss") == pytest.approx(numbers(unbroken, "loss"), rel=1e-5)
    run("train", run_file).told(0, "all 6 steps are made")  # the lock went with the process


def test_a_run_begins_from_an_export_on_one_rank_and_with_experts_on_two(tmp_path: Path) -> None:
    for name in ("first", "branch", "split"):
        (tmp_path / name).mkdir()
    plain = "model.moe.num_shared_experts=0"  # which Qwen3Moe has not
    run("train", write_run_file(tmp_path / "first"), plain).told(0)
    run("export", tmp_path / "first" / "run", "--skip-verify").told(0)
    source = f"init.from={tmp_path / 'first' / 'run' / 'export'}"
    # A learning rate of almost nothing: the first evaluation is of the weights that the run began from.
    still = (plain, source, "learning_rate.peak=1e-12", "train.steps=1", "evaluation.every=1")
    loss = numbers(tmp_path / "first", "validation_loss", "evaluation")[-1]
    run("train", write_run_file(tmp_path / "branch"), *still).told(0, "begun from", "export (weights)")
    run("train", write_run_file(tmp_path / "split"), *still, "parallel.ep=2", ranks=2).told(0, "begun from")
    for name in ("branch", "split"):
        assert numbers(tmp_path / name, "validation_loss", "evaluation") == pytest.approx([loss], rel=1e-5)
    fresh = write_run_file(tmp_path)
    with_moments = run("train", fresh, plain, source, "init.load=weights+optimizer")
    with_moments.told(2, 'an export has no optimizer state; init.load = "weights" would fit')
    other = run("train", fresh, plain, source, "model.moe.expert_hidden_size=20")
    other.told(2, "experts.gate is [4, 12, 16], the run file has [4, 20, 16]")
    run("train", fresh, f"init.from={tmp_path / 'none'}").told(2, "init.from = ", "there is no such folder")
    (Path(source.partition("=")[2]) / "model.safetensors").write_bytes(b"cut")
    run("train", fresh, plain, source).told(2, "init.from = ", "1 problem", "model.safetensors: is damaged")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path: Path, ranks: int) -> None:
    command = [sys.executable, "-m", "meshwright.launcher", "train", write_run_file(tmp_path), "--ranks", str(ranks)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as running:
        assert running.stderr is not None
        assert running.stderr.readline()
        running.stderr.close()
        assert running.wait(timeout=120) == 0
    assert numbers(tmp_path, "step") == [1, 2, 3, 4, 5, 6]
    assert len(checkpoint_bytes(tmp_path, 6)) > 0
    assert (tmp_path / "run" / "summary.json").exists()
