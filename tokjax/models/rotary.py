"""Rotary positions (Su et al. 2021, arXiv 2104.09864) and the rules that stretch them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax.models.config import ModelConfig, RopeScaling

Tables = tuple[Float[Array, "B T 1 r"], Float[Array, "B T 1 r"]]


def rotary_tables(
    config: ModelConfig, positions: Int[Array, "B T"], *, local: bool = False
) -> Tables:
    """Returns the cosines and sines of the rotary angles, r = half the turned width.

    Args:
        config: the model's.
        positions: of each token.
        local: of windowed layers, where those have frequencies of their own.
    """
    if local and config.rope_local_theta is not None:
        frequencies, scale = _inverse(config.rope_local_theta, config.rotary_width), 1.0
    else:
        frequencies, scale = _frequencies(config, positions)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if scale == 1.0 else (cos * scale, sin * scale)


def rotate(x: Float[Array, "B T H d"], tables: Tables) -> Float[Array, "B T H d"]:
    """Returns x turned by its position; the pairs are (i, i + r), as in Hugging Face's models.

    Dimensions from twice r on pass unchanged.
    """
    cos, sin = tables
    width = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :width].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    turned = turned.astype(x.dtype)
    return turned if width == x.shape[-1] else jnp.concatenate([turned, x[..., width:]], axis=-1)


def _inverse(theta: float, width: int) -> np.ndarray:
    # In float32 as the checkpoints' own code has it: far positions see the rounding.
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return np.float32(1.0) / np.float32(theta) ** exponents


def _frequencies(config: ModelConfig, positions: Int[Array, "B T"]):
    """Returns (inverse frequencies, factor of cosines and sines).

    `dynamic` and `longrope` look at the largest position of each row. (transformers looks at that
    of the batch, so that there a row's logits change with the rows beside it.)
    """
    scaling, width = config.rope_scaling, config.rotary_width
    factor = np.float32(scaling.factor or 1.0)
    plain = _inverse(config.rope_theta, width)
    if scaling.kind == "none":
        return plain, 1.0
    if scaling.kind == "linear":
        return plain / factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(plain, scaling, config), 1.0
    if scaling.kind == "yarn":
        return _yarn(plain, scaling, config), _yarn_attention_factor(scaling)
    longest = positions.max(axis=1)[:, None, None, None] + 1
    if scaling.kind == "dynamic":
        return _dynamic(scaling, config, longest), 1.0
    short, long = (
        (1.0 / (np.asarray(f, np.float32) * config.rope_theta ** _exponents(width))).astype("f4")
        for f in (scaling.short_factors, scaling.long_factors)
    )
    original = scaling.original_positions or config.max_positions
    return jnp.where(longest > original, long, short), _longrope_attention_factor(config)


def _exponents(width: int) -> np.ndarray:
    return np.arange(0, width, 2, dtype=np.float32) / np.float32(width)


def _dynamic(scaling: RopeScaling, config: ModelConfig, longest: jax.Array) -> jax.Array:
    """NTK-aware scaling: the base grows with the length beyond the trained one."""
    width, factor = config.rotary_width, scaling.factor or 1.0
    length = jnp.maximum(longest, config.max_positions).astype(jnp.float32)
    growth = factor * length / config.max_positions - (factor - 1)
    base = config.rope_theta * growth ** (width / (width - 2))
    return 1.0 / base ** jnp.asarray(_exponents(width))


def _llama3(plain: np.ndarray, scaling: RopeScaling, config: ModelConfig) -> np.ndarray:
    """Long wavelengths are divided by the factor, short ones kept, those between blended."""
    length = scaling.original_positions or config.max_positions
    wavelength = 2 * math.pi / plain
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = (length / wavelength - low) / (high - low)
    divided = plain / np.float32(scaling.factor or 1.0)
    between = (1 - blend) * divided + blend * plain
    stretched = np.where(wavelength > length / low, divided, between)
    return np.where(wavelength < length / high, plain, stretched).astype(np.float32)


def _yarn(plain: np.ndarray, scaling: RopeScaling, config: ModelConfig) -> np.ndarray:
    """NTK-by-parts (Peng et al. 2023, arXiv 2309.00071, section 3.2)."""
    width, base = config.rotary_width, config.rope_theta
    length = scaling.original_positions or config.max_positions

    def dimension(turns: float) -> float:
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high = high + 0.001 if low == high else high
    stretched = np.clip((np.arange(width // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    divided = plain / np.float32(scaling.factor or 1.0)
    return (divided * stretched + plain * (1 - stretched)).astype(np.float32)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    factor = scaling.factor or 1.0

    def of(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return of(scaling.mscale) / of(scaling.mscale_all_dim)
    return of(1.0)


def _longrope_attention_factor(config: ModelConfig) -> float:
    scaling = config.rope_scaling
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    original = scaling.original_positions or config.max_positions
    factor = scaling.factor or config.max_positions / original
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
