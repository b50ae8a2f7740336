"""What a family of Hugging Face checkpoints is: its configuration and the names of its tensors."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokjax.errors import CheckpointError, ConfigError, nearest
from tokjax.models.config import Config, ModelConfig

Fields = Mapping[str, Any]  # a parsed config.json


@dataclass(frozen=True)
class Split:
    """Says which part of a fused tensor a parameter is.

    Along `axis` the tensor holds `groups` repetitions of all parts in turn: one for parts that lie
    one behind the other (GPT-2, Phi-3), one per head where they alternate (GPT-NeoX).

    Attributes:
        sizes: of each part within one group.
        index: which of the parts.
        axis: of the tensor as stored.
        groups: number of repetitions.
    """

    sizes: tuple[int, ...]
    index: int
    axis: int = 0
    groups: int = 1


@dataclass(frozen=True)
class Tensor:
    """Where a parameter lies in a checkpoint.

    Attributes:
        name: of the tensor; `{layer}` stands for the block.
        transposed: stored as (output, input) where tokjax has (input, output).
        split: the part it is of a fused tensor, or None.
        row: stored as the one row of a matrix.
        first_layer: the first block that has it; what those before it have is of no effect.
    """

    name: str
    transposed: bool = False
    split: Split | None = None
    row: bool = False
    first_layer: int = 0

    def from_stored(self, stored: np.ndarray) -> np.ndarray:
        """Returns the parameter (of one layer) from the stored tensor."""
        if self.split is not None:
            s, start = self.split, sum(self.split.sizes[: self.split.index])
            part = _grouped(stored, s, sum(s.sizes))[:, start : start + s.sizes[s.index]]
            stored = _ungrouped(part, s)
        stored = stored[0] if self.row else stored
        return stored.T if self.transposed else stored

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the stored tensor from that of the parameter (of one layer)."""
        found = list(shape[::-1] if self.transposed else shape)
        if self.split is not None:
            found[self.split.axis] = self.split.groups * sum(self.split.sizes)
        return (1, *found) if self.row else tuple(found)


def to_stored(parts: Sequence[tuple[Tensor, np.ndarray]]) -> np.ndarray:
    """Returns the stored tensor made of all its parts (one, unless it is fused)."""
    placed = {}
    for tensor, array in parts:
        array = array.T if tensor.transposed else array
        if tensor.split is None:
            return array[None] if tensor.row else array
        s = tensor.split
        placed[s.index] = (_grouped(array, s, s.sizes[s.index]), s)
    in_order = [placed[i] for i in sorted(placed)]
    return _ungrouped(np.concatenate([part for part, _ in in_order], axis=1), in_order[0][1])


def _grouped(array: np.ndarray, split: Split, size: int) -> np.ndarray:
    """Returns the array with the split axis first, as [groups, size, ...]."""
    moved = np.moveaxis(array, split.axis, 0)
    return moved.reshape(split.groups, size, *moved.shape[1:])


def _ungrouped(array: np.ndarray, split: Split) -> np.ndarray:
    return np.moveaxis(array.reshape(-1, *array.shape[2:]), 0, split.axis)


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint.

    Attributes:
        name: its `model_type`.
        architecture: the class that transformers loads it with.
        read: config.json -> configuration.
        write: configuration -> config.json, without what every family has.
        tensors: configuration -> path of each parameter -> where it lies.
        prefix: what the names of all but the head begin with; checkpoints of the bare backbone
            leave it out.
        ignored: endings of names that hold no parameter (buffers of older versions).
        unused: names that a checkpoint may have and this model does not use.
        copies: names of tensors that may repeat a parameter -> its path.
        renamed: (former, present) endings of names.
        backbone: the class of checkpoints without a head, whose names lack the prefix.
        has_head: whether a configuration is of a model with a head.
        adapt: (configuration, names of the tensors) -> configuration, where config.json alone
            leaves something open.
    """

    name: str
    architecture: str
    read: Callable[[Fields], Any]
    write: Callable[[Any], dict[str, Any]]
    tensors: Callable[[Any], dict[str, Tensor]]
    prefix: str = "model."
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq", "rotary_emb.original_inv_freq")
    unused: tuple[str, ...] = ()
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    renamed: tuple[tuple[str, str], ...] = ()
    backbone: str | None = None
    has_head: Callable[[Any], bool] = lambda config: True
    adapt: Callable[[Any, frozenset[str]], Any] = lambda config, names: config

    def without_prefix(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors under the names that a bare backbone has."""
        return {
            path: dataclasses.replace(t, name=t.name.removeprefix(self.prefix))
            for path, t in tensors.items()
        }


_FAMILIES: dict[str, Family] = {}


def add_family(family: Family) -> None:
    """Makes a family known under its name."""
    _FAMILIES[family.name] = family


def family_of(name: str) -> Family:
    """Returns the family with this `model_type`.

    Raises:
        ConfigError: there is none.
    """
    if name not in _FAMILIES:
        raise ConfigError(f"no model of type {name!r} can be read.{nearest(name, _FAMILIES)}")
    return _FAMILIES[name]


def known_families() -> tuple[str, ...]:
    """Returns every known `model_type`."""
    return tuple(sorted(_FAMILIES))


def config_from_fields(fields: Fields) -> Any:
    """Returns the configuration that a parsed config.json describes: a `ModelConfig`, or an
    `EncDecConfig`.

    Raises:
        ConfigError: the type of model or one of its features is not supported, or a key is
            missing.
    """
    if "quantization_config" in fields:
        method = fields["quantization_config"].get("quant_method", "unknown")
        raise ConfigError(
            f"the checkpoint's weights are quantised (quant_method={method!r}), which cannot be "
            f"read: take an unquantised one, or a GGUF file"
        )
    name = fields.get("model_type")
    if not isinstance(name, str):
        raise ConfigError("config.json has no 'model_type', so the model cannot be told")
    family = family_of(name)
    try:
        config = family.read(fields)
    except KeyError as error:
        raise ConfigError(f"config.json of a {name} model has no key {error.args[0]!r}") from None
    return dataclasses.replace(config, family=name)


def config_to_fields(config: Config) -> dict[str, Any]:
    """Returns the config.json of a configuration, as its family has it.

    Raises:
        ConfigError: the family cannot express the model.
    """
    family = family_of(config.family)
    architecture = family.architecture if family.has_head(config) else family.backbone
    fields = {"model_type": family.name, "architectures": [architecture]}
    fields |= family.write(config)
    fields |= {
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": config.param_dtype,
    }
    for name, now, then in _differences(config, config_from_fields(fields)):
        raise ConfigError(
            f"a {family.name} checkpoint cannot hold a model with {name}={now!r} (it would be "
            f"read as {then!r}): change the model or its family"
        )
    return fields


def _differences(config: Any, again: Any, left_out: frozenset[str] = frozenset()):
    """Yields (name, value, value read back) of what a checkpoint does not keep."""
    if type(config) is not type(again):
        yield "kind", type(config).__name__, type(again).__name__
        return
    for field in dataclasses.fields(config):
        now, then = getattr(config, field.name), getattr(again, field.name)
        if field.name in _OF_TRAINING | left_out:
            continue
        if isinstance(now, ModelConfig):
            inner = _OF_A_MODEL | (_OF_THE_HEAD if field.name == "encoder" else frozenset())
            for name, *values in _differences(now, then, inner):
                yield f"{field.name}.{name}", *values
        elif now != then and _resolved(config, field.name) != _resolved(again, field.name):
            yield field.name, now, then


# Not a matter of the checkpoint.
_OF_TRAINING = frozenset(
    ["init_scale", "dtype", "param_dtype", "remat", "unroll", "attention", "window_pattern", "base"]
)
# Neither a stack beside another one has, nor an encoder beside a decoder.
_OF_A_MODEL = frozenset(["family"])
_OF_THE_HEAD = frozenset(
    ["vocab_size", "tie_embeddings", "head_bias", "logit_scale", "logit_softcap"]
)
_DERIVED = {
    "n_kv_heads": "kv_heads",
    "head_dim": "head_width",
    "d_ff": "ff_width",
    "attention_scale": "score_scale",
    "embedding_width": "table_width",
    "sliding_window": "windows",
    "rotary_fraction": "rotary_width",
}


# What means nothing without something else.
_WITHOUT: dict[str, Callable[[ModelConfig], bool]] = {
    **dict.fromkeys(
        ("rope_theta", "rope_scaling", "rotary_fraction"), lambda c: c.positions != "rotary"
    ),
    **dict.fromkeys(("relative_buckets", "relative_distance"), lambda c: c.positions != "relative"),
    "key_bias": lambda c: not c.attention_bias,
    "mlm_bias": lambda c: c.mlm_head is None,
}


def _resolved(config: Any, name: str) -> Any:
    if name in ("embedding_scale", "rope_local_theta", "logit_scale"):
        default = config.rope_theta if name == "rope_local_theta" else 1.0
        value = getattr(config, name)
        return default if value is None else value
    if name in _WITHOUT and _WITHOUT[name](config):
        return None
    return getattr(config, _DERIVED.get(name, name))


def check_feature(fields: Fields, key: str, *allowed: Any) -> None:
    """Refuses a key of config.json with a value that changes the model in an unsupported way.

    Raises:
        ConfigError: the value is none of `allowed`; a missing key counts as the first of them.
    """
    if fields.get(key, allowed[0]) not in allowed:
        raise ConfigError(
            f"config.json says {key}={fields[key]!r}, which is not supported; only "
            f"{' or '.join(map(repr, allowed))} is"
        )


def activation(fields: Fields, key: str, default: str) -> Any:
    """Returns the activation named by a key.

    Raises:
        ConfigError: it is not supported.
    """
    name = fields.get(key) or default
    if name not in _ACTIVATIONS:
        raise ConfigError(f"config.json says {key}={name!r}.{nearest(name, _ACTIVATIONS)}")
    return _ACTIVATIONS[name]


_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
ACTIVATION_NAMES = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}


def missing_tensor(name: str, where: str) -> CheckpointError:
    """Returns the error for a tensor that a checkpoint should have."""
    return CheckpointError(f"{where}: there is no tensor {name!r}, which the model needs")
