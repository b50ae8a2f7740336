"""Token stores for a model: its own tokenizer, and the records that a user names."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from tokjax.config import Choice, resolve
from tokjax.data.config import DataConfig
from tokjax.data.prepare import ensure_store
from tokjax.data.store import TokenStore
from tokjax.data.tokenizers import Tokenizer, TokenizerConfig
from tokjax.errors import ConfigError
from tokjax.training.initial import find_initial


def tokenizer_of(path_or_name: str, tokenizer: Tokenizer) -> TokenizerConfig:
    """Returns the configuration of the tokenizer that `tokjax.load` finds with a model.

    It is the one that a training which starts from this model has: sequences begin as the model
    knows them, and end with EOS where the tokenizer has one.

    Args:
        path_or_name: what `tokjax.load` takes.
        tokenizer: of the loaded model.

    Raises:
        CheckpointError: there is no such model.
        ConfigError: it has no tokenizer.
    """
    config = find_initial(path_or_name).tokenizer()
    return dataclasses.replace(config, add_eos=False) if tokenizer.eos_id is None else config


def records(file: str, kind: str, options: Mapping[str, Any]) -> Any:
    """Returns the source of a JSONL or Parquet file (or of several, by a pattern).

    Args:
        file: path or glob pattern; Parquet where it ends in .parquet.
        kind: of the records.
        options: other options of the source, such as the names of fields.

    Raises:
        ConfigError: an option does not exist, or a value is impossible.
    """
    for name in ("name", "files", "kind"):
        if name in options:
            raise ConfigError(f"the option {name!r} of the records has a flag of its own")
    name = "parquet" if file.endswith(".parquet") else "jsonl"
    chosen: Any = Annotated[Any, Choice("source")]
    tree = {"name": name, "files": (file,), "kind": kind, **options}
    return resolve(chosen, tree, path=f"the records of {file}")


def open_store(
    source: Any,
    tokenizer: TokenizerConfig,
    *,
    on_error: str = "raise",
    cache_dir: str | None = None,
    progress: bool = True,
) -> TokenStore:
    """Returns the token store of a source, made now if it is not there.

    Raises:
        ConfigError: a file is missing.
        DataError: a record is bad and `on_error` is "raise", or there is no record.
        StorageError: the cache cannot be written.
    """
    data = DataConfig(
        tokenizer=tokenizer,
        on_error=on_error,  # type: ignore[arg-type]
        cache_dir=cache_dir,
    )
    return TokenStore.open(ensure_store(source, data, progress=progress))
