"""What cannot work is refused by every command that reads a run file, with the same words, before anything begins.

    check -n N    train --ranks N    prove -n N    verify-resume -n N        the same stderr, exit status 2

Where each rule is told in detail: tests/launcher/runfile/. A vocabulary is held against the store, which the last two
commands do without.
"""

import os
import sys
from pathlib import Path

import pytest
from tiny_run import write_run_file

from meshwright.launcher.__main__ import main
from meshwright.launcher.proof import forked
from meshwright.launcher.ranks import local_ranks

FOUR_LAYERS = ("model.num_layers=4", "parallel.pp=2", "train.micro_batch_size=1")
BACKWARDS_APART = (*FOUR_LAYERS, "pipeline.schedule=zbv")

CASES = {
    "heads": (4, ["parallel.tp=4"], "parallel.tp = 4: must divide model.num_heads = 2"),
    "key heads": (
        2,
        ["parallel.tp=2", "model.num_heads=6", "model.num_kv_heads=3", "model.head_dim=4"],
        "parallel.tp = 2: must divide model.num_kv_heads = 3",
    ),
    "exchanged heads": (
        4,
        ["parallel.cp=2", "parallel.tp=2", "parallel.context=ulysses"],
        'parallel.context = "ulysses": cp * tp = 4 must divide model.num_heads = 2',
    ),
    "shared width": (
        2,
        ["parallel.tp=2", "model.moe.expert_hidden_size=13"],
        "parallel.tp = 2: must divide model.moe.num_shared_experts * expert_hidden_size = 13",
    ),
    "experts": (3, ["parallel.ep=3"], "parallel.ep = 3: must divide model.moe.num_experts = 4"),
    "expert width": (8, ["parallel.etp=8"], "parallel.etp = 8: must divide model.moe.expert_hidden_size = 12"),
    "ranks of experts": (2, ["parallel.ep=4"], "parallel.ep = 4: ep * etp = 4 must divide the 2 ranks"),
    "layers": (4, ["parallel.pp=4"], "parallel.pp = 4: makes 4 stages, and model.num_layers = 2"),
    "layers of two stages": (
        2,
        ["parallel.pp=2", "pipeline.schedule=interleaved_1f1b"],
        "parallel.pp = 2: makes 4 stages (2 on each rank), and model.num_layers = 2",
    ),
    "sequence, tp": (2, ["parallel.tp=2", "data.seq_len=15"], "data.seq_len = 15: must be a multiple of"),
    "sequence, cp": (2, ["parallel.cp=2", "data.seq_len=14"], "data.seq_len = 14: must be a multiple of 4"),
    "mixer without cp": (
        2,
        ["parallel.cp=2", "model.pattern=S*E"],
        "parallel.cp = 2: S4D ",
    ),
    "batch": (3, [], "train.global_batch_size = 8: must be a multiple of the 3 data-parallel ranks"),
    "batch of a ramp": (
        2,
        ["train.batch_ramp=[{samples=4, global_batch_size=1}]"],
        "train.batch_ramp[0].global_batch_size = 1: must be a multiple of the 2 data-parallel ranks",
    ),
    "micro-batches": (
        2,
        ["parallel.pp=2", "train.micro_batch_size=8"],
        "train.global_batch_size = 8: leaves 1 micro-batch of 8 on a rank",
    ),
    "vocabulary": (2, ["model.vocab_size=12"], "model.vocab_size = 12: must hold the tokenizer's"),
    "ZeRO-3, split backward": (2, [*BACKWARDS_APART, "zero.stage=3"], "zero.stage = 3: would gather weights"),
    "recompute, split backward": (
        2,
        [*BACKWARDS_APART, "recompute.mode=full"],
        'recompute.mode = "full": would recompute a layer many times over',
    ),
    "compile, split backward": (2, [*BACKWARDS_APART, "train.compile=true"], "train.compile = true: needs whole"),
    "bf16, split backward": (2, [*BACKWARDS_APART, "train.precision=bf16"], 'train.precision = "bf16": would add up'),
    "compile, recompute": (
        2,
        ["train.compile=true", "recompute.mode=selective"],
        'train.compile = true: is not possible with recompute.mode = "selective"',
    ),
    "modules that no layer has": (
        2,
        ["model.pattern=E", "recompute.mode=modules", 'recompute.modules=["mixer"]'],
        'recompute.modules = ["mixer"]: no layer of model.pattern = "E" has "mixer"; one of ["norm", "activation",',
    ),
    "ranks": (3, ["parallel.tp=2"], "parallel.tp = 2: tp * pp * cp * dp_replicate = 2 must divide the world size 3"),
    # Of several kinds at once, those that another number of ranks would mend among them.
    "heads, experts and batch": (
        5,
        ["parallel.tp=5", "parallel.ep=3", "train.batch_ramp=[{samples=4, global_batch_size=1}]"],
        "parallel.ep = 3: ep * etp = 3 must divide the 5 ranks",
    ),
}
NEED_THE_STORE = ("vocabulary",)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder of the test's own, with no launcher around, and let no rank be started."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("RANK", "LOCAL_", "WORLD_SIZE", "SLURM_", "OMPI_", "PMI_", "MESHWRIGHT_")):
            monkeypatch.delenv(name)

    def fork(*_given: object) -> None:
        raise AssertionError("a rank was started")

    monkeypatch.setattr(forked.Fork, "__init__", fork)
    monkeypatch.setattr(local_ranks, "run_local_ranks", lambda *_given: 77)


def command(monkeypatch: pytest.MonkeyPatch, *args: object) -> object:
    """Run the command line in this process; return its exit status."""
    monkeypatch.setattr(sys, "argv", ["meshwright", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.mark.parametrize("kind", CASES)
def test_every_command_refuses_it_with_the_same_words(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks, overrides, told = CASES[kind]
    run_file = write_run_file(tmp_path)
    ways = {"check": ["-n", ranks], "train": ["--ranks", ranks], "prove": ["-n", ranks]}
    ways["verify-resume"] = ["-n", ranks, "--to", "dp_shard=1"]
    before, words = sorted(tmp_path.rglob("*")), {}
    for name, options in ways.items():
        if kind in NEED_THE_STORE and name in ("prove", "verify-resume"):
            continue
        assert command(monkeypatch, name, run_file, *overrides, *options) == 2, name
        printed, words[name] = capsys.readouterr()
        assert printed == ""
    assert f"  {told}" in words["check"]
    assert words["check"].startswith(f"{run_file}: ")
    assert "Traceback" not in words["check"]
    assert words == dict.fromkeys(words, words["check"])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, ["parallel.tp=2", "model.vocab_size=301"]),
        (2, BACKWARDS_APART),
        (4, ["parallel.cp=2", "parallel.ep=4"]),
        # Its first stage has no experts; tests/parallel/recompute/test_kept.py builds such a stage.
        (2, [*FOUR_LAYERS, "model.pattern=*-*E", "recompute.mode=modules", 'recompute.modules=["experts"]']),
    ],
)
def test_what_check_lets_pass_train_begins(
    ranks: int, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_file = write_run_file(tmp_path)
    assert command(monkeypatch, "check", run_file, *overrides, "-n", ranks) == 0
    assert command(monkeypatch, "train", run_file, *overrides, "--ranks", ranks) == 77
