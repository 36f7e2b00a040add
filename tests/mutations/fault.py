"""What a planted fault is, and the small models that they are planted in."""

from dataclasses import asdict, dataclass, field
from typing import Any

SIZES = {
    "num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 64,
    "bias": ["q", "k", "v", "output", "ffn"], "qk_norm": True,
}  # fmt: skip
DENSE = SIZES | {"pattern": "*-", "ffn_hidden_size": 128}
MOE = SIZES | {
    "pattern": "*E",
    "tie_embeddings": True,
    "moe": {"num_experts": 8, "top_k": 2, "expert_hidden_size": 64, "num_shared_experts": 1},
}
TP, EP = {"tp": 2, "dp_shard": 1}, {"dp_shard": 2, "ep": 2}


@dataclass(frozen=True)
class Fault:
    """One line that is changed."""

    name: str
    file: str
    old: str
    new: str
    named: str = ""
    """What stands in the first difference; like `quantity` "" where the change changes nothing."""
    quantity: str = ""
    """What the first difference is of: norm, loss, tokens."""
    axis: str = ""
    not_axis: str = ""
    """An axis of the layout that has no part in it."""
    is_alone: bool = False
    """Whether one process shows it too, in a rank's micro-batches: no axis is blamed."""
    model: dict[str, Any] = field(default_factory=lambda: DENSE)
    layout: dict[str, int] = field(default_factory=lambda: TP)
    zero: int = 1
    train: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    mask_documents: bool = False
    passes: tuple[str, ...] = ("exact",)

    def request(self) -> dict[str, Any]:
        """Return the fault as plain values."""
        return asdict(self)
