"""What a GGUF file's metadata say of the model, and how its tensors differ from ours.

Architectures: llama (Llama, Mistral, SmolLM), qwen2, qwen3, gemma3.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokjax.errors import CheckpointError, ConfigError, nearest
from tokjax.gguf_file import GGUFFile, GGUFTensor
from tokjax.models.config import ModelConfig, RopeScaling
from tokjax.models.huggingface.common import linear
from tokjax.models.huggingface.family import Family, Tensor
from tokjax.models.huggingface.family import family_of as family_named

_ROPE_FACTORS = "rope_freqs.weight"
# Architecture -> the family that its models are saved as.
_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
# Keys that change the model in a way that is not supported, unless they have this value.
_NEUTRAL: Mapping[str, Any] = {
    "expert_count": 0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "use_parallel_residual": False,
}
_NUMBER = (int, float)


def family_of(file: GGUFFile) -> Family:
    """Returns how the file's tensors are named, and the family its model is saved as.

    Raises:
        ConfigError: the architecture is not supported.
    """
    family = family_named(_FAMILIES[_architecture(file)])
    return dataclasses.replace(
        family, tensors=_tensors, prefix="", ignored=(), unused=(_ROPE_FACTORS,), copies={}
    )


def config_of(file: GGUFFile) -> ModelConfig:
    """Returns the configuration that a file describes.

    Raises:
        ConfigError: the model or one of its features is not supported, or a key is missing.
        CheckpointError: there is no embedding table.
    """
    name = _architecture(file)
    fields = _Fields(file, name)
    for key, neutral in _NEUTRAL.items():
        value = file.metadata.get(f"{name}.{key}", neutral)
        if value != neutral:
            raise ConfigError(
                f"{file.path} says {name}.{key}={value!r}, which is not supported; only "
                f"{neutral!r} is"
            )
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path}: there is no tensor 'token_embd.weight'")
    special = _gemma3(fields) if name == "gemma3" else _features(fields)
    try:
        return ModelConfig(**_sizes(fields) | special, family=_FAMILIES[name])
    except ConfigError as error:
        raise ConfigError(f"{file.path}: {error}") from None


def tensors_of(file: GGUFFile, config: ModelConfig) -> dict[str, Any]:
    """Returns the file's tensors with their numbers as the other kind of checkpoint has them."""
    name = _architecture(file)
    heads = {"attn_q": config.n_heads, "attn_k": config.kv_heads}
    found: dict[str, Any] = {}
    for key, tensor in file.tensors.items():
        *_, part, _ = ["", *key.split(".")]
        change: Callable[[np.ndarray], np.ndarray] | None = None
        if name == "llama" and part in heads:
            change = _HalfSplit(heads[part])
        elif name == "gemma3" and part.endswith("_norm"):
            change = _minus_one
        found[key] = tensor if change is None else _Changed(tensor, change)
    return found


def _architecture(file: GGUFFile) -> str:
    name = file.get("general.architecture", str)
    if name not in _FAMILIES:
        raise ConfigError(
            f"{file.path}: no model of the architecture {name!r} can be read; those that can are "
            f"{', '.join(sorted(_FAMILIES))}"
        )
    return name


@dataclass(frozen=True)
class _Changed:
    """A tensor behind a change of its numbers."""

    tensor: GGUFTensor
    change: Callable[[np.ndarray], np.ndarray]

    @property
    def file(self) -> Path:
        return self.tensor.file

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def read(self) -> np.ndarray:
        return self.change(self.tensor.read())


@dataclass(frozen=True)
class _HalfSplit:
    """Reorders each head's rows from pairs (2i, 2i + 1), which are turned together, to (i, i + r).

    Half of a head's rows lie apart in the original checkpoint and side by side in the file.
    """

    heads: int

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        pairs = rows.reshape(self.heads, -1, 2, *rows.shape[1:])
        return pairs.swapaxes(1, 2).reshape(rows.shape)


def _minus_one(weight: np.ndarray) -> np.ndarray:
    # The file has what a norm multiplies by, the model that without the one.
    return weight - np.ones((), weight.dtype)


class _Fields:
    """The metadata of one architecture, by key without its prefix."""

    def __init__(self, file: GGUFFile, architecture: str):
        self.file, self.prefix = file, f"{architecture}."

    def get(self, key: str, kind: Any, *default: Any) -> Any:
        return self.file.get(self.prefix + key, kind, *default)

    def count(self, key: str, *default: Any) -> Any:
        """Returns a whole number, the same in all layers."""
        value = self.get(key, (int, list), *default)
        if isinstance(value, list):
            if len(set(value)) != 1 or not isinstance(value[0], int):
                raise ConfigError(
                    f"{self.file.path}: {self.prefix}{key} differs between layers, which is not "
                    f"supported: {value[:8]}"
                )
            return value[0]
        return value

    def number(self, key: str, *default: Any) -> Any:
        value = self.get(key, _NUMBER, *default)
        return None if value is None else float(value)

    def has(self, name: str) -> bool:
        """Returns whether there is such a tensor."""
        return name in self.file.tensors


def _sizes(fields: _Fields) -> dict[str, Any]:
    d_model, n_heads = fields.count("embedding_length"), fields.count("attention.head_count")
    if n_heads < 1 or (d_model % n_heads and fields.count("attention.key_length", None) is None):
        raise ConfigError(
            f"{fields.file.path}: {n_heads} heads do not divide the width {d_model}, and there is "
            f"no key {fields.prefix}attention.key_length"
        )
    width = fields.count("attention.key_length", d_model // n_heads)
    if fields.count("attention.value_length", width) != width:
        raise ConfigError(f"{fields.file.path}: keys and values differ in length: not supported")
    return {
        "vocab_size": fields.file.tensors["token_embd.weight"].shape[0],
        "d_model": d_model,
        "n_layers": fields.count("block_count"),
        "n_heads": n_heads,
        "n_kv_heads": fields.count("attention.head_count_kv", n_heads),
        "head_dim": width,
        "d_ff": fields.count("feed_forward_length"),
        "max_positions": fields.count("context_length"),
        "norm_eps": _as_written(fields.number("attention.layer_norm_rms_epsilon")),
        "tie_embeddings": not fields.has("output.weight"),
        "rope_theta": fields.number("rope.freq_base", 10000.0),
        "rope_scaling": _scaling(fields),
        "rotary_fraction": fields.count("rope.dimension_count", width) / width,
    }


def _features(fields: _Fields) -> dict[str, Any]:
    """Returns what the Llama-like architectures do not share."""
    window = fields.get("attention.sliding_window", int, 0)
    biased = fields.has("blk.0.attn_q.bias")
    scale = fields.number("attention.scale", 0.0)
    return {
        "attention_bias": biased,
        "out_bias": fields.has("blk.0.attn_output.bias"),
        "qk_norm": fields.prefix == "qwen3.",
        "attention_scale": scale or None,
        "sliding_window": window or None,
    }


def _gemma3(fields: _Fields) -> dict[str, Any]:
    d_model, n_layers = fields.count("embedding_length"), fields.count("block_count")
    n_heads = fields.count("attention.head_count")
    width = fields.count("attention.key_length", 256)
    # The file does not say it. Of all sizes only the one of 62 layers divides by another width.
    scale = fields.number("attention.scale", 0.0)
    scale = scale or (d_model // n_heads if n_layers == 62 else width) ** -0.5
    pattern = fields.get("attention.sliding_window_pattern", (int, list), 6)
    if isinstance(pattern, int):
        pattern = [(layer + 1) % pattern != 0 for layer in range(n_layers)]
    return {
        "head_dim": width,
        "activation": "gelu_tanh",
        "norm_plus_one": True,
        "norm_placement": "both",
        "qk_norm": True,
        "embedding_scale": float(d_model) ** 0.5,
        "attention_scale": scale,
        "attention_softcap": fields.number("attn_logit_softcapping", 0.0) or None,
        "logit_softcap": fields.number("final_logit_softcapping", 0.0) or None,
        "sliding_window": fields.count("attention.sliding_window"),
        "window_pattern": tuple(bool(windowed) for windowed in pattern),
        "rope_theta": fields.number("rope.freq_base", 1e6),
        "rope_local_theta": fields.number("rope.freq_base_swa", 10000.0),
    }


def _scaling(fields: _Fields) -> RopeScaling:
    """Returns how rotary frequencies are stretched."""
    path = fields.file.path
    if fields.has(_ROPE_FACTORS):
        # What the frequencies are divided by (Llama 3's rule, worked out): one set for any length.
        factors = tuple(fields.file.tensors[_ROPE_FACTORS].read().astype(float).ravel().tolist())
        return RopeScaling(
            kind="longrope", short_factors=factors, long_factors=factors, attention_factor=1.0
        )
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 0.0))
    kind = fields.get("rope.scaling.type", str, "linear" if factor else "none")
    if kind == "none" or factor in (0.0, 1.0):
        return RopeScaling()
    if kind not in ("linear", "yarn"):
        raise ConfigError(
            f"{path} scales rotary positions by {kind!r}.{nearest(kind, ('linear', 'yarn'))}"
        )
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_positions=fields.count("rope.scaling.original_context_length", None),
    )


def _as_written(value: float) -> float:
    """Returns a number that went through float32 as it was written, such as 1e-05."""
    return float(f"{value:.6g}")


def _tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Returns where each parameter lies in a file."""
    del config
    block = "blk.{layer}"
    norms = {
        "attention/norm": "attn_norm",
        "attention/query_norm": "attn_q_norm",
        "attention/key_norm": "attn_k_norm",
        "attention/post_norm": "post_attention_norm",
        "mlp/norm": "ffn_norm",
        "mlp/post_norm": "post_ffw_norm",
    }
    matrices = {
        "attention/query": "attn_q",
        "attention/key": "attn_k",
        "attention/value": "attn_v",
        "attention/out": "attn_output",
        "mlp/gate": "ffn_gate",
        "mlp/up": "ffn_up",
        "mlp/down": "ffn_down",
    }
    return {
        "embedding": Tensor("token_embd.weight"),
        "norm": Tensor("output_norm.weight"),
        "head": Tensor("output.weight"),
        **{f"layers/{path}": Tensor(f"{block}.{name}.weight") for path, name in norms.items()},
        **linear({f"layers/{path}": f"{block}.{name}" for path, name in matrices.items()}),
    }
