"""Steering: a vector added to a block's output, whose length is kept."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from tokjax.decoding.edited import Edited, EditedParams, edited
from tokjax.errors import ConfigError
from tokjax.models.edits import Edits, Steer
from tokjax.models.transformer import Transformer


def steering_edits(
    vector: Float[np.ndarray, "L D"],
    layers: int | Sequence[int],
    alpha: Any = 4.0,
    *,
    gain: float = 10.0,
    keep_norm: bool = True,
) -> Edits:
    """Returns the edits that steer the outputs of some blocks, at every token.

    At block l, h becomes h' = h + gain * alpha * vector[l], then h' |h| / |h'|. At all other
    blocks, and where alpha is 0, h is left as it is, bit for bit.

    Args:
        vector: of every block, for example from `steering_vector`.
        layers: exact indices of the steered blocks.
        alpha: strength, one number or one for each row; negative steers the other way. The
            reference code's is 4 for text and 10 with images.
        gain: its constant factor.
        keep_norm: False leaves the lengths as the vector makes them.

    Raises:
        ConfigError: there is no such layer, or the shapes or numbers are impossible.

    Reference: GrAInS, arXiv 2507.18043.
    """
    vector = np.asarray(vector, np.float32)
    if vector.ndim != 2 or not np.isfinite(vector).all():
        raise ConfigError(f"the vector {vector.shape} must be [L, D], and finite")
    chosen = [layers] if isinstance(layers, (int, np.integer)) else list(layers)
    wrong = [layer for layer in chosen if not 0 <= layer < len(vector)]
    if wrong or not chosen:
        raise ConfigError(f"layers={layers} must be some of 0 to {len(vector) - 1}")
    strength = np.asarray(alpha, np.float32)
    if strength.ndim > 1 or not np.isfinite(strength).all():
        raise ConfigError(f"alpha={alpha!r} must be a finite number, or one for each row")
    scale = np.zeros((len(vector), strength.size, 1), np.float32)
    scale[chosen] = gain * strength.reshape(-1, 1)
    steer = Steer(vector[:, None, None], scale, keep_norm)  # type: ignore[arg-type]
    return Edits(steer={"resid_post": steer})


def steered(
    model: Transformer,
    params: Any,
    vector: Float[np.ndarray, "L D"],
    *,
    layers: int | Sequence[int],
    alpha: Any = 4.0,
    gain: float = 10.0,
    keep_norm: bool = True,
) -> tuple[Edited, EditedParams]:
    """Returns the predictor of a steered model and its parameters, for `decode`.

    Prompts and new tokens are steered. Another vector, layer or strength compiles nothing.

    Args:
        model: the model.
        params: its parameters.
        vector: of every block.
        layers: exact indices of the steered blocks; the reference code's are 31 of 32
            (Llama-3.1-8B) and 27 of 28 (Qwen2.5-7B).
        alpha: strength, one number or one for each prompt.
        gain: its constant factor.
        keep_norm: see `steering_edits`.

    Raises:
        ConfigError: as `steering_edits`, or the vector is another model's.

    Reference: "GrAInS: Gradient-based Attribution for Inference-Time Steering of LLMs and VLMs",
    arXiv 2507.18043.
    """
    wanted = (model.config.n_layers, model.config.d_model)
    if np.shape(vector) != wanted:
        raise ConfigError(f"the vector {np.shape(vector)} must be [L, D] = {list(wanted)}")
    edits = steering_edits(vector, layers, alpha, gain=gain, keep_norm=keep_norm)
    return edited(model, params, edits)
