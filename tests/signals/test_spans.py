import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.data.offsets import offsets_from_bytes
from tokjax.signals import (
    alignment_weights,
    ids_from_ends,
    index_in_span,
    overlaps,
    span_ids,
    span_mask,
    span_pool,
    span_ranges,
    span_sizes,
    span_weights,
    spread,
    without_spaces,
)
from tokjax.signals.spans import POOLINGS

pytestmark = pytest.mark.usefixtures("strict_dtypes")
pool = jax.jit(span_pool, static_argnames=("num", "how", "empty"))
spread_ = jax.jit(spread)
chunks = jax.jit(ids_from_ends, static_argnums=1)
TOKENS = [(0, 2), (2, 6), (6, 6), (6, 9), (9, 13)]
RANGE = st.tuples(st.integers(0, 12), st.integers(0, 12)).map(lambda ab: (min(ab), max(ab)))


def words(text):
    """Character ranges of the words of a text, one token a word."""
    ends = np.cumsum([len(w) + 1 for w in text.split(" ")])
    return [(int(e) - len(w) - 1, int(e) - 1) for w, e in zip(text.split(" "), ends, strict=True)]


def find(text, phrase):
    return (text.index(phrase), text.index(phrase) + len(phrase))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("any", [0, 1, 0, 1, 1]), ("majority", [0, 1, 0, 1, 0]), ("contained", [0, 0, 0, 1, 0])],
)
def test_rules_of_overlap(rule, expected):
    spans = [(3, 11)]  # 3 of 4 characters of token 1, all of 3, half of 4; token 2 has none
    np.testing.assert_array_equal(span_mask(TOKENS, spans, rule), np.array(expected, bool))
    np.testing.assert_array_equal(span_ids(TOKENS, spans, rule), np.array(expected) - 1)
    np.testing.assert_allclose(span_weights(TOKENS, spans), [0, 0.75, 0, 1, 0.5])


def test_phrases_found_by_offset():
    text = "I did n't enjoy it , quite boring"
    spans = [find(text, "n't enjoy"), find(text, "quite boring")]
    np.testing.assert_array_equal(span_mask(words(text), spans), [0, 0, 1, 1, 0, 0, 1, 1])
    text = "bad film , not bad at all"
    np.testing.assert_array_equal(
        span_mask(words(text), [find(text, "bad film")]), [1, 1, 0, 0, 0, 0, 0]
    )


def test_weights_between_two_tokenizations():
    weights = alignment_weights([(0, 7), (8, 10), (10, 12)], [(0, 4), (4, 7), (8, 12)])
    expected = [[0.57143, 0.42857, 0], [0, 0, 1], [0, 0, 1]]
    np.testing.assert_allclose(weights, expected, atol=1e-5)
    np.testing.assert_array_equal(alignment_weights(TOKENS, TOKENS)[2], np.zeros(5))


def test_a_token_belongs_to_the_span_it_shares_most_with():
    np.testing.assert_array_equal(span_ids([(0, 5)], [(0, 2), (2, 5)]), [1])
    np.testing.assert_array_equal(span_ids([(0, 4)], [(0, 2), (2, 4)]), [0])
    # Two spans together hold the whole token, neither does alone.
    assert span_mask([(0, 4)], [(0, 2), (2, 4)], "contained")
    np.testing.assert_array_equal(span_ids([(0, 4)], [(0, 2), (2, 4)], "contained"), [-1])


def test_empty_and_unmatched_spans_put_nothing_on_any_token():
    spans = [(5, 5), (20, 22), (6, 9)]
    assert span_ranges(TOKENS, spans) == [None, None, (3, 4)]
    np.testing.assert_array_equal(span_ids(TOKENS, spans), [-1, -1, -1, 2, -1])
    np.testing.assert_array_equal(span_mask(TOKENS, spans), [0, 0, 0, 1, 0])
    assert not span_mask(TOKENS, []).any()
    assert (span_ids(TOKENS, []) == -1).all()
    assert span_ranges(TOKENS, []) == []
    assert span_ids([], [(0, 3)]).shape == (0,)
    assert span_ranges([], [(0, 3)]) == [None]


def test_a_leading_space_is_taken_off_before_containment():
    text = "a dog  ran\n"
    tokens = [(0, 1), (1, 5), (5, 6), (6, 10), (10, 11)]
    span = [find(text, "dog")]
    assert not span_mask(tokens, span, "contained").any()
    trimmed = without_spaces(tokens, text)
    assert trimmed == [(0, 1), (2, 5), (5, 6), (7, 10), (10, 11)]
    np.testing.assert_array_equal(span_mask(trimmed, span, "contained"), [0, 1, 0, 0, 0])


def test_pieces_of_one_character_all_lie_in_its_span():
    text = "né!"
    offsets = offsets_from_bytes(text, [b"n", b"\xc3", b"\xa9", b"!"])
    np.testing.assert_array_equal(span_mask(offsets, [(1, 2)], "contained"), [0, 1, 1, 0])
    assert span_ranges(offsets, [(1, 2)]) == [(1, 3)]


def test_a_range_that_ends_before_it_starts_is_named():
    with pytest.raises(ValueError, match=r"range 1 is \(4, 2\)"):
        span_mask(TOKENS, [(0, 1), (4, 2)])
    with pytest.raises(ValueError, match="contained"):
        span_mask(TOKENS, [(0, 1)], "contain")  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.lists(RANGE, max_size=6), st.lists(RANGE, max_size=4))
def test_masks_equal_counting_characters(offsets, spans):
    covered = {c for start, end in spans for c in range(start, end)}
    inside = [len(covered & set(range(*token))) for token in offsets]
    lengths = [end - start for start, end in offsets]
    np.testing.assert_array_equal(span_mask(offsets, spans), np.array(inside, int) > 0)
    weights = [i / n if n else 0 for i, n in zip(inside, lengths, strict=True)]
    np.testing.assert_allclose(span_weights(offsets, spans), weights)
    each = [[len(set(range(*t)) & set(range(*s))) for s in spans] for t in offsets]
    np.testing.assert_array_equal(
        overlaps(offsets, spans), np.array(each, int).reshape(len(offsets), len(spans))
    )
    contained = span_mask(offsets, spans, "contained")
    majority = span_mask(offsets, spans, "majority")
    assert not (contained & ~majority).any() and not (majority & ~span_mask(offsets, spans)).any()


def test_chunks_from_their_ends():
    ids = chunks(jnp.array([[2, 5], [3, -1]]), 6)
    np.testing.assert_array_equal(ids, [[0, 0, 1, 1, 1, -1], [0, 0, 0, -1, -1, -1]])
    weights = spread_(jnp.array([[0.9, 0.2], [0.5, 7.0]]), ids)
    np.testing.assert_allclose(weights[0], [0.9, 0.9, 0.2, 0.2, 0.2, 0])
    np.testing.assert_allclose(weights[0, 1:], [0.9, 0.2, 0.2, 0.2, 0])  # moved to the targets
    np.testing.assert_allclose(weights[1], [0.5, 0.5, 0.5, 0, 0, 0])
    # A chunk split in two of equal value changes nothing.
    split = spread_(jnp.array([[0.9, 0.2, 0.2]]), chunks(jnp.array([[2, 3, 5]]), 6))
    np.testing.assert_array_equal(split[0], weights[0])
    assert (chunks(jnp.array([-1, -1]), 3) == -1).all()


@pytest.mark.parametrize(
    ("how", "features"), [("mean", ()), ("last", ()), *((how, (2,)) for how in POOLINGS)]
)
def test_pooling_equals_numpy(how, features):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, 6, *features)) - 5  # filling of 0 would show as a maximum
    ids = np.array([[0, 0, -1, 2, 0, 2], [-1, 1, 1, -1, 7, 1]], np.int32)
    found = pool(jnp.asarray(values, jnp.float32), ids, 3, how, -1.5)
    numpy = {"first": lambda a, _: a[0], "last": lambda a, _: a[-1]}.get(
        how, getattr(np, how, None)
    )
    for b in range(2):
        for s in range(3):
            own = values[b][ids[b] == s]
            expected = numpy(own, 0) if len(own) else np.full(features, -1.5)
            np.testing.assert_allclose(found[b, s], expected, rtol=1e-5)
    np.testing.assert_array_equal(span_sizes(ids, 3), [[3, 0, 2], [0, 3, 0]])


def test_word_scores_from_token_scores():
    ids = jnp.array([0, 0, 1])
    entropies = jnp.array([0.3, 0.5, 0.7])
    np.testing.assert_allclose(pool(entropies, ids, 2, "sum"), [0.8, 0.7], rtol=1e-6)
    np.testing.assert_allclose(pool(entropies, ids, 2), [0.4, 0.7], rtol=1e-6)


def test_pooling_passes_gradients_to_the_tokens_of_the_span_only():
    ids = jnp.array([0, -1, 0, 1])
    loss = lambda x: pool(x, ids, 2)[0]  # noqa: E731
    np.testing.assert_allclose(jax.grad(loss)(jnp.arange(4.0)), [0.5, 0, 0.5, 0])


def test_spreading_then_pooling_gives_the_values_back():
    ids = jnp.array([[2, 0, 0, 1, -1]])
    values = jnp.array([[0.5, -2.0, 3.0]])
    tokens = spread_(values, ids, outside=9.0)
    np.testing.assert_array_equal(tokens, [[3, 0.5, 0.5, -2, 9]])
    np.testing.assert_array_equal(pool(tokens, ids, 3, "mean", 0.0), values)
    beyond = spread_(values, jnp.array([[3, 99, -7, 2, 0]]), outside=9.0)
    np.testing.assert_array_equal(beyond, [[9, 9, 9, 3, 0.5]])
    np.testing.assert_array_equal(spread_(jnp.zeros((1, 0)), ids, 4.0), np.full((1, 5), 4))


def test_index_of_a_token_in_its_span():
    # Spans of 3 and 1 tokens: two first tokens, one second, one third.
    ids = jnp.array([[-1, 0, 0, 0, -1, 1], [1, -1, 0, 1, 5, 1]])
    found = jax.jit(index_in_span, static_argnums=1)(ids, 2)
    np.testing.assert_array_equal(found, [[-1, 0, 1, 2, -1, 0], [0, -1, 0, 1, -1, 2]])


def test_pooling_names_what_is_wrong():
    with pytest.raises(ValueError, match="mean"):
        span_pool(jnp.ones(3), jnp.zeros(3, jnp.int32), 1, "meen")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(3,\)"):
        span_pool(jnp.ones(3), jnp.zeros((1, 3), jnp.int32), 1)


def test_no_tokens_at_all():
    none = jnp.zeros(0, jnp.int32)
    for how in POOLINGS:
        np.testing.assert_array_equal(span_pool(jnp.zeros(0), none, 2, how), [0, 0])
