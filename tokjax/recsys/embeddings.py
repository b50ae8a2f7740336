"""What items mean as vectors: read from a file, or a language model's of their texts."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax.decoding.prompts import bucket
from tokjax.errors import DataError
from tokjax.language_model import LanguageModel
from tokjax.models.encoder import pool
from tokjax.recsys.interactions import read_records


def read_embeddings(
    path: str | Path, *, item: str = "item", embedding: str = "embedding"
) -> dict[str, list[float]]:
    """Returns the embedding of each item in a file of JSON lines.

    Args:
        path: of lines such as {"item": "a", "embedding": [0.1, -0.2]}.
        item: field of the item's name.
        embedding: field of its numbers.

    Raises:
        DataError: the file cannot be read, or a line is not of that form.
    """
    found: dict[str, list[float]] = {}
    for place, record in read_records(path):
        values = record.get(embedding)
        if not isinstance(values, list) or not all(isinstance(v, int | float) for v in values):
            raise DataError(f"{place}: {embedding!r} must be a list of numbers")
        if record.get(item) is None:
            raise DataError(f"{place}: no {item!r} among the fields {', '.join(map(repr, record))}")
        found[str(record[item])] = values
    return found


def of_items(
    items: Sequence[str], vectors: Mapping[str, Sequence[float]], where: str
) -> Float[np.ndarray, "I E"]:
    """Returns the embeddings of a catalogue, in its order.

    Args:
        items: names.
        vectors: by name.
        where: they come from, for messages.

    Raises:
        DataError: an item has none, or they are not of one width.
    """
    missing = [name for name in items if name not in vectors]
    if missing:
        raise DataError(
            f"{where} has no embedding of {len(missing)} of {len(items)} items, {missing[0]!r} for "
            f"example: add them, or leave these items out of the interactions"
        )
    widths = {len(vectors[name]) for name in items}
    if len(widths) > 1:
        raise DataError(f"{where} has embeddings of different widths: {sorted(widths)}")
    return np.array([vectors[name] for name in items], np.float32)


def embed_texts(
    lm: LanguageModel, texts: Sequence[str], *, max_tokens: int = 128, batch_size: int = 16
) -> Float[np.ndarray, "N D"]:
    """Returns the mean of a language model's final hidden states over the tokens of each text.

    Args:
        lm: the model.
        texts: what to embed.
        max_tokens: of each; what is behind is not read.
        batch_size: texts at a time.

    Raises:
        DataError: a text has no token.
    """
    ids = [lm.encode(text)[:max_tokens] for text in texts]
    empty = [i for i, row in enumerate(ids) if not row]
    if empty:
        raise DataError(f"text {empty[0]} is empty: there is nothing to embed")
    found = np.zeros((len(ids), lm.model.config.d_model), np.float32)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        width = bucket(max(len(ids[i]) for i in rows))
        tokens, mask = np.zeros((batch_size, width), np.int32), np.zeros((batch_size, width), bool)
        for b, i in enumerate(rows):
            tokens[b, : len(ids[i])], mask[b, : len(ids[i])] = ids[i], True
        found[rows] = np.asarray(_pooled(lm.model, lm.params, tokens, mask))[: len(rows)]
    return found


@partial(jax.jit, static_argnums=0)
def _pooled(
    model: Any, params: Any, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B D"]:
    return pool(model.backbone(params, model.embed(params, tokens)).x, mask)
