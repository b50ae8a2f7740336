"""Which words of a translation are wrong, and how badly: alignment, ranks, and tags of words."""

from collections.abc import Hashable, Sequence
from enum import IntEnum

import numpy as np
from jaxtyping import Bool, Int, Shaped

from tokjax.errors import ConfigError, DataError
from tokjax.signals.edit_script import edit_script

Words = Sequence[Hashable]


class Severity(IntEnum):
    """How bad an error is."""

    OK = 0
    MINOR = 1
    MAJOR = 2
    CRITICAL = 3


def edited_words(hypothesis: Words, reference: Words) -> tuple[Bool[np.ndarray, "W"], bool]:
    """Returns which words the fewest edits would change, and whether the reference has others.

    Those are candidates of errors; words that match are not. (TER without its shifts: a moved
    phrase is edited at both places.)

    >>> changed, missing = edited_words("a b x d".split(), "a b c d e".split())
    >>> changed.tolist(), missing
    ([False, False, True, False], True)
    """
    number = {word: i for i, word in enumerate(dict.fromkeys([*hypothesis, *reference]))}
    edits = edit_script([number[w] for w in hypothesis], [number[w] for w in reference])
    changed = np.zeros(len(hypothesis), bool)
    changed[[edit.source for edit in edits if edit.kind != "insert"]] = True
    return changed, any(edit.kind == "insert" for edit in edits)


def severities(
    ranks: Int[np.ndarray, "T"],
    candidates: Bool[np.ndarray, "T"],
    bounds: tuple[int, int, int] = (4, 8, 30),
) -> Int[np.ndarray, "T"]:
    """Returns a severity for each token by its rank; tokens that are no candidates are OK.

    Args:
        ranks: of the tokens in an annotating model's predictions, 0 for the likeliest.
        candidates: tokens that the alignment calls wrong.
        bounds: the first ranks of minor, major and critical errors.

    Raises:
        ConfigError: the bounds do not rise.

    Reference: arXiv 2502.19941; the bounds are those of the authors' code.
    """
    if not 0 <= bounds[0] <= bounds[1] <= bounds[2]:
        raise ConfigError(f"bounds={bounds} must be three ranks that rise")
    return np.where(candidates, np.digitize(ranks, bounds), 0)


def word_severities(
    of_tokens: Int[np.ndarray, "T"], words: Shaped[np.ndarray, "T"] | Sequence[int], count: int
) -> Int[np.ndarray, "W"]:
    """Returns the greatest severity of each word's tokens.

    Args:
        of_tokens: severities.
        words: number of the word that each token belongs to.
        count: number of words.

    Raises:
        DataError: a token belongs to no word, or a word has no token.
    """
    at, found = np.asarray(words, np.int64), np.zeros(count, np.int64)
    if len(at) != len(of_tokens) or not np.array_equal(np.unique(at), np.arange(count)):
        raise DataError(f"{len(of_tokens)} tokens must each have one of {count} words, and all")
    np.maximum.at(found, at, of_tokens)
    return found
