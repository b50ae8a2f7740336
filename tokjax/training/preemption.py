"""Stopping on request: SIGTERM or Ctrl-C ends the run after the step in progress."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Whether somebody has asked this run to stop; all processes agree on the step.

    Orbax's own handler needs `jax.distributed`; this one does not. With several processes the
    coordination service, which receives SIGTERM by itself, picks a step that all can reach.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: do not wait for the step or the save
        self.signal = number

    def at(self, step: int) -> bool:
        """Returns whether to stop after `step` steps. To be called by every process."""
        if jax.process_count() == 1:
            return self.signal is not None
        if multihost_utils.reached_preemption_sync_point(step):
            self.signal = self.signal or signal.SIGTERM
            return True
        return False


@contextmanager
def watch_for_stop() -> Iterator[StopRequest]:
    """Yields a `StopRequest` that listens to SIGTERM and SIGINT until the block ends."""
    request = StopRequest()
    # With several processes SIGTERM belongs to the coordination service.
    numbers = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
    try:
        before = {number: signal.signal(number, request._receive) for number in numbers}
    except ValueError:  # not the main thread, as in a notebook's worker: nothing to listen to
        before = {}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
