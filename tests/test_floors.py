"""Imports run down the floors, never up, and our modules are known by their full name alone.

    launcher -> model -> parallel -> kernels        launcher -> data

Every import is read from the source, also those inside functions and under TYPE_CHECKING.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A folder may import itself and these.
BELOW = {
    "launcher": {"model", "data", "parallel", "kernels"},
    "model": {"parallel", "kernels"},
    "parallel": {"kernels"},
    "kernels": set(),
    "data": set(),
}
# These answer on a login node at once, so that nothing they import, directly or not, may be heavy.
LIGHT = (
    "launcher/__main__.py", "launcher/commands/check.py", "launcher/here.py", "launcher/ranks/environment.py",
    "launcher/ranks/local_ranks.py",
    "model/config.py", "model/presets.py", "model/pattern.py", "model/counts/costs.py", "parallel/config.py",
    "data/config.py", "data/meta.py",
)  # fmt: skip
HEAVY = {"torch", "numpy", "transformers", "zarr", "pyarrow", "matplotlib"}


def imported(source: str) -> list[tuple[int, str]]:
    """Return line and full name of everything that a source imports; `from a import b` is a.b."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found


def wrong_imports(folder: str, source: str) -> list[str]:
    """Return what is wrong with the imports of a file of `folder`."""
    wrong = []
    for line, name in imported(source):
        parts = name.split(".")
        if name.startswith("."):
            wrong.append(f"line {line}: {name} is relative")
        elif parts[0] in BELOW:
            wrong.append(f"line {line}: {name} must be meshwright.{name}")
        elif parts[0] == "meshwright" and (len(parts) < 3 or parts[1] not in {folder, *BELOW.get(folder, set())}):
            wrong.append(f"line {line}: {folder} may not import {name}")
    return wrong


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_the_reader_sees_imports_wherever_they_stand() -> None:
    source = "def f():\n    import model\n    from meshwright.launcher import build\n    from . import x\nimport json\n"
    assert wrong_imports("parallel", source) == [
        "line 2: model must be meshwright.model",
        "line 3: parallel may not import meshwright.launcher.build",
        "line 4: ..x is relative",
    ]
    assert wrong_imports("launcher", "from meshwright.model.stack import Stack\nfrom data_tools import x") == []
    assert wrong_imports("data", "from meshwright.kernels.matmul.linear import linear") != []


@pytest.mark.parametrize("folder", BELOW)
def test_no_import_runs_up(folder: str) -> None:
    assert sources(folder)
    wrong = {str(path.relative_to(ROOT)): wrong_imports(folder, path.read_text()) for path in sources(folder)}
    assert {path: lines for path, lines in wrong.items() if lines} == {}


def test_every_code_folder_is_on_a_floor() -> None:
    assert {path.name for path in (ROOT / "src" / "meshwright").iterdir()} == {*BELOW, "slurm"}


def test_top_folders_are_no_packages_of_their_own() -> None:
    """With an __init__.py, our `kernels/` would hide an installed distribution of that name."""
    assert [folder for folder in (*BELOW, "slurm", "src/meshwright") if (ROOT / folder / "__init__.py").exists()] == []


def test_no_file_bears_the_name_of_a_standard_module() -> None:
    """Such a file, run as a script, would hide the standard module from everything it imports."""
    import sys

    names = {str(path.relative_to(ROOT)) for folder in BELOW for path in sources(folder)}
    assert {name for name in names if Path(name).stem in sys.stdlib_module_names - {"__main__"}} == set()


def test_what_a_login_node_runs_loads_nothing_heavy() -> None:
    """Follow imports at the top of modules from each light file; those inside functions are made when needed."""
    seen: dict[Path, str] = {ROOT / name: name for name in LIGHT}
    queue, heavy = list(seen), []
    while queue:
        path = queue.pop()
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            for _, name in imported(ast.unparse(node)):
                parts = name.split(".")
                if parts[0] in HEAVY:
                    heavy.append(f"{seen[path]} -> {name}")
                target = ROOT.joinpath(*parts[1:-1]).with_suffix(".py")
                if parts[0] == "meshwright" and target.exists() and target not in seen:
                    seen[target] = f"{seen[path]} -> {target.relative_to(ROOT)}"
                    queue.append(target)
    assert heavy == []
