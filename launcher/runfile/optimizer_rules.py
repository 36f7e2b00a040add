"""Which optimizer updates a parameter, and with which settings: by its name and global shape alone.

    kind            optimizer.kind = "muon"                      optimizer.kind = "adamw"
    matrices of     q, k, v, output; gate, up, down; z, x, B, C; -
    layers          latent attention's; projections of further
                    tokens; each expert of a stack: Muon
    all else        embedding, output, whatever chooses (routers, all: AdamW
                    gates of one expert or head), time steps and
                    decays, norms, biases: AdamW,
                    learning rate * adamw_learning_rate_factor

Muon makes all singular values of an update alike. That is meant for what turns one vector of features into another; of
what has one row for each choice, head or token id, or few numbers that set a state's pace, rows are separate things. A
name that is not known to be of the first sort is not taken (docs/optimizer.md lists both).

    optimizer.groups, in order     the first pattern that fits a name gives what it has; the rest is [optimizer]'s.
                                   A group may choose the kind for what it matches
    [optimizer] weight_decay       not on norms and biases (one dim, a bias of stacked experts, T5's table of biases),
                                   nor on what governs a state (A_log, dt_bias, ...; short convolutions); on embeddings
                                   (of tokens, of learned positions, the output matrix) by choice; a group that gives
                                   weight_decay means it for all that it fits

Muon's updates have the size of AdamW's (launcher/training/muon.py), so both take the learning rate and the weight
decay as they are. Nothing here loads torch: a run file's groups are checked before a rank is started.
"""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from meshwright.launcher.runfile.messages import problem
from meshwright.launcher.runfile.tables import OptimizerConfig, OptimizerGroup

Kind = Literal["adamw", "muon"]
Shapes = Mapping[str, tuple[int, ...]]

PRODUCTS = frozenset(
    {
        "q", "k", "v", "output", "gate", "up", "down", "z", "x", "B", "C", "projection",
        "q_a", "q_b", "kv_a", "k_rope", "k_b", "v_b",
    }
)  # fmt: skip
"""Modules whose weight is a matrix from features to features; the last six are latent attention's."""
STACKS = {"experts": frozenset({"gate", "up", "down"}), "part": frozenset({"v", "output"})}
"""Parameters that are such matrices one upon the other, by the module that has them: "part" is SwitchHead."""
EMBEDDINGS = frozenset({"embedding.weight", "output.weight", "positions.weight"})
OF_STATE = frozenset({"A_log", "A_imag", "C", "D", "log_dt", "dt_bias"})
"""Of Mamba, S4D and the delta net; "C" is S4D's own parameter, Mamba's is a product's C.weight."""
T5_TABLE = "core.bias.table"
"""What is added to the scores of attention by distance: biases, as many as heads and buckets."""
MUON_KEYS = ("muon_momentum", "muon_nesterov", "muon_steps", "adamw_learning_rate_factor")
_SHOWN = 3


class Settings(NamedTuple):
    """What is done to one parameter."""

    kind: Kind
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    learning_rate_factor: float


def settings_of(name: str, shape: tuple[int, ...], config: OptimizerConfig) -> Settings:
    """Return the settings of one parameter: its group's, and what that leaves out from the config."""
    group = _group_of(name, config) or OptimizerGroup(match=name)
    kind = group.kind or _usual_kind(name, shape, config)
    weight_decay = group.weight_decay
    if weight_decay is None:
        weight_decay = config.weight_decay if _decays(name, shape, config) else 0.0
    factor = group.learning_rate_factor
    if factor is None:
        factor = config.adamw_learning_rate_factor if kind == "adamw" else 1.0
    return Settings(
        kind=kind,
        betas=config.betas if group.betas is None else group.betas,
        eps=config.eps if group.eps is None else group.eps,
        weight_decay=weight_decay,
        learning_rate_factor=factor,
    )


def changed_kinds(shapes: Shapes, before: OptimizerConfig, after: OptimizerConfig) -> dict[str, Kind]:
    """Return each parameter that another optimizer updates after a change, with the new one."""
    kinds = {name: settings_of(name, shape, after).kind for name, shape in shapes.items()}
    return {name: kind for name, kind in kinds.items() if settings_of(name, shapes[name], before).kind != kind}


def optimizer_problems(shapes: Shapes, config: OptimizerConfig) -> list[str]:
    """Return every reason why a model with these parameters cannot be updated as the table says."""
    return [*_key_problems(config), *_group_problems(shapes, config)]


def _usual_kind(name: str, shape: tuple[int, ...], config: OptimizerConfig) -> Kind:
    return "muon" if config.kind == "muon" and _is_matrix_of_layer(name, shape) else "adamw"


def _is_matrix_of_layer(name: str, shape: tuple[int, ...]) -> bool:
    """Say whether a parameter is what a layer multiplies its tokens with; what is not known to be is not."""
    *path, last = name.split(".")
    if path[:1] not in (["layers"], ["multi_token"]) or not _is_matrix(name, shape):
        return False
    return path[-1] in PRODUCTS if last == "weight" else last in STACKS.get(path[-1], ())


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Say whether the last two dims can be a matrix; those of a stack of biases are not."""
    return len(shape) >= 2 and not name.endswith("bias")


def _is_of_state(name: str) -> bool:
    """Say whether a parameter says how a mixer's state decays or starts, or is a channel's few weights before it."""
    *path, last = name.split(".")
    return last in OF_STATE or (bool(path) and path[-1].startswith("conv_"))


def _decays(name: str, shape: tuple[int, ...], config: OptimizerConfig) -> bool:
    """Say whether [optimizer]'s weight decay acts on a parameter."""
    if not _is_matrix(name, shape) or _is_of_state(name) or name.endswith(T5_TABLE):
        return False
    return config.embedding_weight_decay or name not in EMBEDDINGS


def _key_problems(config: OptimizerConfig) -> Iterator[str]:
    """Yield each key of Muon's that would be without effect."""
    if config.kind == "muon" or any(group.kind == "muon" for group in config.groups):
        return
    for key in MUON_KEYS:
        value, usual = getattr(config, key), OptimizerConfig.model_fields[key].default
        if value != usual:
            rule = 'has no effect with optimizer.kind = "adamw"'
            yield problem(f"optimizer.{key}", value, rule, 'leave it out, or optimizer.kind = "muon"')


def _group_problems(shapes: Shapes, config: OptimizerConfig) -> Iterator[str]:
    caught: dict[int, list[str]] = {at: [] for at in range(len(config.groups))}
    for name in shapes:
        group = _group_of(name, config)
        for at, one in enumerate(config.groups):
            if one is group:
                caught[at].append(name)
    for at, group in enumerate(config.groups):
        key = f"optimizer.groups[{at}]"
        if caught[at]:
            yield from _problems_of_kind(key, group, caught[at], shapes, config)
        elif any(fnmatchcase(name, group.match) for name in shapes):
            rule = "all parameters that it matches fall into groups before it"
            yield problem(f"{key}.match", group.match, rule, "move it up, or leave it out")
        else:
            few = list(shapes)
            few = few if len(few) <= 2 * _SHOWN else [*few[:_SHOWN], "...", *few[-_SHOWN:]]
            yield problem(f"{key}.match", group.match, "matches no parameter", f"there are {', '.join(few)}")


def _problems_of_kind(
    key: str, group: OptimizerGroup, names: list[str], shapes: Shapes, config: OptimizerConfig
) -> Iterator[str]:
    """Yield what a group asks for and cannot be done to what falls into it."""
    vectors = [name for name in names if not _is_matrix(name, shapes[name])]
    if group.kind == "muon" and vectors:
        rule = f"is for matrices, and no matrix is {few_of(vectors)}"
        yield problem(f"{key}.kind", "muon", rule, "a narrower match would fit")
        return
    if all(settings_of(name, shapes[name], config).kind == "muon" for name in names):
        for word in ("betas", "eps"):
            if (value := getattr(group, word)) is not None:
                shown = list(value) if isinstance(value, tuple) else value
                rule = f"is AdamW's, and all that falls into this group ({few_of(names)}) is updated by Muon"
                yield problem(f"{key}.{word}", shown, rule, 'leave it out, or kind = "adamw" in this group')


def few_of(names: list[str]) -> str:
    """Return the first names, and how many more there are."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _group_of(name: str, config: OptimizerConfig) -> OptimizerGroup | None:
    """Return the first group whose pattern fits the name."""
    return next((group for group in config.groups if fnmatchcase(name, group.match)), None)
