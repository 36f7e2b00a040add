"""The [data] table: which tokens are read, and in which lengths."""

from pydantic import BaseModel, ConfigDict, PositiveInt


class DataConfig(BaseModel):
    """The store that `prepare` wrote, and how samples are cut from it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    store: str
    """Folder that `meshwright prepare` wrote: tokens, document index and tokenizer."""
    seq_len: PositiveInt
    """Tokens of one sample; 256 (tiny) to 8192 are usual."""
    prefetch: PositiveInt = 2
    """Steps that are read ahead of training, by a thread."""
