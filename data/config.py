"""The [data] table: which tokens are read, and in windows of what length."""

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt


class DataConfig(BaseModel):
    """The token store of a run. Sizes are counts of tokens or of steps."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    store: str = Field(min_length=1)
    """Folder written by `meshwright prepare`. A relative path is taken from where the command runs."""
    seq_len: PositiveInt
    """Tokens in a sample: 512 to 2048 for small models, 4096 or 8192 for large ones."""
    prefetch: NonNegativeInt = 2
    """Steps read ahead by a thread: 2 hides the reading; 0 reads when the step begins, which is good for debugging."""
    mask_documents: bool = False
    """Let a token attend only to its own document; false lets samples that hold several documents mix them."""
