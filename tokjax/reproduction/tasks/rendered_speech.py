"""Transcripts rendered as noisy frames: each symbol a vector held for some frames, silence between.

An invented speech whose transcripts are known exactly; nothing of it is read from files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from tokjax.data.feature_batch import FeatureExample
from tokjax.signals.edit_script import edit_script

BOS, END, FIRST = 0, 1, 2  # ids; symbols come from FIRST on


@dataclass(frozen=True)
class RenderedSpeech:
    """A speaker: which vectors its symbols are, and how it speaks."""

    symbols: int = 8  # distinct symbols
    features: int = 16  # numbers in a frame
    lengths: tuple[int, int] = (5, 10)  # symbols of a transcript, from and to
    held: tuple[int, int] = (4, 8)  # frames of a symbol, from and to
    silence: tuple[int, int] = (1, 3)  # frames before, between and behind symbols, from and to
    noise: float = 0.5  # standard deviation of what is added to each number
    seed: int = 0  # of the vectors, whose numbers have variance 1

    @property
    def vocabulary(self) -> int:
        """Number of ids."""
        return FIRST + self.symbols

    @property
    def most_frames(self) -> int:
        """Frames of the longest utterance."""
        most = self.lengths[1]
        return most * self.held[1] + (most + 1) * self.silence[1]

    @property
    def vectors(self) -> Float[np.ndarray, "S C"]:
        """The vector of each symbol; silence is zeros."""
        rng = np.random.default_rng(self.seed)
        return rng.normal(size=(self.symbols, self.features)).astype(np.float32)

    def utterances(self, rng: np.random.Generator, count: int) -> list[FeatureExample]:
        """Returns random transcripts behind their frames.

        Args:
            rng: draws everything but the vectors.
            count: of utterances.
        """
        vectors = np.concatenate([self.vectors, np.zeros((1, self.features), np.float32)])
        found = []
        for _ in range(count):
            size = rng.integers(self.lengths[0], self.lengths[1] + 1)
            text = rng.integers(0, self.symbols, size)
            # Silence, symbol, silence, ..., symbol, silence.
            what = np.full(2 * size + 1, self.symbols)
            what[1::2] = text
            times = rng.integers(self.silence[0], self.silence[1] + 1, 2 * size + 1)
            times[1::2] = rng.integers(self.held[0], self.held[1] + 1, size)
            frames = vectors[np.repeat(what, times)]
            frames = frames + self.noise * rng.normal(size=frames.shape).astype(np.float32)
            found.append(FeatureExample(frames, [*(FIRST + text).tolist(), END], before=[BOS]))
        return found


def symbol_errors(
    written: Sequence[Sequence[int]], examples: Sequence[FeatureExample]
) -> list[float]:
    """Returns the edit distance of each text to the transcript, over the transcript's length.

    Args:
        written: what was written of each example; it ends at the first end token.
        examples: whose transcripts are right.
    """
    found = []
    for ids, example in zip(written, examples, strict=True):
        said = list(ids)
        said = said[: said.index(END)] if END in said else said
        right = list(example.text[:-1])
        found.append(len(edit_script(right, said)) / len(right))
    return found
