"""What comparisons are made of: small models trained for the purpose, kept between runs."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokjax.config import resolve
from tokjax.files import write_atomically
from tokjax.language_model import LanguageModel
from tokjax.loading import load
from tokjax.training.config import TrainConfig
from tokjax.training.loop import train
from tokjax.training.run import build_run


class Interrupted(Exception):
    """A training run was asked to stop; the same command continues it.

    Attributes:
        signal: that asked.
    """

    def __init__(self, signal: int | None):
        super().__init__("a training run was asked to stop")
        self.signal = signal


def trained(folder: Path, tree: Mapping[str, Any]) -> LanguageModel:
    """Returns the model that a configuration trains, trained in a folder if it is not there yet.

    Args:
        folder: workdir of the run; one that was stopped goes on.
        tree: of a `TrainConfig`, as a config file returns it.

    Raises:
        Interrupted: the run was asked to stop.
        ConfigError: the configuration is impossible, or not the one that was begun in the folder.
    """
    outcome = train(build_run(resolve(TrainConfig, tree)), folder)
    if not outcome.finished:
        raise Interrupted(outcome.stopped_by)
    return load(folder)


def jsonl(path: Path, records: Callable[[], Iterable[Mapping[str, Any]]]) -> Path:
    """Returns a file of records, one a line, written if it is not there yet."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in records()))
    return path


def word_tokenizer(folder: Path, words: Sequence[str]) -> dict[str, Any]:
    """Returns the configuration of a tokenizer whose tokens are words, for invented languages.

    A token is a word with the one space before it, which the first word of a text has not.

    Args:
        folder: gets its `tokenizer.json`.
        words: all that occur; `<unk>`, `<s>` and `</s>` come before them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<unk>", "<s>", "</s>"]
    pieces = [f"\u2581{word}" for word in dict.fromkeys(words)]
    ids = {piece: i for i, piece in enumerate([*special, *pieces])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    tokenizer.decoder = decoders.Metaspace()  # type: ignore[assignment]
    tokenizer.add_special_tokens(special)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    write_atomically(path, tokenizer.to_str(pretty=True))
    return {"name": "huggingface", "path": str(path), "bos": "<s>", "eos": "</s>"}
