"""Finding a checkpoint by path, known name or hub id, and loading it."""

import os
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from tokjax.errors import CheckpointError
from tokjax.models.config import Config, EncDecConfig
from tokjax.models.encdec import EncoderDecoder
from tokjax.models.encoder import Encoder
from tokjax.models.huggingface.loading import load_parameters, read_config
from tokjax.models.huggingface.safetensors_files import find_tensors
from tokjax.models.transformer import Transformer

# What is taken from the hub: never a pickle.
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def load(
    path_or_id: str | os.PathLike, *, mesh: Mesh | None = None, dtype: str | None = None
) -> tuple[Any, dict[str, Any]]:
    """Returns a model and its parameters from a Hugging Face checkpoint.

    The model is a `Transformer`, an `Encoder` or an `EncoderDecoder`, as config.json says.

    Tensors are read one at a time straight into their sharding, so the host never holds much more
    than the parameters once. No pickle is ever opened.

    Args:
        path_or_id: a folder with config.json and safetensors, or an id on the hub (needs the
            extra `hub`).
        mesh: devices to lay the parameters out on; default the first device.
        dtype: of the parameters, `float32`, `bfloat16` or `float16`; default as stored. The model
            computes in bfloat16 where its parameters are, else in float32.

    Raises:
        CheckpointError: files are missing or damaged, or a tensor is missing, left over or of
            another shape; it names the tensor and the file.
        ConfigError: the model is not supported.
    """
    folder = locate(path_or_id)
    config = read_config(folder)
    tensors = find_tensors(folder)
    config, params = load_parameters(config, tensors, str(folder), mesh=mesh, dtype=dtype)
    return model_of(config), params


def model_of(config: Config) -> Any:
    """Returns the model of a configuration: `Transformer`, `Encoder` or `EncoderDecoder`."""
    if isinstance(config, EncDecConfig):
        return EncoderDecoder(config)
    return Transformer(config) if config.causal else Encoder(config)


def locate(path_or_id: str | os.PathLike) -> Path:
    """Returns the local folder of a checkpoint; one on the hub is fetched, or found in its cache.

    Raises:
        CheckpointError: there is no such folder, and no way to get it.
    """
    path = Path(path_or_id)
    if path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file: name the folder that holds it together with config.json"
        )
    name = os.fspath(path_or_id)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{path} does not exist")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise CheckpointError(
            f"{path} does not exist here; to take it from the hub, install the extra 'hub' (pip "
            f"install 'tokjax[hub]')"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=_PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path} does not exist here and cannot be taken from the hub: {reason}"
        ) from None
