"""Statistics of tokens and layers, computed from a forward pass."""

from tokjax.signals.token_stats import TokenStats, token_stats
from tokjax.signals.weighted_nll import weighted_nll

__all__ = ["TokenStats", "token_stats", "weighted_nll"]
