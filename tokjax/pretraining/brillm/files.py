"""A graph in a file."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from tokjax.errors import CheckpointError, ConfigError
from tokjax.files import storage_errors, write_atomically
from tokjax.pretraining.brillm.graph import BriLLM, Params

_METADATA = "brillm"


def save_brillm(path: Path | str, model: BriLLM, params: Params) -> None:
    """Writes a graph and its parameters into a safetensors file; one that is there is replaced.

    Raises:
        StorageError: the file cannot be written.
    """
    arrays = {name: np.ascontiguousarray(a) for name, a in jax.device_get(dict(params)).items()}
    told = {_METADATA: json.dumps(dataclasses.asdict(model))}
    write_atomically(Path(path), safetensors.numpy.save(arrays, told))


def load_brillm(path: Path | str) -> tuple[BriLLM, dict[str, Any]]:
    """Returns the graph and the parameters of a file that `save_brillm` wrote.

    Raises:
        CheckpointError: the file is damaged, or holds something else.
        StorageError: it cannot be read.
    """
    path = Path(path)
    with storage_errors(path, "read", "Name a file that save_brillm wrote."):
        content = path.read_bytes()
    try:
        arrays = safetensors.numpy.load(content)
        size = int.from_bytes(content[:8], "little")
        told = json.loads(content[8 : 8 + size])["__metadata__"][_METADATA]
        model = BriLLM(**json.loads(told))
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path} holds no whole graph ({error})") from None
    return model, {name: jnp.asarray(a) for name, a in arrays.items()}
