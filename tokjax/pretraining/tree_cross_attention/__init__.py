"""Tree Cross Attention: queries that read a few summaries and leaves of a long context.

Reference: "Tree Cross Attention" (arXiv 2309.17388).
"""

from tokjax.pretraining.tree_cross_attention.objective import (
    TreeCrossAttention,
    queries_of,
    reinforce,
)
from tokjax.pretraining.tree_cross_attention.readers import (
    ContextReader,
    FullReader,
    LatentReader,
    Reading,
    TreeReader,
)

__all__ = [
    "ContextReader",
    "FullReader",
    "LatentReader",
    "Reading",
    "TreeCrossAttention",
    "TreeReader",
    "queries_of",
    "reinforce",
]
