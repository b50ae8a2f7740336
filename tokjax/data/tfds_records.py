"""Records of TensorFlow Datasets. Importing this imports TensorFlow."""

import importlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from tokjax.data.sources import TfdsSource
from tokjax.errors import ConfigError, DataError, nearest


def build(source: TfdsSource) -> tfds.core.DatasetBuilder:
    """Returns the builder of a data set whose files are there, made now if they were not.

    Raises:
      ConfigError: there is no such data set or split, or it is not there and may not be fetched.
      DataError: it cannot be fetched or built.
    """
    if source.module:
        try:
            importlib.import_module(source.module)
        except Exception as error:
            raise ConfigError(
                f"cannot import {source.module}, which should define {source.dataset!r}: "
                f"{type(error).__name__}: {error}"
            ) from error
    data_dir = os.path.expanduser(source.data_dir) if source.data_dir else None
    try:
        builder = tfds.builder(source.dataset, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        close = nearest(source.dataset.split("/")[0].split(":")[0], tfds.list_builders())
        raise ConfigError(
            f"TensorFlow Datasets has no {source.dataset!r}.{close if 'mean' in close else ''} A "
            "data set of your own needs data_dir, or module, the module that defines it."
        ) from error
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"dataset {source.dataset!r}: {error}") from error
    if not builder.is_prepared():
        if not source.download:
            raise ConfigError(
                f"{source.dataset!r} is not in {builder.data_path}; set download=True to make it"
            )
        try:
            builder.download_and_prepare()
        except Exception as error:  # a builder is a program and can fail in any way
            raise DataError(f"cannot build {source.dataset!r}: {error}") from error
    try:
        builder.info.splits[source.split]
    except (KeyError, ValueError, AssertionError) as error:
        close = nearest(source.split, builder.info.splits)
        raise ConfigError(f"{source.dataset!r} has no split {source.split!r}.{close}") from error
    return builder


def tfds_records(source: TfdsSource) -> Iterator[tuple[str, Any]]:
    """Yields (name, record) of every example in the order of its files.

    Raises:
      ConfigError, DataError: see `build`; or a field is no feature of the data set.
    """
    builder = build(source)
    known: Any = builder.info.features or {}
    features = list(known)
    for field in source.fields:
        if field not in features:
            raise ConfigError(
                f"{source.dataset!r} has no feature {field!r}.{nearest(field, features)}"
            )
    config = tfds.ReadConfig(interleave_cycle_length=1)  # one file after another: a fixed order
    open_dataset: Any = builder.as_dataset
    dataset = open_dataset(split=source.split, shuffle_files=False, read_config=config)
    for row, record in enumerate(tfds.as_numpy(dataset)):
        plain = _plain(record)
        if source.kind == "messages" and isinstance(plain.get(source.messages), dict):
            plain[source.messages] = _rows(plain[source.messages])
        yield f"{source.dataset}/{source.split}#{row}", plain


def _plain(value: Any) -> Any:
    """Returns a NumPy tree as plain values; bytes that are no UTF-8 stay bytes."""
    if isinstance(value, dict):
        return {name: _plain(child) for name, child in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, np.ndarray):
        return [_plain(child) for child in value] if value.dtype == object else value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    return value


def _rows(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Returns a table as rows: a sequence of objects comes as one object of sequences."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
