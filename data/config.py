"""The [data] table: which tokens are read, and in windows of what length."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class DataConfig(BaseModel):
    """The token store of a run. Sizes are counts of tokens or of steps."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    store: str = Field(min_length=1)
    """Folder written by `meshwright prepare`. A relative path is taken from where the command runs."""
    seq_len: Annotated[int, Field(gt=0, le=2**31 - 1)]
    """Tokens in a sample: 512 to 2048 for small models, 4096 or 8192 for large ones."""
    prefetch: Annotated[int, Field(ge=0, le=1024)] = 2
    """Steps read ahead by a thread: 2 hides the reading; 0 reads when the step begins, which is good for debugging."""
    mask_documents: bool = False
    """Let a token attend only to its own document; false lets samples that hold several documents mix them."""
