"""Questions about the characters of words that are single tokens.

WHERE names a word and a letter; the answer is the first position of the letter. LENGTH asks how
many characters the word has. Positions count the space before a word, as maps of characters do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tokjax.data.tokenizer_base import Tokenizer
from tokjax.finetuning.tipa import Chat, text_of_map
from tokjax.reproduction.rows import Row

LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Signs that no text has, one token each.
_WHERE, _LENGTH, _MAP, _ASK = "\x01", "\x02", "\x03", "\x04"

Kind = Literal["where", "length"]


def words(texts: Sequence[str], shortest: int = 4, longest: int = 7) -> list[str]:
    """Returns the texts that are a space and a word of lower-case letters.

    >>> words([" hello", "hello", " Hello", " it", " hello!"])
    [' hello']
    """
    found = [t for t in texts if t[0] == " " and set(t[1:]) <= set(LETTERS)]
    return [t for t in found if shortest <= len(t) - 1 <= longest]


@dataclass(frozen=True)
class Spelling:
    """How words, characters and questions become ids.

    Attributes:
        tokenizer: of which words and characters are single tokens.
    """

    tokenizer: Tokenizer

    @property
    def end(self) -> int:
        """The id that begins and ends samples."""
        assert self.tokenizer.eos_id is not None
        return self.tokenizer.eos_id

    def character(self, character: str) -> int:
        """Returns the id of one character."""
        (found,) = self.tokenizer.encode(character)
        return found

    def question(self, word: str, kind: Kind, rng: np.random.Generator) -> Row:
        """Returns a question about a word, with its answer."""
        named = self.tokenizer.encode(word)
        ask = self.character(_ASK)
        if kind == "length":
            asked = [self.end, self.character(_LENGTH), *named, ask]
            return Row.answer(asked, [self.character(str(len(word))), self.end])
        letter = word[int(rng.integers(1, len(word)))]  # the space is not asked for
        asked = [self.end, self.character(_WHERE), *named, ask, self.character(letter), ask]
        return Row.answer(asked, [self.character(str(word.index(letter) + 1)), self.end])

    def chat(self, chat: Chat) -> Row:
        """Returns what user and assistant say, behind a sign instead of the system's words."""
        said = {message["role"]: message["content"] for message in chat["messages"]}
        asked = [self.end, self.character(_MAP), *self.tokenizer.encode(said["user"])]
        answer = [*self.tokenizer.encode(said["assistant"]), self.end]
        return Row.answer([*asked, self.character(_ASK)], answer)


def shuffled(chat: Chat, rng: np.random.Generator) -> Chat:
    """Returns a chat whose map has the characters of the text in another order."""
    from tokjax.finetuning.tipa import token_samples

    *others, answer = chat["messages"]
    text = text_of_map(answer["content"])
    (mixed,) = token_samples(["".join(rng.permutation(list(text)))])
    return {"messages": [*others, mixed["messages"][-1]]}
