"""What a compiled program needs on each chip, and the least time that it can take."""

from dataclasses import dataclass
from typing import Any

from tokjax.ahead.chips import Topology
from tokjax.ahead.collectives import by_kind, collectives


@dataclass(frozen=True)
class Estimate:
    """A program on a topology; all figures are for one chip and one step.

    The time of the roofline is the longest of three that could pass beside each other: of its
    operations at the chip's peak, of its memory traffic, and of its collectives. What overlaps in
    fact lies between that and their sum.

    Attributes:
        name: of the program.
        chips: how many run it.
        arguments: bytes that lie in memory all the time: parameters, their state, the batch.
        temporary: bytes beside them at the fullest moment.
        model_flops: operations of the model's formula, which MFU counts.
        flops: operations that are computed, those done again included.
        traffic: least bytes between chip and memory: every argument read, every result written
            (of a cache, none), every temporary written and read, once.
        sent: bytes sent, by kind of collective, with how often it runs.
        seconds: of computing, memory and collectives; None for chips without figures.
        fits: whether it fits; None where nobody knows the memory.
    """

    name: str
    chips: int
    arguments: float
    temporary: float
    model_flops: float
    flops: float
    traffic: float
    sent: dict[str, tuple[int, float]]
    seconds: dict[str, float] | None
    fits: bool | None
    memory: float | None = None
    peak: float | None = None

    @property
    def bytes(self) -> float:
        """Bytes of memory at the fullest moment."""
        return self.arguments + self.temporary

    @property
    def total_sent(self) -> float:
        """Bytes sent by all collectives."""
        return sum(size for _, size in self.sent.values())

    @property
    def mfu(self) -> tuple[float, float] | None:
        """Share of the peak that the model's operations take: nothing overlaps, everything does."""
        if self.seconds is None or self.peak is None:
            return None
        least, most = max(self.seconds.values()), sum(self.seconds.values())
        ideal = self.model_flops / self.peak
        return ideal / most, ideal / least

    @property
    def bound(self) -> str | None:
        """What takes longest."""
        return None if self.seconds is None else max(self.seconds, key=self.seconds.__getitem__)


def estimate(
    name: str,
    compiled: Any,
    topology: Topology,
    *,
    model_flops: float,
    flops: float,
    rewrites: bool = True,
) -> Estimate:
    """Returns what a compiled program needs and how fast it can be.

    Args:
        name: of the program.
        compiled: by XLA for the topology.
        topology: that it was compiled for.
        model_flops: operations of the formula, over all chips.
        flops: operations of the traced program, over all chips.
        rewrites: whether results that take the place of arguments are written whole, as a state
            is, or in a few places, as a cache is.
    """
    chips, chip = len(topology.devices), topology.chip
    memory = compiled.memory_analysis()
    arguments = float(memory.argument_size_in_bytes)
    results = float(memory.output_size_in_bytes - memory.alias_size_in_bytes)
    temporary = float(memory.temp_size_in_bytes + memory.generated_code_size_in_bytes) + results
    found = collectives(compiled.as_text(), chips)
    written = float(memory.output_size_in_bytes) if rewrites else results
    traffic = arguments + written + 2 * memory.temp_size_in_bytes
    seconds = None
    if chip is not None:
        per_slice = chips // topology.slices
        inside = sum(each.moved for each in found if not _leaves_slice(each.groups, per_slice))
        outside = sum(each.moved for each in found if _leaves_slice(each.groups, per_slice))
        seconds = {
            "computing": flops / chips / chip.flops,
            "memory": traffic / chip.bandwidth,
            "collectives": inside / chip.link + outside / chip.outside,
        }
    return Estimate(
        name=name,
        chips=chips,
        arguments=arguments,
        temporary=temporary,
        model_flops=model_flops / chips,
        flops=flops / chips,
        traffic=traffic,
        sent=by_kind(found),
        seconds=seconds,
        fits=None if chip is None else arguments + temporary <= chip.memory,
        memory=None if chip is None else chip.memory,
        peak=None if chip is None else chip.flops,
    )


def _leaves_slice(devices: tuple[int, ...], per_slice: int) -> bool:
    return len({device // per_slice for device in devices}) > 1
