"""Saving a model as a checkpoint that transformers loads."""

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tokjax.errors import ConfigError, StorageError
from tokjax.files import storage_errors, sync_directory
from tokjax.models import parameters
from tokjax.models.huggingface.family import Tensor, config_to_fields, family_of, to_stored
from tokjax.models.huggingface.safetensors_files import write_tensors
from tokjax.models.quantized import is_quantized

# What travels with a checkpoint beside the model itself.
CARRIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "spiece.model",
    "tokjax_tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
_IDS = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id"),
    *("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
)


def save(
    folder: str | os.PathLike,
    model: Any,
    params: Mapping[str, Any],
    *,
    source: str | os.PathLike | None = None,
    max_shard_bytes: int = 5 * 2**30,
    overwrite: bool = False,
) -> None:
    """Writes a model as a Hugging Face checkpoint; the folder appears whole or not at all.

    Args:
        folder: where.
        model: what the parameters are of (`Transformer`, `Encoder` or `EncoderDecoder`); its
            `config.family` says in which form it is written.
        params: stacked or unstacked parameters, written in their own dtypes.
        source: a checkpoint's folder whose tokenizer, generation_config.json and token ids are
            carried along.
        max_shard_bytes: a checkpoint larger than this is split into several files.
        overwrite: replace a folder that holds something already.

    Raises:
        ConfigError: the family cannot express the model, it has adapters, or the parameters are
            quantised.
        StorageError: the folder is not empty, or cannot be written.
    """
    folder = Path(folder)
    if getattr(model.config, "lora", None) is not None:
        raise ConfigError("the model has adapters: merge them (lora.merge), or save them alone")
    if is_quantized(params):
        raise ConfigError("the parameters are int8: save quantized.dequantize(params)")
    fields = config_to_fields(model.config)
    if folder.exists() and not overwrite and (folder.is_file() or any(folder.iterdir())):
        raise StorageError(f"{folder} exists already: choose another folder, or overwrite=True")
    stored = _stored(model, parameters.stack(params))
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    with storage_errors(folder, remedy="Free space or choose another folder."):
        try:
            temporary.mkdir(parents=True)
            if source is not None:
                fields |= _carry(Path(source), temporary)
            shapes = {name: _described(parts) for name, parts in stored.items()}
            write_tensors(temporary, shapes, lambda n: _assembled(stored[n]), max_shard_bytes)
            (temporary / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    sync_directory(folder.parent)


def _carry(source: Path, target: Path) -> dict[str, Any]:
    """Copies what belongs to the tokenizer; returns the special ids that config.json has."""
    for name in CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    try:
        given = json.loads((source / "config.json").read_bytes())
    except OSError:
        return {}
    return {name: given[name] for name in _IDS if name in given}


Parts = list[tuple[Tensor, Any, int | None]]


def _stored(model: Any, params: Mapping[str, Any]) -> dict[str, Parts]:
    """Returns name -> (tensor, parameter, layer) of each part of each stored tensor."""
    config = model.config
    family = family_of(config.family)
    names = family.tensors(config)
    if not family.has_head(config):
        names = family.without_prefix(names)
    found: dict[str, Parts] = {}

    def visit(path: str, parameter: parameters.Parameter, layers: int) -> None:
        leaf: Any = params
        for key in path.split("/"):
            leaf = leaf[key]
        expected = ((layers,) if layers else ()) + parameter.shape
        if leaf.shape != expected:
            raise ValueError(f"parameter {path} has shape {leaf.shape}, the model {expected}")
        tensor = names[path]
        for layer in range(tensor.first_layer, layers) if layers else (None,):
            found.setdefault(tensor.name.format(layer=layer), []).append((tensor, leaf, layer))

    parameters.map_table(config, visit)
    return found


def _described(parts: Parts) -> tuple[tuple[int, ...], Any]:
    tensor, leaf, layer = parts[0]
    return tensor.stored_shape(leaf.shape if layer is None else leaf.shape[1:]), leaf.dtype


def _assembled(parts: Parts) -> np.ndarray:
    pieces = []
    for tensor, leaf, layer in parts:
        piece = leaf if layer is None else leaf[layer]
        pieces.append((tensor, np.asarray(jax.device_get(piece))))
    return to_stored(pieces)
