"""`meshwright import`: a run file that goes on from a Hugging Face checkpoint."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def import_weights(
    source: Annotated[Path, typer.Argument(help="A Hugging Face folder: config.json and safetensors files.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run file to write.  [default: FOLDER's name with .toml, here]")
    ] = None,
    store: Annotated[
        str, typer.Option(help="Token store of the run.  [default: output/FOLDER's name-store, to be prepared]")
    ] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older run file of that name.")] = False,
    skip_verify: Annotated[
        bool, typer.Option("--skip-verify", help="Do not compare with transformers what the model computes.")
    ] = False,
) -> None:
    """Write a run file that starts from the weights of a Hugging Face checkpoint.

    The weights stay where they are: [init] from in the run file names the folder, and each rank reads its own part.
    Names and shapes of all tensors are looked at, and the logits are compared with those of transformers.

    Families: llama, qwen3, mixtral, qwen3_moe, gemma, olmo2, olmoe, deepseek_v3, granitemoehybrid, mamba2, mamba,
    qwen3_next, bloom, gpt2. What a checkpoint asks for and is not computed here is refused, each key by name.

    meshwright import models/olmo2-1b --out olmo2.toml
    """
    from meshwright.launcher.weights.import_run import ImportRequest, failure_of, import_run

    imported = import_run(ImportRequest(source, out, store, verify=not skip_verify, overwrite=overwrite))
    print(f"{imported.class_name}, {imported.weights:,} weights: every tensor is there")
    if imported.logits is None:
        print("  not compared with transformers (--skip-verify)")
    elif failure := failure_of(imported.logits):
        print(f"comparison with transformers FAILED: {failure}; no run file was written", file=sys.stderr)
        raise typer.Exit(1)
    else:
        print(
            f"  computes what transformers does: logits within {imported.logits.max_difference:.2g} "
            f"(allowed {imported.logits.limit:.2g})"
        )
    print(f"  run file  {imported.run_file}")
    if imported.prepare:
        print(f"  store     {imported.prepare}")
    print(f"  train     meshwright train {imported.run_file}")
