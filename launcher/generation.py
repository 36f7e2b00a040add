"""Text in, text out: the tokenizer around the model's generation.

A token may end in the middle of a character, and the next one completes it; a piece of text is given out when it
is whole.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer

from meshwright.launcher.inference import Loaded
from meshwright.launcher.runfile.messages import ConfigError
from meshwright.model.generate import generate
from meshwright.model.sampling import Sampling

# What a decoder puts where bytes make no character (yet).
_BROKEN = "\N{REPLACEMENT CHARACTER}"


def continue_prompt(
    loaded: Loaded,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    *,
    seed: int = 0,
    samples: int = 1,
    tokenizer: Path | None = None,
) -> Iterator[str]:
    """Yield the prompt and then its continuation, in pieces; several samples come one after the other, whole.

    Raises:
        ConfigError: if there is no tokenizer, or it does not belong to the model.
    """
    path = tokenizer or loaded.tokenizer
    if path is None or not path.is_file():
        raise ConfigError(str(loaded.source), ["no tokenizer.json lies with it; give one with --tokenizer FILE"])
    codec = read_tokenizer(path, loaded.config.vocab_size)
    end_token = codec.token_to_id(loaded.end_of_text) if loaded.end_of_text else None
    ids = codec.encode(prompt, add_special_tokens=False).ids if prompt else []
    if not ids and end_token is not None:
        ids = [end_token]  # a document begins after the end of another
    if not ids:
        raise ConfigError(str(path), ["the prompt is empty and there is no end-of-text token to begin from"])
    device = loaded.model.embedding.weight.device
    tokens = torch.tensor(ids, device=device)[:, None].expand(-1, samples)
    made = generate(loaded.model, tokens, max_new_tokens, sampling=sampling, seed=seed, end_token=end_token)
    if samples == 1:
        yield prompt
        yield from _stream(codec, (int(chosen[0]) for chosen in made))
        return
    columns = torch.stack(list(made), dim=1).tolist()
    for number, column in enumerate(columns, start=1):
        yield f"--- {number}\n{prompt}{codec.decode(column)}\n"


def read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Read a tokenizer.

    Raises:
        ConfigError: if it is none, or has more tokens than the model has rows.
    """
    try:
        codec = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise ConfigError(str(path), [f"is no tokenizer.json: {error}"]) from None
    if codec.get_vocab_size() > vocab_size:
        raise ConfigError(
            str(path), [f"has {codec.get_vocab_size()} tokens, the model {vocab_size}: it belongs to another model"]
        )
    return codec


def _stream(codec: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Yield the text of tokens as soon as its characters are whole."""
    held: list[int] = []
    for token in tokens:
        held.append(token)
        text = codec.decode(held)
        if not text.endswith(_BROKEN):
            yield text
            held = []
    if held:
        yield codec.decode(held)
