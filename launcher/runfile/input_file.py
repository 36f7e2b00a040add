"""Reads a small file that a user names: a whole one, of a bounded size, and of no deep nesting once it is parsed.

    input_bytes("runs/8b.toml", 2**18)    bytes; a pipe, a device or a larger file is refused before it is read
    nesting([[1], [[2]]])                 3: lists and tables within one another

A pipe may never end and a device never does; what is nested without bound ends the parser, or who walks over it, in a
RecursionError. Knows neither TOML nor JSON.
"""

import stat
from pathlib import Path

# Lists and tables within one another; a run file has 4, a config.json of transformers about 6.
MOST_NESTED = 64


def input_bytes(path: str | Path, most_bytes: int) -> bytes:
    """Return what a file holds.

    Raises:
        ValueError: if it is no ordinary file, or larger than this; the message does not name the file.
        OSError: if it is not there or may not be read.
    """
    status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):  # reading a folder is the system's error
        raise ValueError("is a pipe, a socket or a device; a file on a disk would fit")
    if status.st_size > most_bytes:
        raise ValueError(f"has {status.st_size:,} bytes; at most {most_bytes:,} would fit")
    with Path(path).open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:  # files such as /proc's say that they are empty, and others grow
        raise ValueError(f"has more than the {most_bytes:,} bytes that would fit")
    return content


def nesting(value: object) -> int:
    """Return how many lists and tables stand within one another; 0 for a plain value."""
    depth, level = 0, [value]
    while level := [it for it in level if isinstance(it, dict | list)]:
        depth += 1
        level = [inner for it in level for inner in (it.values() if isinstance(it, dict) else it)]
    return depth
