"""tokjax: language models through their token-level signals, in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokjax.language_model import LanguageModel, load

__version__ = "0.1.0"
__all__ = ["LanguageModel", "load"]


def __getattr__(name: str) -> Any:
    # Found when first asked for: importing tokjax alone takes no time and imports no JAX.
    if name in __all__:
        return getattr(importlib.import_module("tokjax.language_model"), name)
    raise AttributeError(f"module 'tokjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
