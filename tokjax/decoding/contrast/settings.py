"""Checks of what one sets of a contrast; each value becomes an array, or one for each row."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from tokjax.decoding.predictors import Predictor
from tokjax.decoding.prompts import Prompts, bucket
from tokjax.decoding.transforms.base import setting
from tokjax.errors import ConfigError


def number(name: str, value: Any) -> Any:
    """Returns a finite number.

    Raises:
        ConfigError: it is not.
    """
    return setting(name, value, np.float32, np.isfinite, "a finite number")


def positive(name: str, value: Any) -> Any:
    """Returns a positive number.

    Raises:
        ConfigError: it is not.
    """
    ok = lambda v: (v > 0) & np.isfinite(v)  # noqa: E731
    return setting(name, value, np.float32, ok, "a positive number")


def share_of_best(value: Any) -> Any:
    """Returns the plausibility threshold: least probability of a token over that of the likeliest.

    Raises:
        ConfigError: it is not between 0 and 1.
    """
    ok = lambda v: (v >= 0) & (v <= 1)  # noqa: E731
    return setting("plausibility", value, np.float32, ok, "between 0 and 1")


def of_rows(value: Any, rows: int) -> Any:
    """Returns a setting for each row: one for each prompt is repeated for the prompt's samples."""
    return jnp.repeat(value, rows // value.shape[0]) if jnp.ndim(value) else value


def shared_vocabulary(predictors: dict[str, Predictor], vocab_size: int | None) -> int:
    """Returns the number of ids that predictions of several models are compared over.

    Models of one tokenizer may differ in how far their tables are padded; `vocab_size` then says
    where the tokenizer's ids end.

    Raises:
        ConfigError: the sizes differ and none is given, or one is below it.
    """
    sizes = {name: predictor.vocab_size for name, predictor in predictors.items()}
    listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
    if vocab_size is None and len(set(sizes.values())) > 1:
        raise ConfigError(
            f"the models' vocabularies differ ({listed}): they must share a tokenizer; if only the "
            f"padding differs, give vocab_size (the tokenizer's)"
        )
    size = min(sizes.values()) if vocab_size is None else vocab_size
    if size > min(sizes.values()):
        raise ConfigError(f"vocab_size={size} is above a model's own ({listed})")
    return size


def in_bucket(prompts: Prompts) -> Prompts:
    """Returns the prompts padded to one of a few widths, so that few programs are compiled."""
    tokens, lengths = np.asarray(prompts.tokens), np.asarray(prompts.lengths)
    padded = np.zeros((len(tokens), bucket(int(lengths.max()))), np.int32)
    shared = min(tokens.shape[1], padded.shape[1])
    padded[:, :shared] = tokens[:, :shared]
    return Prompts(padded, lengths.astype(np.int32))  # type: ignore[arg-type]
