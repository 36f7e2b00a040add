"""The exit status of `prove` and `verify-resume` is what a script goes by, through the command line itself.

    0    the same        1    a difference, or no answer        2    a mistake        130, 143    stopped

Ranks are forked, killed and compared as always; what they leave is made here, so that nothing is trained. The last
three are told in test_answer.py, test_prove.py and commands/test_refusals.py.
"""

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from meshwright.launcher.__main__ import main
from meshwright.launcher.proof import prove as proof
from meshwright.launcher.proof import resume, trained
from meshwright.launcher.proof.passes import Pass
from meshwright.launcher.proof.record import RankRecord, StepRecord
from meshwright.launcher.proof.sublayouts import Cover
from meshwright.launcher.proof.trained import Trained
from meshwright.launcher.runfile.tables import RunFile
from meshwright.parallel.mesh import Sizes

Printed = pytest.CaptureFixture[str]
RUN_FILE = Path(__file__).resolve().parents[3] / "runs" / "dense_tiny.toml"


def status_of(monkeypatch: pytest.MonkeyPatch, *args: object) -> object:
    """Run the command line in this process; return its exit status."""
    monkeypatch.setattr(sys, "argv", ["meshwright", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def step_of(outcome: str, run_file: RunFile, rank: int) -> StepRecord:
    """Return what a rank leaves of a step; with tp = 2, and there alone, the second comes to an outcome."""
    if run_file.parallel.tp == 2 and rank == 1:
        if outcome == "NO ANSWER":
            os.kill(os.getpid(), signal.SIGKILL)
        if outcome == "DIFFERENT":
            return StepRecord(learning_rate=1.0, loss=1.0 + 1e-6, norm=1.0)
    return StepRecord(learning_rate=1.0, loss=1.0, norm=1.0)


@pytest.mark.parametrize(
    ("outcome", "status", "told"),
    [
        ("SAME", 0, "the same as one process"),
        ("DIFFERENT", 1, "DIFFERENT from one process on 1 of 2 layouts"),
        ("NO ANSWER", 1, "NO ANSWER from 1 of 2 layouts"),
    ],
)
def test_prove_ends_with_what_it_found_on_one_of_two_layouts(
    outcome: str, status: int, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Printed
) -> None:
    real = proof.plan_proof

    def small_plan(*given: object) -> proof.Plan:
        cover = Cover((Sizes(tp=2), Sizes(dp_shard=2)), ("dp_shard", "tp"), ())
        return replace(real(*given), cover=cover, passes=("exact",))  # type: ignore[arg-type]

    def leave(run_file: RunFile, passes: Sequence[Pass], *given: object, **_how: object) -> dict[str, RankRecord]:
        rank = given[-1]
        assert isinstance(rank, int)
        return {one.name: RankRecord([step_of(outcome, run_file, rank)]) for one in passes}

    monkeypatch.setattr(proof, "plan_proof", small_plan)
    monkeypatch.setattr(proof, "run_passes", leave)
    out = tmp_path / "answer.json"
    assert status_of(monkeypatch, "prove", RUN_FILE, "-n", 4, "parallel.tp=2", "--out", out) == status
    assert told in capfd.readouterr().out
    assert json.loads(out.read_text())["is_same"] == (status == 0)


@pytest.mark.parametrize(
    ("outcome", "status", "told"),
    [
        ("SAME", 0, "the resumed run is the unbroken one"),
        ("DIFFERENT", 1, "DIFFERENT from the unbroken run in 1 of 2 ways"),
        ("NO ANSWER", 1, "NO ANSWER from 1 of 2 ways"),
    ],
)
def test_verify_resume_ends_with_what_it_found_on_one_of_two_ways(
    outcome: str, status: int, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Printed
) -> None:
    def wait_to_be_killed(folder: Path, rank: int) -> NoReturn:
        folder.mkdir(exist_ok=True)
        trained._mark(folder, rank).touch()
        while True:
            signal.pause()

    def leave(run_file: RunFile, folder: Path, rank: int, *, kill_after: int | None = None, **_how: object) -> Trained:
        if kill_after is not None:
            wait_to_be_killed(folder, rank)
        made = 2 if folder.name == "unbroken" else 1
        return Trained([step_of(outcome, run_file, rank)] * made, state={"changes": []})

    monkeypatch.setattr(resume, "train_rank", leave)
    monkeypatch.setattr(resume, "compare_for_resume", lambda *_: ([], []))
    out = tmp_path / "answer.json"
    arguments = ("verify-resume", RUN_FILE, "--to", "tp=2,dp_shard=1", "--steps", 1, "--out", out)
    assert status_of(monkeypatch, *arguments) == status
    assert told in capfd.readouterr().out
    assert json.loads(out.read_text())["is_same"] == (status == 0)
