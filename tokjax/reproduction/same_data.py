"""Arms that read the very data of another arm, whatever the length of their rows.

Rows are packed for the coarsest stage of a run, so a run with patches and one without lay out the
same documents differently, and the second stage of a run begins at a row that no other run knows.
Here a run gets the layout of another: the same documents in the same rows from the same place on.
A run with the same stage as the other's last reads the same batches, bit for bit.
"""

import dataclasses
from typing import Any

from tokjax.data.batch import Batch
from tokjax.data.loader import Loader, StageSlice
from tokjax.errors import ConfigError
from tokjax.training.run import Run


@dataclasses.dataclass(frozen=True)
class LaterSteps:
    """The steps of a loader from `first_step` on, counted from 0."""

    loader: Loader
    first_step: int

    @property
    def batch_size(self) -> int:
        """Rows of a batch, over all hosts."""
        return self.loader.batch_size

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the batches' channels."""
        return self.loader.channels

    @property
    def value_names(self) -> tuple[str, ...]:
        """Names of the batches' values of segments."""
        return self.loader.value_names

    @property
    def group(self) -> int:
        """Segments of an example."""
        return self.loader.group

    def shape(self, step: int) -> tuple[int, int, int]:
        """Returns (B, T, S) of the global batch of a step."""
        return self.loader.shape(step + self.first_step)

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """Returns the batch of a step as NumPy arrays."""
        return self.loader.batch(step + self.first_step, rows)

    def example_key(self, example_id: int) -> str:
        """Returns the stable key of an example of a batch."""
        return self.loader.example_key(example_id)

    def example_name(self, example_id: int) -> str:
        """Returns the name, for people, of an example of a batch."""
        return self.loader.example_name(example_id)

    def describe(self) -> dict[str, Any]:
        """Returns the facts of the whole loader, the steps left out included."""
        return self.loader.describe()


def with_data_of(run: Run, other: Run, from_stage: int = 0) -> Run:
    """Returns `run` reading the data of `other` from the first row of one of its stages on.

    Raises:
        ConfigError: the two configurations name different data, or there is no such stage.
    """
    data = run.config.data
    if data != other.config.data:
        raise ConfigError("arms that share data need equal `data` sections, seed included")
    if not 0 <= from_stage < len(other.stages):
        raise ConfigError(f"from_stage={from_stage} of an arm with {len(other.stages)} stages")
    before = [_slice(stage) for stage in other.stages[:from_stage]]
    # Never reached: they only make the documents be packed as the other run packs them.
    unreached = [dataclasses.replace(_slice(stage), steps=1) for stage in other.stages]
    loader = Loader(
        run.stores,
        rates=[entry.rate for entry in data.train] if len(data.train) > 1 else None,
        seq_len=data.seq_len,
        batch_size=data.batch_size,
        seed=data.seed,
        packing=data.packing,
        long_examples=data.long_examples,
        shuffle=data.shuffle,
        stages=[*before, *map(_slice, run.stages), *unreached],
    )
    skipped: Any = LaterSteps(loader, sum(stage.steps for stage in before))
    return dataclasses.replace(run, loader=skipped)


def _slice(stage: Any) -> StageSlice:
    return StageSlice(stage.steps, stage.objective.tokens_per_position)
