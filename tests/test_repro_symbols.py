"""Tasks of symbols without fixed meaning."""

import numpy as np
import pytest

from tokjax.reproduction.tasks.symbols import look_up, periodic, permuting, substituted


def test_a_substitution_is_a_bijection_of_its_own_for_each_text():
    ids = np.tile(np.arange(9), (3, 2))
    texts, keys = substituted(np.random.default_rng(0), ids, range(2, 9))
    assert (texts[:, :2] == [0, 1]).all()
    for text, key in zip(texts, keys, strict=True):
        assert sorted(key) == list(range(9))
        np.testing.assert_array_equal(text, key[np.tile(np.arange(9), 2)])
    assert (keys[0] != keys[1]).any() and (keys[1] != keys[2]).any()


def test_a_look_up_asks_for_a_key_and_wants_its_value():
    rng = np.random.default_rng(0)
    for _ in range(20):
        prompt, answer = look_up(rng, range(5, 25), 4)
        *shown, asked = prompt
        assert len(set(shown)) == 8 and shown[shown.index(asked) + 1] == answer
        assert shown.index(asked) % 2 == 0
    with pytest.raises(ValueError, match="8 different symbols of 6"):
        look_up(rng, range(6), 4)


def test_permutations_all_have_the_same_order():
    prompt, answer = permuting(np.random.default_rng(0), range(30), length=4, shown=2)
    lists = np.array(prompt[:16]).reshape(2, 2, 4)
    order = [list(lists[0, 0]).index(s) for s in lists[0, 1]]
    np.testing.assert_array_equal(lists[1, 0][order], lists[1, 1])
    assert [prompt[16:][o] for o in order] == answer


def test_periodic_sequences_repeat_distinct_symbols():
    rows = periodic(np.random.default_rng(0), 20, 14, 32, (2, 6))
    for row in rows:
        period = next(p for p in range(1, 14) if (row[p:] == row[:-p]).all())
        assert 2 <= period <= 6 and len(set(row[:period])) == period
