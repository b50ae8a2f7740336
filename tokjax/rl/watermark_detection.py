"""Finding a learnt watermark: scores of texts, and how well they tell two kinds of text apart."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from tokjax.data.tokenizers import Tokenizer
from tokjax.errors import ConfigError
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.rl.rl_watermark import RLWatermark
from tokjax.rl.watermark_detector import DETECTOR, detector_scores, substituted
from tokjax.signals.auroc import auroc, fpr_at_tpr, roc_curve
from tokjax.training.initial import find_initial
from tokjax.training.trained import load_trained, read_trained

_BUCKET = 32  # rows are filled up to multiples of it, so that few programs are compiled
Rows = Sequence[Sequence[int]]


class Detection(NamedTuple):
    """How well scores tell marked texts from others.

    Attributes:
        auc: probability that a marked text scores above another one, a tie counting one half.
        fpr_at_90: share of the others taken for marked where 90 % of the marked ones are found.
        fpr_at_99: the same where 99 % are found.
    """

    auc: float
    fpr_at_90: float
    fpr_at_99: float


def detection(marked: Float[np.ndarray, " n"], others: Float[np.ndarray, " m"]) -> Detection:
    """Returns how well scores tell marked texts from others.

    Args:
        marked: scores of marked texts.
        others: scores of texts by people, or by the model before it was marked.

    >>> detection(np.array([2.0, 3.0]), np.array([0.0, 1.0]))
    Detection(auc=1.0, fpr_at_90=0.0, fpr_at_99=0.0)
    """
    scores = np.concatenate([marked, others])
    labels = np.repeat([True, False], [len(marked), len(others)])
    curve = roc_curve(scores, labels)
    return Detection(auroc(scores, labels), fpr_at_tpr(curve, 0.9), fpr_at_tpr(curve, 0.99))


def with_substitutions(rows: Rows, share: float, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Returns texts in which a share of the tokens, rounded, are random ids.

    Args:
        rows: ids of texts, without their prompts.
        share: of each text's tokens, 0 to 1.
        vocab_size: ids are drawn uniformly below it.
        seed: of places and ids.
    """
    tokens, mask = _padded(rows)
    key = jax.random.key(seed)
    found = substituted(jnp.asarray(tokens), jnp.asarray(mask), share, vocab_size, key)
    return [row[: len(given)].tolist() for row, given in zip(np.asarray(found), rows, strict=True)]


@dataclass(frozen=True, eq=False)
class WatermarkDetector:
    """The detector that a run trained beside its model.

    Attributes:
        trunk: the transformer.
        params: its parameters and the score's.
        tokenizer: the run's.
        add_bos: whether its sequences began with the BOS id.
        limit: most tokens of the texts that it was trained on.
    """

    trunk: Transformer
    params: Params
    tokenizer: Tokenizer
    add_bos: bool
    limit: int

    def __call__(
        self, prompts: Sequence[str], texts: Sequence[str], *, limit: int | None = None
    ) -> Float[np.ndarray, " n"]:
        """Returns the score of each text behind its prompt; high ones are the marked model's.

        Args:
            prompts: what the texts continue.
            texts: continuations.
            limit: tokens of each that are read at most; default those of training. Scores of texts
                of different lengths are best compared at one length.

        Raises:
            ConfigError: not as many texts as prompts, or an empty text.
        """
        first = [self.tokenizer.bos_id] if self.add_bos else []
        encode = self.tokenizer.encode
        before = [[i for i in first if i is not None] + encode(p) for p in prompts]
        return self.of_ids(before, [encode(t) for t in texts], limit=limit)

    def of_ids(
        self, prompts: Rows, texts: Rows, *, limit: int | None = None, batch_size: int = 64
    ) -> Float[np.ndarray, " n"]:
        """Returns the score of each text, all given as ids, end tokens not included.

        Args:
            prompts: ids before each text, a BOS id included where the model has one.
            texts: ids of each.
            limit: see `__call__`.
            batch_size: texts that are read at a time.

        Raises:
            ConfigError: not as many texts as prompts, an empty text, or one without room.
        """
        limit = self.limit if limit is None else limit
        if len(prompts) != len(texts):
            raise ConfigError(f"{len(prompts)} prompts and {len(texts)} texts: give as many")
        rows = [[*p, *list(t)[:limit]] for p, t in zip(prompts, texts, strict=True)]
        for i, (text, row) in enumerate(zip(texts, rows, strict=True)):
            if not len(text):
                raise ConfigError(f"text {i} is empty: there is nothing to be scored")
            if len(row) > self.trunk.config.max_positions:
                raise ConfigError(
                    f"prompt and text {i} have {len(row)} tokens, more than the detector's "
                    f"{self.trunk.config.max_positions} positions: lower limit={limit}"
                )
        found = np.zeros(len(rows), np.float32)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for first in range(0, len(order), batch_size):
            part = order[first : first + batch_size]
            # The last part is filled up, so that one program serves all.
            tokens, real = _padded([rows[i] for i in (part + part[-1:] * batch_size)[:batch_size]])
            scores = _scores(self.trunk, self.params, tokens, real)
            found[part] = np.asarray(scores)[: len(part)]
        return found


def load_detector(workdir: str | Path) -> WatermarkDetector:
    """Returns the detector of a run whose last stage had the objective "rl_watermark".

    The marked model itself is what `tokjax.load(workdir)` returns.

    Raises:
        CheckpointError: the folder is no run's, or has no checkpoint yet.
        ConfigError: its last stage trained no detector.
    """
    config = read_trained(Path(workdir)).config
    objective = config.stage_list[-1].objective
    if not isinstance(objective, RLWatermark):
        raise ConfigError(
            f"{workdir} has no detector: the last stage's objective must be 'rl_watermark'"
        )
    found = load_trained(Path(workdir))
    frozen = None
    if objective.detector.checkpoint is not None:
        trunk = objective.detector.trunk(found.model)
        frozen = find_initial(objective.detector.checkpoint).load(trunk.config, None)
    params = objective.detector.whole(found.heads[DETECTOR], frozen)
    limit = objective.rollouts.max_new_tokens
    trunk = objective.detector.trunk(found.model)
    return WatermarkDetector(trunk, params, found.tokenizer, found.add_bos, limit)


def _padded(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    longest = max(map(len, rows), default=1)
    T = -(-longest // _BUCKET) * _BUCKET
    tokens, real = np.zeros((len(rows), T), np.int32), np.zeros((len(rows), T), bool)
    for r, row in enumerate(rows):
        tokens[r, : len(row)], real[r, : len(row)] = row, True
    return tokens, real


@functools.partial(jax.jit, static_argnums=0)
def _scores(trunk, params, tokens, real):
    last = real.sum(-1) - 1
    scores = detector_scores(trunk, params, tokens, real)
    return jnp.take_along_axis(scores, last[:, None], axis=1)[:, 0]
