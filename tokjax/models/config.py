"""The configuration of a decoder-only language model."""

import typing
from dataclasses import dataclass
from typing import Literal

from tokjax.errors import ConfigError, nearest


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-style decoder: RMS norm before each part, rotary positions, gated feed-forward."""

    vocab_size: int | None = None  # number of token ids; None takes the tokenizer's
    d_model: int = 256  # width of the residual stream
    n_layers: int = 4  # number of blocks
    n_heads: int = 4  # query heads
    n_kv_heads: int | None = None  # key/value heads; None means as many as query heads
    head_dim: int | None = None  # width of a head; None means d_model / n_heads
    d_ff: int | None = None  # feed-forward width; None means 8/3 d_model rounded up to 32
    max_positions: int = 2048  # longest sequence of positions the model may see
    norm_eps: float = 1e-5  # added to the mean square in RMS norm
    rope_theta: float = 10000.0  # base of the rotary frequencies
    tie_embeddings: bool = True  # the output head is the embedding table
    attention_bias: bool = False  # biases on query, key and value (Qwen2)
    activation: Literal["silu", "gelu"] = "silu"  # of the gate; gelu is the tanh approximation
    init_scale: float = 0.02  # standard deviation of embeddings; matrices use 1/sqrt(fan in)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations and matmuls
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of parameters and their gradients
    # what the backward pass computes again instead of keeping: nothing; all but the results of
    # matrix products and attention; everything inside a block
    remat: Literal["none", "elementwise", "block"] = "elementwise"
    unroll: int = 1  # blocks per iteration of the training scan
    # kernel; auto chooses by platform and by what is asked of it
    attention: Literal["auto", "dense", "blockwise", "cudnn"] = "auto"

    def __post_init__(self):
        for name in ("d_model", "n_layers", "n_heads", "max_positions", "unroll"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("vocab_size", "n_kv_heads", "head_dim", "d_ff"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("activation", "dtype", "param_dtype", "remat", "attention"):
            value, choices = getattr(self, name), typing.get_args(type(self).__annotations__[name])
            if value not in choices:
                raise ConfigError(f"unknown {name}={value!r}.{nearest(str(value), choices)}")
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise ConfigError(
                f"attention='cudnn' computes in bfloat16 only, not in dtype={self.dtype!r}: set "
                f"dtype='bfloat16' or attention='auto'"
            )
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ConfigError(
                f"d_model={self.d_model} is not divisible by n_heads={self.n_heads}; "
                f"choose other sizes or set head_dim"
            )
        if self.n_heads % self.kv_heads:
            raise ConfigError(
                f"n_heads={self.n_heads} is not divisible by n_kv_heads={self.kv_heads}"
            )
        if self.head_width % 2:
            raise ConfigError(
                f"a head is {self.head_width} wide, but rotary positions turn pairs: make "
                f"d_model / n_heads or head_dim even"
            )
        if self.n_layers % self.unroll:
            raise ConfigError(f"n_layers={self.n_layers} is not divisible by unroll={self.unroll}")
        if self.norm_eps <= 0 or self.rope_theta <= 0:
            raise ConfigError(
                f"norm_eps={self.norm_eps} and rope_theta={self.rope_theta} must be positive"
            )
        if not self.init_scale >= 0:
            raise ConfigError(f"init_scale={self.init_scale} must not be negative")

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def ff_width(self) -> int:
        """Feed-forward width."""
        return -(-8 * self.d_model // 3 // 32) * 32 if self.d_ff is None else self.d_ff

    @property
    def vocabulary(self) -> int:
        """Number of token ids; an error while it is still open."""
        if self.vocab_size is None:
            raise ConfigError("model.vocab_size is None: set it, or build the model from a run")
        return self.vocab_size
