"""The data section of a training configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tokjax.config import Choice, FrozenDict
from tokjax.data.arithmetic import ArithmeticSource
from tokjax.data.copying import CopySource
from tokjax.data.sources import StdlibSource
from tokjax.data.tokenizers import TokenizerConfig
from tokjax.errors import ConfigError

# Importing a source offers it.
__all__ = ["ArithmeticSource", "CopySource", "DataConfig", "MixtureEntry"]


@dataclass(frozen=True)
class MixtureEntry:
    """One source of the training data and its share."""

    source: Annotated[Any, Choice("source")]  # where the examples come from
    rate: float = 1.0  # share of the rows of every batch, relative to the other entries
    # file of a selection (`python -m tokjax.select`): only the examples it keeps are read, with its
    # values of their tokens; None: all examples
    artifact: str | None = None

    def __post_init__(self):
        if not self.rate > 0:
            raise ConfigError(
                f"rate is {self.rate}; it must be above 0. Remove an entry that should not be used."
            )


@dataclass(frozen=True)
class DataConfig:
    """What a run reads: sources, tokenizer, and the rows made of them."""

    # training sources; with several, rows are mixed by their rates
    train: tuple[MixtureEntry, ...] = (MixtureEntry(StdlibSource()),)
    # evaluation sources by the name their metrics get
    evals: Mapping[str, Annotated[Any, Choice("source")]] = FrozenDict(
        {"validation": StdlibSource(split="validation")}
    )
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)  # how text becomes ids
    seq_len: int = 512  # positions of a row
    batch_size: int = 8  # rows of a step, over all devices and hosts
    packing: Literal["best_fit", "concat", "none"] = "best_fit"  # how examples share rows
    # what happens to an example longer than a row: cut at row ends, or refused
    long_examples: Literal["split", "error"] = "split"
    max_tokens: int | None = None  # examples with more tokens are bad records; None: no limit
    on_error: Literal["raise", "skip"] = "raise"  # bad records: stop, or count, list and go on
    shuffle: bool = True  # visit rows in an order drawn from `seed`, another in every epoch
    seed: int = 0  # seed of that order and of the mixing
    prefetch: int = 2  # batches made ahead of the step
    cache_dir: str | None = None  # where token stores lie; None: $TOKJAX_CACHE or ~/.cache/tokjax

    def __post_init__(self):
        if not self.train:
            raise ConfigError("train has no entry; name at least one source to train on")
        for key in ("seq_len", "batch_size", "prefetch"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be at least 1")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ConfigError(
                f"max_tokens is {self.max_tokens}; an example needs 2 tokens to have one target"
            )
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}; it must be at least 0 and below 2^63")
        for name in self.evals:
            if not name or any(c.isspace() or c in "/\\,=" for c in name):
                raise ConfigError(
                    f"the evaluation name {name!r} becomes part of metric names: use letters, "
                    "digits, '.', '_' and '-'"
                )
