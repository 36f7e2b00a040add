"""Every part by name, for those who use them as a library: `from meshwright.model.library import Mamba2, preset`.

docs/parts.md shows each in a few lines. Nothing of the project imports this file.
"""

from meshwright.kernels.attention.seen import Blocks
from meshwright.model.block import Block, Layer, Multipliers
from meshwright.model.config import ModelConfig
from meshwright.model.depth import Depth, MixtureOfDepths
from meshwright.model.feedforward.experts import Experts
from meshwright.model.feedforward.mlp import Inner, Mlp
from meshwright.model.feedforward.moe import Moe, RouterLosses, SharedGate
from meshwright.model.generation.generate import generate
from meshwright.model.generation.sampling import Sampling
from meshwright.model.kinds.feedforward.moe import MoeConfig
from meshwright.model.kinds.norms import FORMS, Form
from meshwright.model.mixers.attention import Attention, Heads, Products
from meshwright.model.mixers.attention_core import Look
from meshwright.model.mixers.attention_norms import HeadNorms, rms_norms
from meshwright.model.mixers.gated_delta import DeltaSizes, GatedDelta
from meshwright.model.mixers.latent_attention import LatentAttention, LatentSizes
from meshwright.model.mixers.mamba1 import Mamba1, Mamba1Sizes
from meshwright.model.mixers.mamba2 import Mamba2, Mamba2Sizes
from meshwright.model.mixers.s4d import S4d, S4dSizes
from meshwright.model.mixers.switch_head import SwitchHead, SwitchSizes
from meshwright.model.multi_token import FurtherToken
from meshwright.model.norms import AdaptiveNorm, DynamicTanh, LayerNorm, RMSNorm, ZeroCentredRMSNorm
from meshwright.model.parts import build_model, initialise
from meshwright.model.positions import T5, Alibi, LearnedPositions, Rope, RopeScaling, SinusoidalPositions
from meshwright.model.presets import PRESETS, preset
from meshwright.model.routers.router import Ways
from meshwright.model.routers.table import make_router
from meshwright.model.routing_record import replay_routing
from meshwright.model.stack import Ends, Extras, LanguageModel
from meshwright.parallel.initialise import InitPolicy
from meshwright.parallel.tally import Tally, finish_step, tally_of
from meshwright.parallel.tensor.vocabulary import Embedding, VocabularyRows
from meshwright.parallel.where import Where, where_of_plain_tokens

__all__ = [
    "FORMS",
    "PRESETS",
    "T5",
    "AdaptiveNorm",
    "Alibi",
    "Attention",
    "Block",
    "Blocks",
    "DeltaSizes",
    "Depth",
    "DynamicTanh",
    "Embedding",
    "Ends",
    "Experts",
    "Extras",
    "Form",
    "FurtherToken",
    "GatedDelta",
    "HeadNorms",
    "Heads",
    "InitPolicy",
    "Inner",
    "LanguageModel",
    "LatentAttention",
    "LatentSizes",
    "Layer",
    "LayerNorm",
    "LearnedPositions",
    "Look",
    "Mamba1",
    "Mamba1Sizes",
    "Mamba2",
    "Mamba2Sizes",
    "MixtureOfDepths",
    "Mlp",
    "ModelConfig",
    "Moe",
    "MoeConfig",
    "Multipliers",
    "Products",
    "RMSNorm",
    "Rope",
    "RopeScaling",
    "RouterLosses",
    "S4d",
    "S4dSizes",
    "Sampling",
    "SharedGate",
    "SinusoidalPositions",
    "SwitchHead",
    "SwitchSizes",
    "Tally",
    "VocabularyRows",
    "Ways",
    "Where",
    "ZeroCentredRMSNorm",
    "build_model",
    "finish_step",
    "generate",
    "initialise",
    "make_router",
    "preset",
    "replay_routing",
    "rms_norms",
    "tally_of",
    "where_of_plain_tokens",
]
