"""Answers ranked by their estimated marginal likelihood over several rationales (BiN).

Reference: "LaCoT: Latent Chain-of-Thought for Visual Reasoning", arXiv 2510.23925.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax.decoding.engine import decode
from tokjax.decoding.prompts import Prompts, bucket
from tokjax.decoding.samplers import categorical
from tokjax.decoding.stops import on_tokens
from tokjax.decoding.transforms import chain, suppress, temperature
from tokjax.errors import ConfigError, nearest
from tokjax.models.transformer import Transformer
from tokjax.signals import token_stats

Pool = Literal["log", "logmeanexp"]
POOLS = ("log", "logmeanexp")
_ROWS = 64  # of a scoring pass


def pooled(scores: Float[np.ndarray, "*B J I"], pool: Pool = "log") -> Float[np.ndarray, "*B J"]:
    """Returns what each answer is worth over all rationales.

    Args:
        scores: S[j, i] = log pi(Z_i Y_j | X) over its tokens, of answer j behind rationale i.
        pool: "log" is the mean of the scores (the authors' code), "logmeanexp" the log of the mean
            likelihood (their formula).

    Raises:
        ConfigError: an unknown pool.

    >>> pooled(np.array([[-1.0, -3.2], [-2.0, -2.1]])).round(5).tolist()
    [-2.1, -2.05]
    >>> pooled(np.array([[-1.0, -3.2], [-2.0, -2.1]]), "logmeanexp").round(5).tolist()
    [-1.58806, -2.04875]
    """
    if pool not in POOLS:
        raise ConfigError(f"unknown pool={pool!r}.{nearest(pool, POOLS)}")
    scores = np.asarray(scores, np.float64)
    if pool == "log":
        return scores.mean(-1)
    return np.logaddexp.reduce(scores, axis=-1) - np.log(scores.shape[-1])


@dataclass(frozen=True)
class Marginal:
    """One prompt's answers, each found behind a rationale of its own. N is their number.

    Attributes:
        rationales: ids of each, without the marker.
        answers: ids of each, the end token included.
        scores: of answer j behind rationale i.
        pooled: what each answer is worth; of equals the earliest is the best.
    """

    rationales: list[list[int]]
    answers: list[list[int]]
    scores: Float[np.ndarray, "N N"]
    pooled: Float[np.ndarray, "N"]

    @property
    def best(self) -> int:
        """The number of the best answer."""
        return int(np.argmax(self.pooled))


def answer_by_marginal(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    marker: Sequence[int],
    end: int,
    *,
    samples: int = 8,
    max_rationale: int = 1024,
    max_answer: int = 64,
    heat: float = 0.7,
    pool: Pool = "log",
    scorer: tuple[Transformer, Any] | None = None,
    seed: int = 0,
) -> list[Marginal]:
    """Returns each prompt's answers, ranked by how likely they are behind all its rationales.

    Costs the drawing of N rationales, N answers, and N^2 scoring passes over whole texts.

    Args:
        model: draws rationales and answers.
        params: its parameters.
        prompts: ids of the questions.
        marker: ids between rationale and answer; the first one ends a rationale.
        end: id that ends an answer.
        samples: N, rationales of each prompt.
        max_rationale: most tokens of one; one that is cut gets the marker.
        max_answer: most tokens of an answer.
        heat: temperature that rationales are drawn at; answers are greedy.
        pool: see `pooled`.
        scorer: model and parameters that score; default the same, as in the authors' evaluation.
        seed: of the drawing.

    Raises:
        ConfigError: a marker without ids, an unknown pool, or what `decode` refuses.
    """
    marker = [int(i) for i in marker]
    if not marker:
        raise ConfigError("the marker between rationale and answer has no ids")
    pooled(np.zeros((1, 1)), pool)
    N = samples
    steps = [temperature(heat)] + ([] if end == marker[0] else [suppress([end])])
    drawn = decode(
        model,
        params,
        Prompts.of(prompts),
        max_new_tokens=max_rationale,
        samples=N,
        transform=chain(*steps),
        sampler=categorical(),
        stop=on_tokens([marker[0]]),
        seeds=(np.uint64(seed) + np.arange(len(prompts) * N, dtype=np.uint64)) % 2**32,
    ).rows()
    rationales = [row[:-1] if row[-1] == marker[0] else row for row in drawn]
    asked = [[*prompts[r // N], *z, *marker] for r, z in enumerate(rationales)]
    answers = decode(
        model, params, Prompts.of(asked), max_new_tokens=max_answer, stop=on_tokens([end])
    ).rows()
    scorer = (model, params) if scorer is None else scorer
    texts, starts = [], []
    for b, prompt in enumerate(prompts):
        for j in range(N):
            for i in range(N):
                texts.append([*asked[b * N + i], *answers[b * N + j]])
                starts.append(len(prompt))
    table = _mean_logprobs(*scorer, texts, starts).reshape(len(prompts), N, N)
    return [
        Marginal(
            rationales[b * N : (b + 1) * N],
            answers[b * N : (b + 1) * N],
            table[b],
            pooled(table[b], pool),
        )
        for b in range(len(prompts))
    ]


def _mean_logprobs(
    model: Transformer, params: Any, texts: list[list[int]], starts: list[int]
) -> np.ndarray:
    """Returns the mean log-probability of each text's tokens from its start on."""
    T = bucket(max(map(len, texts)))
    tokens = np.zeros((len(texts), T), np.int32)
    for r, text in enumerate(texts):
        tokens[r, : len(text)] = text
    lengths, begins = np.array([len(t) for t in texts]), np.array(starts)
    found = []
    for first in range(0, len(texts), _ROWS):
        place = np.minimum(np.arange(first, first + _ROWS), len(texts) - 1)
        found.append(
            np.asarray(_scored(model, params, tokens[place], begins[place], lengths[place]))
        )
    return np.concatenate(found)[: len(texts)].astype(np.float64)


@partial(jax.jit, static_argnums=0)
def _scored(
    model: Transformer,
    params: Any,
    tokens: Int[Array, "R T"],
    starts: Int[Array, "R"],
    lengths: Int[Array, "R"],
) -> Float[Array, "R"]:
    x = model.backbone(params, model.embed(params, tokens[:, :-1])).x
    logp = token_stats(x, model.head(params), tokens[:, 1:], ["logprob"]).logprob
    assert logp is not None
    places = jnp.arange(1, tokens.shape[1])
    counted = (places >= starts[:, None]) & (places < lengths[:, None])
    return jnp.where(counted, logp, 0.0).sum(1) / counted.sum(1)
