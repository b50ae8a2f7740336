"""BriLLM: a graph of tokens whose edges pass a signal on; no attention and no embedding table.

Reference: "BriLLM: Brain-inspired Large Language Model", arXiv 2503.11299.
"""

from tokjax.pretraining.brillm.candidates import Sampled, follower_lists, seen_edges
from tokjax.pretraining.brillm.files import load_brillm, save_brillm
from tokjax.pretraining.brillm.graph import BriLLM, parameter_count
from tokjax.pretraining.brillm.training import BriLLMFit, evaluate_brillm, fit_brillm, windows
from tokjax.pretraining.brillm.walking import brillm

__all__ = [
    "BriLLM",
    "BriLLMFit",
    "Sampled",
    "brillm",
    "evaluate_brillm",
    "fit_brillm",
    "follower_lists",
    "load_brillm",
    "parameter_count",
    "save_brillm",
    "seen_edges",
    "windows",
]
