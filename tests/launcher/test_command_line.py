"""The command line: help and check at once, without torch; a user's mistake is a message, our own a traceback."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from meshwright.launcher.__main__ import COMMANDS, function_of, is_told_by_us, load_command, main
from meshwright.launcher.runfile.messages import ConfigError
from meshwright.launcher.runfile.read import read_run_file
from meshwright.launcher.runfile.resume_rules import compare_for_resume

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "numpy", "transformers", "rich.console", "zarr", "pyarrow")


def run_in_a_fresh_process(*args: str) -> tuple[int, str, list[str]]:
    """Run a command; return its exit status, all that it printed and the heavy modules that it loaded."""
    program = f"""
import sys
from meshwright.launcher.__main__ import main
sys.argv = ["meshwright", *{args!r}]
try:
    main()
    status = 0
except SystemExit as stop:
    status = stop.code or 0
print("loaded", *[name for name in {HEAVY!r} if name in sys.modules])
sys.exit(status)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    printed, _, loaded = done.stdout.rpartition("loaded")
    return done.returncode, printed + done.stderr, loaded.split()


def test_a_mistake_in_the_layout_to_go_on_with_is_told_without_torch() -> None:
    status, printed, loaded = run_in_a_fresh_process("verify-resume", "runs/moe_tiny.toml", "--to", "tp=5")
    assert status == 2
    assert "--to 'tp=5': needs 10 ranks or a multiple; the run has 2" in printed
    assert "torch" not in loaded


def test_help_lists_the_commands_and_loads_nothing_heavy() -> None:
    status, printed, loaded = run_in_a_fresh_process("--help")
    assert (status, loaded) == (0, [])
    for name, line in COMMANDS.items():
        assert f"{name}  " in printed
        assert line in printed


@pytest.mark.parametrize("args", [("runs/moe_tiny.toml", "-n", "2"), ("runs/llama3_8b.toml", "--world-size", "64")])
def test_check_says_what_the_run_will_be_and_loads_nothing_heavy(args: tuple[str, ...]) -> None:
    status, printed, loaded = run_in_a_fresh_process("check", *args)
    assert (status, loaded) == (0, [])
    assert f"no problems on {args[-1]} ranks" in printed


def test_check_tells_problems_with_status_2_and_without_a_traceback() -> None:
    status, printed, loaded = run_in_a_fresh_process("check", "runs/moe_tiny.toml", "-n", "3", "train.stps=1")
    assert (status, loaded) == (2, [])
    assert printed.startswith("runs/moe_tiny.toml: 3 problems, nothing was started\n  train.stps: no such key")
    assert "Traceback" not in printed


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself(name: str) -> None:
    path = ROOT / "launcher" / "commands" / f"{function_of(name)}.py"
    assert path.exists()
    command = load_command(name)
    assert command.name == name
    assert len(command.help) > 100
    for option in command.params:
        assert option.name == "help" or option.help, option.name


def examples_in_help() -> list[str]:
    """Return each command line that a command's help shows."""
    lines = [line.strip() for name in COMMANDS for line in (load_command(name).help or "").splitlines()]
    return [line for line in lines if line.startswith(("torchrun ", *(f"meshwright {name} " for name in COMMANDS)))]


def test_the_help_of_each_command_with_arguments_shows_an_example() -> None:
    shown = " ".join(examples_in_help())
    assert [name for name in COMMANDS if f" {name} " not in shown] == ["doctor"]


@pytest.mark.parametrize("example", examples_in_help())
def test_an_example_in_a_help_text_is_taken_as_it_stands(example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(example)
    at = next(at for at, word in enumerate(words) if word in COMMANDS)
    given = load_command(words[at]).make_context(words[at], words[at + 1 :]).params
    if words[at] in ("check", "train"):
        ranks = given["world_size"] if words[at] == "check" else given["ranks"] or 1
        if words[0] == "torchrun":
            ranks = int(words[words.index("--nproc-per-node") + 1])
        run_file = read_run_file(given["run_file"], given["overrides"] or [], world_size=ranks)
        _, refused = compare_for_resume(run_file, run_file, given.get("allow_change") or [])
        assert refused == []


def run_main(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["meshwright", *args])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_a_command_that_does_not_exist_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "chek") == 2
    assert "Did you mean 'check'?" in capsys.readouterr().err


def test_an_option_that_does_not_exist_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "check", "x.toml", "--world", "2") == 2
    assert "No such option" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_told_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_main(monkeypatch, "check", str(tmp_path / "none.toml")) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"{tmp_path}/none.toml: 1 problem, nothing was started")


def fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception, module: str) -> None:
    """Let the command line meet an error raised by code of that module."""
    scope: dict[str, object] = {"error": error, "__name__": module}
    exec("def fail(**_): raise error", scope)
    monkeypatch.setattr("meshwright.launcher.__main__.app", scope["fail"])


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (ConfigError("a.toml", ["one", "two"]), 2, "a.toml: 2 problems, nothing was started\n  one\n  two\n"),
        (ValueError("in_features = 10 does not divide"), 2, "meshwright: in_features = 10 does not divide\n"),
        (OSError(28, "No space left on device"), 1, "meshwright: [Errno 28] No space left on device\n"),
    ],
)
def test_what_we_tell_a_user_has_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, status: int, told: str
) -> None:
    monkeypatch.delenv("MESHWRIGHT_TRACEBACK", raising=False)
    fail_with(monkeypatch, error, "meshwright.launcher.commands.x")
    assert run_main(monkeypatch) == status
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("error", "module"),
    [
        (ValueError("shapes do not match"), "torch.nn.functional"),
        (AssertionError("our bug"), "meshwright.parallel.x"),
        (RuntimeError("gloo"), "meshwright.parallel.x"),
    ],
)
def test_what_went_wrong_elsewhere_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, error: Exception, module: str
) -> None:
    fail_with(monkeypatch, error, module)
    with pytest.raises(type(error), match=str(error)):
        main()


def test_a_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHWRIGHT_TRACEBACK", "1")
    fail_with(monkeypatch, ValueError("told"), "meshwright.launcher.commands.x")
    with pytest.raises(ValueError, match="told"):
        main()


def test_an_error_without_a_traceback_is_not_ours() -> None:
    assert not is_told_by_us(ValueError("never raised"))
