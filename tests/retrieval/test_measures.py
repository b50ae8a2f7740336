"""Measures of orders against numbers worked out by hand."""

import numpy as np
import pytest

from tokjax.retrieval.measures import kendall_tau, ndcg, reciprocal_rank


def test_ndcg_of_the_method():
    assert round(ndcg([3, 2, 0, 1]), 6) == 0.992620


def test_ndcg_looks_at_the_first_places_only():
    assert ndcg([0, 0, 3], k=2) == 0.0
    assert ndcg([3, 0, 1], k=1) == 1.0
    np.testing.assert_allclose(ndcg([0, 1], k=10), 1 / np.log2(3))
    # 7 / log2(2) at best, 3 / log2(2) found, where the best passage was not ranked at all.
    np.testing.assert_allclose(ndcg([2], k=1, ideal=[2, 3]), 3 / 7)


def test_a_query_without_relevant_passages_has_no_ndcg():
    assert np.isnan(ndcg([0, 0]))


@pytest.mark.parametrize(
    ("relevance", "k", "expected"),
    [([1, 0], None, 1.0), ([0, 2, 1], None, 0.5), ([0, 0, 1], 2, 0.0), ([0, 0], None, 0.0)],
)
def test_reciprocal_rank(relevance, k, expected):
    assert reciprocal_rank(relevance, k) == expected


def test_kendall_tau():
    assert kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == -1.0
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1.0
    # Ties: 4 of 6 pairs agree, 1 is tied in the first list and 1 in the second.
    np.testing.assert_allclose(kendall_tau([1, 1, 2, 3], [1, 2, 3, 3]), 4 / 5)
    assert np.isnan(kendall_tau([1, 1], [1, 2]))
