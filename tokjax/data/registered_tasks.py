"""Tasks and mixtures that somebody registered with seqio. Importing this imports TensorFlow."""

import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from tokjax.data.encoding import Encoder, Example
from tokjax.data.sources import Problem, SeqioSource, make_key, namespace
from tokjax.data.tasks import Inspector, iterate
from tokjax.data.vocabularies import SeqioVocabulary
from tokjax.errors import ConfigError, DataError, nearest


def registered_examples(
    source: SeqioSource, encoder: Encoder, inspector: Inspector
) -> Iterator[Example]:
    """Yields the examples of a task or mixture that is registered with seqio.

    Its `tokens`, or its inputs followed by its targets, make the sequence.

    Raises:
      ConfigError: there is no such task, split or feature, or its ids are another tokenizer's.
      DataError: an id or weight makes no sense, or the task failed.
    """
    provider = find_provider(source)
    names = _feature_names(provider, source)
    features = {name: provider.output_features[name] for name in names if name != source.weights}
    readers = {n: _reader(source, n, f, encoder) for n, f in features.items()}
    space = namespace(source)
    for index, element in enumerate(iterate(_provider_dataset(provider, source), inspector)):
        name = element.get("name")
        label = (
            name.decode("utf-8", "replace") if isinstance(name, bytes) else f"{source.task}#{index}"
        )
        result = _registered_example(element, names, readers, source, encoder, space, label)
        if isinstance(result, Problem):
            inspector.meet(result)
        else:
            yield result


def find_provider(source: SeqioSource) -> Any:
    """Returns the registered task or mixture of a source.

    Raises:
      ConfigError: its module cannot be imported, or there is no such task or split.
    """
    if source.module:
        try:
            importlib.import_module(source.module)
        except Exception as error:
            raise ConfigError(
                f"cannot import {source.module}, which should register {source.task!r}: "
                f"{type(error).__name__}: {error}"
            ) from error
    names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if source.task not in names:
        hint = "" if source.module else " Name the module that registers it (module='...')."
        raise ConfigError(
            f"no seqio task or mixture {source.task!r}.{nearest(source.task, names)}{hint}"
        )
    provider = seqio.get_mixture_or_task(source.task)
    splits = [str(split) for split in provider.splits]
    if source.split not in splits:
        close = nearest(source.split, splits)
        raise ConfigError(f"{source.task!r} has no split {source.split!r}.{close}")
    if isinstance(provider, seqio.Mixture) and source.examples is None:
        raise ConfigError(
            f"{source.task!r} is a mixture, which repeats its tasks without end: set examples to "
            "the number to draw, or list its tasks as sources with rates"
        )
    return provider


def _provider_dataset(provider: Any, source: SeqioSource) -> Any:
    if isinstance(provider, seqio.Mixture):
        dataset = provider.get_dataset(
            split=source.split,
            shuffle=False,
            seed=source.seed,
            num_epochs=None,
            passthrough_features=_shared_features(provider, source.split),
        )
    else:
        epochs = 1 if source.examples is None else None
        dataset = provider.get_dataset(split=source.split, shuffle=False, num_epochs=epochs)
    return dataset if source.examples is None else dataset.take(source.examples)


def _shared_features(mixture: Any, split: str) -> list[str]:
    """Returns which of our own features every task of a mixture has."""
    specs = [
        task.get_dataset(split=split, shuffle=False).element_spec
        for task in mixture.tasks
        if split in task.splits
    ]
    return [name for name in ("key", "name", "num_bytes") if all(name in spec for spec in specs)]


def _feature_names(provider: Any, source: SeqioSource) -> list[str]:
    """Returns the features of the sequence in order, then that of the weights if it has one."""
    present = provider.output_features
    if "tokens" in present and source.targets not in present:
        names = ["tokens"]
    elif source.targets in present:
        names = [n for n in (source.inputs, source.targets) if n in present]
    else:
        raise ConfigError(
            f"{source.task!r} has no feature {source.targets!r}.{nearest(source.targets, present)} "
            "Set targets to the one to learn."
        )
    return [*names, source.weights] if source.weights in present else names


def _reader(source: SeqioSource, name: str, feature: Any, encoder: Encoder) -> Callable[[Any], Any]:
    """Returns the function from a feature's value to ids of the encoder's tokenizer."""
    tokenizer = encoder.tokenizer
    if feature.dtype == tf.string:
        return lambda value: tokenizer.encode(value.decode())
    if source.ids == "as_is":
        return lambda value: value
    vocabulary = feature.vocabulary
    if source.ids == "retokenize":
        return lambda value: tokenizer.encode(vocabulary.decode(value.tolist()))
    if vocabulary != SeqioVocabulary(tokenizer):
        raise ConfigError(
            f"feature {name!r} of {source.task!r} has the ids of {vocabulary}, not those of the "
            f"configured tokenizer ({tokenizer.title}). Set ids='retokenize' to decode and encode "
            "them again, or ids='as_is' if they are the same ids all the same."
        )
    return lambda value: value


def _registered_example(
    element: Mapping[str, Any],
    names: Sequence[str],
    readers: Mapping[str, Callable[[Any], Any]],
    source: SeqioSource,
    encoder: Encoder,
    space: str,
    label: str,
) -> Example | Problem:
    try:
        parts = [np.asarray(readers[n](element[n]), np.int64).reshape(-1) for n in readers]
    except (DataError, UnicodeError) as error:
        return Problem(label, "cannot be encoded", str(error))
    *inputs, targets = parts
    size = encoder.tokenizer.vocab_size
    for part in parts:
        if part.size and not (part.min() >= 0 and part.max() < size):
            return Problem(label, "ids outside the vocabulary", f"it has {size} ids")
    if not targets.size:
        return Problem(label, "empty", f"{names[len(inputs)]!r} has no token")
    weights = [np.zeros(part.size) for part in inputs] + [np.ones(targets.size)]
    if source.weights in names:
        given = np.asarray(element[source.weights], np.float64)
        if given.shape != targets.shape:
            detail = f"{given.size} for {targets.size} targets"
            return Problem(label, "as many weights as targets are needed", detail)
        if not np.isfinite(given).all():
            return Problem(label, "a weight is not finite", "")
        weights[-1] = given
    tokens = np.concatenate(parts)
    weight = np.concatenate(weights)
    before = encoder.before if tuple(tokens[: len(encoder.before)]) != encoder.before else ()
    after = encoder.after if tuple(tokens[-len(encoder.after) :]) != encoder.after else ()
    tokens = np.concatenate([before, tokens, after]).astype(np.int32)
    weight = np.concatenate([np.zeros(len(before)), weight, np.full(len(after), weight[-1])])
    if encoder.max_tokens is not None and tokens.size > encoder.max_tokens:
        return Problem(label, "too long", f"it has {tokens.size} tokens")
    plain = not inputs and bool((weight[len(before) :] == 1).all())
    texts = [encoder.tokenizer.decode(part.tolist()) for part in parts]
    given_key = element.get("key")
    key = given_key.decode("utf-8", "replace") if isinstance(given_key, bytes) else ""
    if not re.fullmatch("[0-9a-f]{16}", key):
        key = make_key(space, key or "\0".join(texts), explicit=bool(key))
    return Example(
        label,
        key,
        tokens,
        None if plain else weight.astype(np.float32),
        sum(len(text.encode()) for text in texts),
    )
