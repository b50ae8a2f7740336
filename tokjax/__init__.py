"""tokjax: language models through their token-level signals, in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokjax.language_model import LanguageModel
    from tokjax.loading import load

__version__ = "0.1.0"
__all__ = ["LanguageModel", "load"]

_HOMES = {"LanguageModel": "tokjax.language_model", "load": "tokjax.loading"}


def __getattr__(name: str) -> Any:
    # Found when first asked for: importing tokjax alone takes no time and imports no JAX.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tokjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
