"""What a machine can see of the rules of style: lengths, words that promise less than the whole, lost precision."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("launcher", "parallel", "model", "data", "kernels")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
# Written so that this file does not find itself.
LESS_THAN_WHOLE = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|NotImplemented" r"Error)\b|\bfor n" r"ow\b", re.IGNORECASE)
CANNOT_FAIL = re.compile(r"assert Tr" r"ue\b|\bor Tr" r"ue\b|except Exception:\s*pa" r"ss")
# An address of a package registry, in words that any reader's own settings should decide.
REGISTRY = re.compile(r"pypi\.o" r"rg|pythonhos" r"ted|download\.pyt" r"orch", re.IGNORECASE)
FLOAT = re.compile(r"\.float\(\)")
PRECISION = ROOT / "kernels" / "precision.py"


def found(pattern: re.Pattern[str], paths: list[Path]) -> list[str]:
    """Return where a pattern stands, as file:line: text."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]


def too_long(source: str, limit: int, *, is_command: bool = False) -> list[str]:
    """Return the functions of a source that take more than `limit` lines, decorators not counted.

    The signature and the docstring of a command are the text of its help, and not counted either.
    """
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            begins = node.body[min(1, len(node.body) - 1)].lineno if is_command else node.lineno
            length = (node.end_lineno or 0) - begins + 1
            if length > limit:
                wrong.append(f"{node.name}: {length} lines")
    return wrong


def too_many_parameters(source: str, limit: int) -> list[str]:
    """Return the functions of a source that take more than `limit` parameters, `self` and `cls` not counted."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(argument.arg not in ("self", "cls") for argument in every)
            if count > limit:
                wrong.append(f"{node.name}: {count} parameters")
    return wrong


def test_the_reader_finds_what_it_looks_for() -> None:
    source = "def f(a, b, *, c):\n    x = 1\n    return x\n"
    assert too_long(source, 2) == ["f: 3 lines"]
    assert too_long(source, 3) == []
    assert too_long(source, 0, is_command=True) == ["f: 1 lines"]
    assert too_many_parameters(source, 2) == ["f: 3 parameters"]
    assert LESS_THAN_WHOLE.search("# TO" + "DO: later")
    assert FLOAT.search("x.float() * y")


def test_files_are_read_in_one_sitting() -> None:
    assert FILES
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in [*FILES, *TESTS]}
    assert {path: lines for path, lines in lengths.items() if lines > 400} == {}


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder != "kernels"])
def test_functions_are_short(folder: str) -> None:
    wrong = {
        path.name: too_long(path.read_text(), 60, is_command=path.parent.name == "commands")
        for path in FILES
        if path.is_relative_to(ROOT / folder)
    }
    assert {name: lines for name, lines in wrong.items() if lines} == {}


def test_signatures_are_short() -> None:
    """A command's parameters are its options, so that commands are left out; kernels may take more."""
    ours = [path for path in FILES if path.parent != ROOT / "launcher" / "commands" and "kernels" not in path.parts]
    wrong = {path.name: too_many_parameters(path.read_text(), 8) for path in ours}
    assert {name: lines for name, lines in wrong.items() if lines} == {}


def test_nothing_is_cast_down_to_fp32() -> None:
    """`.float()` turns fp64 into fp32; `kernels.precision.at_least_fp32` does not."""
    assert found(FLOAT, [path for path in FILES if path != PRECISION]) == []


def test_no_word_promises_less_than_the_whole() -> None:
    assert found(LESS_THAN_WHOLE, [*FILES, *TESTS]) == []


def test_tests_can_fail() -> None:
    assert found(CANNOT_FAIL, TESTS) == []


def test_no_package_registry_is_named() -> None:
    scripts = [*ROOT.glob("slurm/*.sh"), *ROOT.glob("tests/*.sh"), ROOT / ".ci" / "run", ROOT / "constraints.txt"]
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*.toml")]
    assert found(REGISTRY, [*FILES, *TESTS, *scripts, *pages]) == []


def test_sources_are_ascii() -> None:
    odd = re.compile(r"[^\x00-\x7f]")
    assert found(odd, [*FILES, *ROOT.glob("slurm/*.sh"), *ROOT.glob("runs/*.toml")]) == []
