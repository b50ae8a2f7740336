"""Where in a generated text the hidden state tells most about the solution, and at which tokens."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax.errors import ConfigError
from tokjax.models.transformer import Transformer
from tokjax.signals.hsic import EPS, SIGMA, normalised_hsic


def mi_curves(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    solutions: Sequence[Sequence[int]],
    *,
    layer: int,
    sigma: float = SIGMA,
    eps: float = EPS,
    batch_size: int = 4,
) -> list[Float[np.ndarray, " T"]]:
    """Returns, for each text, how its hidden states depend on that of the solution.

    Value t belongs to token t of the text: it is of the output of block `layer` at the position
    that predicts the token. The solution's state is that of its last token, when it is read by
    the same model on its own (as in the reference code; put the question before it if it should
    be read behind it). The control is another question's solution: it must flatten the peaks.

    Args:
        model: the model.
        params: its parameters.
        prompts: ids of what each text continues.
        texts: ids of the generated texts.
        solutions: ids of the gold solutions.
        layer: index of the block.
        sigma: width of the kernel; see `normalised_hsic`.
        eps: regularisation.
        batch_size: rows computed at a time; all layers' states of so many are held.

    Raises:
        ConfigError: lists of different lengths, a prompt or solution without tokens, a row longer
            than the model's positions, or no such layer.

    Reference: "Demystifying Reasoning Dynamics with Mutual Information: Thinking Tokens are
    Information Peaks in LLM Reasoning", arXiv 2506.02867.
    """
    if not len(prompts) == len(texts) == len(solutions):
        raise ConfigError(
            f"{len(prompts)} prompts, {len(texts)} texts and {len(solutions)} solutions: give one "
            f"of each"
        )
    if not 0 <= layer < model.config.n_layers:
        raise ConfigError(f"layer={layer} must be 0 to {model.config.n_layers - 1}")
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} must be at least 1")
    for name, rows in (("prompt", prompts), ("solution", solutions)):
        for i, row in enumerate(rows):
            if not len(row):
                raise ConfigError(f"{name} {i} has no tokens")
    written = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
    states = _block_outputs(model, params, written, layer, batch_size)
    golds = _block_outputs(model, params, list(solutions), layer, batch_size)
    return [
        normalised_hsic(
            own[len(prompt) - 1 : len(prompt) - 1 + len(text)], gold[-1], sigma=sigma, eps=eps
        )
        for own, gold, prompt, text in zip(states, golds, prompts, texts, strict=True)
    ]


def _block_outputs(model, params, rows, layer: int, batch_size: int) -> list[np.ndarray]:
    """Returns each row's [T, D] behind one block."""
    longest = max(map(len, rows), default=0)
    if longest > model.config.max_positions:
        raise ConfigError(
            f"a row of {longest} tokens is longer than the model's "
            f"max_positions={model.config.max_positions}"
        )
    width = min(-(-longest // 64) * 64, model.config.max_positions)
    found = []
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        tokens = np.zeros((batch_size, width), np.int32)
        for b, row in enumerate(batch):
            tokens[b, : len(row)] = row
        states = np.asarray(_states(model, params, tokens, layer))
        found += [states[b, : len(row)] for b, row in enumerate(batch)]
    return found


@partial(jax.jit, static_argnums=0)
def _states(
    model: Transformer, params: Any, tokens: Int[Array, "B T"], layer: Int[Array, ""]
) -> Float[Array, "B T D"]:
    out = model.backbone(params, model.embed(params, tokens), capture={"resid_post"})
    return out.captured["resid_post"][layer].astype(jnp.float32)


def outlier_peaks(curve: Float[np.ndarray, " T"], factor: float = 1.5) -> Int[np.ndarray, " P"]:
    """Returns the indices of a curve's outliers: above the third quartile by more than `factor`
    times the range between the quartiles.

    >>> outlier_peaks(np.array([1.0, 2.0, 1.5, 9.0, 1.2])).tolist()
    [3]

    Reference: arXiv 2506.02867 (the rule named in its text).
    """
    curve = np.asarray(curve, np.float64)
    if not len(curve):
        return np.zeros(0, np.int64)
    low, high = np.quantile(curve, [0.25, 0.75])
    return np.flatnonzero(curve > high + factor * (high - low))


def top_peaks(
    curve: Float[np.ndarray, " T"], count: int = 20, first: int = 512
) -> Int[np.ndarray, " P"]:
    """Returns the indices, in order, of the largest values among the first ones; of equals the
    earlier.

    >>> top_peaks(np.array([1.0, 2.0, 1.5, 9.0, 1.2]), count=2).tolist()
    [1, 3]

    Reference: arXiv 2506.02867 (what its reference code does).
    """
    best = np.argsort(-np.asarray(curve, np.float64)[:first], kind="stable")
    return np.sort(best[:count])


def peak_tokens(
    texts: Sequence[Sequence[int]], peaks: Sequence[Sequence[int] | np.ndarray]
) -> Counter[int]:
    """Returns how often each id stands at a peak, over all texts.

    >>> peak_tokens([[5, 6, 5], [6, 7]], [[0, 2], [1]]).most_common(1)
    [(5, 2)]
    """
    return Counter(int(text[int(at)]) for text, own in zip(texts, peaks, strict=True) for at in own)
