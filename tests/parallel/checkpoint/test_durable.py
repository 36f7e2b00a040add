"""Files are written and hashed in pieces of 4 MiB, and hold what was given."""

import os
from pathlib import Path

import xxhash

from meshwright.parallel.checkpoint import durable
from meshwright.parallel.checkpoint.durable import FileSeal, SealedFile, hash_file


def test_a_file_of_several_pieces_is_what_was_given_and_so_is_its_hash(tmp_path: Path) -> None:
    data = os.urandom(2 * durable._PIECE + 3)
    file = SealedFile(tmp_path / "new")
    file.append(b"before")
    file.append(data)
    whole = b"before" + data
    expected = FileSeal(len(whole), xxhash.xxh3_128(whole).hexdigest())
    assert file.close() == hash_file(tmp_path / "new") == expected
    assert (tmp_path / "new").read_bytes() == whole
