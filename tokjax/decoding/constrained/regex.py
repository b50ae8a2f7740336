"""Regular expressions as automata."""

from functools import lru_cache
from typing import Any

import numpy as np

from tokjax.decoding.constrained.automaton import Automaton, TokenTable, over_tokens
from tokjax.decoding.constrained.byte_automaton import NOWHERE, ByteAutomaton
from tokjax.errors import ConfigError

# The library looks for the first match that a backtracking engine would find: of `a|ab` it would
# never read the b. Behind a character that nothing is (the last of Unicode), all alternatives stay.
_MARK = "\U0010ffff"
_EOS = 256


def regex(pattern: str, table: TokenTable) -> Automaton:
    r"""Returns the automaton of the texts that a regular expression matches as a whole.

    The syntax is that of Rust's `regex`: Unicode classes, no look-around, no references back; `.`
    is no newline.

    Args:
        pattern: the expression; `[0-9]{4}-[0-9]{2}`, `(yes|no)\.`.
        table: of the vocabulary, `TokenTable.of(tokenizer)`.

    Raises:
        ConfigError: the expression cannot be read, the vocabulary can write nothing that it
            matches, or it needs too large a table; the extra `constrained` is not installed.
    """
    return compiled(f"regex {_shown(pattern)}", pattern, table)


@lru_cache(maxsize=64)
def compiled(name: str, pattern: str, table: TokenTable) -> Automaton:
    """Returns the automaton of a regular expression, under a name for error messages."""
    return over_tokens(name, byte_automaton(pattern), table)


def byte_automaton(pattern: str) -> ByteAutomaton:
    """Returns the automaton over the bytes of UTF-8; see `regex`."""
    core = outlines_core()
    vocabulary = core.Vocabulary(_EOS, {bytes([byte]): [byte] for byte in range(256)})
    try:
        core.Index(pattern, vocabulary)  # alone, so that a parenthesis too many is found
        index = core.Index(f"(?:{pattern}){_MARK}", vocabulary)
    except ValueError as error:
        raise ConfigError(
            f"regex {_shown(pattern)} cannot be used: {error}. The whole text is matched: leave "
            f"out ^, $ and \\b; there is no look-around and no reference back"
        ) from None
    transitions, finals = index.get_transitions(), index.get_final_states()
    names = [index.get_initial_state()]
    names += [name for name in transitions if name != names[0]]
    number = {name: i for i, name in enumerate(names)}
    table = np.full((len(names), 256), NOWHERE, np.int32)
    for name, row in transitions.items():
        for byte, to in row.items():
            if byte != _EOS:
                table[number[name], byte] = number[to]
    padded = np.vstack([table, np.full((1, 256), NOWHERE, np.int32)])
    state = np.arange(len(names))
    for byte in _MARK.encode():
        state = padded[state, byte]
    final = np.array([name in finals for name in names] + [False])
    return ByteAutomaton(table, final[state])


def outlines_core() -> Any:
    """Returns the library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import outlines_core
    except ImportError:
        raise ConfigError(
            "constraints by regex or JSON schema need the extra 'constrained': pip install "
            "'tokjax[constrained]'"
        ) from None
    return outlines_core


def _shown(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 80 else f"{pattern[:77]}...")
