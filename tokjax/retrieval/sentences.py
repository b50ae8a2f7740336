"""Vectors of sentences by a trained encoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Int

from tokjax.data.tokenizers import Tokenizer, sequence_ends
from tokjax.decoding.prompts import bucket
from tokjax.errors import ConfigError, DataError
from tokjax.models.encoder import Encoder
from tokjax.models.parameters import Params
from tokjax.training.trained import load_trained, read_trained


@dataclass(frozen=True, eq=False)
class SentenceEncoder:
    """An encoder of sentences; see `load_sentence_encoder`.

    Attributes:
        model: the pure functions.
        params: its parameters.
        tokenizer: of the model.
        before: ids before a sentence.
        after: ids behind it.
        how: whether a vector is the first token's state, or the mean of all.
    """

    model: Encoder
    params: Params
    tokenizer: Tokenizer
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    how: Literal["first", "mean"] = "first"

    def embed(self, texts: Sequence[str], *, batch_size: int = 64) -> Float32[np.ndarray, "N D"]:
        """Returns a vector of length 1 for each text; products of vectors are cosines.

        A vector does not depend on the texts beside it.

        Args:
            texts: of any number and length.
            batch_size: texts at a time.

        Raises:
            DataError: a text has no token, or the tokenizer cannot hold it exactly.
            ConfigError: a text is longer than the model's positions.
        """
        sequences = [[*self.before, *i, *self.after] for i in self.tokenizer.encode_batch(texts)]
        most, longest = self.model.config.max_positions, max(map(len, sequences), default=0)
        if longest > most:
            raise ConfigError(
                f"a text has {longest} tokens, the model {most} positions: cut it first"
            )
        if not all(sequences):
            raise DataError(f"text {sequences.index([])} has no token")
        found = np.zeros((len(texts), self.model.config.table_width), np.float32)
        widths = np.array([min(bucket(len(s)), most) for s in sequences], np.int64)
        for width in sorted(set(widths.tolist())):
            own = np.flatnonzero(widths == width)
            for first in range(0, len(own), batch_size):
                places = own[first : first + batch_size]
                tokens = np.zeros((batch_size, width), np.int32)
                mask = np.zeros((batch_size, width), bool)
                mask[:, 0] = True  # rows that fill the batch up
                for row, place in enumerate(places):
                    size = len(sequences[place])
                    tokens[row, :size], mask[row, :size] = sequences[place], True
                vectors = _embed(self.model, self.how, self.params, tokens, mask)
                found[places] = np.asarray(vectors)[: len(places)]
        return found


@partial(jax.jit, static_argnums=(0, 1))
def _embed(
    model: Encoder, how: Any, params: Params, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B D"]:
    return model.embed_sentences(params, tokens, mask, how=how)


def load_sentence_encoder(
    workdir: Path, *, how: Literal["first", "mean"] = "first", mesh: Mesh | None = None
) -> SentenceEncoder:
    """Returns the encoder that a run has trained, such as one with the objective "mexma".

    Args:
        workdir: of the run.
        how: what a vector is; "first" is what "mexma" trains.
        mesh: devices to lay the parameters out on; default the first device.

    Raises:
        ConfigError: the run's model is causal.
        CheckpointError: as `tokjax.training.trained.load_trained`.
    """
    config = read_trained(workdir).config
    found = load_trained(workdir, mesh=mesh)
    if not isinstance(found.model, Encoder):
        raise ConfigError(f"{workdir} holds a causal model: sentences are encoded by an encoder")
    before, after = sequence_ends(config.data.tokenizer, found.tokenizer)
    return SentenceEncoder(
        found.model, found.params, found.tokenizer, tuple(before), tuple(after), how
    )
