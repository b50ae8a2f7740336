"""Reproductions: a published claim, the arms that test it with its controls, and the verdict.

A plan is a file `configs/repro/<slug>.py` with a function `get_plan(scale)`, which returns a `Plan`
(the arms are training runs) or a `Comparison` (the arms are treatments of the same items);
`python -m tokjax.reproduce <slug>` runs it.
"""

from tokjax.reproduction.comparison import (
    Bars,
    Comparison,
    Interval,
    Lines,
    Measurements,
    Treatment,
)
from tokjax.reproduction.plan import Arm, Panel, Plan, Verdict
from tokjax.reproduction.results import ArmResult, Results, Series

__all__ = [
    "Arm",
    "ArmResult",
    "Bars",
    "Comparison",
    "Interval",
    "Lines",
    "Measurements",
    "Panel",
    "Plan",
    "Results",
    "Series",
    "Treatment",
    "Verdict",
]
