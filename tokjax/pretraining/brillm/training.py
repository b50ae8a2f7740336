"""Training of a graph on rows of text, stopped and continued exactly.

Reference: "BriLLM: Brain-inspired Large Language Model", arXiv 2503.11299.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax.errors import ConfigError, DataError
from tokjax.models.digests import digest
from tokjax.pretraining.brillm.candidates import Sampled, sampled_loss
from tokjax.pretraining.brillm.graph import TABLE, BriLLM, Params
from tokjax.training.fitting import FitState, adam_step, begin, fit
from tokjax.training.optimizers import Constant, Cosine


@dataclass(frozen=True)
class BriLLMFit:
    """How a graph is trained: AdamW, gradients clipped to norm 1.

    Attributes:
        steps: updates.
        batch_size: rows of each.
        peak_lr: learning rate; 0.05 is the paper's.
        schedule: of the learning rate; the paper's is constant.
        weight_decay: of all parameters. It reaches the edges that a batch does not touch too.
        sampled: negatives to compare with; None compares with the whole vocabulary.
        seed: of parameters, order and negatives.
    """

    steps: int = 1000
    batch_size: int = 32
    peak_lr: float = 5e-2
    schedule: Constant | Cosine = Constant()
    weight_decay: float = 0.01
    sampled: Sampled | None = None
    seed: int = 0

    def __post_init__(self):
        if self.steps < 1 or self.batch_size < 1:
            raise ConfigError(
                f"steps={self.steps} and batch_size={self.batch_size} must be at least 1"
            )
        if not self.peak_lr > 0 or self.weight_decay < 0:
            raise ConfigError(
                f"peak_lr={self.peak_lr} must be positive and weight_decay={self.weight_decay} "
                f"not negative"
            )


def windows(ids: Sequence[int] | Int[np.ndarray, " N"], length: int) -> Int[np.ndarray, "B L"]:
    """Returns a text cut into rows; what is left over at its end is dropped.

    Neighbouring rows share a token, so that every transition of the rows is in one of them.

    >>> windows([1, 2, 3, 4, 5, 6], 3).tolist()
    [[1, 2, 3], [3, 4, 5]]

    Raises:
        ConfigError: rows of fewer than 2 tokens.
        DataError: the text is shorter than a row.
    """
    if length < 2:
        raise ConfigError(f"length={length}: a transition needs 2 tokens")
    text = np.asarray(ids, np.int32)
    rows = (len(text) - 1) // (length - 1)
    if rows < 1:
        raise DataError(f"a text of {len(text)} tokens has no row of {length}")
    return text[np.arange(rows)[:, None] * (length - 1) + np.arange(length)]


def fit_brillm(
    model: BriLLM,
    tokens: Int[np.ndarray, "B L"],
    config: BriLLMFit | None = None,
    *,
    table: Int[np.ndarray, "V V"] | None = None,
    followers: Int[np.ndarray, "V K"] | None = None,
    checkpoint: Path | str | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], Float[np.ndarray, "N"]]:
    """Returns parameters fitted to rows of text, and the loss before each step.

    Adam keeps two numbers for each parameter and moves all of them, so that a step costs at least a
    pass over the whole graph; edges that a batch does not touch move by what is left of their
    moments.

    Args:
        model: the graph.
        tokens: rows of one length; see `windows`.
        config: how.
        table: edges, where some share one; see `seen_edges`.
        followers: of each token, for `Sampled(among="followers")`; see `follower_lists`.
        checkpoint: file that the training goes on from where it is there, with the same numbers
            as without a stop.
        progress: whether to show it.

    Raises:
        ConfigError: lengths or options that do not fit; the checkpoint is of another training.
        DataError: there is no row, or an id that is no node.
        NonFiniteError: a loss was not finite.
    """
    told = BriLLMFit() if config is None else config
    tokens = _checked(model, tokens)
    if told.sampled is not None:
        told.sampled.check(model, followers)
    elif followers is not None:
        raise ConfigError("followers are for sampled=Sampled(among='followers')")
    keys = jax.random.key(told.seed)
    start = jax.device_get(model.init(jax.random.fold_in(keys, 0), table))
    fixed = {name: jnp.asarray(start.pop(name)) for name in [TABLE] if name in start}
    batch = min(told.batch_size, len(tokens))
    per_epoch = len(tokens) // batch
    given = None if followers is None else jnp.asarray(followers, jnp.int32)

    @functools.lru_cache(1)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([told.seed, epoch]).permutation(len(tokens))

    def update(state: FitState, step: int) -> tuple[FitState, Any]:
        epoch, at = divmod(step, per_epoch)
        rows = tokens[order(epoch)[at * batch : (at + 1) * batch]]
        rate = told.peak_lr * told.schedule.factor(jnp.float32(step), told.steps)
        key = jax.random.fold_in(keys, step + 1)
        options = (model, told.sampled, told.weight_decay)
        return _update(*options, state, fixed, rows, given, key, rate)

    def identity() -> dict[str, Any]:
        arrays = [tokens, *(a for a in (table, followers) if a is not None)]
        return {"model": repr(model), "fit": repr(told), "data": digest(*map(np.asarray, arrays))}

    weights, losses = fit(
        update,
        begin(start),
        told.steps,
        identity=identity,
        checkpoint=checkpoint,
        progress=progress,
    )
    return {**weights, **fixed}, losses


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _update(
    model: BriLLM,
    sampled: Sampled | None,
    decay: float,
    state: FitState,
    fixed: Params,
    tokens: Int[Array, "B L"],
    followers: Int[Array, "V K"] | None,
    key: jax.Array,
    rate: Float[Array, ""],
) -> tuple[FitState, Float[Array, ""]]:
    def loss(weights: Params) -> Float[Array, ""]:
        params = {**weights, **fixed}
        if sampled is None:
            return model.nll(params, tokens).mean()
        chosen = sampled.candidates(key, tokens, model.vocab_size, followers)
        return sampled_loss(model, params, tokens, *chosen)

    return adam_step(state, rate, loss, decay)


def evaluate_brillm(
    model: BriLLM,
    params: Params,
    tokens: Int[np.ndarray, "B L"],
    batch_size: int = 32,
) -> Float[np.ndarray, "B N"]:
    """Returns the negative log-probability of each token but the first of rows, among all tokens.

    Args:
        model: the graph.
        params: its parameters.
        tokens: rows of one length.
        batch_size: rows at a time.

    Raises:
        ConfigError: rows too short or too long, or no row at a time.
        DataError: there is no row, or an id that is no node.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} must be at least 1")
    tokens = _checked(model, tokens)
    size = min(batch_size, len(tokens))
    found = []
    for first in range(0, len(tokens), size):
        part = tokens[first : first + size]
        filled = np.concatenate([part, np.repeat(part[:1], size - len(part), axis=0)])
        found.append(np.asarray(_nll(model, params, filled))[: len(part)])
    return np.concatenate(found)


@functools.partial(jax.jit, static_argnums=0)
def _nll(model: BriLLM, params: Params, tokens: Int[Array, "B L"]) -> Float[Array, "B N"]:
    return model.nll(params, tokens)


def _checked(model: BriLLM, tokens: Any) -> Int[np.ndarray, "B L"]:
    tokens = np.asarray(tokens, np.int32)
    if tokens.ndim != 2 or not len(tokens):
        raise DataError(f"tokens has shape {tokens.shape}: rows of one length are needed, [B, L]")
    model.check_length(tokens.shape[1])
    model.check_tokens(tokens)
    return tokens
