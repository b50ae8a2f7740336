"""Contrast and guidance: predictions of several models, prompts, layers or passes combined.

Each function returns a predictor and its parameters, the first two arguments of `decode`.
"""

from tokjax.decoding.contrast.branches import Branches
from tokjax.decoding.contrast.contrastive import Contrastive, ContrastiveParams, contrastive
from tokjax.decoding.contrast.dola import DoLa, DoLaParams, dola
from tokjax.decoding.contrast.guidance import guided
from tokjax.decoding.contrast.layercake import LayerCake, LayerCakeParams, layercake
from tokjax.decoding.contrast.reasoners import Reasoners, ReasonersParams, with_reasoners
from tokjax.decoding.contrast.sh2 import sh2
from tokjax.decoding.contrast.token_classes import TokenClasses, token_classes
from tokjax.decoding.contrast.two_prompts import TwoPrompts, TwoPromptsParams

__all__ = [
    "Branches",
    "Contrastive",
    "ContrastiveParams",
    "DoLa",
    "DoLaParams",
    "LayerCake",
    "LayerCakeParams",
    "Reasoners",
    "ReasonersParams",
    "TokenClasses",
    "TwoPrompts",
    "TwoPromptsParams",
    "contrastive",
    "dola",
    "guided",
    "layercake",
    "sh2",
    "token_classes",
    "with_reasoners",
]
