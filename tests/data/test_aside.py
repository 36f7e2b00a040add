"""A single file is written whole or not at all, in the place and with the mode of the old one."""

from pathlib import Path

from meshwright.data.aside import write_whole


def test_a_file_that_is_written_anew_keeps_its_mode_and_may_have_a_long_name(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250 + ".toml")
    write_whole(path, "old")
    path.chmod(0o600)
    write_whole(path, "new")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", 0o600)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
