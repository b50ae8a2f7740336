"""What several families' files have in common: names of norms and linear maps, kinds of layers."""

from collections.abc import Mapping

from tokjax.errors import ConfigError
from tokjax.models.config import ModelConfig
from tokjax.models.huggingface.family import Fields, Tensor

_LAYER_TYPES = {"sliding_attention": True, "full_attention": False}


def normed(names: Mapping[str, str], first_layer: int = 0) -> dict[str, Tensor]:
    """Returns where norms lie, with their biases, from path -> name."""
    found = {}
    for path, name in names.items():
        found[path] = Tensor(f"{name}.weight", first_layer=first_layer)
        found[f"{path}_bias"] = Tensor(f"{name}.bias", first_layer=first_layer)
    return found


def linear(names: Mapping[str, str]) -> dict[str, Tensor]:
    """Returns where matrices lie that are stored transposed, with their biases."""
    found = {}
    for path, name in names.items():
        found[path] = Tensor(f"{name}.weight", transposed=True)
        found[f"{path}_bias"] = Tensor(f"{name}.bias")
    return found


def window_pattern(fields: Fields, default: tuple[bool, ...]) -> tuple[bool, ...]:
    """Returns which layers are windowed, from `layer_types` where the file has them.

    Raises:
        ConfigError: a layer is of another type.
    """
    types = fields.get("layer_types")
    if types is None:
        return default
    for kind in types:
        if kind not in _LAYER_TYPES:
            raise ConfigError(
                f"config.json has a layer of type {kind!r}; known: {list(_LAYER_TYPES)}"
            )
    return tuple(_LAYER_TYPES[kind] for kind in types)


def layer_types(config: ModelConfig) -> list[str]:
    """Returns what config.json calls each layer."""
    return ["full_attention" if w is None else "sliding_attention" for w in config.windows]


def is_backbone(fields: Fields, *architectures: str) -> bool:
    """Returns whether config.json says that the checkpoint is one of these, without a head."""
    given = list(fields.get("architectures") or ())
    return len(given) == 1 and given[0] in architectures
