"""Files that are on the disk when the call returns, with the hash of what was written.

Every byte of a checkpoint goes through here, by plain `os` calls: written, hashed on the way while it is in the
processor's cache, and brought to the disk (fsync) before anything refers to it.
"""

import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

_PIECE = 4 << 20
HASH_NAME = "xxh3_128"


@dataclass(frozen=True)
class FileSeal:
    """Size and hash of a finished file: what the manifest says of it."""

    bytes: int
    xxh3_128: str

    def as_json(self) -> dict[str, Any]:
        """Return the manifest's entry."""
        return asdict(self)


class SealedFile:
    """A new file that hashes what is appended to it; `close` brings it to the disk."""

    def __init__(self, path: Path) -> None:
        """Make the file; it must not exist."""
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._path = path
        self._hash = xxhash.xxh3_128()
        self.size = 0

    def append(self, data: Any) -> None:
        """Write a buffer of bytes at the end."""
        view = memoryview(data).cast("B")
        for begin in range(0, len(view), _PIECE):
            piece = view[begin : begin + _PIECE]
            self._hash.update(piece)
            while piece:  # os.write may take less than it was given
                try:
                    written = os.write(self._fd, piece)
                except OSError as error:
                    raise OSError(error.errno, error.strerror, str(self._path)) from None
                self.size += written
                piece = piece[written:]

    def close(self) -> FileSeal:
        """Bring the file to the disk and return its size and hash."""
        try:
            os.fsync(self._fd)
        finally:
            self.abandon()
        return FileSeal(self.size, self._hash.hexdigest())

    def abandon(self) -> None:
        """Close the file without a word about what is in it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def write_file(path: Path, data: bytes) -> FileSeal:
    """Write a whole file to the disk."""
    file = SealedFile(path)
    try:
        file.append(data)
        return file.close()
    finally:
        file.abandon()


def as_json_bytes(value: Any, *, readable: bool = True) -> bytes:
    """Return JSON in the order of the dicts: one value a line for a person, or all in one line."""
    return (json.dumps(value, indent=1 if readable else None) + "\n").encode()


def hash_file(path: Path) -> FileSeal:
    """Read a file once and return its size and hash."""
    hasher = xxhash.xxh3_128()
    size = 0
    buffer = memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
            size += count
    return FileSeal(size, hasher.hexdigest())


def hash_bytes(data: bytes) -> FileSeal:
    """Return the seal that a file with these bytes has."""
    return FileSeal(len(data), xxhash.xxh3_128(data).hexdigest())


def sync_folder(path: Path) -> None:
    """Bring a folder's entries (names made, renamed, removed) to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def new_token() -> str:
    """Return eight letters that tell one save's folder from another's."""
    return secrets.token_hex(4)
