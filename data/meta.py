"""The meta.json of a token store: what the store holds, and checksums that tie its files together.

    meta.json -- checksum of itself
        |------- tokenizer.sha256 ----------> tokenizer.json
        |------- splits.*.arrays.*.shards --> the size of every shard; each chunk in it carries its own crc32c
        `------- fingerprint (derived) -----> the same on every machine that holds the same tokens

Imports neither numpy nor torch, so that a run file can be checked against a store in no time.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from meshwright.data.errors import StoreError

FORMAT = "meshwright-tokens"
VERSION = 1
TOKENIZER_NAME = "tokenizer.json"
REPAIR = "restore the file from a good copy, or write the store anew with `meshwright prepare ... --overwrite`"


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ArrayMeta(_Table):
    """One array of a split."""

    length: int
    """Elements."""
    shards: list[int]
    """Bytes of each shard file, in order."""
    xxh3_128: str
    """Hash of the elements as little-endian bytes, independent of how they are cut into chunks."""


class SplitMeta(_Table):
    """One split: train or validation."""

    num_tokens: int
    num_documents: int
    arrays: dict[str, ArrayMeta]


class TokenizerMeta(_Table):
    """The tokenizer.json beside meta.json."""

    sha256: str
    origin: str
    """The file it was copied from, or how it was trained."""
    end_of_text: str
    """The token that ends each document."""
    end_of_text_id: int


class SourceMeta(_Table):
    """One file that documents came from."""

    path: str
    kind: str
    unit: str
    """What an index into this source counts: document, line, paragraph or row."""
    bytes: int
    xxh3_128: str
    """Hash of the file as it lay on disk, compressed or not."""
    num_documents: int


class StoreMeta(_Table):
    """All of meta.json but its checksum."""

    format: Literal["meshwright-tokens"]
    version: Literal[1]
    corpus: str
    """What the text is, with a note on its licence where that is known."""
    vocab_size: int
    """One more than the largest token id that the tokenizer can give."""
    dtype: Literal["uint16", "uint32"]
    tokenizer: TokenizerMeta
    splits: dict[str, SplitMeta]
    validation_unigram_nats: float | None
    """Mean -ln p(token) over the validation split, p being the token's add-one smoothed share of the train split.

    A model that only knows how frequent each token is reaches this loss. None without a validation split.
    """
    unknown_share: float | None = None
    """Share of the text's tokens that are the tokenizer's unknown token; None where it has no such token."""
    sources: list[SourceMeta]
    recipe: dict[str, Any]
    """Everything that decided the tokens; an equal recipe gives an equal store."""
    written_with: dict[str, str]
    """Versions, for information."""

    @property
    def fingerprint(self) -> str:
        """Return 32 hex digits that change with any token, document boundary, split or tokenizer.

        They change with nothing else: moving, renaming or compressing the sources keeps them.
        """
        arrays = {
            split: {
                array: [it.length, it.xxh3_128] for array, it in sorted(meta.arrays.items()) if "source" not in array
            }
            for split, meta in sorted(self.splits.items())
        }
        content = [FORMAT, self.dtype, self.vocab_size, self.tokenizer.sha256, self.tokenizer.end_of_text_id, arrays]
        return hashlib.sha256(_canonical(content)).hexdigest()[:32]

    def problems(self, *, seq_len: int) -> list[str]:
        """Return every reason why nothing can be trained on windows of `seq_len` tokens of this store."""
        return [
            f"data.seq_len = {seq_len}: one sample needs {seq_len + 1:,} tokens, the {name} split has "
            f"{split.num_tokens:,}; take a smaller seq_len or prepare more text"
            for name, split in self.splits.items()
            if split.num_tokens < seq_len + 1
        ]

    def damage(self, store: Path) -> list[str]:
        """Return a line for each file in the folder of the store that is missing, changed or not of its full size."""
        problems = _tokenizer_problems(store, self)
        for split, meta in self.splits.items():
            for name, array in meta.arrays.items():
                problems += _shard_problems(store / split / name, array.shards)
        return problems

    def to_json(self) -> str:
        """Return the text of meta.json."""
        content = self.model_dump(mode="json")
        return json.dumps(content | {"checksum": _checksum(content)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, store: Path) -> "StoreMeta":
        """Read and verify the meta.json of a store.

        Raises:
            StoreError: if it is missing, changed by hand or by the disk, or of another format.
        """
        path = store / "meta.json"
        try:
            content = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(
                f"{store} is no token store: it has no meta.json; write one with `meshwright prepare --out {store}`"
            ) from None
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror}; {REPAIR}") from None
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{path} is damaged: not JSON ({error}); {REPAIR}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise StoreError(f"{path} is not the meta.json of a token store: its format is not {FORMAT!r}")
        if content.get("version") != VERSION:
            raise StoreError(
                f"{path} has version {content.get('version')!r}, this program reads {VERSION}; "
                "write the store anew with `meshwright prepare ... --overwrite`"
            )
        if content.pop("checksum", None) != _checksum(content):
            raise StoreError(f"{path} was changed: its checksum does not fit its contents; {REPAIR}")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise StoreError(f"{path} does not have the fields of a token store: {error}") from None


def _tokenizer_problems(store: Path, meta: StoreMeta) -> list[str]:
    path = store / TOKENIZER_NAME
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return [f"{path} is missing; {REPAIR}"]
    except OSError as error:
        return [f"{path} cannot be read: {error.strerror}; {REPAIR}"]
    if found == meta.tokenizer.sha256:
        return []
    return [
        f"{path} is not the tokenizer that wrote these tokens: its sha256 is {found[:16]}..., "
        f"the store's {meta.tokenizer.sha256[:16]}...; {REPAIR}"
    ]


def _shard_problems(array: Path, sizes: list[int]) -> list[str]:
    problems = []
    for number, size in enumerate(sizes):
        path = array / "c" / str(number)
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            problems.append(f"{path} is missing; {REPAIR}")
            continue
        except OSError as error:
            problems.append(f"{path} cannot be read: {error.strerror}; {REPAIR}")
            continue
        if found != size:
            problems.append(f"{path} has {found:,} bytes, written were {size:,}; {REPAIR}")
    return problems


def _canonical(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _checksum(content: object) -> str:
    return f"sha256:{hashlib.sha256(_canonical(content)).hexdigest()}"
