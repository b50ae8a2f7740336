"""What a person sees while a token store is made, on stderr."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tokjax.data.store import StoreWriter, TokenStore

T = TypeVar("T")

_REFRESH_S = 0.2  # between two updates on a terminal
_LINE_S = 10.0  # between two lines in a log
_REASONS = 8  # reasons listed in the summary; the others are summed up


class Reporter:
    """Prints progress and summary of one preparation."""

    def __init__(self, title: str, *, enabled: bool = True):
        """Prepares to print about `title`; prints nothing unless `enabled`."""
        self._title = title
        self._enabled = enabled

    @contextlib.contextmanager
    def working(self, doing: str) -> Iterator[None]:
        """Shows on a terminal that `doing` goes on during the block."""
        if not self._enabled or not sys.stderr.isatty():
            yield
            return
        from rich.console import Console

        with Console(stderr=True).status(f"preparing {self._title}: {doing}"):
            yield

    @contextlib.contextmanager
    def counting(self, writer: StoreWriter) -> Iterator[Callable[[], None]]:
        """Gives a function to call after each example, which shows the writer's counts at times."""
        if not self._enabled:
            yield lambda: None
            return
        start = last = time.monotonic()
        terminal = sys.stderr.isatty()
        every = _REFRESH_S if terminal else _LINE_S

        def line() -> str:
            seconds = max(time.monotonic() - start, 1e-9)
            return (
                f"preparing {self._title}: {writer.num_examples:,} examples, "
                f"{writer.num_tokens:,} tokens, {writer.num_tokens / seconds:,.0f} tokens/s"
            )

        with contextlib.ExitStack() as stack:
            show = self._spinner(stack, line()) if terminal else self._print

            def advance() -> None:
                nonlocal last
                if time.monotonic() - last >= every:
                    last = time.monotonic()
                    show(line())

            yield advance

    def summary(self, store: TokenStore, seconds: float) -> None:
        """Prints what was made, and what was left out."""
        counts, skipped = store.manifest["counts"], store.manifest["skipped"]
        examples, tokens, size = counts["examples"], counts["tokens"], counts["bytes"]
        self._print(
            f"prepared {self._title}: {_count(examples, 'example')}, {_count(tokens, 'token')}, "
            f"{size / tokens:.2f} bytes per token, in {seconds:.1f} s"
        )
        if skipped:
            listed = [f"{count:,} {reason}" for reason, count in list(skipped.items())[:_REASONS]]
            rest = sum(list(skipped.values())[_REASONS:])
            listed += [f"{rest:,} for other reasons"] if rest else []
            where = store.directory / "skipped.jsonl"
            self._print(
                f"  left out {_count(counts['skipped'], 'bad record')}: {'; '.join(listed)} (each "
                f"one with its place in {where})"
            )
        if counts["examples_without_weight"]:
            without = _count(counts["examples_without_weight"], "example")
            self._print(
                f"  {without} without a target of any weight: nothing is learned from there"
            )
        if counts["repeated_examples"]:
            self._print(
                f"  {_count(counts['repeated_examples'], 'repetition')} of earlier examples"
            )
        self._print(f"  token store: {store.directory}")

    def _print(self, text: str) -> None:
        if self._enabled:
            print(text, file=sys.stderr, flush=True)

    @staticmethod
    def _spinner(stack: contextlib.ExitStack, text: str) -> Callable[[str], None]:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        # No bar: how many examples a source has is known only at its end.
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        live = Progress(*columns, console=Console(stderr=True), transient=True)
        progress = stack.enter_context(live)
        task = progress.add_task(text, total=None)
        return lambda new: progress.update(task, description=new)


def tracked(
    items: Iterable[T], doing: str, *, total: int | None = None, enabled: bool = True
) -> Iterator[T]:
    """Yields the items, and shows on stderr how many of them are done.

    Args:
        items: to work on.
        doing: what is done, for people.
        total: how many there are; None where that is not known.
        enabled: whether anything is shown.
    """
    if not enabled:
        yield from items
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(items, doing, total=total, console=Console(stderr=True), transient=True)
        return
    last = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - last >= _LINE_S:
            last = time.monotonic()
            of = "" if total is None else f" of {total:,}"
            print(f"{doing}: {done:,}{of}", file=sys.stderr, flush=True)
        yield item


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
