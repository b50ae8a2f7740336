"""Steering: directions in hidden states found by attribution, and models pushed along them."""

from tokjax.steering.ablation import ablate, last_states, select_tokens
from tokjax.steering.grains import Pair, ablation_differences, steering_vector
from tokjax.steering.integrated_gradients import (
    Attribution,
    attribute_tokens,
    integrated_gradients,
)
from tokjax.steering.options import OptionScores, score_options
from tokjax.steering.steer import steered, steering_edits
from tokjax.steering.vectors import direction, steering_direction

__all__ = [
    "Attribution",
    "OptionScores",
    "Pair",
    "ablate",
    "ablation_differences",
    "attribute_tokens",
    "direction",
    "integrated_gradients",
    "last_states",
    "score_options",
    "select_tokens",
    "steered",
    "steering_direction",
    "steering_edits",
    "steering_vector",
]
