"""All methods of selection by name."""

from collections.abc import Mapping
from typing import Annotated, Any

from tokjax.config import Choice, resolve
from tokjax.selection.baselines import Longest, Loss, Random, Rds
from tokjax.selection.gradient import Gradient
from tokjax.selection.scoring import PoolSelector, Selector
from tokjax.selection.shad import Shad
from tokjax.selection.trim import Trim
from tokjax.selection.tvm import Tvm

__all__ = [
    "NAMES",
    "Gradient",
    "Longest",
    "Loss",
    "Random",
    "Rds",
    "Shad",
    "Trim",
    "Tvm",
    "selector",
]

NAMES = ("trim", "random", "longest", "loss", "rds", "gradient", "shad", "tvm")


def selector(name: str, options: Mapping[str, Any]) -> Selector | PoolSelector:
    """Returns a method with its options.

    Raises:
        ConfigError: there is no such method or option, or a value is impossible.
    """
    chosen: Any = Annotated[Any, Choice("selector")]
    return resolve(chosen, {"name": name, **options}, path="method")
