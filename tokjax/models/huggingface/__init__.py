"""Exchange with Hugging Face checkpoints: safetensors in and out, bit for bit."""

from tokjax.models.huggingface import gpt, llama  # noqa: F401 (they add their families)
from tokjax.models.huggingface.checkpoints import load, locate
from tokjax.models.huggingface.family import config_from_fields, config_to_fields, known_families
from tokjax.models.huggingface.loading import read_config
from tokjax.models.huggingface.saving import save

__all__ = [
    "config_from_fields",
    "config_to_fields",
    "known_families",
    "load",
    "locate",
    "read_config",
    "save",
]
