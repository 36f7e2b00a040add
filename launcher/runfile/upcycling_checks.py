"""What [init] asks of a model that begins from a dense one (launcher/weights/upcycle.py). Nothing here loads torch."""

from collections.abc import Iterator

from meshwright.launcher.runfile.messages import problem
from meshwright.launcher.runfile.tables import InitConfig, RunFile
from meshwright.model.config import ModelConfig
from meshwright.model.kinds.feedforward.moe import MoeConfig

Wrong = tuple[str, object, str, str]
"""Key, value, rule, and what would fit."""


def upcycling_problems(run_file: RunFile, *, is_width_written: bool) -> list[str]:
    """Return every reason why this model cannot begin as it is asked for.

    `is_width_written`: whether the run file or its preset has model.ffn_hidden_size; what is filled in is a guess.
    """
    model, init = run_file.model, run_file.init
    rows, widths = list(_wrong(model, init)), list(_wrong_widths(model, init))
    missing = [_missing(model.moe, init)] if widths and not is_width_written and model.moe else []
    rows += [] if missing else widths
    return [*(problem(key, value, rule, f"{fits} would fit") for key, value, rule, fits in rows), *missing]


def _missing(moe: MoeConfig, init: InitConfig) -> str:
    """Return the line for the width of the dense feed-forwards, where it is not written."""
    key, width, what = "model.ffn_hidden_size", moe.expert_hidden_size, {"copy": "copies"}.get(init.upcycle, "pieces")
    line = f"{key}: is missing, and must be that of the dense model at init.from, whose {what} experts are"
    if init.upcycle == "copy":
        return f"{line}; {width} would fit, as model.moe.expert_hidden_size is {width} (both must be the dense model's)"
    return f"{line}; model.moe.expert_hidden_size = {width} must divide it"


def _wrong(model: ModelConfig, init: InitConfig) -> Iterator[Wrong]:
    if (init.upcycle != "none" or init.pool_kv_heads) and not init.source:
        yield "init.from", init.source, "must name the dense model to upcycle", "a run, a checkpoint or an export"
    if init.upcycle_noise and init.upcycle == "none":
        yield "init.upcycle_noise", init.upcycle_noise, "is for experts that are made of a dense model", "0.0"
    if init.upcycle == "none":
        return
    if init.load != "weights":
        yield "init.load", init.load, "a dense model's moments are none of the experts'", '"weights"'
    moe = model.moe
    if moe is None:
        yield "init.upcycle", init.upcycle, "needs experts, and the model has none (no table [model.moe])", '"none"'
        return
    if moe.router not in ("softmax", "sigmoid", "noisy") or not moe.normalise_top_k:
        rule = "must have weights that sum to 1, so that experts of equal output give the dense model's"
        yield "model.moe.router", moe.router, rule, '"softmax" with normalise_top_k = true'
    if moe.router == "noisy" and init.upcycle == "partition":
        rule = "would send a token to pieces of several feed-forwards: its noise parts those of one"
        yield "model.moe.router", moe.router, rule, '"softmax"'
    if moe.num_shared_experts:
        rule = "a dense model has nothing that shared experts could begin with"
        yield "model.moe.num_shared_experts", moe.num_shared_experts, rule, "0"


def _wrong_widths(model: ModelConfig, init: InitConfig) -> Iterator[Wrong]:
    moe = model.moe
    if moe is None:
        return
    if init.upcycle == "copy" and moe.expert_hidden_size != model.ffn_hidden_size:
        rule = f"must be model.ffn_hidden_size = {model.ffn_hidden_size}, the dense model's, whose copies experts are"
        yield "model.moe.expert_hidden_size", moe.expert_hidden_size, rule, f"{model.ffn_hidden_size}"
    if init.upcycle == "partition":
        yield from _partition_problems(model.ffn_hidden_size, moe)


def _partition_problems(dense: int, moe: MoeConfig) -> Iterator[Wrong]:
    width = moe.expert_hidden_size
    if dense % width != 0:
        rule = f"must divide model.ffn_hidden_size = {dense}, the dense model's, whose pieces experts are"
        yield "model.moe.expert_hidden_size", width, rule, f"{dense // 2 if dense % 2 == 0 else dense}"
        return
    pieces = dense // width
    for key, value in (("num_experts", moe.num_experts), ("top_k", moe.top_k)):
        if value % pieces != 0:
            rule = f"must be a multiple of the {pieces} pieces of a dense feed-forward of {dense}"
            yield f"model.moe.{key}", value, rule, f"{-(-value // pieces) * pieces}"
    if not _groups_keep_pieces(pieces, moe, moe.num_groups):
        size = moe.num_experts // moe.num_groups
        rule = f"would choose among groups of {size} experts, which part the {pieces} pieces of a dense feed-forward"
        fewer = range(moe.num_groups - 1, moe.top_groups - 1, -1)
        fits = [n for n in fewer if moe.num_experts % n == 0 and _groups_keep_pieces(pieces, moe, n)]
        way_out = f"{fits[0]}" if fits else "1 with model.moe.top_groups = 1"
        yield "model.moe.num_groups", moe.num_groups, rule, way_out


def _groups_keep_pieces(pieces: int, moe: MoeConfig, num_groups: int) -> bool:
    """Say whether a token that may go to one piece of a dense feed-forward may go to all of them."""
    if moe.top_groups == num_groups or moe.num_experts % pieces != 0:
        return True
    size = max(1, moe.num_experts // num_groups)
    # Neighbouring groups of one feed-forward have one score, and of equals the lower goes first: all or none are kept.
    return size % pieces == 0 or (pieces % size == 0 and moe.top_groups * size % pieces == 0)
