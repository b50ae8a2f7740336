"""tokjax: language models through their token-level signals, in JAX."""

__version__ = "0.1.0"
