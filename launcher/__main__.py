"""The command `meshwright`: a table of commands, each loaded when it is called.

    meshwright check runs/moe_tiny.toml --world-size 2     (or: python -m meshwright.launcher check ...)

A command is a function in `launcher/commands/<name>.py` of the same name (a dash becomes an underscore) whose
annotations are its options. `--help` lists the commands from the table below and loads none of them, so that it
answers at once on a login node.

    what went wrong                      the user reads                 exit status
    wrong option, file, key or value     the message, on stderr         2
    disk, network, missing file          the message, on stderr         1
    the training itself (not a number)   the message, on stderr         1
    our bug                              the traceback                  1

MESHWRIGHT_TRACEBACK=1 shows the traceback in every case.
"""

import importlib
import os
import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from meshwright.launcher.last_words import say

COMMANDS = {
    "prepare": "Turn text into a store of token shards.",
    "check": "Find every mistake in a run file, or say what it does.",
    "prove": "Prove that a layout computes what one process does.",
    "verify-resume": "Verify that a killed run can go on with another layout.",
    "train": "Train, or go on from the newest checkpoint.",
    "generate": "Continue a prompt with a trained model.",
    "export": "Write a checkpoint in Hugging Face format, verified.",
    "import": "Begin from a Hugging Face checkpoint.",
    "doctor": "Say what this machine has, and what it lacks.",
}


class LazyCommands(TyperGroup):
    """The commands of the table, as stand-ins with a name and a line of help; the one that is called is imported."""

    def __init__(self, **settings: Any) -> None:
        """Take typer's settings; the table takes the place of its commands."""
        super().__init__(**settings)
        self.commands = {name: TyperCommand(name, help=line) for name, line in COMMANDS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that is called, loaded, with the arguments that remain for it."""
        name, _stand_in, rest = super().resolve_command(ctx, args)
        assert name is not None, "typer ends with a message where the name is none of the table's"
        return name, load_command(name), rest


def function_of(name: str) -> str:
    """Return the name of a command's function and module; Python keeps `import` for itself."""
    return {"import": "import_weights"}.get(name, name.replace("-", "_"))


def load_command(name: str) -> Any:
    """Import a command's module and return the command that its function makes."""
    attribute = function_of(name)
    module = importlib.import_module(f"meshwright.launcher.commands.{attribute}")
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name, help=None)(getattr(module, attribute))
    return typer.main.get_command(app)


app = typer.Typer(
    cls=LazyCommands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def meshwright() -> None:
    """Pretrain language models on any layout of ranks.

    The way through: prepare a store, check a run file, train it, export or generate.
    Each command explains itself: meshwright train --help
    """


def main() -> None:
    """Run the command line; what the user got wrong is told in a message, without a traceback."""
    try:
        app(prog_name="meshwright")
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("MESHWRIGHT_TRACEBACK") == "1" or not is_for_a_person(error):
            raise
        say(error)
        sys.exit(2 if isinstance(error, ValueError) else 1)


def is_for_a_person(error: BaseException) -> bool:
    """Say whether the message of an error is what a user needs, and its traceback is not."""
    if isinstance(error, OSError) and error.errno is not None:
        return True  # the system's answer, which names the file or the address
    return hasattr(error, "is_same_on_all_ranks") or (not isinstance(error, RuntimeError) and is_told_by_us(error))


def is_told_by_us(error: BaseException) -> bool:
    """Say whether the error was raised by Meshwright's own code, for a person to read, and not deep in a library."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and str(frame.tb_frame.f_globals.get("__name__", "")).startswith("meshwright.")


if __name__ == "__main__":
    main()
