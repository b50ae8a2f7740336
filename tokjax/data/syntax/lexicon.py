"""A tagger made of a treebank's word list: the tags of each form, and of endings for the others.

It gives probabilities, not decisions: what is wanted of it are expected counts over a corpus. It
sees no context.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from tokjax.data.syntax.tags import UNIVERSAL, Word, tag_index, tagged

# Clitics apart from their words, as treebanks of English have them; hyphens stand alone.
_WORD = re.compile(r"n't\b|'(?:s|re|ve|ll|d|m)\b|\w+?(?=n't\b)|\w+|[^\w\s]+", re.IGNORECASE)
_LONGEST = 4  # characters of the endings
_RARE = 3  # occurrences up to which a form tells of its ending

Tags = tuple[tuple[int, float], ...]


class Lexicon:
    """A callable text -> words."""

    def __init__(self, documents: Iterable[tuple[str, list[Word]]]):
        """Learns the tags of the documents' words."""
        forms: dict[str, Any] = defaultdict(Counter)
        for text, words in documents:
            for word in words:
                form = text[word.start : word.end]
                for tag, share in word.tags:
                    forms[form][tag] += share
        endings: dict[str, Any] = defaultdict(Counter)
        lowered: dict[str, Any] = defaultdict(Counter)
        for form, tags in forms.items():
            lowered[form.lower()].update(tags)
            if tags.total() <= _RARE:
                for key in _endings(form):
                    endings[key].update(tags)
        self._forms = {form: _shares(tags) for form, tags in forms.items()}
        self._lowered = {form: _shares(tags) for form, tags in lowered.items()}
        self._endings = {key: _shares(tags) for key, tags in endings.items()}

    def __call__(self, text: str) -> list[Word]:
        """Returns the words of a text with the probabilities of their tags."""
        return [Word(m.start(), m.end(), self.tags(m.group())) for m in _WORD.finditer(text)]

    def tags(self, form: str) -> Tags:
        """Returns the tags of a form with their probabilities."""
        if form in self._forms:
            return self._forms[form]
        if not any(c.isalnum() for c in form):
            return tagged(0, 0, UNIVERSAL.index(".")).tags
        if form[0].isdigit() and form.lower() not in self._lowered:
            return tagged(0, 0, UNIVERSAL.index("NUM")).tags
        known = self._lowered.get(form.lower())
        if known is not None:
            return known
        for key in _endings(form):
            if key in self._endings:
                return self._endings[key]
        return tagged(0, 0, tag_index("NOUN") or 0).tags


def _endings(form: str) -> list[str]:
    """Returns the endings of a form, the longest first; capitals and digits make others of them."""
    shape = "0" if any(c.isdigit() for c in form) else "A" if form[0].isupper() else "a"
    lower = form.lower()
    return [f"{shape}{lower[-n:] if n else ''}" for n in range(min(_LONGEST, len(form)), -1, -1)]


def _shares(tags: Counter) -> Tags:
    total = tags.total()
    return tuple((tag, count / total) for tag, count in sorted(tags.items()))
