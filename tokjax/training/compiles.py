"""Watching for compilations where none should happen."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax.monitoring

_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileWatch:
    """Counts compilations while it is open (a context manager).

    Attributes:
        count: compilations so far.
    """

    def __init__(self) -> None:
        self.count = 0

    def _listen(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == _EVENT:
            self.count += 1

    def __enter__(self) -> "CompileWatch":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    @contextlib.contextmanager
    def none_expected(self, step: int, warn: Callable[[str], None]) -> Iterator[None]:
        """Warns when something is compiled inside the block: a step should only compute."""
        before = self.count
        yield
        if self.count > before:
            warn(
                f"{self.count - before} compilation(s) during step {step}: a shape or a Python "
                f"value changes from step to step"
            )
