"""Exchange with Hugging Face checkpoints: safetensors in and out, bit for bit."""

# These add their families.
from tokjax.models.huggingface import bart, bert, gpt, llama, t5  # noqa: F401
from tokjax.models.huggingface.checkpoints import load, locate, model_of
from tokjax.models.huggingface.family import config_from_fields, config_to_fields, known_families
from tokjax.models.huggingface.loading import read_config
from tokjax.models.huggingface.saving import save

__all__ = [
    "config_from_fields",
    "config_to_fields",
    "known_families",
    "load",
    "locate",
    "model_of",
    "read_config",
    "save",
]
