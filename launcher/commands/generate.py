"""`meshwright generate`: continue a prompt with a trained model, token by token as they are made."""

import io
import sys
from pathlib import Path
from typing import Annotated

import typer


def generate(
    source: Annotated[Path, typer.Argument(help="A run's folder, a checkpoint (step_...), or an export.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue; - reads it from stdin.")] = "",
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Tokens to make at most; 50 to 500 are usual.")
    ] = 100,
    temperature: Annotated[float, typer.Option(help="0 is greedy; 0.6 to 1 are usual.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0 is off, 20 to 100 are usual.")] = 50,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this share; 1 is off.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    samples: Annotated[
        int, typer.Option(min=1, max=1024, help="How many texts to make; more than 1 are not streamed.")
    ] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json, where none lies with the model.")] = None,
) -> None:
    """Continue a prompt with a trained model.

    The text is written to stdout while it is made and ends at the model's end-of-text token. Without a prompt the
    model begins a new document.

    meshwright generate output/moe-tiny --prompt "def main(" --temperature 0.7
    """
    from meshwright.launcher.build import resolve_device
    from meshwright.launcher.generation import continue_prompt
    from meshwright.launcher.inference import load_for_inference
    from meshwright.launcher.runfile.messages import ConfigError
    from meshwright.model.generation.sampling import Sampling

    problems = []
    try:
        sampling = Sampling(temperature, top_k, top_p)
    except ValueError as error:
        problems += str(error).split("; ")
    try:
        if device not in ("auto", "cpu", "cuda", "mps"):
            problems.append(f'--device "{device}": is no device; one of auto, cpu, cuda, mps would fit')
        else:
            on = resolve_device(device, 0)
    except ConfigError as error:  # titled by the key of a run file
        problems += [f"--device {line}" for line in error.problems]
    if problems:
        raise ConfigError("meshwright generate", problems)
    try:
        # An argument that is no UTF-8 reaches Python as surrogates, which cannot be encoded again.
        text = sys.stdin.buffer.read().decode() if prompt == "-" else prompt.encode().decode()
    except UnicodeError as error:
        where = "stdin" if prompt == "-" else "--prompt"
        raise ConfigError("meshwright generate", [f"{where} is not UTF-8: {error}"]) from None
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal of another encoding must not end the text
    loaded = load_for_inference(source, on)
    for folder, reasons in loaded.passed_over.items():
        print(f"passed over {folder}: {'; '.join(reasons)}", file=sys.stderr)
    pieces = continue_prompt(loaded, text, max_new_tokens, sampling, seed=seed, samples=samples, tokenizer=tokenizer)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
