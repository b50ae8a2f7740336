"""A choice among some texts as an automaton."""

from collections.abc import Sequence
from functools import lru_cache

from tokjax.decoding.constrained.automaton import Automaton, TokenTable, over_tokens
from tokjax.decoding.constrained.byte_automaton import of_texts
from tokjax.errors import ConfigError


def choices(texts: Sequence[str], table: TokenTable) -> Automaton:
    """Returns the automaton that allows exactly these texts.

    Args:
        texts: `["yes", "no"]`.
        table: of the vocabulary, `TokenTable.of(tokenizer)`.

    Raises:
        ConfigError: there is no text, or the vocabulary can write none of them.
    """
    if isinstance(texts, str) or not len(texts) or not all(isinstance(t, str) for t in texts):
        raise ConfigError(f"choices={texts!r} must be a list of one or more texts")
    return _choices(tuple(texts), table)


@lru_cache(maxsize=64)
def _choices(texts: tuple[str, ...], table: TokenTable) -> Automaton:
    shown = ", ".join(map(repr, texts[:4])) + (", ..." if len(texts) > 4 else "")
    automaton = of_texts([text.encode() for text in texts])
    return over_tokens(f"choices [{shown}]", automaton, table)
