"""The tokenizer that lies in a checkpoint: a folder in Hugging Face's form, or a GGUF file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokjax.data.tokenizers import Tokenizer, TokenizerConfig, read_tokenizer
from tokjax.errors import ConfigError


def checkpoint_tokenizer(found: Path) -> TokenizerConfig:
    """Returns the configuration of a checkpoint's tokenizer; it begins texts as that says.

    Args:
        found: a folder, or a GGUF file.

    Raises:
        ConfigError: there is none, or its kind is not supported.
    """
    if found.is_file():
        from tokjax.data.gguf_tokenizer import adds_bos
        from tokjax.gguf_file import read_gguf

        return TokenizerConfig(name="gguf", path=str(found), add_bos=adds_bos(read_gguf(found)))
    models = sorted(found.glob("*.model"))
    if (found / "tokjax_tokenizer.json").is_file():
        name, path = "saved", found
    elif (found / "tokenizer.json").is_file():
        name, path = "huggingface", found
    elif models:
        name, path = "sentencepiece", models[0]
    else:
        raise ConfigError(
            f"{found} has no tokenizer (tokenizer.json or a .model file): copy it there, or load "
            f"the model alone by tokjax.models.load"
        )
    config = TokenizerConfig(name=name, path=str(path))
    add_bos = _json(found / "tokenizer_config.json").get("add_bos_token")
    if not isinstance(add_bos, bool):
        spec = _json(found / "tokenizer.json")
        add_bos = _writes_bos(spec, read_tokenizer(config)) if spec else bool(models)
    return TokenizerConfig(name=name, path=str(path), add_bos=add_bos)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _writes_bos(spec: Mapping[str, Any], tokenizer: Tokenizer) -> bool:
    """Returns whether a tokenizer.json's template puts the BOS token before a text."""
    processor = spec.get("post_processor") or {}
    for part in processor.get("processors") or [processor]:
        first = next(iter(part.get("single") or []), {}).get("SpecialToken", {}).get("id")
        if first is not None and tokenizer.special_tokens.get(first) == tokenizer.bos_id:
            return True
    return False
