"""Hyperschedule diffusion language models: from autoregression to diffusion, and corrections.

Reference: "Unifying Autoregressive and Diffusion-Based Sequence Generation", arXiv 2504.06416.
"""

from tokjax.pretraining.hdlm.bound import Bound, likelihood_bound
from tokjax.pretraining.hdlm.epsilon import EpsilonHybrid
from tokjax.pretraining.hdlm.gamma import GammaHybrid
from tokjax.pretraining.hdlm.objective import HDLM
from tokjax.pretraining.hdlm.samplers import acs, original, remask, reverse
from tokjax.pretraining.hdlm.sampling import Samples, sample
from tokjax.pretraining.hdlm.schedules import (
    Block,
    Hybrid,
    SimpleAnnealing,
    Table,
    autoregressive,
    full_diffusion,
)

__all__ = [
    "HDLM",
    "Block",
    "Bound",
    "EpsilonHybrid",
    "GammaHybrid",
    "Hybrid",
    "Samples",
    "SimpleAnnealing",
    "Table",
    "acs",
    "autoregressive",
    "full_diffusion",
    "likelihood_bound",
    "original",
    "remask",
    "reverse",
    "sample",
]
