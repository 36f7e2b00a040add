"""`meshwright export`: a checkpoint as a Hugging Face folder, verified in transformers."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def export(
    source: Annotated[Path, typer.Argument(help="A run's folder, or one checkpoint of it (checkpoints/step_...).")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write.  [default: export, in the run's folder]")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="fp32, or bf16 for half the size; the report says what rounding costs.")
    ] = ("fp32"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older export in the same folder.")] = False,
    skip_verify: Annotated[
        bool, typer.Option("--skip-verify", help="Do not load the result in transformers; the report says so.")
    ] = False,
    text: Annotated[
        Path | None, typer.Option(help="Text to verify on.  [default: the validation split of the run's store]")
    ] = None,
    end_of_text: Annotated[
        str, typer.Option(help="The token that ends a document.  [default: the one that the run recorded]")
    ] = "",
    max_file_gb: Annotated[float, typer.Option(help="Largest weight file in GB (10^9 bytes); 2 to 5 are usual.")] = 5.0,
) -> None:
    """Write a checkpoint in Hugging Face format, and verify it in transformers.

    The class follows from the model: fourteen are known, from Llama and Mixtral to Mamba2, GraniteMoeHybrid and
    DeepseekV3 (docs/export.md). What none of them computes exactly is refused with every reason.

    The verification compares tensors, tokenizer, logits and greedy choices on held-out text, and writes
    export_report.md and export_report.json beside the files. Where it fails, the figure is named, the exit status is
    1, and the files stand in a folder with `.failed` in its name.

    meshwright export output/moe-tiny --out output/moe-tiny-hf --dtype bf16
    """
    from meshwright.launcher.runfile.messages import ConfigError
    from meshwright.launcher.weights.export_run import ExportRequest, export_run
    from meshwright.model.families.choose import NotRepresentableError

    request = ExportRequest(
        source,
        out,
        dtype,
        verify=not skip_verify,
        overwrite=overwrite,
        text=text,
        end_of_text=end_of_text,
        max_file_gb=max_file_gb,
    )
    try:
        exported = export_run(request)
    except NotRepresentableError as error:
        model = f"{source} is not exactly {error.class_name}, the nearest class of transformers"
        raise ConfigError(model, error.reasons) from None
    for path, damage in exported.passed_over.items():
        print(f"passed over {path}, which is damaged: {'; '.join(damage)}", file=sys.stderr)
    about, report = exported.about, exported.report
    files = f"{about['files']} file{'s' if about['files'] > 1 else ''}"
    print(f"{about['class']}, {dtype}, {about['weights']:,} weights in {files}, {about['bytes'] / 1e6:,.1f} MB")
    print(f"  from    {about['source']}")
    print(f"  to      {exported.folder}")
    print(f"  report  {exported.page}")
    if report is None:
        print("not verified (--skip-verify)")
        return
    if exported.failures:
        print("verification FAILED:", *exported.failures, sep="\n  ", file=sys.stderr)
        raise typer.Exit(1)
    print(
        f"verified in transformers {report.versions['transformers']}: logits within {report.logits.max_difference:.2g} "
        f"of ours (allowed {report.logits.limit:.2g}), {report.greedy.compared:,} greedy tokens compared, "
        f"{report.greedy.excused} differ at a near tie"
    )
