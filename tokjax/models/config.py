"""The configuration of a transformer: one dataclass for every supported family."""

import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tokjax.config.schema import Choice
from tokjax.errors import CheckpointError, ConfigError, nearest
from tokjax.models.lora import LoraConfig

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


def _check_literals(config: object, *names: str) -> None:
    hints = typing.get_type_hints(type(config))
    for name in names:
        value, choices = getattr(config, name), typing.get_args(hints[name])
        if value not in choices:
            raise ConfigError(f"unknown {name}={value!r}.{nearest(str(value), choices)}")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length that a model was trained on."""

    kind: Literal["none", "linear", "dynamic", "yarn", "llama3", "longrope"] = "none"  # the rule
    factor: float | None = None  # how many times longer; longrope may derive it from the lengths
    original_positions: int | None = None  # length of the original training; None: max_positions
    low_freq_factor: float = 1.0  # llama3: wavelengths above length / this are stretched fully
    high_freq_factor: float = 4.0  # llama3: wavelengths below length / this are left alone
    beta_fast: float = 32.0  # yarn: turns within the length above which nothing is stretched
    beta_slow: float = 1.0  # yarn: turns within the length below which all is stretched
    attention_factor: float | None = None  # yarn, longrope: scale of queries and keys; None derives
    mscale: float | None = None  # yarn: with mscale_all_dim, what attention_factor is derived from
    mscale_all_dim: float | None = None  # yarn: see mscale
    truncate: bool = True  # yarn: the bounds of the ramp are whole dimensions
    short_factors: tuple[float, ...] = ()  # longrope: one per frequency, within the original length
    long_factors: tuple[float, ...] = ()  # longrope: one per frequency, beyond it

    def __post_init__(self):
        _check_literals(self, "kind")
        needs_factor = self.kind in ("linear", "dynamic", "yarn", "llama3")
        if needs_factor and not (self.factor or 0) >= 1:
            raise ConfigError(f"kind={self.kind!r} needs a factor of 1 or more, not {self.factor}")
        if self.kind == "longrope" and not (self.short_factors and self.long_factors):
            raise ConfigError("kind='longrope' needs short_factors and long_factors")
        if self.original_positions is not None and self.original_positions < 1:
            raise ConfigError(f"original_positions={self.original_positions} must be at least 1")


@dataclass(frozen=True)
class ModelConfig:
    """A stack of attention and feed-forward blocks; the defaults are a Llama."""

    vocab_size: int | None = None  # number of token ids; None takes the tokenizer's
    d_model: int = 256  # width of the residual stream
    n_layers: int = 4  # number of blocks
    n_heads: int = 4  # query heads
    n_kv_heads: int | None = None  # key/value heads; None means as many as query heads
    head_dim: int | None = None  # width of a head; None means d_model / n_heads
    # feed-forward width; None means 8/3 d_model rounded up to 32, without a gate 4 d_model
    d_ff: int | None = None
    max_positions: int = 2048  # longest sequence of positions the model may see
    causal: bool = True  # queries see no later key; False makes an encoder

    norm: Literal["rms", "layer"] = "rms"  # kind of norm
    norm_eps: float = 1e-5  # added to the mean square or the variance
    norm_plus_one: bool = False  # a norm multiplies by 1 + its weight (Gemma)
    norm_bias: bool = False  # a norm adds a bias
    # before each part; behind each residual addition; before each part and on what it adds
    norm_placement: Literal["pre", "post", "both"] = "pre"
    first_attention_norm: bool = True  # the first block's attention has a norm (not in ModernBERT)
    final_norm: bool = True  # a norm behind the last block
    embedding_norm: bool = False  # a norm on the embeddings, behind positions
    parallel_residual: bool = False  # attention and feed-forward read the same residual stream

    # how positions enter; relative ones are a bias on the scores, by distance in buckets (T5)
    positions: Literal["rotary", "learned", "relative", "none"] = "rotary"
    relative_buckets: int = 32  # rows of the table of relative positions
    relative_distance: int = 128  # distance from which on all fall into one bucket
    position_offset: int = 0  # rows of the learned table before that of position 0
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rope_local_theta: float | None = None  # base in windowed layers, unscaled; None: as in others
    rope_scaling: RopeScaling = RopeScaling()  # stretches the frequencies
    rotary_fraction: float = 1.0  # share of a head's width that is turned
    sliding_window: int | None = None  # keys a query of a windowed layer sees, itself included
    # which layers are windowed, repeated to the model's depth; () means all, given a window
    window_pattern: tuple[bool, ...] = ()

    attention_bias: bool = False  # biases on query, key and value
    key_bias: bool = True  # with attention_bias, the key has one too (not in Whisper)
    out_bias: bool = False  # bias on the attention output
    mlp_bias: bool = False  # biases in the feed-forward
    qk_norm: bool = False  # a norm on each head's queries and keys
    attention_scale: float | None = None  # factor of the scores; None means head_dim^-0.5
    attention_softcap: float | None = None  # bound on the size of a score
    activation: Activation = "silu"  # of the feed-forward; gelu_tanh is the approximation
    gated: bool = True  # the activation gates a second product
    # between attention and feed-forward, attention to an encoder's memory, with neither positions
    # nor qk_norm
    cross_attention: bool = False
    lora: LoraConfig | None = None  # low-rank adapters beside the matrices of every block, or None
    # a causal filter over the tokens behind each block (see `tokjax.models.mixing`), or None
    mixer: Annotated[Any, Choice("mixer")] | None = None

    tie_embeddings: bool = True  # the output head is the embedding table
    # rows of the learned embedding table: fewer than ids (0 has no table) where tokens have no
    # vectors of their own (see `tokjax.pretraining.lexinvariant`); None means one for each id
    embedding_rows: int | None = None
    embedding_width: int | None = None  # of the embedding table and head; None means d_model
    embedding_scale: float | None = None  # factor of the embeddings; None means 1
    token_types: int = 0  # rows of the table of segment types (BERT); 0 has none
    head_bias: bool = False  # a bias on the logits
    logit_scale: float | None = None  # factor of the logits; None means 1
    # of the dense layer with a norm between an encoder and its output head; None has no such layer
    mlm_head: Activation | None = None
    mlm_bias: bool = True  # that layer has a bias
    logit_softcap: float | None = None  # bound on the size of a logit

    init_scale: float = 0.02  # standard deviation of embeddings; matrices use 1/sqrt(fan in)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations and matmuls
    # of parameters and their gradients; float16 is for checkpoints kept as they are
    param_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    # what the backward pass computes again instead of keeping: nothing; all but the results of
    # matrix products and attention; everything inside a block
    remat: Literal["none", "elementwise", "block"] = "elementwise"
    unroll: int = 1  # blocks per iteration of the training scan
    # kernel; auto chooses by platform and by what is asked of it
    attention: Literal["auto", "dense", "blockwise", "cudnn", "splash"] = "auto"
    family: str = "llama"  # model_type of the Hugging Face checkpoints it is saved as
    # a name of `tokjax.models.zoo`, or a Hugging Face config.json or its folder, whose values
    # become the defaults of the other keys
    base: str | None = None

    def __post_init__(self):
        for name in ("d_model", "n_layers", "n_heads", "max_positions", "unroll"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in (
            *("vocab_size", "n_kv_heads", "head_dim", "d_ff", "embedding_width", "sliding_window"),
            *("attention_softcap", "logit_softcap", "rope_local_theta", "attention_scale"),
            "logit_scale",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name}={value} must be positive, or None")
        for name in ("position_offset", "token_types"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")
        _check_literals(
            self,
            *("norm", "norm_placement", "positions", "activation"),
            *("dtype", "param_dtype", "remat", "attention"),
        )
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
        if self.positions == "rotary":
            self._check_rotary()
        if self.window_pattern and self.sliding_window is None:
            raise ConfigError("window_pattern says which layers are windowed: set sliding_window")
        if len(self.window_pattern) > self.n_layers:
            raise ConfigError(
                f"window_pattern has {len(self.window_pattern)} entries for {self.n_layers} layers"
            )
        if self.n_layers % self.unroll:
            raise ConfigError(f"n_layers={self.n_layers} is not divisible by unroll={self.unroll}")
        if self.norm_eps <= 0 or self.rope_theta <= 0:
            raise ConfigError(
                f"norm_eps={self.norm_eps} and rope_theta={self.rope_theta} must be positive"
            )
        if not self.init_scale >= 0:
            raise ConfigError(f"init_scale={self.init_scale} must not be negative")
        if self.lora is not None and not self.gated and "gate" in self.lora.targets:
            raise ConfigError("lora.targets names 'gate', but the model has gated=False")
        if self.parallel_residual and (self.norm_placement != "pre" or self.cross_attention):
            raise ConfigError("parallel_residual needs norm_placement='pre' and no cross_attention")
        if not self.first_attention_norm and self.norm_placement == "post":
            raise ConfigError("first_attention_norm=False needs a norm before attention")
        if self.mlm_head not in (None, *typing.get_args(Activation)):
            raise ConfigError(
                f"unknown mlm_head={self.mlm_head!r}."
                f"{nearest(str(self.mlm_head), typing.get_args(Activation))}"
            )
        if self.positions == "relative":
            self._check_relative()
        if self.norm_bias and (self.norm != "layer" or self.norm_plus_one):
            raise ConfigError("norm_bias needs norm='layer' and no norm_plus_one")
        if self.embedding_rows is not None:
            if self.embedding_rows < 0:
                raise ConfigError(f"embedding_rows={self.embedding_rows} must not be negative")
            if not self.tie_embeddings or self.head_bias:
                raise ConfigError("embedding_rows needs tie_embeddings=True and head_bias=False")
        mixer: Any = self.mixer
        if hasattr(mixer, "check"):
            mixer.check(self)

    def _check_relative(self) -> None:
        exact = self.relative_buckets // (2 if self.causal else 4)
        if exact < 1 or self.relative_distance <= exact:
            raise ConfigError(
                f"relative_buckets={self.relative_buckets} must be 4 or more, and "
                f"relative_distance={self.relative_distance} above the {exact} distances that have "
                f"a bucket of their own"
            )
        if self.sliding_window is not None:
            raise ConfigError("positions='relative' cannot have a sliding_window")

    def _check_rotary(self) -> None:
        if self.head_width % 2:
            raise ConfigError(
                f"a head is {self.head_width} wide, but rotary positions turn pairs: make "
                f"d_model / n_heads or head_dim even"
            )
        if not 0 < self.rotary_fraction <= 1 or self.rotary_width < 2 or self.rotary_width % 2:
            raise ConfigError(
                f"rotary_fraction={self.rotary_fraction} of a head of {self.head_width} turns "
                f"{self.rotary_width} of its dimensions: that must be an even number, 2 or more"
            )
        scaling = self.rope_scaling
        for name in ("short_factors", "long_factors"):
            given = len(getattr(scaling, name))
            if scaling.kind == "longrope" and given != self.rotary_width // 2:
                raise ConfigError(
                    f"rope_scaling.{name} has {given} factors, but {self.rotary_width // 2} pairs "
                    f"of dimensions are turned: give one for each"
                )

    @classmethod
    def from_base(cls, base: str) -> "ModelConfig":
        """Returns the configuration that a name of the zoo or a config.json's path stands for.

        Raises:
            ConfigError: there is no such name and no such file, or the model is not supported.
        """
        from tokjax.models.huggingface import read_config
        from tokjax.models.zoo import ZOO

        if base in ZOO:
            return dataclasses.replace(ZOO[base], base=base)
        if not Path(base).exists():
            raise ConfigError(
                f"{base!r} is no size of the zoo and no file or folder.{nearest(base, ZOO)}"
            )
        try:
            found = read_config(Path(base))
        except CheckpointError as error:
            raise ConfigError(str(error)) from None
        if not isinstance(found, cls):
            raise ConfigError(f"{base!r} describes a {type(found).__name__}, not a {cls.__name__}")
        return dataclasses.replace(found, base=base)

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def rotary_width(self) -> int:
        """Number of a head's dimensions that are turned by positions."""
        return int(self.head_width * self.rotary_fraction)

    @property
    def ff_width(self) -> int:
        """Feed-forward width."""
        if self.d_ff is not None:
            return self.d_ff
        return -(-8 * self.d_model // 3 // 32) * 32 if self.gated else 4 * self.d_model

    @property
    def score_scale(self) -> float:
        """Factor of attention scores."""
        return self.head_width**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def table_width(self) -> int:
        """Width of the embedding table and of the output head."""
        return self.d_model if self.embedding_width is None else self.embedding_width

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Each layer's number of keys a query sees, itself included; None sees all."""
        if self.sliding_window is None:
            return (None,) * self.n_layers
        pattern = self.window_pattern or (True,)
        return tuple(
            self.sliding_window if pattern[i % len(pattern)] else None for i in range(self.n_layers)
        )

    @property
    def depths(self) -> dict[str, int]:
        """Number of layers of each stack, by the path of its parameters."""
        return {"layers": self.n_layers}

    @property
    def vocabulary(self) -> int:
        """Number of token ids; an error while it is still open."""
        if self.vocab_size is None:
            raise ConfigError("model.vocab_size is None: set it, or build the model from a run")
        return self.vocab_size


@dataclass(frozen=True)
class EncDecConfig:
    """An encoder, and a decoder that attends to what the encoder found."""

    encoder: ModelConfig  # not causal
    decoder: ModelConfig  # with cross_attention; its embedding table is the encoder's too
    # what the encoder reads: tokens; embeddings of anything; or frames (of a log-mel spectrogram,
    # for example), of which two convolutions make half as many embeddings
    inputs: Literal["tokens", "embeddings", "frames"] = "tokens"
    frame_width: int | None = None  # numbers in a frame
    family: str = "t5"  # model_type of the Hugging Face checkpoints it is saved as

    def __post_init__(self):
        _check_literals(self, "inputs")
        if self.encoder.causal or self.encoder.cross_attention:
            raise ConfigError("the encoder must have causal=False and cross_attention=False")
        if not (self.decoder.causal and self.decoder.cross_attention):
            raise ConfigError("the decoder must have causal=True and cross_attention=True")
        for name in ("d_model", "dtype", "param_dtype"):
            one, other = getattr(self.encoder, name), getattr(self.decoder, name)
            if one != other:
                raise ConfigError(f"encoder and decoder differ in {name}: {one!r}, {other!r}")
        if self.encoder.embedding_width is not None:
            raise ConfigError("the encoder must have embedding_width=None")
        if (self.inputs == "frames") != (self.frame_width is not None):
            raise ConfigError("inputs='frames' needs frame_width, and nothing else does")

    @property
    def depths(self) -> dict[str, int]:
        """Number of layers of each stack, by the path of its parameters."""
        return {"encoder/layers": self.encoder.n_layers, "decoder/layers": self.decoder.n_layers}

    @property
    def param_dtype(self) -> str:
        """Dtype of the parameters."""
        return self.decoder.param_dtype

    @property
    def tie_embeddings(self) -> bool:
        """Whether the output head is the embedding table."""
        return self.decoder.tie_embeddings


Config = ModelConfig | EncDecConfig


def with_dtypes(config: Any, param_dtype: Any, dtype: Any) -> Any:
    """Returns the configuration, of either kind, with the dtypes of parameters and activations."""
    if isinstance(config, ModelConfig):
        return dataclasses.replace(config, param_dtype=param_dtype, dtype=dtype)
    stacks = (with_dtypes(stack, param_dtype, dtype) for stack in (config.encoder, config.decoder))
    return dataclasses.replace(config, **dict(zip(("encoder", "decoder"), stacks, strict=True)))
