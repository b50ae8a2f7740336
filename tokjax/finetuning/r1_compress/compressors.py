"""What writes shorter versions of texts: a language model, a function, or pruning of tokens.

A compressor is called with texts and a seed for each, and returns the versions of each text. A
version that was cut off before its end is None: it is longer than it may be.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from tokjax.decoding.prompts import bucket
from tokjax.errors import ConfigError, DataError
from tokjax.language_model import LanguageModel

Compressor = Callable[[Sequence[str], Sequence[int]], Sequence[Sequence[str | None]]]

PROMPT = """\
Rewrite the following part of someone's reasoning more concisely. Keep its meaning, every number, \
formula and intermediate result, and every moment of reflection ("wait", re-checks, changes of \
plan). Do not add anything, do not solve anything further. Reply with the rewritten part alone.

{chunk}"""


def by_function(function: Callable[[str, int], Sequence[str]]) -> Compressor:
    """Returns a compressor of a function of (text, seed) -> versions."""

    def compressor(texts: Sequence[str], seeds: Sequence[int]) -> list[list[str | None]]:
        found: list[list[str | None]] = []
        for text, seed in zip(texts, seeds, strict=True):
            versions = function(text, seed)
            if isinstance(versions, str):
                raise DataError("a compressor returned a text instead of a list of texts")
            found.append(list(versions))
        return found

    return compressor


class LMRewriter:
    """A compressor that asks a language model for shorter versions."""

    def __init__(
        self,
        lm: LanguageModel,
        candidates: int = 8,
        *,
        prompt: str = PROMPT,
        temperature: float = 0.8,
        top_p: float = 0.95,
        batch_size: int = 16,
    ):
        """Wraps a model.

        Args:
            lm: from `tokjax.load`; one with a chat template is asked as a user would.
            candidates: versions of each text.
            prompt: the request, in which {chunk} is the text.
            temperature: of sampling; 0 for the one likeliest version.
            top_p: probability mass that is drawn from.
            batch_size: versions written at a time.

        Raises:
            ConfigError: a prompt without {chunk}, or numbers that make no sense.
        """
        if "{chunk}" not in prompt:
            raise ConfigError("the prompt of the rewriter has no {chunk}: say where the text goes")
        if candidates < 1 or batch_size < 1:
            raise ConfigError(f"candidates={candidates}, batch_size={batch_size} must be 1 or more")
        if candidates > 1 and temperature == 0:
            raise ConfigError(
                f"candidates={candidates} at temperature 0 would all be the same: raise it"
            )
        self.lm, self.candidates, self.prompt = lm, candidates, prompt
        self.temperature, self.top_p, self.batch_size = temperature, top_p, batch_size

    def __call__(self, texts: Sequence[str], seeds: Sequence[int]) -> list[list[str | None]]:
        """Returns the versions of each text; None for one as long as the text that did not end.

        A version depends on its text and seed, not on what is written beside it.
        """
        prompts = [self._prompt(text) for text in texts]
        # Whatever is longer than the text will be left out: nothing more has to be written.
        limits = [len(self.lm.tokenizer.encode(text)) + 1 for text in texts]
        room = self.lm.model.config.max_positions
        jobs = [(t, m) for t in range(len(texts)) for m in range(self.candidates)]
        fits = [len(p) + n <= room for p, n in zip(prompts, limits, strict=True)]
        found: list[list[str | None]] = [[None] * self.candidates for _ in texts]
        order = sorted((job for job in jobs if fits[job[0]]), key=lambda job: -limits[job[0]])
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            full = batch + batch[:1] * (self.batch_size - len(batch))
            longest = max(len(prompts[t]) for t, _ in batch)
            new = min(bucket(limits[batch[0][0]]), room - longest)
            written = self.lm.generate(
                [prompts[t] for t, _ in full],
                seeds=[_seed(seeds[t], m) for t, m in full],
                max_new_tokens=max(new, max(limits[t] for t, _ in batch)),
                temperature=self.temperature,
                top_p=self.top_p,
            )
            for row, (t, m) in enumerate(batch):
                ended = bool(written.stopped[row]) and int(written.lengths[row]) <= limits[t]
                found[t][m] = written.texts[row].strip() if ended else None
        return found

    def _prompt(self, text: str) -> list[int]:
        asked = self.prompt.replace("{chunk}", text)
        if self.lm.tokenizer.chat_template is None:
            return self.lm.encode(asked)
        return self.lm.chat([{"role": "user", "content": asked}])


def _seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def prune_tokens(
    lm: LanguageModel,
    texts: Sequence[str],
    keep: float,
    *,
    importance: Callable[[str, Sequence[tuple[int, int]]], Sequence[float]] | None = None,
    batch_size: int = 8,
) -> list[str]:
    """Returns the texts without their least important tokens: a baseline.

    Args:
        lm: whose tokens are dropped.
        texts: that stand alone.
        keep: share of each text's tokens that stay, rounded up.
        importance: of the tokens of a text, given as ranges of characters; default how little the
            model expected each (its surprisal; a first token without prediction stays).
        batch_size: texts scored at a time.

    Raises:
        ConfigError: the share is not within (0, 1].
        DataError: `importance` gives not one number for each token.

    Reference: "TokenSkip: Controllable Chain-of-Thought Compression in LLMs", arXiv 2502.12067,
    with selective context's measure (arXiv 2310.06201).
    """
    if not 0 < keep <= 1:
        raise ConfigError(f"keep={keep} must be above 0 and at most 1")
    if not texts:
        return []
    if importance is None:
        scores = lm.score(texts, batch_size=batch_size)
        spans = scores.offsets
        values = [
            np.where(scores.mask[b], scores.nll[b], np.inf)[: scores.lengths[b]]
            for b in range(len(texts))
        ]
    else:
        spans = [lm.tokenizer.encode_with_offsets(text)[1] for text in texts]
        values = [np.asarray(importance(t, s), float) for t, s in zip(texts, spans, strict=True)]
    found = []
    for text, ranges, value in zip(texts, spans, values, strict=True):
        if len(value) != len(ranges):
            raise DataError(f"importance gave {len(value)} numbers for {len(ranges)} tokens")
        own = [i for i, (start, end) in enumerate(ranges) if end > start]
        count = math.ceil(keep * len(own) - 1e-9)
        kept = sorted(sorted(own, key=lambda i: (-value[i], i))[:count])
        characters = sorted({c for i in kept for c in range(*ranges[i])})
        found.append("".join(text[c] for c in characters))
    return found


class TokenPruner:
    """A compressor that gives one version of each text: without its least important tokens."""

    def __init__(self, lm: LanguageModel, keep: float = 0.7, *, batch_size: int = 8):
        """Wraps a model from `tokjax.load`; for the other arguments see `prune_tokens`."""
        self.lm, self.keep, self.batch_size = lm, keep, batch_size
        prune_tokens(lm, [], keep)

    def __call__(self, texts: Sequence[str], seeds: Sequence[int]) -> list[list[str | None]]:
        """Returns the version of each text."""
        pruned = prune_tokens(self.lm, texts, self.keep, batch_size=self.batch_size)
        return [[text] for text in pruned]
