"""Texts to token ids, by as many processes as one likes: the result is the same for any number.

    reader      documents in order  ->  tasks of about a megabyte
    workers     each takes a task       (processes, started fresh so that no lock or thread is inherited)
    writer      results in the order of the tasks

What a task holds depends on the documents only. A worker ends by itself when the process that started it
is gone, however that ended.
"""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait

import numpy as np
from jaxtyping import Int64, UInt32
from tokenizers import Tokenizer

from meshwright.data.documents import Document
from meshwright.data.errors import DataError
from meshwright.data.tokenizer import StoreTokenizer, open_tokenizer

TASK_CHARACTERS = 1 << 20
TASK_DOCUMENTS = 4096

_encoder: "_Encoder"  # of a worker process, set when it starts


@dataclass(frozen=True)
class Encoded:
    """The tokens of a task: all documents' ids in a row, and how many each has, its end-of-text token included."""

    ids: UInt32[np.ndarray, "tokens"]
    lengths: Int64[np.ndarray, "documents"]


def encode_documents(
    documents: Iterable[Document], tokenizer: StoreTokenizer, workers: int
) -> Iterator[tuple[list[Document], Encoded]]:
    """Yield tasks with their tokens, in the documents' order.

    Raises:
        DataError: if the tokenizer fails on a text, or a worker process dies.
    """
    tasks = _tasks(documents)
    if workers == 1:
        encoder = _Encoder(tokenizer)
        for task in tasks:
            yield task, encoder.encode([it.text for it in task])
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer,),
    )
    waiting: deque[tuple[list[Document], Future[Encoded]]] = deque()
    try:
        for task in tasks:
            waiting.append((task, pool.submit(_encode_task, [it.text for it in task])))
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    except BrokenProcessPool:
        raise DataError(
            "a process that tokenizes died, most likely for lack of memory; take fewer with --workers, "
            "or cut the text into smaller documents with --documents"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _tasks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    task: list[Document] = []
    characters = 0
    for document in documents:
        task.append(document)
        characters += len(document.text)
        if characters >= TASK_CHARACTERS or len(task) == TASK_DOCUMENTS:
            yield task
            task, characters = [], 0
    if task:
        yield task


class _Encoder:
    def __init__(self, tokenizer: StoreTokenizer) -> None:
        self.tokenizer: Tokenizer = open_tokenizer(tokenizer.json)
        self.origin = tokenizer.origin
        self.end = np.array([tokenizer.end_of_text_id], np.uint32)

    def encode(self, texts: list[str]) -> Encoded:
        """Encode each text by itself, and end it.

        Raises:
            DataError: if the tokenizer's own file makes it fail, for instance on a word that it does not know.
        """
        try:
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises a bare Exception
            raise DataError(
                f"{self.origin}: this tokenizer fails on the text: {error}; mend its file (an unknown token must be in "
                "its vocabulary), or leave out --tokenizer to train one on the text"
            ) from None
        pieces: list[UInt32[np.ndarray, "tokens"]] = []
        lengths = []
        for encoding in encodings:
            ids = np.array(encoding.ids, np.uint32)
            pieces += [ids, self.end]
            lengths.append(len(ids) + 1)
        return Encoded(np.concatenate(pieces), np.array(lengths, np.int64))


def _start_worker(tokenizer: StoreTokenizer) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread for each process: they are as many as asked for
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = _Encoder(tokenizer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker is started by another process"
    wait([parent.sentinel])
    os._exit(1)


def _encode_task(texts: list[str]) -> Encoded:
    return _encoder.encode(texts)
