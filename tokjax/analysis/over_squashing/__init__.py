"""What the last state of a causal transformer still knows of a long input.

Reference: Barbero et al., "Transformers need glasses! Information over-squashing in language
tasks", arXiv 2406.04267.
"""

from tokjax.analysis.over_squashing.collapse import (
    CollapseCurve,
    collapse_curve,
    last_states,
    variant,
)
from tokjax.analysis.over_squashing.jacobian import (
    Ends,
    ends,
    jacobian_norms,
    jacobian_profile,
)
from tokjax.analysis.over_squashing.layer import attend, rounded
from tokjax.analysis.over_squashing.pairs import (
    all_equal,
    first_differs,
    last_repeated,
    ones_then,
    separated,
    with_separators,
)
from tokjax.analysis.over_squashing.paths import attention_of, path_bound, path_counts, path_sums

__all__ = [
    "CollapseCurve",
    "Ends",
    "all_equal",
    "attend",
    "attention_of",
    "collapse_curve",
    "ends",
    "first_differs",
    "jacobian_norms",
    "jacobian_profile",
    "last_repeated",
    "last_states",
    "ones_then",
    "path_bound",
    "path_counts",
    "path_sums",
    "rounded",
    "separated",
    "variant",
    "with_separators",
]
