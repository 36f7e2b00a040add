"""The tables of docs/models.md: the parts by letter, and the presets with their numbers of weights.

They are made by `python -m meshwright.launcher.runfile.schema`; a test fails while the page is behind the code.
"""

from meshwright.model.counts.costs import active_parameter_count, parameter_count
from meshwright.model.kinds.kind import Kind
from meshwright.model.kinds.table import ALL
from meshwright.model.presets import PRESETS, preset

VOCABULARY = 32768
"""Of presets that leave theirs to the tokenizer, in the table."""
PARTS = ("<!-- parts: generated, do not edit by hand -->", "<!-- end of parts -->")
SHAPES = ("<!-- presets: generated, do not edit by hand -->", "<!-- end of presets -->")
# Where each kind of part was published.
PAPERS = {
    "attention": "Vaswani et al. 2017; grouped heads: Ainslie et al. 2023",
    "sliding_attention": "Beltagy et al. 2020",
    "block_sparse_attention": "Child et al. 2019; Zaheer et al. 2020",
    "latent_attention": "DeepSeek-AI 2024 (DeepSeek-V2)",
    "switch_head": "Csordas et al. 2024",
    "mamba2": "Dao and Gu 2024",
    "mamba1": "Gu and Dao 2023",
    "gated_delta": "Yang et al. 2025",
    "s4d": "Gu et al. 2022",
    "mlp": "Vaswani et al. 2017; gated: Shazeer 2020",
    "moe": "Shazeer et al. 2017",
}


def with_part(page: str, begin: str, end: str, text: str) -> str:
    """Return the page with the part between two markers made anew.

    Raises:
        ValueError: if the page has lost its markers.
    """
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"the page has no part between {begin!r} and {end!r}")
    return f"{before}{begin}\n\n{text}\n{end}{after}"


def with_tables(page: str) -> str:
    """Return the page with both tables made anew."""
    return with_part(with_part(page, *PARTS, parts_table()), *SHAPES, presets_table())


def parts_table() -> str:
    """Return a row for each kind of part, as Markdown."""
    head = "| letter | part | its keys | cut over | not over | published by |\n|---|---|---|---|---|---|\n"
    return head + "".join(f"{_part_row(kind)}\n" for kind in ALL)


def _part_row(kind: Kind) -> str:
    keys = f"`[model.{kind.table}]`" if kind.table else "`[model]`"
    axes = [axis for axis in ("tp", "cp", *(("ep", "etp") if kind.name == "moe" else ())) if axis not in kind.refuses]
    refused = "; ".join(f"{axis}: {reason}" for axis, reason in kind.refuses.items())
    return f"| `{kind.letter}` | {kind.words} | {keys} | {', '.join(axes)} | {refused} | {PAPERS[kind.name]} |"


def presets_table() -> str:
    """Return a row for each preset, as Markdown."""
    head = "| preset | pattern | layers | width | weights | a token meets |\n|---|---|---|---|---|---|\n"
    return head + "".join(f"{_preset_row(name)}\n" for name in PRESETS)


def _preset_row(name: str) -> str:
    model = preset(name)
    model = model.model_copy(update={"vocab_size": model.vocab_size or VOCABULARY})
    total, active = parameter_count(model), active_parameter_count(model)
    met = f"{active:,}" if active != total else "all"
    return f"| `{name}` | `{model.pattern}` | {model.num_layers} | {model.hidden_size} | {total:,} | {met} |"
