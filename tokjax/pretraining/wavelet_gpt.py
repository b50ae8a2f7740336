"""Wavelets between blocks: part of the stream becomes moving averages over 1, 2, 4, ... tokens.

Reference: Verma, "WaveletGPT: Wavelets Meet Large Language Models", arXiv 2409.12924. The mixer
"wavelet" of `ModelConfig.mixer`. It has no parameters unless the kernels are learned.
"""

import itertools
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax.config import register
from tokjax.errors import ConfigError, nearest
from tokjax.models.config import ModelConfig
from tokjax.models.mixing import NOT_A_TOKEN, between_blocks, check_place, earlier
from tokjax.models.parameters import Parameter

_TAPS = 32  # of a long kernel that are applied at a time, to bound what a program holds


def ladder(context: int) -> tuple[int, ...]:
    """Returns the windows 1, 2, 4, ... up to the largest power of two within the context.

    >>> ladder(20)
    (1, 2, 4, 8, 16)
    """
    return tuple(1 << level for level in range(context.bit_length()))


def coordinate_windows(
    d_model: int, windows: tuple[int, ...], fraction: float = 0.5
) -> tuple[int, ...]:
    """Returns the window of each coordinate: 1 for the first, then the windows in equal parts.

    Args:
        d_model: number of coordinates.
        windows: in ascending order.
        fraction: of the coordinates that have windows; they are the last.

    >>> coordinate_windows(8, ladder(16))
    (1, 1, 1, 1, 1, 2, 4, 8)
    """
    first = d_model - round(fraction * d_model)
    kept = d_model - first
    levels = (len(windows) * (i - first) // kept for i in range(first, d_model))
    return (1,) * first + tuple(windows[level] for level in levels)


def moving_sums(
    x: Float[Array, "B S C"], segments: Int[Array, "B S"], groups: Sequence[tuple[int, int]]
) -> list[Float[Array, "B S G"]]:
    """Returns the sum of the last values at each place, of its own segment, for groups of windows.

    Sums of 1, 2, 4, ... values are doubled, those of a window's binary digits joined: no running
    total, whose rounding errors would grow along the row.

    Args:
        x: values.
        segments: of each place.
        groups: (window, number of coordinates) in ascending order, in the order of coordinates.
    """
    sums: list[Any] = [None] * len(groups)
    left, power, size = list(range(len(groups))), x, 1
    while True:
        at = 0
        for g in left:
            window, count = groups[g]
            if window & size:
                part = power[..., at : at + count]
                joined = sums[g] is not None
                sums[g] = part + earlier(sums[g], segments, size) if joined else part
            at += count
        finished = sum(groups[g][1] for g in left if groups[g][0] < 2 * size)
        left = [g for g in left if groups[g][0] >= 2 * size]
        if not left:
            return sums
        power = power[..., finished:]
        power, size = power + earlier(power, segments, size), 2 * size


def causal_filter(
    x: Float[Array, "B S C"], segments: Int[Array, "B S"], kernel: Float[Array, "C K"], tokens: int
) -> Float[Array, "B T C"]:
    """Returns sum_j kernel[c, j] x(t - j) at the last places, over those of the same segment.

    Args:
        x: values; places before the first are zero.
        segments: of each.
        kernel: of each coordinate, or one for all (C = 1).
        tokens: number of places T that are asked for.
    """
    B, S, C = x.shape
    taps = kernel.shape[1]
    parts = -(-taps // _TAPS)
    size = taps if parts == 1 else _TAPS
    kernel = jnp.pad(kernel, ((0, 0), (0, parts * size - taps)))
    front = max(0, parts * size - 1 + tokens - S)
    x = jnp.pad(x, ((0, 0), (front, 0), (0, 0)))
    segments = jnp.pad(segments, ((0, 0), (front, 0)), constant_values=NOT_A_TOKEN)
    first, own = x.shape[1] - tokens, segments[:, x.shape[1] - tokens :]

    def part(total: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        number, weights = chunk
        start = first - number * size - (size - 1)
        near = jax.lax.dynamic_slice_in_dim(x, start, tokens + size - 1, axis=1)
        of = jax.lax.dynamic_slice_in_dim(segments, start, tokens + size - 1, axis=1)
        for j in range(size):
            at = slice(size - 1 - j, size - 1 - j + tokens)
            same = (of[:, at] == own)[..., None]
            total = total + jnp.where(same, near[:, at], 0.0) * weights[:, j]
        return total, None

    total = jnp.zeros((B, tokens, C), x.dtype)
    if parts == 1:
        return part(total, (jnp.int32(0), kernel))[0]
    chunks = kernel.reshape(-1, parts, size).swapaxes(0, 1)
    over = (jnp.arange(parts), chunks)
    return jax.lax.scan(jax.checkpoint(part), total, over)[0]


@dataclass(frozen=True)
class _Runs(Parameter):
    """A vector that starts as runs of constants, (value, count) each."""

    runs: tuple[tuple[float, int], ...] = ()

    def initialise(self, key: jax.Array, dtype: Any) -> jax.Array:
        """Returns the runs."""
        return jnp.concatenate([jnp.full(count, value, dtype) for value, count in self.runs])


@register("mixer", "wavelet")
@dataclass(frozen=True)
class Wavelet:
    """Causal moving averages of 1, 2, 4, ... tokens in the place of part of the coordinates.

    Reference: arXiv 2409.12924. That the block behind the last stays as it is, zeros before the
    start with a constant divisor, documents that do not mix, and learned kernels that start as
    averages are recommendations of tokjax where the paper is silent.
    """

    context: int = 512  # tokens of the longest row in training: the largest window is within it
    fraction: float = 0.5  # share of the coordinates that is replaced; they are the last
    windows: tuple[int, ...] = ()  # ascending, instead of 1, 2, 4, ...; one is for all coordinates
    # what replaces a coordinate: the mean of its window; a kernel of that length, learned; an
    # exponential average of decay 1 - 2 / (window + 1), cut off at the context; or as controls
    # the mean of as many random earlier tokens of the context, or zero
    kernel: Literal["average", "learned", "ema", "shuffled", "zero"] = "average"
    # divide by the number of tokens there are, where a document is shorter than the window;
    # otherwise what comes before it counts as zeros
    divide_by_count: bool = False
    apply_last: bool = False  # also behind the last block, before the final norm
    centered: bool = False  # windows reach as far ahead as back: for encoders
    allow_leak: bool = False  # centred windows in a causal model, as a control of leak tests
    seed: int = 0  # of the tokens that kernel='shuffled' reads

    def __post_init__(self):
        if self.context < 1:
            raise ConfigError(f"mixer.context={self.context} must be at least 1")
        if not 0 <= self.fraction <= 1:
            raise ConfigError(f"mixer.fraction={self.fraction} must lie within 0 and 1")
        kernels = typing.get_args(typing.get_type_hints(type(self))["kernel"])
        if self.kernel not in kernels:
            raise ConfigError(
                f"unknown mixer.kernel={self.kernel!r}.{nearest(self.kernel, kernels)}"
            )
        if list(self.windows) != sorted(set(self.windows)) or any(w < 1 for w in self.windows):
            raise ConfigError(f"mixer.windows={self.windows} must ascend from 1 or more")
        if self.windows and self.windows[-1] > self.context:
            raise ConfigError(
                f"mixer.windows has {self.windows[-1]}, longer than context={self.context}"
            )
        if self.centered and self.kernel != "average":
            raise ConfigError(f"mixer.centered=True needs kernel='average', not {self.kernel!r}")
        if self.divide_by_count and self.kernel in ("shuffled", "zero"):
            raise ConfigError(f"mixer.divide_by_count has no meaning for kernel={self.kernel!r}")

    def check(self, config: ModelConfig) -> None:
        """Refuses models that this mixer is not for.

        Raises:
            ConfigError: the fraction is no whole number of coordinates, the context is longer than
                the model's rows, or see `mixing.check_place`.
        """
        share = self.fraction * config.d_model
        if abs(share - round(share)) > 1e-6:
            raise ConfigError(
                f"mixer.fraction={self.fraction} of d_model={config.d_model} is {share:g} "
                f"coordinates: choose values that give a whole number"
            )
        if self.context > config.max_positions:
            raise ConfigError(
                f"mixer.context={self.context} is longer than "
                f"max_positions={config.max_positions}: set it to the length of training rows"
            )
        check_place(
            config,
            centered=self.centered,
            allow_leak=self.allow_leak,
            apply_last=self.apply_last,
        )

    @property
    def ladder(self) -> tuple[int, ...]:
        """The windows, in ascending order."""
        return self.windows or ladder(self.context)

    @property
    def reach(self) -> int:
        """Number of earlier tokens that it reads."""
        longest = self.ladder[-1] if self.fraction else 1
        if longest == 1 or self.kernel == "zero":
            return 0
        if self.kernel in ("ema", "shuffled"):
            return self.context - 1
        return longest - 1 - longest // 2 if self.centered else longest - 1

    def groups(self, d_model: int) -> tuple[tuple[int, int], ...]:
        """Returns (window, number of coordinates) of the replaced coordinates, in order."""
        first = d_model - round(self.fraction * d_model)
        replaced = coordinate_windows(d_model, self.ladder, self.fraction)[first:]
        return tuple((w, len(list(same))) for w, same in itertools.groupby(replaced))

    def parameters(self, d_model: int) -> Mapping[str, Parameter]:
        """Returns the learned kernels, one behind the other; nothing for other kernels."""
        groups = self.groups(d_model)
        if self.kernel != "learned" or not groups:
            return {}
        # A vector: weight decay would pull matrices towards zero, away from an average.
        runs = tuple((1 / window, window * count) for window, count in groups)
        return {"kernels": _Runs((self.products(d_model),), (None,), None, runs)}

    def products(self, d_model: int) -> int:
        """Returns the multiplications a token."""
        taps = {"learned": None, "ema": self.context, "shuffled": self.context}
        if self.kernel not in taps:
            return 0
        each = taps[self.kernel]
        return sum(count * (each or window) for window, count in self.groups(d_model))

    def __call__(
        self,
        x: Float[Array, "B R+T D"],
        segments: Int[Array, "B R+T"],
        weights: Mapping[str, jax.Array],
        layer: Int[Array, ""] | int,
        n_layers: int,
    ) -> Float[Array, "B T D"]:
        """Returns the last T tokens with their last coordinates averaged; see `TokenMixer`."""
        tokens = x.shape[1] - self.reach
        own = x[:, self.reach :]

        def mix() -> jax.Array:
            groups = self.groups(x.shape[2])
            kept = x.shape[2] - sum(count for _, count in groups)
            replaced = x[..., kept:].astype(jnp.float32)
            parts = self._replaced(replaced, segments, groups, tokens, weights)
            return jnp.concatenate([own[..., :kept], *(p.astype(x.dtype) for p in parts)], axis=-1)

        return between_blocks(mix, own, layer, n_layers, self.apply_last)

    def _replaced(
        self,
        x: jax.Array,
        segments: jax.Array,
        groups: tuple[tuple[int, int], ...],
        tokens: int,
        weights: Mapping[str, jax.Array],
    ) -> list[jax.Array]:
        """Returns what takes the place of the coordinates [B R+T C] of each window, [B T G]."""
        if self.kernel == "zero":
            return [jnp.zeros_like(x[:, x.shape[1] - tokens :])]
        if self.kernel == "average":
            return self._averages(x, segments, groups, tokens)
        parts, at, used = [], 0, 0
        for number, (window, count) in enumerate(groups):
            part, at = x[..., at : at + count], at + count
            if self.kernel == "learned":
                kernel = weights["kernels"][used : used + window * count].reshape(count, window)
                used += window * count
                y = causal_filter(part, segments, kernel.astype(jnp.float32), tokens)
            elif window == 1:
                y = part[:, x.shape[1] - tokens :]
            else:
                y = causal_filter(part, segments, self._fixed_kernel(window, number), tokens)
            if self.divide_by_count and self.kernel == "learned":
                y = y * (window / self._counts(segments, [window], tokens)[0])
            elif self.divide_by_count and window > 1:  # by the weight of the tokens there are
                present = self._counts(segments, [self.context], tokens)[0]
                y = y / (1.0 - (1.0 - 2.0 / (window + 1)) ** present)
            parts.append(y)
        return parts

    def _averages(
        self,
        x: jax.Array,
        segments: jax.Array,
        groups: tuple[tuple[int, int], ...],
        tokens: int,
    ) -> list[jax.Array]:
        """Returns the averages; what has a window of one token stays bit for bit."""
        sums = self._windowed(x, segments, groups)
        divisors: list[Any] = [window for window, _ in groups]
        if self.divide_by_count:
            divisors = self._counts(segments, divisors, tokens)
        return [y[:, -tokens:] / n for y, n in zip(sums, divisors, strict=True)]

    def _windowed(
        self, x: jax.Array, segments: jax.Array, groups: Sequence[tuple[int, int]]
    ) -> list[jax.Array]:
        """Returns the sum over each place's window, for each group."""
        if not self.centered or not groups:
            return moving_sums(x, segments, groups) if groups else []
        back = [(window - window // 2, count) for window, count in groups]
        ahead = [(window // 2 + 1, count) for window, count in groups]
        later = moving_sums(x[:, ::-1], segments[:, ::-1], ahead)
        ends = np.cumsum([count for _, count in groups])[:-1].tolist()
        here = jnp.split(x, ends, axis=-1)
        sums = moving_sums(x, segments, back)
        return [a + b[:, ::-1] - c for a, b, c in zip(sums, later, here, strict=True)]

    def _counts(self, segments: jax.Array, windows: Sequence[int], tokens: int) -> list[jax.Array]:
        """Returns the number of tokens within each place's window, [B T 1] for each window."""
        ones = jnp.ones((*segments.shape, len(windows)), jnp.float32)
        found = self._windowed(ones, segments, [(window, 1) for window in windows])
        return [n[:, -tokens:] for n in found]

    def _fixed_kernel(self, window: int, group: int) -> Float[Array, "1 K"]:
        """Returns the weights of the context's tokens, the newest first."""
        if self.kernel == "ema":
            rate = 2.0 / (window + 1)
            kernel = rate * (1.0 - rate) ** np.arange(self.context)
        else:
            drawn = np.random.default_rng((self.seed, group)).permutation(self.context)[:window]
            kernel = np.zeros(self.context)
            kernel[drawn] = 1.0 / window
        return jnp.asarray(kernel[None], jnp.float32)
