"""From a run, a checkpoint, a file or a name to a language model with its tokenizer."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from tokjax.data.checkpoint_tokenizer import checkpoint_tokenizer
from tokjax.data.tokenizers import read_tokenizer
from tokjax.errors import ConfigError
from tokjax.language_model import LanguageModel
from tokjax.models import checkpoints
from tokjax.models.config import with_dtypes
from tokjax.models.quantized import quantize
from tokjax.models.transformer import Transformer
from tokjax.training.run_facts import RUN_FILE


def load(
    path_or_name: str | os.PathLike, *, mesh: Mesh | None = None, dtype: str | None = None
) -> LanguageModel:
    """Returns a language model with its tokenizer.

    Args:
        path_or_name: the workdir of a training run; a folder in Hugging Face's form; a GGUF file,
            or a folder with one; the name of a known model ("smollm2-135m", "gemma3-270m"); or an
            id on the hub (needs the extra `hub`).
        mesh: devices to lay the parameters out on; default the first device.
        dtype: of the parameters, `float32`, `bfloat16` or `float16`; default as stored, float32
            where they are quantised. The model computes in bfloat16 where its parameters are, else
            in float32. `int8` quantises the blocks' matrices (`tokjax.models.quantized`) and
            leaves the rest as stored.

    Raises:
        CheckpointError: files are missing or damaged, or the model is not installed (the message
            says how to install it).
        ConfigError: the model or its tokenizer is not supported, or it is no language model.
    """
    if dtype == "int8":
        lm = load(path_or_name, mesh=mesh)
        return dataclasses.replace(lm, params=quantize(lm.params))
    path = Path(path_or_name).expanduser()
    if (path / RUN_FILE).is_file():
        return _from_run(path, mesh, dtype)
    found = checkpoints.find(path_or_name)
    described = checkpoint_tokenizer(found)
    tokenizer, add_bos = read_tokenizer(described), described.add_bos
    ends = _gguf_ends(found) if found.is_file() else _folder_ends(found)
    model, params = checkpoints.load(found, mesh=mesh, dtype=dtype)
    if not isinstance(model, Transformer) or not model.config.causal:
        raise ConfigError(
            f"{path_or_name} holds a model of the kind {type(model).__name__}, which continues no "
            f"text: load it by tokjax.models.load"
        )
    size = model.config.vocabulary
    more = tuple(i for i in ends if 0 <= i < size and i != tokenizer.eos_id)
    return LanguageModel(model, params, tokenizer, add_bos, more)


def _folder_ends(folder: Path) -> list[int]:
    """Returns the ids that end a text by a checkpoint's folder: its generation_config.json's, or
    else its config.json's.
    """
    for name in ("generation_config.json", "config.json"):
        given = _json(folder / name).get("eos_token_id")
        if given is not None:
            ids = given if isinstance(given, list) else [given]
            return [i for i in ids if isinstance(i, int)]
    return []


def _gguf_ends(path: Path) -> list[int]:
    """Returns the ids that end a turn or a message by a GGUF file."""
    from tokjax.gguf_file import read_gguf

    file = read_gguf(path)
    keys = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    return [i for key in keys if (i := file.get(key, int, None)) is not None]


def _from_run(workdir: Path, mesh: Mesh | None, dtype: str | None) -> LanguageModel:
    from tokjax.training.trained import load_trained

    found = load_trained(workdir, mesh=mesh)
    model, params = found.model, found.params
    if not model.config.causal:
        raise ConfigError(
            f"{workdir} is a run of a model that sees both sides, which continues no text: load it "
            f"by tokjax.training.trained.load_trained"
        )
    if dtype is not None:
        compute = "bfloat16" if dtype == "bfloat16" else "float32"
        model = Transformer(with_dtypes(model.config, dtype, compute))
        params = jax.tree.map(lambda p: p.astype(dtype), params)
    return LanguageModel(model, params, found.tokenizer, found.add_bos)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
