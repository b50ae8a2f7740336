"""Sources as seqio tasks, and tasks as mixtures. Importing this imports TensorFlow.

A task's examples have `tokens` (int32 ids, begin and end tokens included), `weights` (float32, the
weight of each token as a target), `key`, `name`, `num_bytes`, `cuts` and one feature for each of
an example's values (see `Example`).
"""

import contextlib
import dataclasses
import itertools
import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from tokjax.data.encoding import Encoder, Example
from tokjax.data.rankings import Ranking
from tokjax.data.reading import record_error
from tokjax.data.sources import (
    Document,
    Problem,
    SeqioSource,
    TextSource,
    read_documents,
    split_label,
)
from tokjax.data.store_format import VALUES
from tokjax.data.thinking import Insertion
from tokjax.data.vocabularies import SeqioVocabulary
from tokjax.errors import ConfigError, DataError, TokjaxError, nearest

_TOGETHER = 64  # documents tokenised in one call
_FILES_TOGETHER = 4  # the same where a document is a whole file
_ragged = tf.RaggedTensor.from_row_splits  # pyright: ignore[reportAttributeAccessIssue]
_FEATURES = {
    "tokens": tf.TensorSpec([None], tf.int32),  # type: ignore[abstract]
    "weights": tf.TensorSpec([None], tf.float32),  # type: ignore[abstract]
    "key": tf.TensorSpec([], tf.string),  # type: ignore[abstract]
    "name": tf.TensorSpec([], tf.string),  # type: ignore[abstract]
    "num_bytes": tf.TensorSpec([], tf.int64),  # type: ignore[abstract]
    "cuts": tf.TensorSpec([None], tf.int64),  # type: ignore[abstract]
    **{
        name: tf.TensorSpec([None], tf.float32)  # type: ignore[abstract]
        for name in VALUES
    },
}


@dataclass
class Inspector:
    """What happens to bad records, and what went wrong: TensorFlow turns every error into its own.

    Attributes:
      skip: leave bad records out instead of raising.
      on_skip: called with each record that is left out.
      error: the error that ended the reading, if one did.
    """

    skip: bool = False
    on_skip: Callable[[Problem], None] | None = None
    error: BaseException | None = field(default=None, init=False)

    def meet(self, problem: Problem) -> None:
        """Notes a bad record.

        Raises:
          DataError: bad records are not to be skipped.
        """
        if not self.skip:
            raise record_error(problem)
        if self.on_skip is not None:
            self.on_skip(problem)

    def watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `function` such that the error it raises is kept in `error`."""

        def call(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except BaseException as error:
                self.error = self.error or error
                raise

        return call


def register_task(
    name: str, source: Any, encoder: Encoder, inspector: Inspector | None = None
) -> seqio.Task:
    """Returns the seqio task of a source, registered under `name`.

    Args:
      name: letters, digits, "_", ".", ":" and "#"; it must be new.
      source: any source but `seqio`.
      encoder: how documents become tokens.
      inspector: what to do with bad records; None: raise.

    Raises:
      ConfigError: the name is taken or not allowed, or the source is a task already.
    """
    if isinstance(source, SeqioSource):
        raise ConfigError(f"{source.task!r} is a seqio task already; use it by that name")
    if not re.fullmatch(r"[\w.:#]+", name):
        raise ConfigError(f"the task name {name!r} may hold letters, digits, '_', '.', ':' and '#'")
    if name in seqio.TaskRegistry.names():
        raise ConfigError(f"there is a seqio task {name!r} already; choose another name")
    inspector = inspector or Inspector()
    split = split_label(source)
    vocabulary = SeqioVocabulary(encoder.tokenizer)
    features = {
        "tokens": seqio.Feature(vocabulary, add_eos=False, dtype=tf.int32),
        "weights": seqio.Feature(
            seqio.PassThroughVocabulary(1), add_eos=False, dtype=tf.float32, required=False
        ),
    }
    origin: Any = seqio.FunctionDataSource(_dataset_fn(source, inspector), splits=[split])
    return seqio.TaskRegistry.add(
        name,
        source=origin,
        preprocessors=[_tokenize(source, encoder, inspector)],
        output_features=features,
    )


def register_mixture(name: str, rates: Mapping[str, float]) -> seqio.Mixture:
    """Returns the seqio mixture of registered tasks at the given rates, registered under `name`.

    Raises:
      ConfigError: the name is taken, a task is not registered, or a rate is not above 0.
    """
    if name in seqio.MixtureRegistry.names():
        raise ConfigError(f"there is a seqio mixture {name!r} already; choose another name")
    for task, rate in rates.items():
        if task not in seqio.TaskRegistry.names():
            raise ConfigError(f"no seqio task {task!r}.{nearest(task, seqio.TaskRegistry.names())}")
        if not rate > 0:
            raise ConfigError(f"the rate of {task!r} is {rate}; it must be above 0")
    return seqio.MixtureRegistry.add(name, list(rates.items()))


def _dataset_fn(source: Any, inspector: Inspector) -> Callable[..., tf.data.Dataset]:
    specification = {
        "text": tf.TensorSpec([None], tf.string),  # type: ignore[abstract]
        "facts": tf.TensorSpec([None], tf.string),  # type: ignore[abstract]
    }

    def documents() -> Iterator[Document]:
        for item in read_documents(source):
            if isinstance(item, Problem):
                inspector.meet(item)
            else:
                yield item

    def records() -> Iterator[dict[str, np.ndarray]]:
        # Several at a time: handing over one costs TensorFlow more than reading it costs us.
        reader = documents()
        try:
            while group := list(itertools.islice(reader, _together(source))):
                features = [_to_features(document) for document in group]
                yield {n: np.array([f[n] for f in features], object) for n in specification}
        except Exception as error:
            inspector.error = inspector.error or error
            raise

    def dataset(split: str, shuffle_files: bool = False, seed: int | None = None) -> Any:
        del split, shuffle_files, seed  # the source has one split, in its own order
        return tf.data.Dataset.from_generator(records, output_signature=specification).unbatch()

    return dataset


def _together(source: Any) -> int:
    whole_files = isinstance(source, TextSource) and source.per == "file"
    return _FILES_TOGETHER if whole_files else _TOGETHER


def _to_features(document: Document) -> dict[str, bytes]:
    return {
        "text": document.text.encode("utf-8", "surrogatepass"),
        "facts": json.dumps(_facts(document), default=str).encode(),
    }


def _facts(document: Document) -> dict[str, Any]:
    rejected = document.rejected
    return {
        "name": document.name,
        "key": document.key,
        "weights": document.weights,
        "messages": document.messages,
        "end_weight": document.end_weight,
        "by_token": document.by_token,
        "rejected": rejected and {**_facts(rejected), "text": rejected.text},
        "ranking": document.ranking and dataclasses.asdict(document.ranking),
        "translation": document.translation,
        "insertion": document.insertion and dataclasses.asdict(document.insertion),
    }


def _from_features(text: bytes, facts: bytes) -> Document:
    return _document(text.decode("utf-8", "surrogatepass"), json.loads(facts))


def _document(text: str, loaded: dict[str, Any]) -> Document:
    if loaded["rejected"] is not None:
        rejected = dict(loaded["rejected"])
        loaded["rejected"] = _document(rejected.pop("text"), rejected)
    kinds: dict[str, Callable[..., Any]] = {"ranking": Ranking, "insertion": Insertion}
    for name, kind in kinds.items():
        if loaded[name] is not None:
            facts = loaded[name].items()
            loaded[name] = kind(**{n: tuple(x) if isinstance(x, list) else x for n, x in facts})
    for name in ("weights", "messages"):
        if loaded[name] is not None:
            items = loaded[name]
            loaded[name] = tuple(tuple(i) if name == "weights" else i for i in items)
    return Document(text=text, **loaded)


def _tokenize(source: Any, encoder: Encoder, inspector: Inspector) -> Callable[..., Any]:
    """Returns the preprocessor that turns documents into examples."""

    def encode(texts: np.ndarray, facts: np.ndarray) -> tuple[np.ndarray, ...]:
        documents = [_from_features(t, f) for t, f in zip(texts, facts, strict=True)]
        examples: list[Example] = []
        for result in encoder.encode(documents):
            if isinstance(result, Problem):
                inspector.meet(result)
            else:
                examples.append(result)
        columns = {
            "tokens": [e.tokens for e in examples],
            "weights": [
                np.ones(e.tokens.size) if e.weights is None else e.weights for e in examples
            ],
            "cuts": [np.array(e.cuts, np.int64) for e in examples],
            **{v: [e.values.get(v, np.zeros(0)) for e in examples] for v in VALUES},
        }
        ragged = []
        for name, parts in columns.items():
            dtype = _FEATURES[name].dtype.as_numpy_dtype
            ragged.append(np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype))
            ragged.append(np.cumsum([0, *(part.size for part in parts)], dtype=np.int64))
        return (
            *ragged,
            np.array([e.key.encode() for e in examples], object),
            np.array([e.name.encode("utf-8", "replace") for e in examples], object),
            np.array([e.num_bytes for e in examples], np.int64),
        )

    watched = inspector.watched(encode)
    names = ("tokens", "weights", "cuts", *VALUES)
    types = [t for name in names for t in (_FEATURES[name].dtype, tf.int64)]
    types += [tf.string, tf.string, tf.int64]

    def batch(element: Mapping[str, Any]) -> dict[str, Any]:
        arrays = tf.numpy_function(watched, [element["text"], element["facts"]], types)
        arrays = [tf.ensure_shape(array, [None]) for array in arrays]
        rows = {
            name: _ragged(arrays[2 * i], arrays[2 * i + 1], validate=False)
            for i, name in enumerate(names)
        }
        return rows | dict(zip(("key", "name", "num_bytes"), arrays[-3:], strict=True))

    def preprocess(dataset: tf.data.Dataset) -> tf.data.Dataset:
        dataset = dataset.batch(_together(source))
        # Plain tensors instead of the ragged ones: mixtures compare the types of their tasks.
        return dataset.map(batch).unbatch().map(_plain)

    return preprocess


def _plain(element: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tf.ensure_shape(element[name], spec.shape) for name, spec in _FEATURES.items()}


@contextlib.contextmanager
def temporary_task(source: Any, encoder: Encoder, inspector: Inspector) -> Iterator[seqio.Task]:
    """Gives the task of a source, registered under a name of its own while the block runs."""
    name = f"tokjax_prepare_{uuid.uuid4().hex}"
    try:
        yield register_task(name, source, encoder, inspector)
    finally:
        seqio.TaskRegistry.remove(name)


def task_examples(task: seqio.Task, source: Any, inspector: Inspector) -> Iterator[Example]:
    """Yields the examples of a task made by `register_task`, in order.

    Raises:
      TokjaxError: what reading or encoding raised, in its own class.
    """
    dataset = task.get_dataset(split=split_label(source), shuffle=False)
    for element in iterate(dataset, inspector):
        weights = element["weights"]
        yield Example(
            element["name"].decode(),
            element["key"].decode(),
            element["tokens"],
            None if (weights == 1).all() else weights,
            int(element["num_bytes"]),
            tuple(element["cuts"].tolist()),
            {name: element[name] for name in VALUES if element[name].size},
        )


def iterate(dataset: Any, inspector: Inspector) -> Iterator[dict[str, Any]]:
    """Yields the elements of a dataset as NumPy values.

    Raises:
      TokjaxError: what was raised inside the dataset, in its own class.
    """
    try:
        yield from dataset.as_numpy_iterator()
    except tf.errors.OpError as error:
        if isinstance(inspector.error, TokjaxError | OSError):
            raise inspector.error from None
        raise DataError(f"the data set failed: {error.message}") from error
