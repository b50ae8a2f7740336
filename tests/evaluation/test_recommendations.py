"""Metrics of recommendations, by hand."""

import numpy as np
import pytest

from tokjax.evaluation import recommendations as metrics


def test_unfairness_of_the_example():
    dgu, mgu = metrics.unfairness(np.array([0.5, 0.3, 0.2]), np.array([0.7, 0.2, 0.1]))
    np.testing.assert_allclose([dgu, mgu], [0.3, 0.13333], atol=5e-6)


def test_divergences():
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.25, 0.5])
    np.testing.assert_allclose(metrics.kl(p, q), np.log(2))
    assert metrics.kl(q, p) == np.inf
    assert metrics.js(p, q) == metrics.js(q, p) < np.log(2)
    np.testing.assert_allclose(metrics.js(np.array([1.0, 0]), np.array([0.0, 1])), np.log(2))
    assert metrics.js(p, p) == 0


def test_groups_are_ordered_by_popularity_and_alike_in_size():
    groups = metrics.popularity_groups(np.arange(16.0), 8)
    assert groups.tolist() == [7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0]
    assert set(metrics.popularity_groups(np.ones(5), 2)) == {0, 1}


def test_frequencies_leave_out_what_is_no_item():
    np.testing.assert_allclose(metrics.frequencies([0, 2, 2, -1, -1], 4), [1 / 3, 0, 2 / 3, 0])
    assert not metrics.frequencies([-1], 2).any()


def test_words():
    assert metrics.word_diversity(["the end", "the end"]) == (1.0, 0.5)
    assert metrics.word_diversity([]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("at", "hit", "gain"), [(1, 0, 0), (2, 1, 1 / np.log2(3)), (5, 1, 0.63093)]
)
def test_hits(at, hit, gain):
    found = metrics.hits(np.array([[4, 2, 9]]), np.array([2]), at)
    np.testing.assert_allclose([a[0] for a in found], [hit, gain], atol=1e-5)
