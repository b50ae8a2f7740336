"""Toucan: a character model whose last stack spells whole groups of characters."""

from tokjax.tokenization.toucan.boundaries import (
    Boundaries,
    boundary_prior_loss,
    relaxed_bernoulli,
    whitespace_boundaries,
)
from tokjax.tokenization.toucan.expansion import Expansion
from tokjax.tokenization.toucan.objective import Toucan
from tokjax.tokenization.toucan.predictor import (
    ToucanParams,
    ToucanPredictor,
    expanded_rows,
    toucan,
    without_ends,
)

__all__ = [
    "Boundaries",
    "Expansion",
    "Toucan",
    "ToucanParams",
    "ToucanPredictor",
    "boundary_prior_loss",
    "expanded_rows",
    "relaxed_bernoulli",
    "toucan",
    "whitespace_boundaries",
    "without_ends",
]
