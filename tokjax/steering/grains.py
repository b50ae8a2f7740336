"""GrAInS: from pairs of a preferred and a dispreferred answer to a steering vector."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax.errors import ConfigError, DataError
from tokjax.models.transformer import Transformer
from tokjax.steering.ablation import ablate, last_states, select_tokens
from tokjax.steering.integrated_gradients import Target, attribute_tokens, quadrature
from tokjax.steering.rows import Rows, batches, rows_of
from tokjax.steering.vectors import Method, Mode, steering_direction

Scores = Literal["integrated", "gradient", "random"]
Place = Literal["last", "predicting"]


class Pair(NamedTuple):
    """One prompt with two answers, as ids; BOS belongs to the prompt."""

    prompt: Sequence[int]
    preferred: Sequence[int]
    dispreferred: Sequence[int]


def ablation_differences(
    model: Transformer,
    params: Any,
    pairs: Sequence[Pair],
    *,
    ablation_id: int,
    bos_id: int | None = None,
    k: int = 10,
    scores: Scores = "integrated",
    baseline_id: int | None = None,
    target: Target = "last",
    steps: int = 20,
    place: Place = "last",
    seed: int = 0,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Float[np.ndarray, "L N D"], Float[np.ndarray, "L N D"]]:
    """Returns the last states of every answer minus those without its most positive tokens, and
    minus those without its most negative ones; N is two for each pair.

    The arguments and errors are those of `steering_vector`.
    """
    _check(model, pairs, ablation_id, baseline_id, k, scores, target, place)
    quadrature(steps)
    texts = [(pair.prompt, answer) for pair in pairs for answer in pair[1:]]
    rows = rows_of(texts, model.config)
    # Each text counts with the sign with which its log-probability enters the objective.
    sign = np.tile(np.array([1.0, -1.0], np.float32), len(pairs))
    random = np.random.default_rng(seed).normal(size=rows.tokens.shape).astype(np.float32)
    compute = partial(_differences, model, (scores, target, steps, baseline_id is not None))
    found = []
    for batch, own in batches(len(texts), batch_size):
        positive, negative = compute(
            params,
            rows.take(batch),
            sign[batch],
            random[batch],
            np.int32(k),
            np.int32(ablation_id),
            np.int32(-1 if bos_id is None else bos_id),
            np.int32(0 if baseline_id is None else baseline_id),
            np.int32(place == "predicting"),
        )
        found.append((np.asarray(positive)[:, :own], np.asarray(negative)[:, :own]))
        if progress is not None:
            progress(sum(each.shape[1] for each, _ in found), len(texts))
    positive, negative = (np.concatenate(each, axis=1) for each in zip(*found, strict=True))
    return positive, negative


def steering_vector(
    model: Transformer,
    params: Any,
    pairs: Sequence[Pair],
    *,
    ablation_id: int,
    bos_id: int | None = None,
    k: int = 10,
    scores: Scores = "integrated",
    baseline_id: int | None = None,
    target: Target = "last",
    steps: int = 20,
    place: Place = "last",
    method: Method = "pca",
    mode: Mode = "both",
    seed: int = 0,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Float[np.ndarray, "L D"]:
    """Returns a vector for each block's output that points from dispreferred to preferred answers.

    Integrated gradients of log p(preferred) - log p(dispreferred) rank the tokens of each text
    (prompt and answer); its k most positive ones, and apart from that its k most negative ones, are
    replaced by `ablation_id`; what that changes of the last token's hidden states makes the vector.
    Pairs turned round give the negative of it ("both"). Costs about `steps` forward and backward
    passes over each answer. About 50 pairs are the paper's number.

    Args:
        model: the model.
        params: its parameters.
        pairs: prompts with a preferred and a dispreferred answer.
        ablation_id: id that replaces tokens: PAD, or UNK without one.
        bos_id: id that is never replaced; None if texts begin without one.
        k: how many tokens of each text are replaced; 10 for text, 50 with images. Where a text has
            no more, one is left.
        scores: how tokens are ranked: "integrated" gradients, plain "gradient" times input, or at
            "random" (a control).
        baseline_id: id whose embedding the integration begins at, for example PAD; None begins at
            zeros, the paper's choice (see `attribute_tokens` for when that fails).
        target: log-probability of the "last" token of each answer, or of the whole "response".
        steps: number of gradients.
        place: whose states are compared: those of the "last" token of each text, as in the
            reference code, or those of the token before it, "predicting" it, which is then never
            replaced. The answer is decided in the latter, and in a small model only they gave a
            vector that can be relied on (see `configs/repro/grains.py`).
        method: "pca", or "mean", which keeps the shift common to all texts; see `direction`.
        mode: "both" sets of tokens, or "pos" or "neg" alone.
        seed: of random scores.
        batch_size: texts computed at a time.
        progress: called with (texts done, texts) after each batch.

    Raises:
        ConfigError: no pair, an empty prompt or answer, one longer than the model's positions, an
            unknown choice or an impossible number.
        DataError: an id is not in the model's vocabulary.

    Reference: "GrAInS: Gradient-based Attribution for Inference-Time Steering of LLMs and VLMs",
    arXiv 2507.18043.
    """
    empty = np.zeros((1, 1))
    steering_direction(empty, empty, method, mode)  # refuse a wrong choice before the long part
    positive, negative = ablation_differences(
        model,
        params,
        pairs,
        ablation_id=ablation_id,
        bos_id=bos_id,
        k=k,
        scores=scores,
        baseline_id=baseline_id,
        target=target,
        steps=steps,
        place=place,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    return steering_direction(positive, negative, method, mode).astype(np.float32)


def _check(model, pairs, ablation_id, baseline_id, k, scores, target, place) -> None:
    if not len(pairs):
        raise ConfigError("no pairs: give at least one prompt with two answers")
    if k < 1:
        raise ConfigError(f"k={k} must be at least 1")
    if scores not in ("integrated", "gradient", "random"):
        raise ConfigError(f"scores={scores!r} must be 'integrated', 'gradient' or 'random'")
    if target not in ("last", "response"):
        raise ConfigError(f"target={target!r} must be 'last' or 'response'")
    if place not in ("last", "predicting"):
        raise ConfigError(f"place={place!r} must be 'last' or 'predicting'")
    for name, value in (("ablation_id", ablation_id), ("baseline_id", baseline_id)):
        if value is not None and not 0 <= value < model.config.vocabulary:
            raise DataError(
                f"{name}={value} is not one of the model's ids, 0 to {model.config.vocabulary - 1}"
            )


@partial(jax.jit, static_argnums=(0, 1))
def _differences(
    model: Transformer,
    how: tuple[Scores, Target, int, bool],
    params: Any,
    rows: Rows,
    sign: Float[Array, "B"],
    random: Float[Array, "B T"],
    k: Int[Array, ""],
    ablation_id: Int[Array, ""],
    bos_id: Int[Array, ""],
    baseline_id: Int[Array, ""],
    back: Int[Array, ""],
) -> tuple[Float[Array, "L B D"], Float[Array, "L B D"]]:
    kind, target, steps, has_baseline = how
    tokens, lengths = rows.tokens, rows.lengths
    if kind == "random":
        ranked = random
    else:
        found = attribute_tokens(
            model,
            params,
            tokens,
            lengths,
            rows.starts,
            baseline_id=baseline_id if has_baseline else None,
            target=target,
            steps=1 if kind == "gradient" else steps,
            rule="right" if kind == "gradient" else "gauss",
        )
        ranked = found.scores * sign[:, None]
    at = jnp.arange(tokens.shape[1])
    ends = lengths - back
    eligible: Bool[Array, "B T"] = (at < lengths[:, None]) & (tokens != bos_id)
    # Another token at the very place that predicts would change its state more than all others
    # together, and in one direction whatever the text says: principal components find only that.
    kept = (at == ends[:, None] - 1) & (back > 0)
    most_positive = select_tokens(jnp.where(kept, -jnp.inf, ranked), eligible, k, "positive")
    most_negative = select_tokens(jnp.where(kept, jnp.inf, ranked), eligible, k, "negative")
    without = [ablate(tokens, each, ablation_id) for each in (most_positive, most_negative)]
    texts = jnp.concatenate([tokens, *without])
    states = last_states(model, params, texts, jnp.tile(ends, 3))
    own, positive, negative = jnp.split(states, 3, axis=1)
    return own - positive, own - negative
