"""The tokenizer of a store: trained on its text, or a tokenizer.json that the user gives.

One that is trained here is a byte-level BPE with GPT-2's pre-tokenizer, a form that every tool knows:

    id 0                  <|endoftext|>, which ends each document
    ids 1 to 256          the bytes, so that no text is unknown
    ids 257 and above     merges, most frequent first

The same texts give the same file, whatever the number of threads. In training, not in encoding, a run that
the pre-tokenizer leaves whole (letters, digits, signs or blanks: base64, DNA) is cut into pieces of 1,024 bytes.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from meshwright.data.errors import DataError

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257

# A trainer's time is the square of a word's length: 250 kB of one letter take a minute whole, 0.1 s in pieces.
# No word is as long, and a text without such runs gives the same tokenizer for any length that is above its words'.
LONGEST_WORD = 1024

MAX_UNKNOWN_SHARE = 0.5  # of a text's tokens; a tokenizer that knows less of it is refused

# What families call the token that ends a document; Llama 3, GPT-2 and Qwen, Llama 2 and T5, others.
KNOWN_ENDS = ("<|end_of_text|>", END_OF_TEXT, "</s>", "<eos>", "<|eos|>", "[EOS]", "<eos_token>")


@dataclass(frozen=True)
class StoreTokenizer:
    """A tokenizer.json with what a store needs to know of it."""

    json: bytes
    origin: str
    end_of_text: str
    end_of_text_id: int
    vocab_size: int
    """One more than its largest id; ids may have gaps."""
    unknown: str = ""
    """The token that stands for what the vocabulary lacks; empty where nothing is unknown, as with all bytes."""
    unknown_id: int | None = None

    @property
    def sha256(self) -> str:
        """Return the hash of the file."""
        return hashlib.sha256(self.json).hexdigest()


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> StoreTokenizer:
    """Train a byte-level BPE; where the text has too few repeated pairs, its vocabulary stays smaller."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([byte_level, pre_tokenizers.FixedLength(LONGEST_WORD)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = byte_level
    size = _vocab_size(tokenizer)
    origin = f"byte-level BPE trained on this store's train split, {size} of {vocab_size} tokens"
    return StoreTokenizer(
        json=tokenizer.to_str(pretty=False).encode(),
        origin=origin,
        end_of_text=END_OF_TEXT,
        end_of_text_id=_id_of(tokenizer, END_OF_TEXT),
        vocab_size=size,
    )


def load_tokenizer(path: Path, end_of_text: str = "") -> StoreTokenizer:
    """Read a tokenizer.json; without `end_of_text` it must have exactly one of the usual end tokens.

    Raises:
        DataError: if it is missing, is no tokenizer, or does not tell which token ends a document.
    """
    try:
        content = Path(os.path.expanduser(path)).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the tokenizer cannot be read: {error.strerror}") from None
    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises a bare Exception
        raise DataError(f"{path} is no tokenizer.json of Hugging Face tokenizers: {error}") from None
    end = _end_of_text(path, tokenizer, end_of_text)
    unknown_id = _unknown_id(content, tokenizer)
    return StoreTokenizer(
        json=content,
        origin=str(path),
        end_of_text=end,
        end_of_text_id=_id_of(tokenizer, end),
        vocab_size=_vocab_size(tokenizer),
        unknown="" if unknown_id is None else tokenizer.id_to_token(unknown_id) or "",
        unknown_id=unknown_id,
    )


def unknown_share(tokenizer: StoreTokenizer, counts: Int64[np.ndarray, "v"], num_documents: int) -> float | None:
    """Return which share of a text's tokens, each document's end apart, is the unknown token; None if it has none.

    Raises:
        DataError: if the tokenizer does not know most of the text.
    """
    way_out = "take one that was made for such text, or leave out --tokenizer to train one"
    num_tokens = int(counts.sum()) - num_documents
    if num_tokens == 0:
        raise DataError(f"{tokenizer.origin}: this tokenizer gives no tokens at all for this text; {way_out}")
    if tokenizer.unknown_id is None:
        return None
    num_unknown = int(counts[tokenizer.unknown_id])
    if tokenizer.unknown_id == tokenizer.end_of_text_id:
        num_unknown -= num_documents
    share = num_unknown / num_tokens
    if share > MAX_UNKNOWN_SHARE:
        raise DataError(
            f"{tokenizer.origin}: {share:.1%} of the text's tokens are its unknown token {tokenizer.unknown!r}; "
            f"most of the text would be lost; {way_out}"
        )
    return share


def open_tokenizer(content: bytes) -> Tokenizer:
    """Return a tokenizer that turns text into all of its tokens and nothing else.

    The file's truncation and padding are switched off, and a special token's name that occurs in a text is
    plain text: no document can pretend to end.
    """
    tokenizer = Tokenizer.from_str(content.decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _end_of_text(path: Path, tokenizer: Tokenizer, wanted: str) -> str:
    if wanted:
        if tokenizer.token_to_id(wanted) is None:
            raise DataError(f"--end-of-text {wanted}: {path} has no such token; {_added_tokens(tokenizer)}")
        return wanted
    known = [it for it in KNOWN_ENDS if tokenizer.token_to_id(it) is not None]
    if len(known) == 1:
        return known[0]
    found = f"has {' and '.join(known)}" if known else f"has none of {', '.join(KNOWN_ENDS)}"
    raise DataError(
        f"{path}: which token ends a document? It {found}; name it with --end-of-text ({_added_tokens(tokenizer)})"
    )


def _unknown_id(content: bytes, tokenizer: Tokenizer) -> int | None:
    """Return the id of the unknown token, which a Unigram model names by number and the others by its text."""
    model = json.loads(content)["model"]
    name = model.get("unk_token")
    number: int | None = model.get("unk_id") if name is None else tokenizer.token_to_id(name)
    return number


def _added_tokens(tokenizer: Tokenizer) -> str:
    names = [token.content for _, token in sorted(tokenizer.get_added_tokens_decoder().items())]
    more = ", ..." if len(names) > 12 else ""
    return f"its added tokens are {', '.join(names[:12])}{more}" if names else "it has no added tokens"


def _id_of(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    assert number is not None, f"{token} was looked up before"
    return number


def _vocab_size(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
