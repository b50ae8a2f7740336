"""Confidence: an attempt that is sure of itself ends the thinking ("Think Just Enough")."""

from tokjax.decoding.confidence.entropy import (
    TopEntropy,
    renormalised_entropy,
    sequence_entropy,
    top_entropy,
)
from tokjax.decoding.confidence.policies import (
    MeanEntropy,
    Policy,
    Signal,
    StopBelow,
    stop_below,
)
from tokjax.decoding.confidence.thinking import again, think, with_attempt
from tokjax.decoding.confidence.thoughts import Thoughts, majority, savings
from tokjax.decoding.confidence.thresholds import (
    Calibration,
    Separation,
    bayes,
    calibrate,
    entropy_mean,
    mutual_information,
    overall_mean,
    separation,
)

__all__ = [
    "Calibration",
    "MeanEntropy",
    "Policy",
    "Separation",
    "Signal",
    "StopBelow",
    "Thoughts",
    "TopEntropy",
    "again",
    "bayes",
    "calibrate",
    "entropy_mean",
    "majority",
    "mutual_information",
    "overall_mean",
    "renormalised_entropy",
    "savings",
    "separation",
    "sequence_entropy",
    "stop_below",
    "think",
    "top_entropy",
    "with_attempt",
]
