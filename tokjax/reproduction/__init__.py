"""Reproductions: a published claim, the arms that test it with its controls, and the verdict.

A plan is a file `configs/repro/<slug>.py` with a function `get_plan(scale) -> Plan`;
`python -m tokjax.reproduce <slug>` runs it.
"""

from tokjax.reproduction.plan import Arm, Panel, Plan, Verdict
from tokjax.reproduction.results import ArmResult, Results, Series

__all__ = ["Arm", "ArmResult", "Panel", "Plan", "Results", "Series", "Verdict"]
