"""Catalogues from files: titles with weights, and what users think of them."""

import csv
import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from tokjax.data.tokenizers import Tokenizer
from tokjax.decoding.constrained.trie import TokenTrie
from tokjax.errors import DataError


@dataclass(frozen=True)
class Catalogue:
    """Titles and their weights, each title once.

    Attributes:
        titles: as they follow a prompt, a leading space included where there is one.
        weights: above 0, for example how often each was bought.
    """

    titles: tuple[str, ...]
    weights: Float[np.ndarray, "I"]

    def trie(self, tokenizer: Tokenizer, end: int, power: float = 1.0) -> TokenTrie:
        """Returns the tree of the titles' tokens.

        Args:
            tokenizer: the model's.
            end: id of the token that ends an item.
            power: of the weights; below 1 the target is flatter than they are.
        """
        ids = [tokenizer.encode(title) for title in self.titles]
        return TokenTrie.of(ids, self.weights**power, end)


def read_catalogue(path: str | Path, title: str = "title", weight: str = "weight") -> Catalogue:
    """Returns the catalogue in a file; lines with the same title are one item.

    Args:
        path: JSON lines, or CSV with a header, by its ending; `.gz` is decompressed.
        title: name of the field with the title.
        weight: name of the field with its weight; a line without it weighs 1, so that a file of
            interactions is a catalogue too.

    Raises:
        DataError: the file cannot be read, or a line has no title or no number for its weight.
    """
    path = Path(path)
    found: dict[str, float] = {}
    for number, record in enumerate(_records(path), 1):
        name, value = record.get(title), record.get(weight, 1)
        if not isinstance(name, str) or not name:
            raise DataError(f"{path}: record {number} has no {title!r}: {str(record)[:100]}")
        try:
            found[name] = found.get(name, 0.0) + float(value)
        except (TypeError, ValueError):
            raise DataError(
                f"{path}: record {number} has {weight}={value!r}, which is no number"
            ) from None
    return Catalogue(tuple(found), np.array(list(found.values()), np.float64))


def read_preferences(path: str | Path, items: int) -> dict[str, Float[np.ndarray, "I"]]:
    """Returns how likely each user takes each item, by the user's prompt.

    Args:
        path: JSON lines of {"prompt": text, "scores": [a number in (0, 1) for each item, in the
            catalogue's order]}, such as the softmax of a ranker's logits.
        items: of the catalogue.

    Raises:
        DataError: the file cannot be read, or a line is not of that form.
    """
    path, found = Path(path), {}
    for number, record in enumerate(_records(path), 1):
        scores = np.asarray(record.get("scores", ()), np.float64)
        if not isinstance(record.get("prompt"), str) or scores.shape != (items,):
            raise DataError(
                f"{path}: record {number} must have a prompt and {items} scores, one for each item "
                f"of the catalogue; it has {scores.size}"
            )
        found[record["prompt"]] = scores
    return found


def _records(path: Path) -> Iterator[dict[str, Any]]:
    opened = gzip.open if path.suffix == ".gz" else open
    name = path.name.removesuffix(".gz")
    try:
        with opened(path, "rt", encoding="utf-8", newline="") as file:
            if name.endswith(".csv"):
                yield from csv.DictReader(file)
            else:
                for line in file:
                    if line.strip():
                        yield json.loads(line)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as records: {error}") from error


def one_token(tokenizer: Tokenizer, text: str | None, what: str) -> int:
    """Returns the id that a text is, or the EOS id for None.

    Raises:
        DataError: there is no EOS id, or the text is not one token.
    """
    ids: Sequence[int] = tokenizer.encode(text) if text is not None else ()
    if text is None and tokenizer.eos_id is not None:
        return tokenizer.eos_id
    if len(ids) != 1:
        raise DataError(
            f"{what}={text!r} must be one token of this tokenizer, not {len(ids)}"
            + (": it has no EOS id, so name a token" if text is None else "")
        )
    return int(ids[0])
