"""Trees over states: summaries of them, and attention that walks down to a few.

Shapes and indices are exact integers (`shape`), inner nodes summarise their leaves (`nodes`), a
query walks from the root to one leaf (`walk`) and attends to what it met (`cross`).
"""

from tokjax.models.tree.cross import CrossAttention
from tokjax.models.tree.nodes import Aggregator, Tree, build_tree, exchange_siblings
from tokjax.models.tree.shape import (
    TreeShape,
    arranged,
    leaves_under,
    projections,
    retrieved,
)
from tokjax.models.tree.walk import Walk, attention_policy, uniform_policy, walk

__all__ = [
    "Aggregator",
    "CrossAttention",
    "Tree",
    "TreeShape",
    "Walk",
    "arranged",
    "attention_policy",
    "build_tree",
    "exchange_siblings",
    "leaves_under",
    "projections",
    "retrieved",
    "uniform_policy",
    "walk",
]
