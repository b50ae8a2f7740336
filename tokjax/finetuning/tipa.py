"""TIPA: chats that teach a model which characters its tokens are made of, and where.

Every token of a vocabulary becomes a sample from the token to a JSON object of its characters by
position, listed from the last to the first: the first key is then the length, and what follows
counts down. MTIPA does the same with sentences. The samples are chats for plain SFT; mix them with
those of the task.

Reference: "Enhancing Character-Level Understanding in LLMs through Token Internal Structure
Learning", arXiv 2411.17679. That a token shown as text must be one token again is a recommendation
of tokjax.
"""

import json
import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokjax.data.tokenizer_base import Tokenizer
from tokjax.errors import ConfigError, DataError
from tokjax.files import write_atomically

Order = Literal["reverse", "forward"]
Chat = dict[str, Any]

INSTRUCTION = (
    "Name each character of the user's text by its position, counted from 1, as a JSON object that "
    "begins with the {first} position. For {example} the answer is {answer}"
)


def character_map(text: str, order: Order = "reverse") -> str:
    """Returns the JSON object of a text's characters (code points) by position, without spaces.

    Args:
        text: one character or more.
        order: "reverse" lists them from the last to the first, "forward" from the first.

    >>> character_map("hello")
    '{"5":"o","4":"l","3":"l","2":"e","1":"h"}'
    """
    places = [(str(i + 1), character) for i, character in enumerate(text)]
    listed = dict(reversed(places)) if order == "reverse" else dict(places)
    return json.dumps(listed, ensure_ascii=False, separators=(",", ":"))


def text_of_map(answer: str) -> str:
    """Returns the text that a character map in either order describes.

    Raises:
        DataError: it is no object whose keys are 1 to its length.
    """
    try:
        found = {int(place): character for place, character in json.loads(answer).items()}
    except (ValueError, AttributeError, TypeError):
        raise DataError(f"{answer!r} is no JSON object of characters by position") from None
    if sorted(found) != list(range(1, len(found) + 1)):
        raise DataError(f"{answer!r} does not name the positions 1 to {len(found)}")
    return "".join(found[i] for i in range(1, len(found) + 1))


@dataclass(frozen=True)
class Texts:
    """What a vocabulary is as texts, and how many tokens are none.

    Attributes:
        kept: distinct texts of tokens, in the order of their ids.
        special: special tokens, which stand for no text.
        broken: tokens that are part of a character.
        blank: tokens of white space alone.
        repeated: tokens whose text another has too.
        divided: tokens whose text is not one token again.
    """

    kept: tuple[str, ...]
    special: int = 0
    broken: int = 0
    blank: int = 0
    repeated: int = 0
    divided: int = 0


def vocabulary_texts(
    tokenizer: Tokenizer,
    ids: Collection[int] | None = None,
    *,
    strip: bool = False,
    single: bool = True,
) -> Texts:
    """Returns the texts of a vocabulary's tokens.

    Args:
        tokenizer: whose tokens are meant.
        ids: the tokens to take, for instance those that occur in a task's texts; None takes all.
        strip: take white space off the ends of each. A word token of a byte-level BPE begins with
            a space, so that most are then `divided`.
        single: leave out texts that the tokenizer does not make one token of: a sample of several
            tokens says nothing of any of them.
    """
    kept: dict[str, None] = {}
    special = broken = blank = repeated = divided = 0
    for token in range(tokenizer.vocab_size) if ids is None else sorted(set(ids)):
        data = tokenizer.token_bytes(token)
        if not data:
            special += 1
            continue
        text = data.decode("utf-8", "replace")
        if "\ufffd" in text:
            broken += 1
            continue
        text = text.strip() if strip else text
        if not text.strip():
            blank += 1
        elif text in kept:
            repeated += 1
        elif single and not _is_one_token(tokenizer, text):
            divided += 1
        else:
            kept[text] = None
    return Texts(tuple(kept), special, broken, blank, repeated, divided)


def _is_one_token(tokenizer: Tokenizer, text: str) -> bool:
    try:
        return len(tokenizer.encode(text)) == 1
    except DataError:  # it cannot be encoded as it is
        return False


def tokens_of(tokenizer: Tokenizer, texts: Iterable[str]) -> set[int]:
    """Returns the ids that occur in texts, to prune a vocabulary to a task."""
    return {token for ids in tokenizer.encode_batch(list(texts)) for token in ids}


def token_samples(texts: Iterable[str], order: Order = "reverse") -> list[Chat]:
    """Returns a chat for each text: instruction, the text, and its character map."""
    first = "last" if order == "reverse" else "first"
    told = INSTRUCTION.format(first=first, example="hello", answer=character_map("hello", order))
    return [
        {
            "messages": [
                {"role": "system", "content": told},
                {"role": "user", "content": text},
                {"role": "assistant", "content": character_map(text, order)},
            ]
        }
        for text in texts
    ]


def sentence_samples(
    sentences: Sequence[str],
    *,
    share: float = 0.1,
    shortest: int = 80,
    longest: int = 120,
    seed: int = 0,
    order: Order = "reverse",
) -> list[Chat]:
    """Returns MTIPA's chats: a share of the sentences, each cut to a random length.

    Args:
        sentences: of the task's training split.
        share: of them that are taken, rounded down, at least one.
        shortest: least length that a sentence is cut to, in characters; shorter ones stay whole.
        longest: greatest length.
        seed: of choice and lengths.
        order: of the character maps.

    Raises:
        ConfigError: a share outside (0, 1] or lengths that do not fit together.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"share={share} must be above 0 and at most 1")
    if not 1 <= shortest <= longest:
        raise ConfigError(f"shortest={shortest} must be at least 1 and at most longest={longest}")
    drawn = random.Random(seed)
    usable = [sentence for sentence in sentences if sentence.strip()]
    count = min(len(usable), max(1, int(share * len(usable) + 1e-6)))
    chosen = drawn.sample(usable, count)
    return token_samples([s[: drawn.randint(shortest, longest)] for s in chosen], order)


def mixed(*parts: Sequence[Chat], seed: int = 0) -> list[Chat]:
    """Returns all samples of several sets in one random order."""
    together = [sample for part in parts for sample in part]
    random.Random(seed).shuffle(together)
    return together


def write_chats(path: str | Path, samples: Iterable[Chat]) -> None:
    """Writes samples as the JSONL file that `kind="messages"` reads; it appears whole or not.

    Raises:
        StorageError: the file cannot be written.
    """
    lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    write_atomically(Path(path), "".join(lines))
