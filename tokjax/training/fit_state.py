"""The state of a fit in a file, from which it goes on exactly."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Float

from tokjax.errors import CheckpointError, ConfigError
from tokjax.files import storage_errors, write_atomically

_METADATA = "tokjax_fit"
_LOSSES = "losses"
_REMEDY = "Free space or name a writable place; what was written before is intact."


def write_state(
    path: Path, identity: Mapping[str, Any], state: Any, losses: Float[np.ndarray, "N"]
) -> None:
    """Writes the state behind as many steps as there are losses.

    Args:
        path: of the file; one that is there is replaced as a whole.
        identity: what the training was told, as plain values.
        state: a pytree of arrays.
        losses: of the steps so far.

    Raises:
        StorageError: the file cannot be written.
    """
    tensors = {name: np.asarray(leaf) for name, leaf in _named(jax.device_get(state)).items()}
    tensors[_LOSSES] = losses
    content = safetensors.numpy.save(tensors, {_METADATA: json.dumps(dict(identity))})
    write_atomically(path, content, remedy=_REMEDY)


def read_state(
    path: Path, identity: Mapping[str, Any], template: Any
) -> tuple[Any, list[float]] | None:
    """Returns the state and the losses of the steps so far, or None without a file.

    Args:
        path: of the file.
        identity: what this training is told.
        template: a state of the same structure.

    Raises:
        ConfigError: the file is of a training that was told something else.
        CheckpointError: it is damaged, or none of a training.
        StorageError: it cannot be read.
    """
    if not path.exists():
        return None
    with storage_errors(path, "read", "Name a readable file, or one that does not exist."):
        content = path.read_bytes()
    try:
        tensors = safetensors.numpy.load(content)
        size = int.from_bytes(content[:8], "little")
        told = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][_METADATA])
        losses = tensors.pop(_LOSSES)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} holds no whole training state ({error}): remove it to begin anew"
        ) from None
    asked = json.loads(json.dumps(dict(identity)))
    for name in sorted({*told, *asked}):
        if told.get(name) != asked.get(name):
            raise ConfigError(
                f"{path} is of a training with {name}={told.get(name)}, not {asked.get(name)}: "
                f"name another file, or remove it to begin anew"
            )
    expected = {name: (leaf.shape, leaf.dtype) for name, leaf in _named(template).items()}
    if expected != {name: (leaf.shape, leaf.dtype) for name, leaf in tensors.items()}:
        raise CheckpointError(
            f"{path} holds other arrays than this training's state: remove it to begin anew"
        )
    paths, structure = jax.tree_util.tree_flatten_with_path(template)
    leaves = [tensors[jax.tree_util.keystr(at)] for at, _ in paths]
    return jax.tree.unflatten(structure, leaves), losses.tolist()


def _named(tree: Any) -> dict[str, Any]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}
