"""Which tokens of a text are punctuation, which name concepts, which only hold a sentence together.

The rules are LayerCake's (Zhu et al., arXiv 2507.04404, its development code): words get a
part-of-speech tag of the Penn Treebank, and all tokens of a word share its class.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tokjax.errors import DataError

Tagger = Callable[[list[str]], list[str]]

_SPACES = ("Ġ", "▁", " ")  # how tokenizers write the space that begins a word
_NEWLINES = {"Ċ": "\n", "<0x0A>": "\n"}
_MARKS = frozenset(['"', ":", ".", ",", "?", "\n", ""])
_FUNCTION_TAGS = frozenset(["IN", "DT", "TO", "MD", "CC"])
_CONCEPT_TAGS = frozenset(["CD", "PRP", "PRP$", "POS"])
_FUNCTION_WORDS = (
    "i you he she it we they me him her us them my your his its our their "
    "mine yours hers ours theirs "
    "be am is are was were been being following did do does according which q a"
)
_FUNCTIONAL = frozenset(_FUNCTION_WORDS.split())
_TAGS_OF_WORDS = {
    "IN": "about above after against among around as at because before behind below between by "
    "during for from if in inside into of off on onto out over since than that through "
    "under until up upon while with within without",
    "DT": "a an the this these those each every some any no all both either neither another",
    "TO": "to",
    "MD": "can could may might must shall should will would",
    "CC": "and or but nor so yet",
    "WP": "who whom whose what which when where why how",
    "RB": "not n't very too also just only even still never always often again here there then now "
    "more most less least quite rather almost perhaps however",
}
_TAG = {word: tag for tag, words in _TAGS_OF_WORDS.items() for word in words.split()}


@dataclass(frozen=True)
class TokenClasses:
    """Which tokens belong to each class; a token has one class or none.

    Attributes:
        punctuation: structure: punctuation marks, line breaks, the first token.
        concept: nouns, names, numbers, adjectives, verbs.
        functional: prepositions, articles, pronouns, auxiliaries and the like.
    """

    punctuation: np.ndarray
    concept: np.ndarray
    functional: np.ndarray


def token_classes(
    pieces: Sequence[str], tagger: Tagger | None = None, bos: str | None = None
) -> TokenClasses:
    """Returns the class of each token of one text.

    >>> found = token_classes(["<s>", "▁The", "▁cap", "ital", "▁of", "▁Japan", "."])
    >>> found.punctuation.astype(int).tolist(), found.concept.astype(int).tolist()
    ([1, 0, 0, 0, 0, 0, 1], [0, 0, 1, 1, 0, 1, 0])

    Args:
        pieces: text of each token. A word begins at a token that begins with the tokenizer's space
            ("Ġ", "▁" or " "); a token of nothing but punctuation is a word of its own.
        tagger: gives a list of words their Penn tags, for example NLTK's or spaCy's. None takes
            `guess_tags`, which is no tagger: it knows the commonest function words and calls
            every other word a noun.
        bos: text of the token that begins a sequence, which counts as punctuation.

    Raises:
        DataError: the tagger gives another number of tags than there are words.
    """
    words, members = merge_words(pieces)
    tags = (guess_tags if tagger is None else tagger)(words)
    if len(tags) != len(words):
        raise DataError(f"the tagger gave {len(tags)} tags for {len(words)} words")
    masks = {name: np.zeros(len(pieces), bool) for name in ("P", "C", "F")}
    for word, tag, tokens in zip(words, tags, members, strict=True):
        found = class_of_word(word, tag, bos)
        if found is not None:
            masks[found][tokens] = True
    for name, mask in masks.items():
        mask[:1] = name == "P"  # the first token draws attention whatever it is
    return TokenClasses(punctuation=masks["P"], concept=masks["C"], functional=masks["F"])


def merge_words(pieces: Sequence[str]) -> tuple[list[str], list[list[int]]]:
    """Returns the words that tokens make up, and which tokens each is made of.

    >>> merge_words(["▁To", "kyo", ",", "▁Japan"])
    (['Tokyo', ',', 'Japan'], [[0, 1], [2], [3]])
    """
    words: list[str] = []
    members: list[list[int]] = []
    closed = True  # whether the latest word is complete
    for i, piece in enumerate(pieces):
        piece = _NEWLINES.get(piece, piece)
        begins = piece.startswith(_SPACES)
        text = piece.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n")
        text = text if text.strip(" ") == "" and "\n" in text else text.strip(" ")
        alone = not any(letter.isalnum() for letter in text)
        if begins or alone or closed:
            words.append(text)
            members.append([i])
        else:
            words[-1] += text
            members[-1].append(i)
        # A bare space belongs to the word behind it.
        closed = alone and not (begins and text == "")
    return words, members


def class_of_word(word: str, tag: str, bos: str | None = None) -> str | None:
    """Returns "P" (punctuation), "F" (functional), "C" (concept) or None, the first that matches.

    >>> [class_of_word("Japan", "NNP"), class_of_word(".", "."), class_of_word("soon", "RB")]
    ['C', 'P', None]
    """
    if word == bos or word in _MARKS or word.startswith("_"):
        return "P"
    plain = re.sub(r"^[\"'“‘`\-]+", "", word.lower())
    if plain in _MARKS or set(plain) <= {"\n"}:
        return "P"
    if tag in _FUNCTION_TAGS or tag.startswith("W") or plain in _FUNCTIONAL:
        return "F"
    if tag in _CONCEPT_TAGS or tag.startswith(("N", "J", "V")):
        return "C"
    return None


def guess_tags(words: list[str]) -> list[str]:
    """Returns Penn tags by a short list of function words: all that is not on it is a noun, a
    number or punctuation.

    Verbs, adjectives and nouns are one class in LayerCake, so taking one for the other costs
    nothing there; adverbs beyond the list are wrongly taken for concepts.
    """

    def guess(word: str) -> str:
        if not any(letter.isalnum() for letter in word):
            return "."
        if any(letter.isdigit() for letter in word):
            return "CD"
        return _TAG.get(word.lower(), "NN")

    return [guess(word) for word in words]
