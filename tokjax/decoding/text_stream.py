"""Text as it is written: pieces that together are the finished text, to the character."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tokjax.data.tokenizers import Tokenizer
from tokjax.decoding.streaming import Callback, Streamed
from tokjax.decoding.text import continuation

_BROKEN = "\ufffd"  # what bytes decode to that are no whole character, perhaps not yet


def cut(text: str, ends: Sequence[str]) -> str:
    """Returns a text up to the first of the ends in it.

    >>> cut("a. b! c", ["!", ". "])
    'a'
    """
    return min((text.split(end)[0] for end in ends), key=len, default=text)


class TextStream:
    """The text of one row, as far as no later token can change it."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], ends: Sequence[str] = ()):
        """Begins behind a prompt.

        Args:
            tokenizer: the model's.
            prompt: ids.
            ends: texts before which the text ends.
        """
        self._tokenizer, self._ends = tokenizer, list(ends)
        self._prompt, self._new, self._shown = list(prompt), [], ""

    def push(self, token: int, done: bool) -> str:
        """Returns what one more token adds; with `done`, all that was held back.

        Held back are the bytes of a character that is not whole, and what may begin one of the
        ends. Where the tokenizer joins words by rules, all is held back.
        """
        self._new.append(int(token))
        if not done and not self._tokenizer.decodes_by_bytes:
            return ""
        text = continuation(self._tokenizer, self._prompt, self._new)
        text = cut(text, self._ends) if done else self._settled(text)
        piece, self._shown = text[len(self._shown) :], max(text, self._shown, key=len)
        return piece

    def _settled(self, text: str) -> str:
        text = cut(text.rstrip(_BROKEN), self._ends)
        begun = (
            size for end in self._ends for size in range(1, len(end)) if text.endswith(end[:size])
        )
        return text[: len(text) - max(begun, default=0)]


class _Abandoned(Exception):
    """Nobody reads any more."""


def pieces(
    decode: Callable[[Callback], Any], rows: Sequence[TextStream]
) -> Iterator[tuple[int, str]]:
    """Yields (row, piece of text) while a decode runs in a thread of its own.

    A reader that leaves early ends the decode; what it raises is raised to the reader.

    Args:
        decode: runs it, with this callback.
        rows: of the decode.
    """
    steps: queue.SimpleQueue = queue.SimpleQueue()
    left = threading.Event()

    def receive(step: Streamed) -> None:
        if left.is_set():
            raise _Abandoned
        steps.put(step)

    def run() -> None:
        try:
            decode(receive)
            steps.put(None)
        except BaseException as error:  # raised again where the text is read
            steps.put(error)

    thread = threading.Thread(target=run, name="tokjax-stream")
    thread.start()
    try:
        while (step := steps.get()) is not None:
            if isinstance(step, BaseException):
                raise step
            for b, row in enumerate(rows):
                if step.written[b] and (piece := row.push(step.tokens[b], bool(step.done[b]))):
                    yield b, piece
    finally:
        left.set()
        thread.join()
