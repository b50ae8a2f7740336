"""Models from GGUF files, dequantised on load."""

from tokjax.models.gguf.checkpoints import load

__all__ = ["load"]
