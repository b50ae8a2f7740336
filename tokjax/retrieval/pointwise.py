"""Scores of passages by a trained reranker, one passage at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int

from tokjax.data.rankings import Limits, Passage, passage_text, query_text, sequence_ids
from tokjax.data.tokenizers import Tokenizer, sequence_ends
from tokjax.decoding.prompts import bucket
from tokjax.errors import ConfigError
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.retrieval.dear import read_scores
from tokjax.training.trained import load_trained, read_trained

Group = tuple[str, Sequence[Passage]]  # a query with its passages


@dataclass(frozen=True, eq=False)
class Reranker:
    """A model that scores passages; see `load_reranker`.

    Attributes:
        model: the pure functions.
        params: its parameters.
        heads: of the objective "dear".
        tokenizer: of the model.
        before: ids before a query and before a passage.
        after: ids behind a passage.
        limits: most tokens of a query and of a passage.
    """

    model: Transformer
    params: Params
    heads: Any
    tokenizer: Tokenizer
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    limits: Limits = Limits()

    def scores(
        self, groups: Sequence[Group], *, batch_size: int = 32
    ) -> list[Float32[np.ndarray, "n"]]:
        """Returns the scores of the passages of each query; higher is more relevant.

        A score does not depend on the passages beside it.

        Args:
            groups: queries with their passages, of any number.
            batch_size: passages at a time.

        Raises:
            DataError: the tokenizer cannot hold a text exactly.
            ConfigError: a sequence is longer than the model's positions.
        """
        sequences = [s for query, passages in groups for s in self.sequences(query, passages)]
        found = np.zeros(len(sequences), np.float32)
        widths = np.array([self._width(len(s)) for s in sequences], np.int64)
        for width in sorted(set(widths.tolist())):
            own = np.flatnonzero(widths == width)
            for first in range(0, len(own), batch_size):
                places = own[first : first + batch_size]
                tokens = np.zeros((batch_size, width), np.int32)
                lengths = np.ones(batch_size, np.int32)
                for row, place in enumerate(places):
                    lengths[row] = len(sequences[place])
                    tokens[row, : lengths[row]] = sequences[place]
                scores = _scores(self.model, self.params, self.heads, tokens, lengths)
                found[places] = np.asarray(scores)[: len(places)]
        ends = np.cumsum([len(passages) for _, passages in groups])
        return np.split(found, ends[:-1]) if len(groups) else []

    def sequences(self, query: str, passages: Sequence[Passage]) -> list[list[int]]:
        """Returns what the model reads of each passage, as ids."""
        texts = [query_text(query), *(passage_text(p) for p in passages)]
        asked, *told = self.tokenizer.encode_batch(texts)
        return [sequence_ids(asked, ids, self.before, self.after, self.limits) for ids in told]

    def _width(self, length: int) -> int:
        most = self.model.config.max_positions
        if length > most:
            raise ConfigError(
                f"a query with a passage has {length} tokens, the model {most} positions: it was "
                f"trained on shorter ones"
            )
        return min(bucket(length), most)


@partial(jax.jit, static_argnums=0)
def _scores(
    model: Transformer,
    params: Params,
    heads: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
) -> Float[Array, "B"]:
    places = jnp.arange(tokens.shape[1])
    segments = (places < lengths[:, None]).astype(jnp.int32)
    positions = jnp.broadcast_to(places, tokens.shape)
    x = model.backbone(
        params, model.embed(params, tokens), positions=positions, segments=segments
    ).x
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return read_scores(heads, last)


def load_reranker(workdir: Path, *, mesh: Mesh | None = None) -> Reranker:
    """Returns the reranker that a run with the objective "dear" has trained.

    Queries and passages are cut as those of the run's training data.

    Args:
        workdir: of the run.
        mesh: devices to lay the parameters out on; default the first device.

    Raises:
        ConfigError: the run trained something else.
        CheckpointError: as `tokjax.training.trained.load_trained`.
    """
    config = read_trained(workdir).config
    source = config.data.train[0].source
    if getattr(source, "kind", None) != "ranking":
        raise ConfigError(
            f"{workdir} was not trained on rankings: name the workdir of a run with the objective "
            f"'dear'"
        )
    found = load_trained(workdir, mesh=mesh)
    if "score" not in found.heads:
        raise ConfigError(f"{workdir} has no head of scores: train with the objective 'dear'")
    before, after = sequence_ends(config.data.tokenizer, found.tokenizer)
    limits = Limits(source.query_tokens, source.passage_tokens)
    return Reranker(
        found.model,
        found.params,
        found.heads,
        found.tokenizer,
        tuple(before),
        tuple(after),
        limits,
    )
