"""Reasoning traces as training data: how many tokens of thinking are left at each place."""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Int

from tokjax.data.tokenizers import Tokenizer
from tokjax.errors import DataError

Row = Sequence[int]


def remaining_lengths(row: Row, think_start: int, think_end: int) -> Int[np.ndarray, "T"]:
    """Returns how many tokens of thinking are left at each token, itself included; 0 outside.

    From `<think>` to `</think>`, both included: 1 at `</think>`. Thinking that is not closed has
    no known length and counts as outside. Each of several segments counts for itself.

    >>> remaining_lengths([7, 1, 5, 5, 2, 8], think_start=1, think_end=2).tolist()
    [0, 4, 3, 2, 1, 0]

    Args:
        row: ids of prompt, thinking and answer.
        think_start: id of `<think>`.
        think_end: id of `</think>`.

    Reference: Li et al., "Steering LLM Thinking with Budget Guidance", arXiv 2506.13752.
    """
    found = np.zeros(len(row), np.int32)
    start = None
    for j, token in enumerate(row):
        if start is None and token == think_start:
            start = j
        elif start is not None and token == think_end:
            found[start : j + 1] = np.arange(j - start + 1, 0, -1)
            start = None
    return found


def concise(row: Row, think_start: int, think_end: int, *, end: Iterable[int] = ()) -> list[int]:
    """Returns a copy whose (last) thinking is replaced by the text of its answer.

    Trained on beside the full trace, it covers short lengths.

    >>> concise([7, 1, 5, 5, 5, 2, 8, 9, 0], think_start=1, think_end=2, end=[0])
    [7, 1, 8, 9, 2, 8, 9, 0]

    Args:
        row: ids of prompt, thinking and answer.
        think_start: id of `<think>`.
        think_end: id of `</think>`.
        end: ids that end a text and do not belong to the answer.

    Raises:
        DataError: the row has no closed thinking, or no answer behind it.

    Reference: Li et al., arXiv 2506.13752 (its data augmentation).
    """
    row, ends = [int(i) for i in row], set(end)
    last = [j for j, left in enumerate(remaining_lengths(row, think_start, think_end)) if left == 1]
    if not last:
        raise DataError(f"no thinking between the ids {think_start} and {think_end} in this row")
    close = last[-1]
    start = max(j for j in range(close) if row[j] == think_start)
    answer = [i for i in row[close + 1 :] if i not in ends]
    if not answer:
        raise DataError("nothing follows the thinking: there is no answer to think instead")
    return row[: start + 1] + answer + row[close:]


def newline_tokens(tokenizer: Tokenizer, vocab_size: int) -> Bool[np.ndarray, "V"]:
    """Returns which tokens contain a line break: behind them a paragraph or line begins.

    Args:
        tokenizer: the model's.
        vocab_size: the model's number of ids; those the tokenizer has not contain none.
    """
    found = np.zeros(vocab_size, bool)
    for i in range(min(tokenizer.vocab_size, vocab_size)):
        found[i] = b"\n" in tokenizer.token_bytes(i)
    return found
