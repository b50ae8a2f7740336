"""A trace as its parts: what may be shortened, in chunks, and the answer, which stays."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tokjax.errors import ConfigError
from tokjax.verifiers import last_number

# What reflection is announced by; whole words, upper or lower case.
MARKERS = (
    *("wait", "hmm", "alternatively", "however", "let me check", "let me verify", "double-check"),
    *("double check", "re-check", "recheck", "let me reconsider", "on second thought", "actually"),
)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")


@dataclass(frozen=True)
class Trace:
    """A response in three parts, which joined give it back.

    Attributes:
        head: the tag that begins the thinking, with the blanks behind it; or empty.
        thinking: what may be shortened.
        answer: from the blanks before the tag that ends the thinking to the end; or empty.
    """

    head: str
    thinking: str
    answer: str

    @property
    def tagged(self) -> bool:
        """Whether a tag says where the answer begins."""
        return bool(self.answer)


def split_trace(text: str, begin: str = "<think>", end: str = "</think>") -> Trace:
    """Returns the parts of a response; without the tag `end` all of it is thinking.

    >>> split_trace("<think>\\nsix\\n</think>6")
    Trace(head='<think>\\n', thinking='six', answer='\\n</think>6')
    """
    before, tag, after = text.partition(end)
    thinking, head = before, ""
    if begin and thinking.lstrip().startswith(begin):
        head = thinking[: thinking.index(begin) + len(begin)]
        thinking = thinking[len(head) :]
        blanks = len(thinking) - len(thinking.lstrip())
        head, thinking = head + thinking[:blanks], thinking[blanks:]
    if not tag:
        return Trace(head, thinking, "")
    kept = thinking.rstrip()
    return Trace(head, kept, thinking[len(kept) :] + tag + after)


def chunks_of(text: str, min_words: int = 50, boundary: str = "\n\n") -> list[str]:
    """Returns the chunks of a text; joined they give it back.

    The text is cut behind each boundary; pieces are merged until a chunk has enough words, and a
    last one that has too few joins the one before it.

    Args:
        text: of the thinking.
        min_words: least number of words, between blanks, of a chunk that is not the only one.
        boundary: where a text may be cut.

    >>> chunks_of("a b\\n\\nc\\n\\nd e\\n\\nf", min_words=2)
    ['a b\\n\\n', 'c\\n\\nd e\\n\\nf']

    Raises:
        ConfigError: a chunk may have no word, or the boundary is empty.
    """
    if min_words < 1 or not boundary:
        raise ConfigError(
            f"min_words={min_words} must be at least 1 and boundary={boundary!r} not empty"
        )
    pieces = text.split(boundary)
    pieces = [*(piece + boundary for piece in pieces[:-1]), pieces[-1]]
    chunks: list[str] = []
    current, words = "", 0
    for piece in pieces:
        current, words = current + piece, words + len(piece.split())
        if words >= min_words:
            chunks.append(current)
            current, words = "", 0
    if current and chunks:
        chunks[-1] += current
    elif current:
        chunks = [current]
    return chunks


def body_of(chunk: str, boundary: str = "\n\n") -> tuple[str, str, str]:
    """Returns what surrounds the words of a chunk, and the words: (before, words, behind).

    >>> body_of(" a b\\n\\n")
    (' ', 'a b', '\\n\\n')
    """
    before = chunk[: len(chunk) - len(chunk.lstrip())]
    words = chunk[len(before) :]
    bare = words.rstrip()
    ending = boundary.strip()
    while ending and bare.endswith(ending):
        bare = bare[: -len(ending)].rstrip()
    return before, bare, words[len(bare) :]


def count_markers(text: str, markers: Sequence[str] = MARKERS) -> int:
    """Returns how often reflection is announced.

    >>> count_markers("Wait, 7? Let me check: yes. Waiting.")
    2
    """
    if not markers:
        return 0
    listed = "|".join(re.escape(marker) for marker in markers)
    return len(re.findall(rf"(?<!\w)(?:{listed})(?!\w)", text, re.IGNORECASE))


def numbers_of(text: str) -> set[str]:
    """Returns the numbers that are written in a text."""
    return set(_NUMBER.findall(text))


def final_answer(text: str) -> str:
    r"""Returns the answer that a response ends with, to tell whether two are the same.

    It is what the last `\boxed{}` holds, what follows the last `####`, the last number, or else the
    last line.

    >>> [final_answer(text) for text in (r"it is \boxed{x^{2}}, 1 of 3", "a 7, b 8 c", "no")]
    ['x^{2}', '8.0', 'no']
    """
    boxed = _BOXED.findall(text)
    if boxed:
        return boxed[-1].strip()
    if "####" in text:
        return text.rpartition("####")[2].strip()
    number = last_number(text)
    if number is not None:
        return str(number)
    lines = text.split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
