"""Every kind of part by the letter that stands for it in a pattern: a new kind is one line here.

letter   place          kind                     its keys
*        mixer          attention                [model]
L        mixer          sliding_attention        [model.sliding], and those of *
B        mixer          block_sparse_attention   [model.block_sparse], and those of *
+        mixer          latent_attention         [model.latent]
H        mixer          switch_head              [model.switch_head]
M        mixer          mamba2                   [model.mamba2]
m        mixer          mamba1                   [model.mamba1]
G        mixer          gated_delta              [model.gated_delta]
S        mixer          s4d                      [model.s4d]
-        feed-forward   mlp                      [model]
E        feed-forward   moe                      [model.moe]
"""

from meshwright.model.kinds.feedforward.mlp import MlpKind
from meshwright.model.kinds.feedforward.moe import MoeKind
from meshwright.model.kinds.kind import Kind
from meshwright.model.kinds.mixers.attention import AttentionKind
from meshwright.model.kinds.mixers.attention_local import BlockSparseKind, SlidingKind
from meshwright.model.kinds.mixers.gated_delta import GatedDeltaKind
from meshwright.model.kinds.mixers.latent_attention import LatentKind
from meshwright.model.kinds.mixers.mamba1 import Mamba1Kind
from meshwright.model.kinds.mixers.mamba2 import Mamba2Kind
from meshwright.model.kinds.mixers.s4d import WITHOUT_CP, S4dKind
from meshwright.model.kinds.mixers.switch_head import SwitchHeadKind

ALL = (
    AttentionKind("*", "attention", "mixer", "attention", example="*-"),
    SlidingKind("L", "sliding_attention", "mixer", "sliding-window attention", table="sliding", example="L-"),
    BlockSparseKind(
        "B",
        "block_sparse_attention",
        "mixer",
        "block-sparse attention",
        table="block_sparse",
        example="B-",
        refuses={"cp": "sees blocks that lie on other ranks; L (a window) goes over cp"},
    ),
    LatentKind("+", "latent_attention", "mixer", "latent attention", table="latent", example="+-"),
    SwitchHeadKind("H", "switch_head", "mixer", "SwitchHead attention", table="switch_head", example="H-"),
    Mamba2Kind("M", "mamba2", "mixer", "Mamba-2", table="mamba2", example="M-"),
    Mamba1Kind("m", "mamba1", "mixer", "Mamba-1", table="mamba1", example="m-"),
    GatedDeltaKind("G", "gated_delta", "mixer", "a gated delta net", table="gated_delta", example="G-"),
    S4dKind("S", "s4d", "mixer", "S4D", table="s4d", example="S-", refuses={"cp": WITHOUT_CP}),
    MlpKind("-", "mlp", "feedforward", "MLP", example="*-"),
    MoeKind("E", "moe", "feedforward", "experts", table="moe", example="*E"),
)

KINDS: dict[str, Kind] = {kind.name: kind for kind in ALL}
OF_LETTER: dict[str, Kind] = {kind.letter: kind for kind in ALL}
