import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.decoding import Prompts
from tokjax.decoding.context import Context
from tokjax.decoding.stop_texts import TokenBytes, on_texts
from tokjax.errors import ConfigError

VOCABULARY = [b"", b"a", b"b", b"ab", b"\n", b"\n\n", b"User", b":", b"aab", b"\xc3", b"\xa9", b" "]
TOKENS = TokenBytes.of(VOCABULARY)
PROMPTS = Prompts.of([[1], [2]])
_ask = jax.jit(lambda stop, context: stop(context))


def stops_at(texts, rows):
    """The first step behind which each row stops, or None."""
    stop, found = on_texts(texts, TOKENS), [None] * len(rows)
    generated = np.zeros((len(rows), 12), np.int32)
    for step in range(1, max(map(len, rows)) + 1):
        for b, row in enumerate(rows):
            generated[b, step - 1] = row[step - 1] if step <= len(row) else 0
        last = jnp.asarray(generated[:, step - 1])
        done = jnp.zeros(len(rows), bool)
        ended = _ask(stop, Context(jnp.int32(step), last, jnp.asarray(generated), done, PROMPTS))
        for b, row in enumerate(rows):
            if ended[b] and found[b] is None and step <= len(row):
                found[b] = step
    return found


def test_a_text_is_found_wherever_tokens_begin_and_end():
    # "\nUser:" in four tokens; "ab" within "aab" and across "a" + "b".
    assert stops_at(["\nUser:"], [[1, 4, 6, 7], [4, 4, 6, 2]]) == [4, None]
    assert stops_at(["ab"], [[1, 8], [1, 2]]) == [2, 2]
    assert stops_at(["ba"], [[3, 8], [3, 2]]) == [2, None]
    assert stops_at(["\n\n"], [[1, 5], [4, 4]]) == [2, 2]
    # In the middle of the latest token.
    assert stops_at(["\n"], [[5], [3]]) == [1, None]
    assert stops_at(["é"], [[9, 10], [10, 9]]) == [2, None]


def test_several_texts_and_none():
    assert stops_at(["bb", "aaa", ":"], [[1, 7], [1, 1, 1]]) == [2, 3]
    assert stops_at([], [[1, 2], [3, 4]]) == [None, None]


def test_the_prompt_does_not_count():
    assert stops_at(["ab"], [[2, 1], [2, 2]]) == [None, None]  # the first prompt ends in "a"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, len(VOCABULARY) - 1), min_size=1, max_size=12),
    st.text(alphabet="ab\n: ", min_size=1, max_size=8),
)
def test_it_stops_exactly_where_the_text_first_holds_the_string(row, text):
    expected = None
    for step in range(1, len(row) + 1):
        if text.encode() in b"".join(VOCABULARY[i] for i in row[:step]):
            expected = step
            break
    assert stops_at([text], [row, row])[0] == expected


def test_an_empty_text_is_refused():
    with pytest.raises(ConfigError, match="empty"):
        on_texts(["a", ""], TOKENS)
