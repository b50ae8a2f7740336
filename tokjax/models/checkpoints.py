"""One entry for every kind of checkpoint: a name, a path or a hub id becomes a model."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokjax.errors import CheckpointError, nearest
from tokjax.models.known import KNOWN, known_file

if TYPE_CHECKING:
    from jax.sharding import Mesh


def load(
    path_or_name: str | os.PathLike, *, mesh: "Mesh | None" = None, dtype: str | None = None
) -> tuple[Any, dict[str, Any]]:
    """Returns a model and its parameters.

    Tensors are read one at a time straight into their sharding; no pickle is ever opened.

    Args:
        path_or_name: a folder with config.json and safetensors; a GGUF file, or a folder with one;
            the name of a known model ("smollm2-135m", "gemma3-270m"); or an id on the hub (needs
            the extra `hub`).
        mesh: devices to lay the parameters out on; default the first device.
        dtype: of the parameters, `float32`, `bfloat16` or `float16`; default as stored, float32
            where they are quantised. The model computes in bfloat16 where its parameters are, else
            in float32.

    Raises:
        CheckpointError: files are missing or damaged, or a tensor is missing, left over or of
            another shape; it names the tensor and the file.
        ConfigError: the model is not supported.
    """
    found = find(path_or_name)
    if found.is_file():
        from tokjax.models import gguf

        return gguf.load(found, mesh=mesh, dtype=dtype)
    from tokjax.models import huggingface

    return huggingface.load(found, mesh=mesh, dtype=dtype)


def describe(path: Path) -> Any:
    """Returns the model of a checkpoint that `find` found, without reading its parameters.

    Raises:
        CheckpointError: its description is missing or damaged.
        ConfigError: the model is not supported.
    """
    if path.is_file():
        from tokjax.gguf_file import read_gguf
        from tokjax.models.gguf.architectures import config_of
        from tokjax.models.transformer import Transformer

        return Transformer(config_of(read_gguf(path)))
    from tokjax.models.huggingface.checkpoints import model_of
    from tokjax.models.huggingface.loading import read_config

    return model_of(read_config(path))


def find(path_or_name: str | os.PathLike) -> Path:
    """Returns where a checkpoint lies: a GGUF file, or a folder in Hugging Face's form.

    What is there goes before a known name, and that before an id on the hub.

    Raises:
        CheckpointError: there is no such checkpoint, and no way to get it; the message says how.
    """
    path, name = Path(path_or_name).expanduser(), os.fspath(path_or_name)
    if path.is_file():
        if path.suffix == ".gguf" or _begins_as_gguf(path):
            return path
        raise CheckpointError(
            f"{path} is no GGUF file: for a checkpoint in Hugging Face's form name the folder that "
            f"holds it together with config.json"
        )
    if path.is_dir():
        return _in_folder(path)
    if name in KNOWN:
        return known_file(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{name} does not exist.{nearest(name, KNOWN)}")
    from tokjax.models.huggingface import locate

    return locate(name)


def _in_folder(folder: Path) -> Path:
    if any(folder.glob("*.safetensors")) or (folder / "model.safetensors.index.json").exists():
        return folder
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        listed = ", ".join(file.name for file in files[:6])
        raise CheckpointError(
            f"{folder} has {len(files)} GGUF files ({listed}): name one of them. The parts of one "
            f"model have to be merged to one file first (llama-gguf-split --merge)"
        )
    return files[0] if files else folder


def _begins_as_gguf(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"
