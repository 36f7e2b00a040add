"""An export is whole or not there, in the place of an export alone; what no export writes is never removed."""

import errno
import os
import re
import shutil
from pathlib import Path

import pytest

from meshwright.launcher.weights.destination import destination_problems, finish, followed, written_partially

REPORT = "export_report.json"


def told(out: Path, *, overwrite: bool = True, may_fail: bool = True) -> list[str]:
    return destination_problems(out, overwrite=overwrite, may_fail=may_fail)


def export_at(folder: Path, *others: str) -> Path:
    """Make what looks like an export in several files, and other files in it."""
    names = (REPORT, "export_report.md", "config.json", "tokenizer_config.json", "model-00001-of-00012.safetensors")
    for name in (*names, *others):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    return folder


def test_a_destination_is_only_replaced_when_it_is_an_export_and_was_asked_for(tmp_path: Path) -> None:
    assert told(tmp_path / "new", overwrite=False) == []
    (tmp_path / "empty").mkdir()
    assert told(tmp_path / "empty", overwrite=False) == []
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    assert "is no export" in told(tmp_path / "taken")[0]
    out = export_at(tmp_path / "out")
    assert "--overwrite to replace it" in told(out, overwrite=False)[0]
    assert told(out) == []


def test_files_that_no_export_writes_are_named_in_every_folder_that_would_be_removed(tmp_path: Path) -> None:
    out = export_at(tmp_path / "out", "NOTES.md", "my_evals/r.json", *(f"{n}.txt" for n in range(5)))
    export_at(tmp_path / "out.partial", "mine.txt")
    export_at(tmp_path / "out.failed", "model-x.safetensors", "config.json.d/a")
    export_at(tmp_path / ".out.replaced", "sub/config.json")
    lines = told(out)
    assert [re.sub(r".*would remove .*/(\S+), which.*: (.*);.*", r"\1 \2", line) for line in lines] == [
        "out 0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 2 more",
        "out.partial mine.txt",
        ".out.replaced sub/",
        "out.failed config.json.d/, model-x.safetensors",
    ]
    assert all(line.startswith(f"--out {out}: ") and "; move it away, or give another" in line for line in lines)
    assert len(told(out, may_fail=False)) == 3  # without a verification nothing goes to out.failed


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("elsewhere", target_is_directory=True)])
def test_a_partial_folder_that_is_none_is_told(tmp_path: Path, make: object) -> None:
    make(tmp_path / "out.partial")  # type: ignore[operator]
    (line,) = told(tmp_path / "out")
    assert "out.partial, which is there and is no folder; move it away" in line


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("afile/sub/deep", "afile is no folder"),
        ("afile", "is a file"),
        (".", "is the current folder"),
        ("..", "is the current folder, one above it"),
        ("nowhere", "is a link that leads nowhere"),
        ("n" * 300, "File name too long"),
        ("n" * 250, "File name too long"),
    ],
)
def test_where_no_folder_can_be_is_told_by_its_name(
    tmp_path: Path, name: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("afile").touch()
    Path("nowhere").symlink_to("absent")
    (line,) = told(Path(name))
    assert line.startswith(f"--out {name}: ")
    assert rule in line
    assert "would fit" in line


def test_a_folder_that_the_system_refuses_to_make_is_told() -> None:
    with (
        pytest.raises(ValueError, match=r"^--out /proc/x: the export cannot be written \(.*\); a new name in a folder"),
        written_partially(Path("/proc/x"), 1),
    ):
        pass


def test_a_full_disk_is_told_with_the_bytes_and_what_was_made_goes_again(tmp_path: Path) -> None:
    line = r"cannot be written \(No space left on device\): it needs at least 12 bytes, and [\d,]+ are free there"
    with pytest.raises(ValueError, match=line), written_partially(tmp_path / "new" / "out", 12) as partial:
        (partial / "config.json").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1999))
    with (
        pytest.raises(ValueError, match=r"no room\): it needs at least 2,000 bytes, and 1,999 are free there"),
        written_partially(tmp_path / "out", 2000),
    ):
        raise AssertionError("begun")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=0, free=0))  # it does not say
    with written_partially(tmp_path / "out", 2000):
        pass


def test_an_error_of_another_file_keeps_its_words(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), written_partially(tmp_path / "out", 1):
        (tmp_path / "absent").read_bytes()
    assert list(tmp_path.iterdir()) == []


def test_what_stands_under_the_final_name_is_the_new_folder(tmp_path: Path) -> None:
    out = export_at(tmp_path / "out")
    export_at(tmp_path / ".out.replaced")  # of an export that was killed between the renames
    with written_partially(out, 1) as partial:
        (partial / "new.txt").write_text("new")
        assert finish(partial, out, passed=True) == out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["new.txt"]


def test_a_link_keeps_leading_to_the_folder_that_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(export_at(tmp_path / "out").name)
    assert told(tmp_path / "link") == []
    assert followed(tmp_path / "link") == (tmp_path / "out").resolve()


def test_what_did_not_verify_stands_apart_and_the_older_export_stays(tmp_path: Path) -> None:
    out = export_at(tmp_path / "out")
    with written_partially(out, 1) as partial:
        assert finish(partial, out, passed=False) == tmp_path / "out.failed"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.failed"]
    assert (out / REPORT).exists()


def test_a_new_folder_that_cannot_be_renamed_leaves_the_older_export(tmp_path: Path) -> None:
    out = export_at(tmp_path / "out")
    with pytest.raises(ValueError, match="No such file"), written_partially(out, 1) as partial:
        partial.rmdir()
        finish(partial, out, passed=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / REPORT).exists()


def test_what_a_kill_left_is_cleared(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_at(tmp_path / "out.partial")
    assert told(out) == []
    with written_partially(out, 1) as partial:
        assert list(partial.iterdir()) == []


def test_what_comes_while_an_export_is_written_is_kept_and_named_by_the_next(tmp_path: Path) -> None:
    out = export_at(tmp_path / "out")
    partial = export_at(tmp_path / "out.partial")
    (out / "notes.md").write_text("of mine")
    finish(partial, out, passed=True)
    assert (tmp_path / ".out.replaced" / "notes.md").read_text() == "of mine"
    assert any("notes.md" in line for line in told(out))


def test_a_folder_where_a_disk_is_mounted_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    (line,) = told(tmp_path / "out")
    assert "is where another disk is mounted" in line
    assert "a folder in it would fit" in line
