"""From text to a token store: find the files, train or load the tokenizer, encode, write.

    sources --> documents --> train or validation?  by the document's own text and the seed
                    |
                    |--> tokenizer, trained on documents of the train split alone
                    `--> token ids, in the documents' order --> store, renamed into place when it is whole

The store is a function of the sources' contents and the options that `recipe` holds: not of the number of
workers, of where the sources lie, or of what a killed run left. A store with the same recipe is not
written again.
"""

import os
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from meshwright.data.aside import some_of, strangers, why_no_folder, written_aside
from meshwright.data.documents import UNITS, Document, DocumentReader, content_problems
from meshwright.data.encode import Encoded, encode_documents
from meshwright.data.errors import DataError
from meshwright.data.meta import TOKENIZER_NAME, SourceMeta, SplitMeta, StoreMeta, TokenizerMeta
from meshwright.data.sources import FORMATS, Source, embedded_note, embedded_sources, find_sources, hash_file
from meshwright.data.store import TokenStore
from meshwright.data.tokenizer import MIN_VOCAB_SIZE, StoreTokenizer, load_tokenizer, train_tokenizer, unknown_share
from meshwright.data.write import SplitWriter, open_group, unigram_nats

TOKENIZER_SAMPLE_BYTES = 128 << 20  # text that a tokenizer is trained on, at most; more changes few merges
DEFAULT_VOCAB_SIZE = 8192
BYTES_PER_WORKER = 4 << 20  # a process takes about as long to start as to encode this much

# What a store consists of, by path within it; folders end in /.
STORE_FILE = re.compile(
    r"(meta|tokenizer|zarr)\.json|(train|validation)/"
    r"(zarr\.json|(tokens|document_starts|document_source|document_index)/(zarr\.json|c/\d*)?)?"
)

Report = Callable[[str, int, int], None]
"""Called with a phase ("hashing", "tokenizer", "encoding") and the bytes of the sources done and in all."""


@dataclass(frozen=True)
class PrepareOptions:
    """What `meshwright prepare` was asked for."""

    out: Path
    sources: tuple[str, ...] = ()
    """Paths, folders and globs; none stands for the embedded corpus."""
    source_format: str = "auto"
    field: str = "text"
    text_unit: str = "file"
    vocab_size: int | None = None
    """Of a tokenizer that is trained; None takes 8192."""
    tokenizer: Path | None = None
    """A tokenizer.json; None trains one."""
    end_of_text: str = ""
    validation_fraction: float = 0.02
    seed: int = 0
    seq_len: int = 0
    """If not 0, both splits must hold at least one window of this length."""
    workers: int = 0
    """Processes; 0 takes as many as there are cores."""
    overwrite: bool = False

    def problems(self) -> list[str]:
        """Return everything that is wrong with the options themselves."""
        rules = [
            (self.source_format in FORMATS, f"--format {self.source_format}: must be one of {', '.join(FORMATS)}"),
            (self.text_unit in UNITS, f"--documents {self.text_unit}: must be one of {', '.join(UNITS)}"),
            (
                self.tokenizer is None or self.vocab_size is None,
                f"--vocab-size {self.vocab_size}: is for a tokenizer trained here; {self.tokenizer} has its own",
            ),
            (
                self.vocab_size is None or self.vocab_size >= MIN_VOCAB_SIZE,
                f"--vocab-size {self.vocab_size}: must be at least {MIN_VOCAB_SIZE}: all bytes and the end of text",
            ),
            (
                self.tokenizer is not None or not self.end_of_text,
                f"--end-of-text {self.end_of_text}: goes with --tokenizer; one trained here has its own",
            ),
            (
                0 <= self.validation_fraction < 1,
                f"--validation-fraction {self.validation_fraction}: must be at least 0 and below 1",
            ),
            (self.seed >= 0, f"--seed {self.seed}: must be at least 0"),
            (self.seq_len >= 0, f"--seq-len {self.seq_len}: must be at least 0"),
            (self.workers >= 0, f"--workers {self.workers}: must be at least 0"),
        ]
        return [message for holds, message in rules if not holds] + _out_problems(self.out, self.overwrite)


@dataclass(frozen=True)
class Prepared:
    """A store on disk, and whether it was there before."""

    store: Path
    meta: StoreMeta
    was_there: bool


@dataclass(frozen=True)
class _Written:
    """What the encoding of a corpus has put on disk and counted."""

    splits: dict[str, SplitMeta]
    num_documents: list[int]
    """Of each source."""
    unigram_nats: float | None
    unknown_share: float | None


def prepare(options: PrepareOptions, report: Report = lambda phase, done, total: None) -> Prepared:
    """Write a token store, or find that an equal one is there.

    Raises:
        DataError: with every problem found; nothing is then written, and what was at `out` is as it was.
    """
    sources, tokenizer = _check_inputs(options)
    hashes = _hash_sources(options, sources, report)
    recipe = _recipe(options, sources, hashes, tokenizer)
    there = _existing(options, recipe)
    if there is not None:
        _check_windows(options, there)
        return Prepared(options.out, there, was_there=True)
    reader = DocumentReader(sources, field=options.field, text_unit=options.text_unit)
    try:
        with written_aside(options.out) as folder:
            _existing(options, recipe)  # again, now that nobody else can write it
            tokenizer = tokenizer or _train(options, reader, report)
            written = _encode(folder, options, reader, tokenizer, report)
            meta = StoreMeta(
                format="meshwright-tokens",
                version=1,
                corpus=embedded_note() if not options.sources else "files given by the user",
                vocab_size=tokenizer.vocab_size,
                dtype=_dtype(tokenizer),
                tokenizer=TokenizerMeta(
                    sha256=tokenizer.sha256,
                    origin=tokenizer.origin,
                    end_of_text=tokenizer.end_of_text,
                    end_of_text_id=tokenizer.end_of_text_id,
                ),
                splits=written.splits,
                validation_unigram_nats=written.unigram_nats,
                unknown_share=written.unknown_share,
                sources=[
                    SourceMeta(
                        path=it.path,
                        kind=it.kind,
                        unit=reader.unit(it),
                        bytes=it.bytes,
                        xxh3_128=digest,
                        num_documents=n,
                    )
                    for it, digest, n in zip(sources, hashes, written.num_documents, strict=True)
                ],
                recipe=recipe,
                written_with={"python": platform.python_version()}
                | {name: version(name) for name in ("meshwright", "tokenizers", "zarr")},
            )
            _check_windows(options, meta)
            (folder / TOKENIZER_NAME).write_bytes(tokenizer.json)
            (folder / "meta.json").write_text(meta.to_json(), encoding="utf-8")
    except OSError as error:
        why = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        line = f"--out {options.out}: the store cannot be written ({why}), and nothing was left behind"
        raise DataError(f"{line}; another folder, or more room on that disk, would fit") from error
    return Prepared(options.out, meta, was_there=False)


def is_validation(text: str, seed: int, fraction: float) -> bool:
    """Say whether a document belongs to the validation split: decided by its text and the seed alone.

    Equal documents are always on the same side, and a document stays on its side when others come or go.
    """
    return xxhash.xxh3_64_intdigest(text.encode(), seed % 2**64) < int(fraction * 2**64)


def _check_inputs(options: PrepareOptions) -> tuple[list[Source], StoreTokenizer | None]:
    problems = options.problems()
    sources: list[Source] = []
    tokenizer = None
    try:
        if options.sources:
            sources, not_found = find_sources(options.sources, options.source_format)
            problems += not_found
        else:
            sources = embedded_sources()
    except DataError as error:
        problems += error.problems
    try:
        tokenizer = load_tokenizer(options.tokenizer, options.end_of_text) if options.tokenizer else None
    except DataError as error:
        problems += error.problems
    if problems:
        raise DataError(*problems, *_content_problems(options, sources))
    return sources, tokenizer


def _out_problems(out: Path, overwrite: bool) -> list[str]:
    """Return why no store can be written at `out`; that another store is there is for later."""
    is_written = overwrite or not os.path.lexists(out / "meta.json")
    if why := why_no_folder(out, is_written=is_written):
        return [f"--out {out}: {why}; name another folder, for the store alone"]
    try:
        if out.exists() and any(out.iterdir()) and not os.path.lexists(out / "meta.json"):
            return [f"--out {out}: holds files that are not a token store, which prepare never touches; name another"]
        if overwrite and (foreign := strangers(out, STORE_FILE.fullmatch)):
            return [
                f"--out {out}: --overwrite would remove what prepare has not written there ({some_of(foreign)}); "
                "move it away, or name another folder"
            ]
    except OSError as error:
        return [f"--out {out}: {error.strerror}; name another folder"]
    return []


def _content_problems(options: PrepareOptions, sources: list[Source]) -> list[str]:
    """Say what is wrong with the contents of sources that are refused already, unless the options forbid to look."""
    if not options.sources or options.text_unit not in UNITS or options.source_format not in FORMATS:
        return []
    return content_problems(sources, field=options.field, text_unit=options.text_unit)


def _hash_sources(options: PrepareOptions, sources: list[Source], report: Report) -> list[str]:
    total = sum(it.bytes for it in sources)
    done = 0
    hashes = []
    readable = []
    problems: list[str] = []
    for source in sources:
        try:
            hashes.append(hash_file(source.file))
            readable.append(source)
        except DataError as error:
            problems += error.problems
        done += source.bytes
        report("hashing", done, total)
    if problems:
        raise DataError(*problems, *_content_problems(options, readable))
    return hashes


def _recipe(
    options: PrepareOptions, sources: list[Source], hashes: list[str], tokenizer: StoreTokenizer | None
) -> dict[str, Any]:
    """Return everything that decides the tokens; paths do not."""
    contents = sha256()
    for source, digest in zip(sources, hashes, strict=True):
        contents.update(f"{source.kind} {source.compression} {digest}\n".encode())
    return {
        "sources": contents.hexdigest(),
        "field": options.field,
        "documents": options.text_unit,
        "tokenizer": tokenizer.sha256
        if tokenizer
        else f"trained, vocabulary of {options.vocab_size or DEFAULT_VOCAB_SIZE}",
        "end_of_text": tokenizer.end_of_text if tokenizer else "",
        "validation_fraction": options.validation_fraction,
        "seed": options.seed,
    }


def _existing(options: PrepareOptions, recipe: dict[str, Any]) -> StoreMeta | None:
    """Return the store that is there if it is the one asked for; refuse to write over anything else."""
    out = options.out
    if problems := _out_problems(out, options.overwrite):
        raise DataError(*problems)
    if options.overwrite or not out.exists() or not any(out.iterdir()):
        return None
    there = TokenStore.open(out).meta
    if there.recipe == recipe:
        return there
    different = [
        key if key == "sources" else f"{key} (there {there.recipe.get(key)!r}, asked for {value!r})"
        for key, value in recipe.items()
        if there.recipe.get(key) != value
    ]
    raise DataError(
        f"--out {out}: holds another store; different are: {', '.join(different)}; "
        "name another folder, or replace it with --overwrite"
    )


def _train(options: PrepareOptions, reader: DocumentReader, report: Report) -> StoreTokenizer:
    """Train a tokenizer on the train split; of a large corpus, on a like share of each source."""
    total = sum(it.bytes for it in reader.sources)
    fraction = options.validation_fraction

    def texts() -> Iterator[str]:
        for number, source in enumerate(reader.sources):
            left = max(1, TOKENIZER_SAMPLE_BYTES * source.bytes // max(1, total))
            for document in reader.read(number):
                if not is_validation(document.text, options.seed, fraction):
                    yield document.text
                    left -= len(document.text)
                if left <= 0 and total > TOKENIZER_SAMPLE_BYTES:
                    break
            report("tokenizer", min(total, reader.bytes_done), total)

    tokenizer = train_tokenizer(texts(), options.vocab_size or DEFAULT_VOCAB_SIZE)
    if reader.problems:
        raise DataError(*reader.problems)
    return tokenizer


def _encode(
    folder: Path, options: PrepareOptions, reader: DocumentReader, tokenizer: StoreTokenizer, report: Report
) -> _Written:
    """Write both splits, and count what they hold."""
    reader = DocumentReader(reader.sources, field=reader.field, text_unit=reader.text_unit)
    total = sum(it.bytes for it in reader.sources)
    names = ["train", "validation"] if options.validation_fraction > 0 else ["train"]
    root = open_group(folder)
    writers = {it: SplitWriter(root, it, dtype=_dtype(tokenizer), vocab_size=tokenizer.vocab_size) for it in names}
    num_documents = [0] * len(reader.sources)
    for documents, encoded in encode_documents(_documents(reader), tokenizer, _workers(options.workers, total)):
        held_out = np.array([is_validation(it.text, options.seed, options.validation_fraction) for it in documents])
        _append(writers["train"], documents, encoded, ~held_out)
        if held_out.any():
            _append(writers["validation"], documents, encoded, held_out)
        for document in documents:
            num_documents[document.source] += 1
        report("encoding", min(total, reader.bytes_done), total)
    if reader.problems:
        raise DataError(*reader.problems)
    if changed := [it.path for it in reader.sources if not it.is_unchanged]:
        raise DataError(
            *(f"{path} was changed while it was read; prepare again when it is at rest" for path in changed)
        )
    _check_not_empty(options, sum(num_documents), {it: writer.num_documents for it, writer in writers.items()})
    counts = {it: writer.counts for it, writer in writers.items()}
    return _Written(
        unknown_share=unknown_share(tokenizer, np.sum(list(counts.values()), axis=0), sum(num_documents)),
        unigram_nats=unigram_nats(counts["train"], counts["validation"]) if "validation" in counts else None,
        num_documents=num_documents,
        splits={name: writer.close() for name, writer in writers.items()},
    )


def _documents(reader: DocumentReader) -> Iterator[Document]:
    """Yield every document until a problem is found; from there on only look for more problems."""
    for number in range(len(reader.sources)):
        for document in reader.read(number):
            if not reader.problems:
                yield document
            elif reader.has_enough_problems:
                return


def _append(writer: SplitWriter, documents: list[Document], encoded: Encoded, wanted: np.ndarray) -> None:
    if not wanted.any():
        return
    chosen = [document for document, is_wanted in zip(documents, wanted, strict=True) if is_wanted]
    writer.append(
        encoded.ids[np.repeat(wanted, encoded.lengths)],
        encoded.lengths[wanted],
        np.array([it.source for it in chosen], np.int64),
        np.array([it.index for it in chosen], np.int64),
    )


def _check_not_empty(options: PrepareOptions, num_documents: int, by_split: dict[str, int]) -> None:
    if num_documents == 0:
        raise DataError("the corpus is empty: no source holds any text")
    for name, count in by_split.items():
        if count == 0:
            raise DataError(
                f"the {name} split is empty: --validation-fraction {options.validation_fraction} of {num_documents} "
                f"documents, chosen with --seed {options.seed}, left none for it; take another fraction or seed (0 for "
                "no validation split), give more documents, or cut text files into smaller ones with --documents"
            )


def _check_windows(options: PrepareOptions, meta: StoreMeta) -> None:
    if options.seq_len and (problems := meta.problems(seq_len=options.seq_len)):
        raise DataError(*problems)


def _dtype(tokenizer: StoreTokenizer) -> Any:
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def _workers(asked: int, total_bytes: int) -> int:
    """Return the number of processes: as asked, or one for each core that has enough to do."""
    if asked:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none
    return max(1, min(cores, total_bytes // BYTES_PER_WORKER))
