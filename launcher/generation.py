"""Text in, text out: the tokenizer around the model's generation.

A token may end in the middle of a character, and the next one completes it; a piece of text is given out when it
is whole. What a token reads as may depend on those before it (tokenizers with Metaspace leave out a space at the
start), so a piece is what the text grew by, and is not decoded alone:

    tokens      ... [a piece given out] [held back ]        piece = decode(both) without decode(the first)
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer

from meshwright.data.meta import TOKENIZER_NAME
from meshwright.launcher.inference import Loaded
from meshwright.launcher.runfile.messages import ConfigError
from meshwright.model.generation.generate import generate, too_long
from meshwright.model.generation.sampling import Sampling

# What a decoder puts where bytes make no character (yet).
_BROKEN = "\N{REPLACEMENT CHARACTER}"
# Tokens of the prompt that decide how the first new one reads.
_CONTEXT = 8


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
        ConfigError: if there is no tokenizer, it does not belong to the model, or the model's positions end too early.
    """
    if tokenizer is not None and not tokenizer.is_file():
        raise ConfigError(f"--tokenizer {tokenizer}", [_no_file(tokenizer)])
    path = tokenizer or loaded.tokenizer
    if path is None:
        raise ConfigError(str(loaded.source), ["no tokenizer.json lies with it; give one with --tokenizer FILE"])
    codec = read_tokenizer(path, loaded.config.vocab_size)
    end_token = codec.token_to_id(loaded.end_of_text) if loaded.end_of_text else None
    ids = codec.encode(prompt, add_special_tokens=False).ids if prompt else []
    if not ids and end_token is not None:
        ids = [end_token]  # a document begins after the end of another
    if not ids:
        raise ConfigError(str(path), ["the prompt is empty and there is no end-of-text token to begin from"])
    if line := too_long(loaded.model, len(ids), max_new_tokens, "--max-new-tokens"):
        raise ConfigError(str(loaded.source), [line])
    device = loaded.model.output_rows.weight.device
    tokens = torch.tensor(ids, device=device)[:, None].expand(-1, samples)
    made = generate(loaded.model, tokens, max_new_tokens, sampling=sampling, seed=seed, end_token=end_token)
    if samples == 1:
        yield prompt
        yield from stream(codec, ids, (int(chosen[0]) for chosen in made), end_token)
        return
    columns = torch.stack(list(made), dim=1).tolist()
    for number, column in enumerate(columns, start=1):
        yield f"--- {number}\n{prompt}{''.join(stream(codec, ids, iter(column), end_token))}\n"


def _no_file(path: Path) -> str:
    """Return what stands where a tokenizer.json should."""
    if path.is_dir():
        return f"is a folder; {path / TOKENIZER_NAME if (path / TOKENIZER_NAME).is_file() else 'a file'} would fit"
    return "is no ordinary file; a file on a disk would fit" if path.exists() else "there is no such file"


def read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Read a tokenizer.

    Raises:
        ConfigError: if it is none, or has more tokens than the model has rows.
    """
    try:
        codec = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise ConfigError(str(path), [f"is no tokenizer.json: {error}"]) from None
    size = max(codec.get_vocab(with_added_tokens=True).values(), default=-1) + 1  # ids may have gaps
    if size > vocab_size:
        raise ConfigError(str(path), [f"has {size} tokens, the model {vocab_size}: it belongs to another model"])
    codec.no_truncation()
    codec.no_padding()
    return codec


def stream(codec: Tokenizer, before: list[int], tokens: Iterator[int], end_token: int | None = None) -> Iterator[str]:
    """Yield the text of `tokens`, which follow those of `before`, as soon as its characters are whole.

    The end token ends the text and is no part of it.
    """
    given, held = before[-_CONTEXT:], list[int]()
    for token in tokens:
        if token == end_token:
            break
        held.append(token)
        piece = _grown(codec, given, held)
        if piece and not piece.endswith(_BROKEN):
            yield piece
            given, held = held, []
    if held:
        yield _grown(codec, given, held)


def _grown(codec: Tokenizer, given: list[int], held: list[int]) -> str:
    return codec.decode(given + held)[len(codec.decode(given)) :]
