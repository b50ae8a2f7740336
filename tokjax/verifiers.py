"""Verifiers: is an answer right? For evaluation by generation, and as rewards.

A verifier is a frozen dataclass, registered under the kind "verifier"; called with an answer and
the reference it returns a number from 0 (wrong) to 1 (right).
"""

import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from tokjax.config import register
from tokjax.errors import ConfigError

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)?\.?\d+(?:[eE][-+]?\d+)?")


class Verifier(Protocol):
    """Says how right an answer is."""

    def __call__(self, answer: str, reference: str) -> float:
        """Returns 0 (wrong) to 1 (right)."""
        ...


@register("verifier", "exact_match")
@dataclass(frozen=True)
class ExactMatch:
    """The answer is the reference, but for white space at the ends and within."""

    ignore_case: bool = False  # "Tokyo" is "tokyo"
    # expression whose last match's first group (or whole) is compared, in both; "" compares all
    extract: str = ""

    def __post_init__(self):
        _compiled(self.extract)

    def __call__(self, answer: str, reference: str) -> float:
        """Returns 1 or 0."""
        return float(self._normal(answer) == self._normal(reference))

    def _normal(self, text: str) -> str:
        text = " ".join(_extracted(self.extract, text).split())
        return text.casefold() if self.ignore_case else text


@register("verifier", "numeric")
@dataclass(frozen=True)
class Numeric:
    """The last number of the answer is the last number of the reference.

    Commas that group digits are read as such. An answer without a number is wrong.
    """

    relative_tolerance: float = 1e-6  # of the reference's size
    absolute_tolerance: float = 1e-9  # in any case
    extract: str = ""  # as for exact_match, before numbers are looked for

    def __post_init__(self):
        _compiled(self.extract)

    def __call__(self, answer: str, reference: str) -> float:
        """Returns 1 or 0.

        >>> Numeric()("that makes 1,200 in all", "#### 1200")
        1.0
        """
        found, wanted = (last_number(_extracted(self.extract, t)) for t in (answer, reference))
        if found is None or wanted is None:
            return 0.0
        limit = max(self.absolute_tolerance, self.relative_tolerance * abs(wanted))
        return float(abs(found - wanted) <= limit)


@register("verifier", "regex")
@dataclass(frozen=True)
class Regex:
    """The answer contains a match of an expression, in which {reference} is the reference."""

    pattern: str = r"\b{reference}\b"  # {reference} stands for the reference, taken literally

    def __post_init__(self):
        _compiled(self.pattern.replace("{reference}", "x"))

    def __call__(self, answer: str, reference: str) -> float:
        """Returns 1 or 0."""
        pattern = self.pattern.replace("{reference}", re.escape(reference.strip()))
        return float(re.search(pattern, answer) is not None)


@register("verifier", "function")
@dataclass(frozen=True)
class Function:
    """A Python function (answer, reference) -> number from 0 to 1."""

    path: str = ""  # "module:function"

    def __post_init__(self):
        self._function  # noqa: B018 (what is wrong with it is said now)

    def __call__(self, answer: str, reference: str) -> float:
        """Returns what the function returns."""
        return float(self._function(answer, reference))

    @functools.cached_property
    def _function(self) -> Callable[[str, str], Any]:
        module, _, name = self.path.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"verifier.path={self.path!r} names no function ({error}): write 'module:function'"
            ) from None


@register("verifier", "math")
@dataclass(frozen=True)
class Math:
    """Mathematically equal expressions, by the library math-verify."""

    def __post_init__(self):
        try:
            import math_verify  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ConfigError(
                "verifier 'math' needs the library math-verify: pip install math-verify"
            ) from None

    def __call__(self, answer: str, reference: str) -> float:
        """Returns 1 or 0."""
        from math_verify import parse, verify  # pyright: ignore[reportMissingImports]

        return float(verify(parse(reference), parse(answer)))


def last_number(text: str) -> float | None:
    """Returns the last number in a text; None where there is none.

    >>> last_number("3 times 1,000.5 is 3,001.5."), last_number("none")
    (3001.5, None)
    """
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _extracted(pattern: str, text: str) -> str:
    """Returns the first group, or all, of the last match; "" where there is none."""
    if not pattern:
        return text
    matches = list(_compiled(pattern).finditer(text))
    if not matches:
        return ""
    return matches[-1].group(1 if matches[-1].re.groups else 0) or ""


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{pattern!r} is no regular expression: {error}") from None
