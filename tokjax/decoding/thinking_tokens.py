"""Thinking tokens: which ids they are, and how to test whether a model needs them."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from tokjax.decoding.transforms import Transform, suppress
from tokjax.errors import ConfigError

THINKING_WORDS = (
    *("So", "Let", "Hmm", "I", "Okay", "First", "Now", "Wait", "But", "Then", "Since"),
    *("Therefore", "Maybe", "If", "To"),
)


class _Encoder(Protocol):
    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text."""
        ...


def thinking_ids(tokenizer: _Encoder, words: Sequence[str] = THINKING_WORDS) -> list[int]:
    """Returns the ids of words that are one token, at the start of a text or behind a space.

    Args:
        tokenizer: anything with `encode`, without a BOS id.
        words: default those that the paper finds most often at peaks.

    Raises:
        ConfigError: none of the words is one token.

    Reference: arXiv 2506.02867 (figure of the commonest peak tokens).
    """
    encoded = [tokenizer.encode(text) for word in words for text in (word, f" {word}")]
    found = sorted({ids[0] for ids in encoded if len(ids) == 1})
    if not found:
        raise ConfigError(f"none of {list(words)} is a single token of this tokenizer")
    return found


def ban_and_control(
    thinking: Iterable[int],
    vocab_size: int,
    *,
    seed: int = 0,
    keep: Iterable[int] = (),
) -> tuple[Transform, Transform]:
    """Returns two transforms for the intervention test: one forbids the thinking tokens, the other
    as many other ids drawn at random.

    Only the first should cost accuracy, if thinking tokens matter.

    Args:
        thinking: ids.
        vocab_size: number of ids.
        seed: of the drawing.
        keep: ids that the control must not forbid either, for example those that end a text.

    Raises:
        ConfigError: there are not as many other ids.

    Reference: arXiv 2506.02867.
    """
    ids = sorted({int(i) for i in thinking})
    others = np.setdiff1d(np.arange(vocab_size), [*ids, *keep])
    if len(others) < len(ids):
        raise ConfigError(f"{len(ids)} ids are forbidden, but only {len(others)} others are left")
    drawn = np.random.default_rng(seed).choice(others, len(ids), replace=False)
    return suppress(ids), suppress(drawn.tolist())
