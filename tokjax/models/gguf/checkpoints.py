"""Loading a model from a GGUF file."""

import os
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from tokjax.gguf_file import read_gguf
from tokjax.models.gguf.architectures import config_of, family_of, tensors_of
from tokjax.models.huggingface.loading import load_parameters
from tokjax.models.transformer import Transformer


def load(
    path: str | os.PathLike, *, mesh: Mesh | None = None, dtype: str | None = None
) -> tuple[Transformer, dict[str, Any]]:
    """Returns a model and its parameters from a GGUF file.

    Tensors are read and dequantised one at a time, straight into their sharding.

    Args:
        path: the file.
        mesh: devices to lay the parameters out on; default the first device.
        dtype: of the parameters, `float32`, `bfloat16` or `float16`; default float32 for quantised
            tensors and as stored for others. The model computes in bfloat16 where its parameters
            are, else in float32.

    Raises:
        CheckpointError: the file is missing or damaged, or a tensor is missing, left over, of
            another shape or of an unknown kind; it names the tensor and the file.
        ConfigError: the model is not supported.
    """
    file = read_gguf(Path(path))
    config, family = config_of(file), family_of(file)
    config, params = load_parameters(
        config, tensors_of(file, config), str(path), family=family, mesh=mesh, dtype=dtype
    )
    return Transformer(config), params
