"""Which files a corpus is made of: paths, folders and globs that a user gives, or the embedded corpus.

The embedded corpus is the standard library of the Python that runs, its .py files without the tests: real
text of a known licence that is on every machine, and is read where it lies.
"""

import glob
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from meshwright.data.errors import DataError

FORMATS = ("auto", "text", "jsonl", "parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".pq": "parquet"}

# Folders of the standard library that hold tests, other people's packages, or tables rather than text.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "_bundled"}


@dataclass(frozen=True)
class Source:
    """One file of a corpus."""

    path: str
    """Its name in the store: as the user gave it, or stdlib/... in the embedded corpus."""
    file: Path
    kind: str
    """text, jsonl or parquet."""
    compression: str
    """gzip, zstd or empty."""
    bytes: int
    """Size on disk."""
    modified_ns: int
    """When it was last changed; a file that changes while it is prepared is refused."""

    @property
    def is_unchanged(self) -> bool:
        """Say whether the file is still the one that was found."""
        try:
            now = self.file.stat()
        except OSError:
            return False
        return (now.st_size, now.st_mtime_ns) == (self.bytes, self.modified_ns)


def find_sources(patterns: Sequence[str], source_format: str = "auto") -> tuple[list[Source], list[str]]:
    """Return the files that paths, folders and globs name, in the order given and sorted within each; and problems.

    With the format `auto` a file's suffix decides: .jsonl, .ndjson and .json (one object on a line), .parquet,
    all else text; .gz and .zst are taken off first. A folder stands for every file below it that is not hidden.
    There is one problem for each pattern that names no file, and for each file that is named twice.
    """
    problems: list[str] = []
    named_by: dict[Path, str] = {}
    sources: list[Source] = []
    for pattern in patterns:
        try:
            files = _expand(pattern)
            why_nothing = "" if files else _why_nothing(pattern)
        except OSError as error:  # a name that is too long, for one
            files, why_nothing = [], f"cannot be looked up: {error.strerror}"
        if why_nothing:
            problems.append(f"{pattern or repr(pattern)}: {why_nothing}")
        for file in files:
            real = file.resolve()
            if real in named_by:
                problems.append(f"{file} is named twice, by {named_by[real]!r} and {pattern!r}; name it once")
                continue
            named_by[real] = pattern
            sources.append(_source(file, file.as_posix(), source_format))
    return sources, problems


def embedded_sources() -> list[Source]:
    """Return the .py files of the running Python's standard library, sorted by name.

    Raises:
        DataError: if this Python has its standard library in no folder.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = {file.relative_to(root).as_posix(): file for file in _python_files(root)}
    if not found:
        raise DataError(
            f"the embedded corpus is Python's own standard library, and {root} holds no .py files; "
            "name other sources, or use a Python that is not packed into one file"
        )
    return [_source(file, f"stdlib/{name}", "text") for name, file in sorted(found.items())]


def embedded_note() -> str:
    """Say what the embedded corpus is, and under which licence."""
    return (
        f"the standard library of Python {platform.python_version()}, read from the running interpreter, without its "
        "tests and encoding tables; licence: PSF-2.0"
    )


def hash_file(file: Path) -> str:
    """Return the xxh3-128 of a file's bytes.

    Raises:
        DataError: if it cannot be read.
    """
    digest = xxhash.xxh3_128()
    try:
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _expand(pattern: str) -> list[Path]:
    if not pattern:
        return []  # a Path would take it for the current folder
    path = Path(os.path.expanduser(pattern))
    if path.is_file():
        return [path]
    if path.is_dir():
        below = (it for it in path.rglob("*") if not any(part.startswith(".") for part in it.relative_to(path).parts))
    else:
        below = (Path(it) for it in glob.glob(str(path), recursive=True))
    return sorted((it for it in below if it.is_file()), key=lambda it: it.as_posix())


def _why_nothing(pattern: str) -> str:
    if not pattern:
        return "an empty name (is a shell variable unset?); name a file, a folder or a glob"
    path = Path(os.path.expanduser(pattern))
    if path.is_dir():
        return "the folder holds no files"
    if path.exists():
        return "is neither a file nor a folder"
    return "no file matches" if glob.has_magic(pattern) else "no such file"


def _source(file: Path, path: str, source_format: str) -> Source:
    compression = COMPRESSIONS.get(file.suffix.lower(), "")
    inner = Path(file.stem) if compression else file
    kind = KINDS.get(inner.suffix.lower(), "text") if source_format == "auto" else source_format
    found = file.stat()
    return Source(path, file, kind, compression, found.st_size, found.st_mtime_ns)


def _python_files(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        below[:] = [it for it in below if it not in LEFT_OUT and not it.startswith("config-")]
        for name in names:
            # A distributor's own files, and the machine's build settings, differ where the library does not.
            if name.endswith(".py") and not name.startswith(("sitecustomize", "usercustomize", "_sysconfigdata")):
                yield Path(folder, name)
