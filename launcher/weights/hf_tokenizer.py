"""The tokenizer files of a Hugging Face folder, from a `tokenizer.json`.

    tokenizer.json           copied as it is: it alone decides how text becomes tokens
    tokenizer_config.json    names the generic class, which takes tokenizer.json at its word, and the end token
    special_tokens_map.json  the end token again, where transformers 4 looks for it

The generic class is named because a family's own may put its own pre-tokenizer in place of the file's, as
LlamaTokenizer of transformers 5 does with Metaspace. transformers 5 knows the name as TokenizersBackend's old one.
"""

import json
from pathlib import Path
from typing import Any

from meshwright.launcher.weights.safetensors_stream import write_text


def write_tokenizer(folder: Path, tokenizer_json: str, *, end_token: str | None, max_positions: int) -> None:
    """Write the tokenizer's files; `tokenizer_json` is the text of the file that the model was trained with.

    Raises:
        ValueError: if the end token is not in the tokenizer's vocabulary.
    """
    if end_token is not None:
        token_id(tokenizer_json, end_token)
    ends = {} if end_token is None else {"eos_token": end_token, "pad_token": end_token}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
        **ends,
    }
    write_text(folder / "tokenizer.json", tokenizer_json)
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write_text(folder / "special_tokens_map.json", json.dumps(ends, indent=2) + "\n")


def token_id(tokenizer_json: str, token: str) -> int:
    """Return a token's id.

    Raises:
        ValueError: if the tokenizer has no such token.
    """
    tokenizer = json.loads(tokenizer_json)
    for added in tokenizer.get("added_tokens", []):
        if added["content"] == token:
            return int(added["id"])
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    if not isinstance(vocabulary, dict) or token not in vocabulary:
        raise ValueError(f"the tokenizer has no token {token!r}, which is said to end each document")
    return int(vocabulary[token])
