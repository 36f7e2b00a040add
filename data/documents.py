"""Documents out of files: text, JSON lines and parquet, each also as .gz or .zst.

    kind      a document is                                        it is numbered by
    text      the whole file, one line, or the lines between       document, line
              blank ones (paragraph), as the user chooses          or paragraph
    jsonl     a field of the object on one line                    line
    parquet   a column's value in one row                          row

Documents without text are left out. What cannot be read becomes a line in `problems`, and reading goes on,
so that a user learns of every bad line at once; whoever reads must look there before the documents count.
"""

import io
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import BinaryIO, cast

from meshwright.data.sources import Source

UNITS = ("file", "line", "paragraph")
MAX_PROBLEMS = 20
LOOKED_INTO_BYTES = 64 << 20  # of sources that are refused already: it takes seconds, not the time of the corpus
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Document:
    """One text, and where it came from: the source's number, and a number from 0 within it."""

    source: int
    index: int
    text: str


class DocumentReader:
    """Reads the documents of a list of sources, one source at a time."""

    def __init__(self, sources: Sequence[Source], *, field: str, text_unit: str) -> None:
        """Take the field or column that holds the text, and what a document is in a text file."""
        self.sources = sources
        self.field = field
        self.text_unit = text_unit
        self.problems: list[str] = []
        self._bytes_before = 0
        self._file: BinaryIO | None = None

    @property
    def bytes_done(self) -> int:
        """Return how many bytes of the files were read: a measure of progress."""
        return self._bytes_before + (0 if self._file is None or self._file.closed else self._file.tell())

    def unit(self, source: Source) -> str:
        """Return what the numbers within a source count."""
        if source.kind == "text":
            return "document" if self.text_unit == "file" else self.text_unit
        return "line" if source.kind == "jsonl" else "row"

    def read(self, number: int) -> Iterator[Document]:
        """Yield the documents of one source that have text, adding to `problems` what cannot be read."""
        source = self.sources[number]
        try:
            for index, text in self._texts(source):
                if text:
                    yield Document(number, index, text)
        except _UnreadableError as bad:
            self.add_problem(str(bad))
        except (OSError, ValueError) as error:
            self.add_problem(_why_unreadable(source, error))
        self._bytes_before += source.bytes
        self._file = None

    def add_problem(self, problem: str) -> None:
        """Keep a problem; after the first twenty only one more line is kept, which says that there are more."""
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)
        elif len(self.problems) == MAX_PROBLEMS:
            self.problems.append("... and more of this kind")

    @property
    def has_enough_problems(self) -> bool:
        """Say whether reading on would tell a user nothing new."""
        return len(self.problems) > MAX_PROBLEMS

    def _texts(self, source: Source) -> Iterator[tuple[int, str]]:
        if source.kind == "parquet":
            yield from self._parquet_rows(source)
            return
        self._file = source.file.open("rb")
        with self._file, _unpacked(self._file, source) as stream:
            if source.kind == "jsonl":
                yield from self._json_lines(source, stream)
            elif self.text_unit == "file":
                yield 0, _decode(source, stream.read().removeprefix(BOM), offset=0)
            elif self.text_unit == "line":
                for index, offset, line in _lines(stream):
                    yield index, _decode(source, line, offset=offset)
            else:
                yield from _paragraphs(source, stream)

    def _json_lines(self, source: Source, stream: BinaryIO) -> Iterator[tuple[int, str]]:
        for index, offset, line in _lines(stream):
            if self.has_enough_problems:
                return
            if not line.strip():
                continue
            try:
                yield index, self._json_text(_decode(source, line, offset=offset))
            except ValueError as error:
                self.add_problem(f"{source.path}, line {index + 1}: {error}")

    def _json_text(self, line: str) -> str:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON ({error})") from None
        if not isinstance(value, dict):
            raise ValueError(f"holds {type(value).__name__}, an object was expected")
        if self.field not in value:
            raise ValueError(f"has no field {self.field!r}; it has {sorted(value)}: name one with --field")
        text = value[self.field]
        if not isinstance(text, str):
            raise ValueError(f"field {self.field!r} holds {type(text).__name__}, text was expected")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"field {self.field!r} holds half of a surrogate pair at character {error.start}"
            ) from None
        return text

    def _parquet_rows(self, source: Source) -> Iterator[tuple[int, str]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._file = source.file.open("rb")
        with self._file, _seekable(self._file, source) as stream, pq.ParquetFile(stream) as table:
            schema = table.schema_arrow
            if self.field not in schema.names:
                raise _UnreadableError(
                    f"{source.path} has no column {self.field!r}; it has {schema.names}: name one with --field"
                )
            kind = schema.field(self.field).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
                raise _UnreadableError(f"{source.path}: column {self.field!r} holds {kind}, text was expected")
            index = 0
            for batch in table.iter_batches(batch_size=1024, columns=[self.field]):
                for text in batch.column(0).to_pylist():
                    if text is None:
                        self.add_problem(f"{source.path}, row {index + 1}: column {self.field!r} is null")
                    else:
                        yield index, text
                    index += 1


def content_problems(sources: Sequence[Source], *, field: str, text_unit: str) -> list[str]:
    """Look into sources that are refused already, so that a user learns now of what would be refused next."""
    read_before = accumulate((it.bytes for it in sources), initial=0)
    few = [it for it, before in zip(sources, read_before, strict=False) if before + it.bytes <= LOOKED_INTO_BYTES]
    reader = DocumentReader(few, field=field, text_unit=text_unit)
    for number in range(len(few)):
        for _ in reader.read(number):
            if reader.has_enough_problems:
                return reader.problems
    return reader.problems


class _UnreadableError(Exception):
    """The rest of a source cannot be read; says why."""


def _why_unreadable(source: Source, error: OSError | ValueError) -> str:
    # pyarrow reports what is cut short or no parquet at all by an OSError without a number, or by a ValueError.
    if isinstance(error, OSError) and error.errno is not None:
        return f"{source.path} cannot be read: {error.strerror}"
    kind = source.compression or source.kind
    return f"{source.path} cannot be read as {kind}: {str(error).strip()}; is it cut short, or something else?"


def _unpacked(file: BinaryIO, source: Source) -> BinaryIO:
    if not source.compression:
        return file
    import pyarrow as pa

    # pyarrow knows several frames in one file, and refuses one that is cut short; zstandard's reader does not.
    return cast(BinaryIO, io.BufferedReader(pa.input_stream(file, compression=source.compression)))


def _seekable(file: BinaryIO, source: Source) -> BinaryIO:
    """Return a file that can be read from its end: one that is compressed is unpacked into a nameless file first."""
    if not source.compression:
        return file
    whole = tempfile.TemporaryFile()  # noqa: SIM115 - whoever asked closes it
    try:
        with _unpacked(file, source) as stream:
            shutil.copyfileobj(stream, whole)
    except BaseException:
        whole.close()
        raise
    whole.seek(0)
    return cast(BinaryIO, whole)


def _decode(source: Source, raw: bytes, offset: int) -> str:
    """Return text; `offset` is where `raw` lies in the file."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        at = "of the unpacked text" if source.compression else "of the file"
        raise _UnreadableError(
            f"{source.path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start:,} {at} "
            f"({error.reason}); convert it, for example with iconv -f latin1 -t utf-8"
        ) from None


def _lines(stream: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """Yield each line's number from 0, its offset, and its bytes without the line end."""
    offset = 0
    for index, line in enumerate(stream):
        start = offset
        offset += len(line)
        if index == 0 and line.startswith(BOM):
            start, line = start + len(BOM), line.removeprefix(BOM)
        yield index, start, line.rstrip(b"\r\n")


def _paragraphs(source: Source, stream: BinaryIO) -> Iterator[tuple[int, str]]:
    index = 0
    lines: list[str] = []
    for _, offset, line in _lines(stream):
        if line.strip():
            lines.append(_decode(source, line, offset=offset))
        elif lines:
            yield index, "\n".join(lines)
            index, lines = index + 1, []
    if lines:
        yield index, "\n".join(lines)
