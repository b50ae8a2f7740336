"""Questions about the characters of words that are single tokens.

WRONG names a word and spells it character by character with one wrong letter; the answer is the
letter's position and the right letter. LENGTH asks how many characters the word has. Positions
count the space before a word, as maps of characters do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tokjax.data.tokenizer_base import Tokenizer
from tokjax.finetuning.tipa import Chat, text_of_map
from tokjax.reproduction.arrays import Sample

LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Signs that no text has, one token each.
_WRONG, _LENGTH, _MAP, _ASK = "\x01", "\x02", "\x03", "\x04"

Kind = Literal["wrong", "length"]


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
        by_letter: name words by their characters instead.
    """

    tokenizer: Tokenizer
    by_letter: bool = False

    @property
    def end(self) -> int:
        """The id that begins and ends samples."""
        assert self.tokenizer.eos_id is not None
        return self.tokenizer.eos_id

    def character(self, character: str) -> int:
        """Returns the id of one character."""
        (found,) = self.tokenizer.encode(character)
        return found

    def question(self, word: str, kind: Kind, rng: np.random.Generator) -> Sample:
        """Returns a question about a word, with its answer."""
        named = [self.character(c) for c in word] if self.by_letter else self.tokenizer.encode(word)
        ask = self.character(_ASK)
        if kind == "length":
            asked = [self.end, self.character(_LENGTH), *named, ask]
            return Sample.answer(asked, [self.character(str(len(word))), self.end])
        at = int(rng.integers(1, len(word)))  # the space stays
        wrong = str(rng.choice([c for c in LETTERS if c != word[at]]))
        spelt = [self.character(c) for c in word[:at] + wrong + word[at + 1 :]]
        asked = [self.end, self.character(_WRONG), *named, ask, *spelt, ask]
        answer = [self.character(str(at + 1)), self.character(word[at]), self.end]
        return Sample.answer(asked, answer)

    def chat(self, chat: Chat) -> Sample:
        """Returns what user and assistant say, behind a sign instead of the system's words."""
        said = {message["role"]: message["content"] for message in chat["messages"]}
        asked = [self.end, self.character(_MAP), *self.tokenizer.encode(said["user"])]
        answer = [*self.tokenizer.encode(said["assistant"]), self.end]
        return Sample.answer([*asked, self.character(_ASK)], answer)


def shuffled(chat: Chat, rng: np.random.Generator) -> Chat:
    """Returns a chat whose map has the characters of the text in another order."""
    from tokjax.finetuning.tipa import token_samples

    *others, answer = chat["messages"]
    text = text_of_map(answer["content"])
    (mixed,) = token_samples(["".join(rng.permutation(list(text)))])
    return {"messages": [*others, mixed["messages"][-1]]}
