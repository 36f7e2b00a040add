"""`meshwright prepare`: turn text into a token store that runs can read."""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from meshwright.data.prepare import Prepared

Sources = Annotated[
    list[str] | None,
    typer.Argument(
        help="Files, folders and globs ('corpus/**/*.jsonl.zst', quoted): text, .jsonl, .parquet, each also as .gz "
        "or .zst. None: the embedded corpus, the source files of this Python's standard library (licence PSF-2.0).",
        show_default=False,
    ),
]
Out = Annotated[Path, typer.Option(help="Folder of the store.")]
VocabSize = Annotated[
    int | None,
    typer.Option(
        help="Vocabulary of the tokenizer that is trained on the text: 4096 to 16384 for small models and corpora, "
        "32768 to 131072 for large ones. A multiple of 64 suits every accelerator.",
        show_default="8192",
    ),
]
TokenizerFile = Annotated[
    Path | None,
    typer.Option(help="A Hugging Face tokenizer.json to use instead of training one.", show_default=False),
]
EndOfText = Annotated[
    str,
    typer.Option(
        help="With --tokenizer: the token that ends a document. Needed where it has none of the usual ones "
        "(<|endoftext|>, <|end_of_text|>, </s>, <eos>, ...), or several.",
        show_default=False,
    ),
]
Field = Annotated[str, typer.Option(help="Field (.jsonl) or column (.parquet) that holds the text.")]
Format = Annotated[
    str, typer.Option("--format", help="text, jsonl or parquet; auto goes by each file's suffix.", metavar="FORMAT")
]
Documents = Annotated[
    str,
    typer.Option(
        help="What a document is in a text file: the whole file, each line, or each paragraph (between blank "
        "lines). In .jsonl and .parquet it is a line or row.",
        metavar="file|line|paragraph",
    ),
]
ValidationFraction = Annotated[
    float,
    typer.Option(
        help="Share of the documents that is held out: 0.01 to 0.05 for small corpora, 0.0005 for large ones; "
        "0 for none."
    ),
]
Seed = Annotated[int, typer.Option(help="Decides, with each document's text, which documents are held out.")]
SeqLen = Annotated[
    int,
    typer.Option(
        help="The data.seq_len you will train with: refuse a corpus too small for one window of it. 0: no check."
    ),
]
Workers = Annotated[
    int, typer.Option(help="Processes that tokenize; 0: one for each core. The store is the same for any number.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the store that is at --out.")]


def prepare(
    sources: Sources = None,
    out: Out = Path("output/store"),
    vocab_size: VocabSize = None,
    tokenizer: TokenizerFile = None,
    end_of_text: EndOfText = "",
    field: Field = "text",
    source_format: Format = "auto",
    documents: Documents = "file",
    validation_fraction: ValidationFraction = 0.02,
    seed: Seed = 0,
    seq_len: SeqLen = 0,
    workers: Workers = 0,
    overwrite: Overwrite = False,
) -> None:
    """Turn text into a token store: train a tokenizer (or take yours), encode, split by document.

    The store appears under --out when it is complete, never half. If it is already there, with the same
    contents and options, nothing is done.

    Examples:

        meshwright prepare --out output/stdlib --vocab-size 4096

        meshwright prepare 'corpus/*.jsonl.zst' --field content --out output/corpus --vocab-size 32768

        meshwright prepare book.txt --documents paragraph --tokenizer tokenizer.json --out output/book
    """
    from meshwright.data.errors import DataError
    from meshwright.data.prepare import PrepareOptions
    from meshwright.data.prepare import prepare as write_store

    began = time.monotonic()
    try:
        options = PrepareOptions(
            out=Path(os.path.expanduser(out)),
            sources=tuple(sources or ()),
            source_format=source_format,
            field=field,
            text_unit=documents,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            end_of_text=end_of_text,
            validation_fraction=validation_fraction,
            seed=seed,
            seq_len=seq_len,
            workers=workers,
            overwrite=overwrite,
        )
        with _Progress() as progress:
            prepared = write_store(options, progress.report)
    except DataError as error:
        count = len(error.problems)
        print(f"prepare: {count} problem{'s' if count > 1 else ''}, nothing was written", file=sys.stderr)
        for problem in error.problems:
            print(f"  {problem}", file=sys.stderr)
        raise typer.Exit(2) from None
    _print_summary(prepared, time.monotonic() - began)


class _Progress:
    """A bar for each phase, on stderr; nothing where that is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description:>9}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._phases: dict[str, TaskID] = {}

    def __enter__(self) -> "_Progress":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def report(self, phase: str, done: int, total: int) -> None:
        """Move the bar of a phase; it appears at its first report."""
        if phase not in self._phases:
            self._phases[phase] = self._progress.add_task(phase, total=total)
        self._progress.update(self._phases[phase], completed=done)


def _print_summary(prepared: "Prepared", seconds: float) -> None:
    meta = prepared.meta
    num_tokens = sum(it.num_tokens for it in meta.splits.values())
    if prepared.was_there:
        print(f"{prepared.store} is already there, with the same contents and options: nothing was done")
    else:
        print(f"wrote {prepared.store}: {num_tokens:,} tokens in {seconds:.1f} s")
    print(f"  corpus       {len(meta.sources):,} files: {meta.corpus}")
    for name, split in meta.splits.items():
        print(f"  {name:<12} {split.num_tokens:,} tokens, {split.num_documents:,} documents")
    print(f"  tokenizer    {meta.vocab_size:,} tokens, {meta.tokenizer.end_of_text} ends a document")
    print(f"               {meta.tokenizer.origin}")
    if meta.unknown_share:
        print(f"               {100 * meta.unknown_share:.2g}% of the text's tokens are unknown to it")
    if meta.validation_unigram_nats is not None:
        print(f"  unigram loss {meta.validation_unigram_nats:.3f} nats a token of the validation split")
    print(f"  fingerprint  {meta.fingerprint}")
