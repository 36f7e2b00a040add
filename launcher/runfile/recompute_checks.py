"""What [recompute] asks of the model: as many layers as it counts, and layers that have the modules it names.

    module        is in a layer with
    norm          any part: each has its norm
    mixer         a mixer (* and others)
    feedforward   a feed-forward (- or E)
    activation    a feed-forward
    experts       experts (E)

The rule is the model's: a pipeline stage whose layers have none of them has nothing to recompute, and runs.
A test holds the table against the models that are built. Nothing here loads torch.
"""

from typing import get_args

from meshwright.launcher.runfile.messages import problem, shown
from meshwright.launcher.runfile.tables import RunFile
from meshwright.model.pattern import LayerKinds
from meshwright.parallel.config import RecomputedModule


def recompute_problems(run_file: RunFile) -> list[str]:
    """Return every reason why this model's layers cannot be recomputed as the table says."""
    return [*run_file.recompute.problems(run_file.model.num_layers), *_module_problems(run_file)]


def modules_of(kinds: LayerKinds) -> frozenset[RecomputedModule]:
    """Return what a layer of these kinds has of all that [recompute] modules may name."""
    has: dict[RecomputedModule, bool] = {
        "norm": True,
        "activation": kinds.feedforward is not None,
        "mixer": kinds.mixer is not None,
        "feedforward": kinds.feedforward is not None,
        "experts": kinds.feedforward == "moe",
    }
    return frozenset(name for name, is_there in has.items() if is_there)


def _module_problems(run_file: RunFile) -> list[str]:
    """Refuse to recompute what no layer of the pattern has."""
    table, pattern, all_kinds = run_file.recompute, run_file.model.pattern, run_file.model.layer_kinds
    there = [name for name in get_args(RecomputedModule) if any(name in modules_of(kinds) for kinds in all_kinds)]
    missing = [name for name in table.modules if name not in there]
    if table.mode != "modules" or not there or not missing:
        return []
    rule = f"no layer of model.pattern = {shown(pattern)} has {' or '.join(map(shown, missing))}"
    return [problem("recompute.modules", table.modules, rule, f"one of {shown(there)} would fit")]
