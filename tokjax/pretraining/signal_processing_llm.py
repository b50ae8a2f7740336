"""A learnable filter bank between blocks: each coordinate is a signal along the tokens.

Reference: Verma and Pilanci, "Towards Signal Processing In Large Language Models", arXiv
2406.10254. The mixer "filters" of `ModelConfig.mixer`: every coordinate is split into components
by short kernels, passed through a nonlinearity, weighted, and put together again.
"""

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax.config import register
from tokjax.errors import ConfigError, nearest
from tokjax.models.config import ModelConfig
from tokjax.models.layers import ACTIVATIONS
from tokjax.models.mixing import between_blocks, check_place, earlier
from tokjax.models.parameters import Parameter
from tokjax.pretraining.filter_gains import gain_parameters, token_gains

# The whole stream passes through: with 10 bits of float32, as GPUs would, it would lose its digits.
_EXACT = jax.lax.Precision.HIGHEST
_FILTERS = 16  # computed at a time, to bound what a program holds


@dataclass(frozen=True)
class _Kernels(Parameter):
    """Kernels one behind the other, random but for the first few, which are impulses.

    Attributes:
        copies: number of sets of kernels, one a coordinate.
        lengths: of the kernels of a set.
        impulses: (place, sign) of those that the set begins with.
    """

    copies: int = 1
    lengths: tuple[int, ...] = ()
    impulses: tuple[tuple[int, float], ...] = ()

    def initialise(self, key: jax.Array, dtype: Any) -> jax.Array:
        """Returns kernels of variance 1 / length, and the impulses."""
        scale = np.repeat(np.array(self.lengths) ** -0.5, self.lengths)
        start, offset = np.zeros(len(scale)), 0
        for length, (place, sign) in zip(self.lengths, self.impulses, strict=False):
            scale[offset : offset + length] = 0.0
            start[offset + place] = sign
            offset += length
        drawn = jax.random.normal(key, (self.copies, len(scale)))
        return jnp.asarray(jnp.asarray(start) + jnp.asarray(scale) * drawn, dtype).reshape(-1)


@dataclass(frozen=True)
class _Readout(Parameter):
    """Weights of the components: the first few given, the others zero, or all of them random."""

    copies: int = 1
    filters: int = 1
    length: int = 1
    first: tuple[float, ...] = ()
    random: bool = False

    def initialise(self, key: jax.Array, dtype: Any) -> jax.Array:
        """Returns the weights."""
        shape = (self.copies, self.filters, self.length)
        if self.random:
            std = (self.filters * self.length) ** -0.5
            return (std * jax.random.normal(key, shape)).reshape(-1).astype(dtype)
        start = np.zeros(shape, np.float32)
        start[:, : len(self.first), 0] = self.first
        return jnp.asarray(start.reshape(-1), dtype)


@register("mixer", "filters")
@dataclass(frozen=True)
class FilterBank:
    """A causal filter bank over the tokens, the same for all coordinates.

    Reference: arXiv 2406.10254, of which only the abstract and a summary were at hand: 144
    filters in two convolutional layers, kernels of several lengths, gains by a small transformer.
    Everything else is a reconstruction of tokjax and an option.
    """

    filters: int = 144  # components M of a signal
    length: int = 32  # tokens K that a kernel reads
    lengths: tuple[int, ...] = ()  # several lengths instead, among which the filters are split
    # gaps between the tokens that a kernel reads, among which the filters are split
    dilations: tuple[int, ...] = ()
    synthesis_length: int = 1  # tokens K2 of each component that make up the output
    activation: Literal["gelu", "relu", "linear"] = "gelu"  # of components
    # what each coordinate has of its own: nothing; how components are added up; the whole bank
    per_coordinate: Literal["nothing", "readout", "bank"] = "nothing"
    residual: bool = False  # add to the stream instead of replacing it
    start: Literal["identity", "random"] = "identity"  # what the bank does before training
    trained: bool = True  # False keeps the start, drawn by `seed`: a control without parameters
    seed: int = 0  # of the start of a bank that is not trained
    # factor of each component at each token, by a small causal transformer; both start at 1
    gains: Literal["none", "sigmoid", "softmax"] = "none"
    gain_width: int = 16  # of that transformer
    gain_window: int = 16  # tokens that it sees
    apply_last: bool = False  # also behind the last block, before the final norm
    centered: bool = False  # kernels reach as far ahead as back: for encoders
    allow_leak: bool = False  # centred kernels in a causal model, as a control of leak tests

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for name in ("activation", "per_coordinate", "start", "gains"):
            value, choices = getattr(self, name), typing.get_args(hints[name])
            if value not in choices:
                raise ConfigError(f"unknown mixer.{name}={value!r}.{nearest(str(value), choices)}")
        for name in ("filters", "length", "synthesis_length", "gain_width", "gain_window"):
            if getattr(self, name) < 1:
                raise ConfigError(f"mixer.{name}={getattr(self, name)} must be at least 1")
        if self.lengths and self.dilations:
            raise ConfigError("set either mixer.lengths or mixer.dilations, not both")
        for name in ("lengths", "dilations"):
            values = getattr(self, name)
            if any(v < 1 for v in values):
                raise ConfigError(f"mixer.{name}={values} must be 1 or more each")
            if values and self.filters % len(values):
                raise ConfigError(
                    f"mixer.filters={self.filters} cannot be split evenly among the "
                    f"{len(values)} of {name}"
                )
        if not self.trained and self.gains != "none":
            raise ConfigError(
                "mixer.trained=False keeps the bank as it starts, gains of 1 included: set "
                "gains='none', or trained=True"
            )
        if self._pair and not self.residual and self.filters // len(self.groups) < len(self._pair):
            raise ConfigError(
                f"mixer.filters={self.filters} over {len(self.groups)} kernel sizes leaves fewer "
                f"than the {len(self._pair)} filters of each size that start='identity' needs with "
                f"activation={self.activation!r}"
            )

    def check(self, config: ModelConfig) -> None:
        """Refuses models that this mixer is not for.

        Raises:
            ConfigError: kernels longer than the model's rows, or see `mixing.check_place`.
        """
        if self.reach >= config.max_positions:
            raise ConfigError(
                f"the mixer reads {self.reach} earlier tokens, but rows have "
                f"max_positions={config.max_positions}: shorten its kernels"
            )
        check_place(
            config,
            centered=self.centered,
            allow_leak=self.allow_leak,
            apply_last=self.apply_last,
        )

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """(Length, dilation) of each group of kernels; the filters are split evenly among them."""
        if self.lengths:
            return tuple((length, 1) for length in self.lengths)
        return tuple((self.length, dilation) for dilation in self.dilations or (1,))

    @property
    def reach(self) -> int:
        """Number of earlier tokens that it reads."""
        analysis = max(max(self.lags(*group)) for group in self.groups)
        gains = 0 if self.gains == "none" else self.gain_window - 1
        return self.synthesis_length - 1 + max(analysis, gains)

    @property
    def _pair(self) -> tuple[float, ...]:
        """Signs of the impulses whose components add up to the signal itself."""
        if self.start == "random":
            return ()
        return (1.0,) if self.activation == "linear" else (1.0, -1.0)

    def lags(self, length: int, dilation: int) -> tuple[int, ...]:
        """Returns how far back each place of a kernel lies; negative lies ahead."""
        ahead = (length - 1) // 2 if self.centered else 0
        return tuple((j - ahead) * dilation for j in range(length))

    def kernel_lengths(self) -> tuple[int, ...]:
        """Returns the length of each filter's kernel."""
        each = self.filters // len(self.groups)
        return tuple(length for length, _ in self.groups for _ in range(each))

    def products(self, d_model: int) -> int:
        """Returns the multiplications a token, without those of the gains' matrices."""
        gained = 0 if self.gains == "none" else self.filters
        each = sum(self.kernel_lengths()) + self.filters * self.synthesis_length + gained
        seen = 0 if self.gains == "none" else 2 * self.gain_window * self.gain_width
        return d_model * each + seen

    def parameters(self, d_model: int) -> Mapping[str, Parameter]:
        """Returns the parameters of one bank; none where it is not trained."""
        bank = self._bank(d_model) if self.trained else {}
        if self.gains == "none":
            return bank
        return {**bank, **gain_parameters(d_model, self.gain_width, self.gain_window, self.filters)}

    def _bank(self, d_model: int) -> dict[str, Parameter]:
        """Returns the parameters of analysis and synthesis.

        All are vectors: weight decay is for matrices, and would pull the bank from the identity
        towards nothing.
        """
        M, axes = self.filters, (None,)
        banks = d_model if self.per_coordinate == "bank" else 1
        readouts = 1 if self.per_coordinate == "nothing" else d_model
        place = self.lags(*self.groups[0]).index(0)
        impulses = tuple((place, sign) for sign in self._pair)
        if self.residual:
            impulses = ()
        lengths = self.kernel_lengths()
        size = M * self.synthesis_length
        first = () if self.residual else self._pair
        return {
            "analysis": _Kernels(
                (banks * sum(lengths),),
                axes,
                None,
                copies=banks,
                lengths=lengths,
                impulses=impulses,
            ),
            "bias": Parameter((banks * M,), axes, 0),
            "synthesis": _Readout(
                (readouts * size,),
                axes,
                None,
                copies=readouts,
                filters=M,
                length=self.synthesis_length,
                first=first,
                random=self.start == "random",
            ),
            "offset": Parameter((readouts,), axes, 0),
        }

    def kernels(self, analysis: Float[Array, "N"]) -> list[Float[Array, "C M K"]]:
        """Returns the kernels of each group from the parameter "analysis" of one layer.

        C is the number of coordinates that have kernels of their own, or 1 for all.
        """
        each, found, at = self.filters // len(self.groups), [], 0
        sets = analysis.reshape(-1, sum(self.kernel_lengths()))
        for length, _ in self.groups:
            found.append(sets[:, at : at + each * length].reshape(-1, each, length))
            at += each * length
        return found

    def __call__(
        self,
        x: Float[Array, "B R+T D"],
        segments: Int[Array, "B R+T"],
        weights: Mapping[str, jax.Array],
        layer: Int[Array, ""] | int,
        n_layers: int,
    ) -> Float[Array, "B T D"]:
        """Returns the last T tokens, filtered; see `TokenMixer`."""
        own = x[:, self.reach :]

        def mix() -> jax.Array:
            w = dict(weights)
            if not self.trained:
                keys = jax.random.split(jax.random.fold_in(jax.random.key(self.seed), layer), 4)
                bank = self._bank(x.shape[2]).items()
                w |= {n: p.initialise(k, x.dtype) for k, (n, p) in zip(keys, bank, strict=True)}
            z = self._filtered(x, segments, w, own.shape[1]).astype(x.dtype)
            return own + z if self.residual else z

        return between_blocks(mix, own, layer, n_layers, self.apply_last)

    def _filtered(
        self, x: jax.Array, segments: jax.Array, w: Mapping[str, jax.Array], tokens: int
    ) -> jax.Array:
        M, K2 = self.filters, self.synthesis_length
        places = tokens + K2 - 1  # where components are needed
        gains = None
        if self.gains != "none":
            gains = token_gains(x, segments, w, places, self.gain_window, self.gains)
        bias = w["bias"].reshape(-1, M)
        readout = w["synthesis"].reshape(-1, M, K2)
        each, total = M // len(self.groups), jnp.zeros((), jnp.float32)
        for number, kernel in enumerate(self.kernels(w["analysis"])):
            part = slice(number * each, (number + 1) * each)
            total = total + joined(
                neighbours(x, segments, self.lags(*self.groups[number]), places),
                kernel,
                bias[:, part],
                readout[:, part],
                None if gains is None else gains[..., part],
                self.activation,
            )
        of = segments[:, segments.shape[1] - places :]
        z = sum((earlier(total[j], of, j) for j in range(1, K2)), total[0])
        return z[:, K2 - 1 :] + w["offset"].astype(jnp.float32)


def neighbours(
    x: Float[Array, "B S D"], segments: Int[Array, "B S"], lags: tuple[int, ...], places: int
) -> Float[Array, "K B P D"]:
    """Returns what stands `lags` places before each of the last places, of the same segment."""
    shifted = [earlier(x, segments, lag)[:, x.shape[1] - places :] for lag in lags]
    return jnp.stack(shifted)


def components(
    near: Float[Array, "K B P D"],
    kernel: Float[Array, "C M K"],
    bias: Float[Array, "C M"],
    activation: str = "linear",
) -> Float[Array, "M B P D"]:
    """Returns the components of every signal: activation(kernel * x + bias).

    Args:
        near: from `neighbours`.
        kernel: of each coordinate (C = D), or one for all (C = 1); so is the bias.
        bias: of each component.
        activation: "linear" or one of `layers.ACTIVATIONS`.
    """
    if kernel.shape[0] == 1:
        y = jnp.einsum("mk,kbpd->mbpd", kernel[0], near, precision=_EXACT)
    else:
        y = jnp.einsum("dmk,kbpd->mbpd", kernel, near, precision=_EXACT)
    y = y + bias.T[:, None, None]
    return y if activation == "linear" else ACTIVATIONS[activation](y)


def joined(
    near: Float[Array, "K B P D"],
    kernel: Float[Array, "C M K"],
    bias: Float[Array, "C M"],
    readout: Float[Array, "A M J"],
    gains: Float[Array, "B P M"] | None,
    activation: str,
) -> Float[Array, "J B P D"]:
    """Returns the components weighted and added up, for each place of the synthesis kernel.

    At most `_FILTERS` components exist at a time, in the backward pass too; sums are float32.
    """

    def add(total: jax.Array, part: Any) -> tuple[jax.Array, None]:
        kernel, bias, readout, gains = part
        y = components(near, kernel.swapaxes(0, 1), bias.T, activation)
        if gains is not None:
            y = y * gains[..., None].astype(y.dtype)
        readout = readout.swapaxes(0, 1)
        form, readout = ("mj", readout[0]) if readout.shape[0] == 1 else ("dmj", readout)
        more = jnp.einsum(
            f"{form},mbpd->jbpd",
            readout,
            y,
            precision=_EXACT,
            preferred_element_type=jnp.float32,
        )
        return total + more, None

    M = kernel.shape[1]
    size = min(M, _FILTERS)
    rest = -M % size
    # By filter, in parts of `size`; those that fill the last part up weigh nothing.
    parts: list[Any] = [a.swapaxes(0, 1) for a in (kernel, bias, readout)]
    parts.append(None if gains is None else jnp.moveaxis(gains, -1, 0))
    filled = jax.tree.map(
        lambda a: jnp.pad(a, ((0, rest), *((0, 0),) * (a.ndim - 1))).reshape(
            -1, size, *a.shape[1:]
        ),
        parts,
    )
    total = jnp.zeros((readout.shape[2], *near.shape[1:]), jnp.float32)
    if size == M:
        return add(total, jax.tree.map(lambda a: a[0], filled))[0]
    return jax.lax.scan(jax.checkpoint(add), total, filled)[0]


def frequency_response(
    kernels: Float[Array, "... K"], points: int = 256
) -> Float[Array, "... points"]:
    """Returns the magnitude of each kernel's Fourier transform, from frequency 0 to 1/2 a token.

    Low-pass and band-pass filters show as what they are.
    """
    K, wide = kernels.shape[-1], kernels.astype(jnp.float32)
    angle = 2 * np.pi * np.linspace(0, 0.5, points)[:, None] * np.arange(K)
    real, imaginary = wide @ np.cos(angle).T, wide @ np.sin(angle).T
    return jnp.sqrt(jnp.square(real) + jnp.square(imaginary))
