"""Every record reaches the file once, also across a kill and a resume; the terminal shows what is due."""

import errno
import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from meshwright.launcher.observe.metrics import Numbers
from meshwright.launcher.observe.records import decode, encode, read_records
from meshwright.launcher.observe.sinks import JsonLines, Sinks, drop_lines_after, open_sinks
from meshwright.launcher.observe.terminal import LiveLine, PlainLines, step_line


def numbers(step: int, **others: object) -> Numbers:
    values: dict[str, object] = {
        "step": step,
        "loss": 2.9134,
        "grad_norm": 1.25,
        "skipped": False,
        "tokens_per_second_per_rank": 41200.4,
        "mfu": 0.3811,
        "memory_gib": 61.23,
    }
    return values | others  # type: ignore[return-value]


def lines_of(path: Path) -> list[Numbers]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Remembering:
    def __init__(self) -> None:
        self.records: list[Numbers] = []
        self.closed = 0

    def write(self, record: Numbers) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.closed += 1


def test_each_call_is_one_record_of_its_kind_for_every_sink() -> None:
    sinks = [Remembering(), Remembering()]
    with Sinks(sinks) as together:
        together.step({"step": 1, "loss": 3.0})
        together.evaluation({"step": 1, "validation_loss": 2.0})
        together.event("saved")
    for sink in sinks:
        assert [record["kind"] for record in sink.records] == ["step", "evaluation", "event"]
        assert [record.get("step") for record in sink.records] == [1, 1, None]
        assert sink.records[2]["text"] == "saved"
        assert sink.closed == 1


def test_every_sink_is_closed_though_one_fails() -> None:
    class Failing(Remembering):
        def close(self) -> None:
            raise OSError("no")

    last = Remembering()
    with pytest.raises(OSError, match="no"):
        Sinks([Failing(), last]).close()
    assert last.closed == 1


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "run" / "metrics.jsonl", resumed_at=0)
    for step in (1, 2):
        sink.write({"kind": "step", "step": step})
        assert [line["step"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")] == list(range(1, step + 1))
    sink.close()


def test_numbers_that_json_lacks_survive_in_strict_json() -> None:
    line = encode(
        {"kind": "step", "step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5, "e": None, "f": True}
    )
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert strict["a"] == "NaN"
    record = decode(line)
    assert record is not None
    assert math.isnan(float(record["a"] or 0))
    assert (record["b"], record["c"], record["d"], record["e"], record["f"]) == (math.inf, -math.inf, 1.5, None, True)
    assert decode(encode({"kind": "event", "text": "NaN"})) == {"kind": "event", "text": "NaN"}


@pytest.mark.parametrize(
    "line",
    [
        '{"kind": "step", "step": "x"}',
        '{"kind": "step", "step": true}',
        '{"kind": "step"}',
        '{"kind": "evaluation", "step": -1}',
        '{"kind": "step", "step": 1, "tokens": "many"}',
        '{"kind": "other", "step": 1}',
        "[" * 100_000,
        "[]",
    ],
)
def test_json_of_another_shape_is_no_record(line: str) -> None:
    assert decode(line) is None


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with open_sinks(tmp_path, rank=0, total_steps=6) as sinks:
        for step in range(1, 6):
            sinks.step(numbers(step, loss=1.0))
        sinks.evaluation({"step": 3, "validation_loss": 1.0})
        sinks.evaluation({"step": 5, "validation_loss": 1.0})
        sinks.event("the first start")
    with path.open("a") as file:
        file.write('{"kind": "step", "step": 6, "lo')  # killed in the middle of a line
    with open_sinks(tmp_path, rank=0, total_steps=6, resumed_at=3) as sinks:
        for step in range(4, 7):
            sinks.step(numbers(step, loss=2.0))
        sinks.evaluation({"step": 5, "validation_loss": 2.0})
    lines = lines_of(path)
    assert [(line["step"], line["loss"]) for line in lines if line["kind"] == "step"] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 2.0),
        (5, 2.0),
        (6, 2.0),
    ]
    evaluations = [(line["step"], line["validation_loss"]) for line in lines if line["kind"] == "evaluation"]
    assert evaluations == [(3, 1.0), (5, 2.0)]
    events = [line["text"] for line in lines if line["kind"] == "event"]
    moved = "metrics.jsonl: 4 lines after step 3 moved to metrics.dropped.jsonl; they are made again"
    assert events == ["the first start", moved]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["metrics.dropped.jsonl", "metrics.jsonl"]
    assert [record["loss"] for record in read_records(tmp_path / "metrics.dropped.jsonl")[0][:2]] == [1.0, 1.0]


def test_a_kill_while_lines_are_dropped_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    before = "".join(encode({"kind": "step", "step": step}) + "\n" for step in range(1, 9))
    path.write_text(before)

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        drop_lines_after(path, 3)
    assert path.read_text() == before
    monkeypatch.undo()
    assert drop_lines_after(path, 3) == 5  # what the kill left aside is in nobody's way
    assert [record["step"] for record in read_records(path)[0]] == [1, 2, 3]


def test_a_file_that_needs_no_dropping_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "step", "step": 3}\n')
    inode = path.stat().st_ino
    assert drop_lines_after(path, 3) == 0
    assert path.stat().st_ino == inode


def test_lines_that_are_no_records_are_dropped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "step", "step": 1}\n\xff\xfe\n[1]\n{"step": 2}\n\n{"kind": "step", "step": 2}\n')
    assert read_records(path)[1] == 4
    assert drop_lines_after(path, 2) == 4
    assert [record["step"] for record in lines_of(path)] == [1, 2]


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl", resumed_at=0)

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    sink._file.close()
    sink._file = Full()  # type: ignore[assignment]
    with pytest.raises(OSError, match=r"cannot append to the run's metrics: No space left.*metrics\.jsonl"):
        sink.write({"kind": "event", "text": "x"})


def test_only_rank_0_tells_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_sinks(tmp_path / "run", rank=1, total_steps=2) as sinks:
        sinks.step(numbers(1))
        sinks.event("hello")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().err == ""


def test_a_step_is_one_line_with_units() -> None:
    assert step_line(numbers(120), "gpu") == "step 120 | loss 2.913 | 41,200 tokens/s/gpu | 38.1% mfu | 61.2 GiB"
    assert step_line(numbers(7, skipped=True), "rank").endswith("| skipped, gradient norm 1.25")


def test_plain_lines_come_every_n_steps_and_for_the_first_last_and_skipped() -> None:
    shown: list[str] = []
    sink = PlainLines(shown.append, total_steps=11, every=4, unit="gpu")
    for step in range(2, 12):
        sink.write({"kind": "step", **numbers(step, skipped=step == 6)})
    sink.write({"kind": "evaluation", "time": 1.0, "step": 11, "validation_loss": 2.80049, "samples": 64})
    sink.write({"kind": "event", "time": 1.0, "text": "checkpoint [bold] saved"})
    sink.close()
    assert [line.split(" | ")[0] for line in shown[:5]] == ["step 2", "step 4", "step 6", "step 8", "step 11"]
    assert shown[5:] == ["step 11 | validation loss 2.800 | samples 64", "checkpoint [bold] saved"]


def test_without_a_terminal_lines_go_to_stderr_as_they_come(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_sinks(tmp_path, rank=0, total_steps=10, every=2, unit="gpu") as sinks:
        for step in range(1, 4):
            sinks.step(numbers(step))
        caught = capsys.readouterr()
    assert caught.out == ""
    assert [line.split(" | ")[0] for line in caught.err.splitlines()] == ["step 1", "step 2"]
    assert [line["step"] for line in lines_of(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_terminal_shows_a_bar_that_moves_and_keeps_events_above_it() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, color_system=None)
    sink = LiveLine(console, total_steps=12, unit="gpu")
    sink.write({"kind": "event", "text": "before the first step [bold]"})
    sink.write({"kind": "step", **numbers(5)})
    sink.write({"kind": "evaluation", "time": 1.0, "step": 5, "validation_loss": 2.5})
    sink.write({"kind": "step", **numbers(6, loss=1.5)})
    sink.close()
    sink.close()  # also after an error has closed it
    shown = stream.getvalue()
    assert "before the first step [bold]" in shown
    assert "step 5 | validation loss 2.500" in shown
    last = shown.rsplit("loss 1.500 | 41,200 tokens/s/gpu | 38.1% mfu | 61.2 GiB", 1)
    assert len(last) == 2
    assert " 6/12" in last[1]
    assert shown.rstrip("\n").endswith("\x1b[?25h") or "\x1b[?25h" in last[1]  # the cursor is given back


@pytest.mark.parametrize("is_live", [False, True])
def test_a_view_that_cannot_be_written_is_silent_and_the_file_is_not(tmp_path: Path, is_live: bool) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def say(text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    view = LiveLine(Console(file=Full(), force_terminal=True), 3, "rank") if is_live else PlainLines(say, 3, 1, "rank")
    with Sinks([view, JsonLines(tmp_path / "metrics.jsonl", 0)]) as sinks:
        sinks.event("begins")
        sinks.step(numbers(1))
    assert [record["kind"] for record in lines_of(tmp_path / "metrics.jsonl")] == ["event", "step"]
