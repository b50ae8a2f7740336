"""Where the tags of a vocabulary come from: a treebank, a tagger, or the tokens' own contexts.

Each source is registered as a choice of `tags`; `tag_counts_file` makes its table once and keeps
it in the cache.
"""

import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from tokjax.config import register
from tokjax.config.values import to_dict
from tokjax.data.cache import cached_bytes
from tokjax.data.files import expand_files, file_digest
from tokjax.data.prepare_report import tracked
from tokjax.data.syntax.conllu import documents
from tokjax.data.syntax.distributional import context_counts, distributional_classes
from tokjax.data.syntax.lexicon import Lexicon
from tokjax.data.syntax.tag_counts import TagCounts, from_bytes, to_bytes
from tokjax.data.syntax.tags import OTHER, UNIVERSAL, Word, count_tags, tag_index, tagged
from tokjax.data.tokenizer_base import Tokenizer
from tokjax.errors import ConfigError, DataError, nearest

_RULES = 1  # raise it when the same data would give other counts
_UNKNOWN = 0.5  # share of words with unknown tags from which a tagger is taken for another's


class TagSource(Protocol):
    """Something that tells the tags of tokens."""

    def identity(self, cache: Path) -> dict[str, Any]:
        """Returns what the counts depend on besides the tokenizer and the training data."""
        ...

    def count(self, tokenizer: Tokenizer, stores: Sequence[Any], progress: bool) -> TagCounts:
        """Returns the table of counts."""
        ...


@register("tags", "treebank")
@dataclass(frozen=True)
class Treebank:
    """Gold tags of a treebank in CoNLL-U; UPOS is mapped to the twelve universal tags."""

    files: tuple[str, ...] = ()  # paths or patterns of .conllu files, perhaps compressed (.gz)
    # what is counted: the training data, each word with its form's tags in the treebank (endings
    # tell those of unknown words); or the treebank's own words, whatever the training data are
    of: Literal["corpus", "treebank"] = "corpus"

    def __post_init__(self):
        if not self.files:
            raise ConfigError("tags 'treebank' needs files: name .conllu files")
        if self.of not in ("corpus", "treebank"):
            raise ConfigError(f"unknown tags.of={self.of!r}.{nearest(self.of, _COUNTED)}")

    def identity(self, cache: Path) -> dict[str, Any]:
        """Returns the contents of the files."""
        files = expand_files(self.files)
        return {"of": self.of, "files": [file_digest(file, cache) for file in files]}

    def count(self, tokenizer: Tokenizer, stores: Sequence[Any], progress: bool) -> TagCounts:
        """Returns the counts of the training data, or of the treebank."""
        if self.of == "corpus":
            lexicon = Lexicon(documents(self.files))
            return _counted(tokenizer, _tagged_texts(tokenizer, stores, lexicon, progress))
        found = tracked(documents(self.files), "counting tags of the treebank", enabled=progress)
        encoded = ((*tokenizer.encode_with_offsets(text), text, words) for text, words in found)
        return _counted(tokenizer, encoded)


_COUNTED = ("corpus", "treebank")


@register("tags", "tagger")
@dataclass(frozen=True)
class Tagger:
    """A Python function of a text that returns (start, end, tag) of its words, in order.

    Tags are universal or UPOS; others count as X.
    """

    path: str = ""  # "module:function"
    version: str = ""  # change it when the function changed: it is not looked at

    def __post_init__(self):
        self._function  # noqa: B018 (what is wrong with it is said now)

    @cached_property
    def _function(self) -> Callable[[str], Iterable[tuple[int, int, str]]]:
        module, _, name = self.path.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"tags.path={self.path!r} names no function ({error}): write 'module:function'"
            ) from None

    def identity(self, cache: Path) -> dict[str, Any]:
        """Returns the names."""
        return {"path": self.path, "version": self.version}

    def count(self, tokenizer: Tokenizer, stores: Sequence[Any], progress: bool) -> TagCounts:
        """Returns the counts of the training data.

        Raises:
            DataError: words that do not lie in their text, or a tag set that is not understood.
        """
        unknown: dict[str, int] = {}
        words = 0

        def tag(text: str) -> list[Word]:
            nonlocal words
            found = []
            for start, end, name in self._function(text):
                if not 0 <= start < end <= len(text):
                    raise DataError(
                        f"the tagger {self.path!r} puts a word at {start}:{end} of a text of "
                        f"{len(text)} characters: {text[:40]!r}"
                    )
                number = tag_index(name)
                words += 1
                if number is None:
                    unknown[name] = unknown.get(name, 0) + 1
                found.append(tagged(start, end, OTHER if number is None else number))
            return sorted(found, key=lambda word: (word.start, word.end))

        counted = _counted(tokenizer, _tagged_texts(tokenizer, stores, tag, progress))
        if sum(unknown.values()) > _UNKNOWN * words:
            names = sorted(unknown, key=lambda name: -unknown[name])[:5]
            raise DataError(
                f"the tagger {self.path!r} gives {sum(unknown.values()):,} of {words:,} words tags "
                f"that are neither universal nor UPOS, such as {', '.join(names)}: let it return "
                f"{', '.join(UNIVERSAL)}"
            )
        return counted


@register("tags", "distributional")
@dataclass(frozen=True)
class Distributional:
    """Classes of tokens with alike neighbours in the training data, where nothing tells tags."""

    classes: int = 12  # how many
    contexts: int = 300  # most frequent tokens that are looked for as neighbours
    dimensions: int = 50  # leading directions of the contexts that are clustered
    min_count: int = 5  # occurrences below which a token has no class
    seed: int = 0  # of the clustering

    def __post_init__(self):
        for name in ("classes", "contexts", "dimensions", "min_count"):
            if getattr(self, name) < 1:
                raise ConfigError(f"tags.{name}={getattr(self, name)} must be at least 1")

    def identity(self, cache: Path) -> dict[str, Any]:
        """Returns the options."""
        return to_dict(self)

    def count(self, tokenizer: Tokenizer, stores: Sequence[Any], progress: bool) -> TagCounts:
        """Returns the occurrences of each token, in the column of its class.

        Raises:
            DataError: no token is frequent enough to have a class.
        """
        special = special_ids(tokenizer)
        counts = np.zeros(tokenizer.vocab_size, np.int64)
        for ids in _sequences(stores):
            counts += np.bincount(ids, minlength=tokenizer.vocab_size)
        frequent = np.argsort(-counts, kind="stable")[: self.contexts]
        frequent = frequent[counts[frequent] > 0]
        sequences = _sequences(stores)
        shown = tracked(sequences, "counting contexts", total=_examples(stores), enabled=progress)
        contexts = context_counts(shown, tokenizer.vocab_size, frequent)
        own = distributional_classes(
            contexts,
            np.where(special, 0, counts),
            classes=self.classes,
            dimensions=self.dimensions,
            min_count=self.min_count,
            seed=self.seed,
        )
        if own.max() < 0:
            raise DataError(
                f"no token occurs tags.min_count={self.min_count} times in the training data: "
                f"lower it, or give more data"
            )
        table = np.zeros((tokenizer.vocab_size, int(own.max()) + 1))
        known = np.flatnonzero(own >= 0)
        table[known, own[known]] = counts[known]
        return TagCounts(table, tuple(f"class {i}" for i in range(table.shape[1])), special)


def tag_counts_file(
    source: TagSource,
    tokenizer: Tokenizer,
    stores: Sequence[Any],
    cache: Path,
    progress: bool = True,
) -> Path:
    """Returns the file of a source's counts of some training data; made once.

    Args:
        source: of the tags.
        tokenizer: whose tokens are counted.
        stores: token stores.
        cache: folder that keeps it.
        progress: whether people are shown how far it is.

    Raises:
        ConfigError: a file is missing.
        DataError: tags cannot be read, or not be counted.
        StorageError: the cache cannot be written.
    """
    facts = {
        "rules": _RULES,
        "kind": type(source).__name__,
        "source": source.identity(cache),
        "tokenizer": tokenizer.fingerprint,
        "stores": [store.fingerprint for store in stores],
    }
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    path = cache / "tag_counts" / f"{name}.npz"

    def make() -> bytes:
        table = source.count(tokenizer, stores, progress)
        if not table.counts.any():
            raise DataError("no token of the training data has a tag: is it text?")
        return to_bytes(replace(table, meta=facts))

    def valid(data: bytes) -> bool:
        try:
            from_bytes(data, str(path))
        except DataError:
            return False
        return True

    cached_bytes(path, make, valid)
    return path


def special_ids(tokenizer: Tokenizer) -> np.ndarray:
    """Returns which ids stand for no text."""
    return np.array([not tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)], bool)


def _sequences(stores: Sequence[Any]) -> Iterator[np.ndarray]:
    for store in stores:
        for i in range(store.num_examples):
            yield store.tokens(i)


def _examples(stores: Sequence[Any]) -> int:
    return sum(store.num_examples for store in stores)


def _tagged_texts(
    tokenizer: Tokenizer,
    stores: Sequence[Any],
    tag: Callable[[str], list[Word]],
    progress: bool,
) -> Iterator[tuple[Any, Any, str, list[Word]]]:
    """Yields ids, their characters, text and words of every example."""
    sequences = _sequences(stores)
    shown = tracked(sequences, "counting tags", total=_examples(stores), enabled=progress)
    for ids in shown:
        text = tokenizer.decode(ids.tolist())
        yield (*tokenizer.encode_with_offsets(text), text, tag(text))


def _counted(tokenizer: Tokenizer, texts: Iterable[tuple[Any, Any, str, list[Word]]]) -> TagCounts:
    counts = np.zeros((tokenizer.vocab_size, len(UNIVERSAL)))
    for ids, offsets, text, words in texts:
        count_tags(counts, ids, offsets, text, words)
    return TagCounts(counts, UNIVERSAL, special_ids(tokenizer))
