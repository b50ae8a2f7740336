"""Mining accuracy, margins and xSIM."""

import numpy as np
import pytest

from tokjax.errors import ConfigError, DataError
from tokjax.retrieval.mining import margin_scores, mining_accuracy, xsim

RNG = np.random.default_rng(0)
A = RNG.normal(size=(40, 8))


def test_translations_find_each_other_whatever_their_length():
    found = mining_accuracy(A, A * RNG.uniform(0.1, 9, (40, 1)))
    assert (found.forward, found.backward, found.mean) == (1, 1, 1)
    assert xsim(A, 3 * A) == 0


def test_both_directions_are_counted_on_their_own():
    first = np.array([[1.0, 0.0], [0.0, 1.0]])
    found = mining_accuracy(first, np.array([[1.0, 0.0], [1.0, 0.9]]))
    assert (found.forward, found.backward) == (1, 0.5)
    found = mining_accuracy(first, first[::-1])
    assert (found.forward, found.backward) == (0, 0)
    assert mining_accuracy(np.ones((4, 2)), np.ones((4, 2))).mean == 0.25  # a collapse


def test_hard_negatives_are_targets_too():
    near = A + 0.1 * RNG.normal(size=A.shape)
    assert xsim(A, near, margin="cosine") == 0
    worse = np.concatenate([near, A])  # each source stands among the targets itself
    assert xsim(A, worse, margin="cosine") == 1
    assert xsim(A, np.concatenate([A, near]), gold=np.arange(40), margin="cosine") == 0
    assert xsim(A, worse, gold=40 + np.arange(40), margin="cosine") == 0


def test_margins_by_hand():
    sources, targets = np.eye(2), np.array([[0.6, 0.8], [0.0, 1.0], [1.0, 0.0]])
    cosines = np.array([[0.6, 0.0, 1.0], [0.8, 1.0, 0.0]])
    np.testing.assert_allclose(margin_scores(sources, targets, "cosine"), cosines)
    near = (np.array([0.8, 0.9])[:, None] + np.array([0.7, 0.5, 0.5])) / 2
    np.testing.assert_allclose(margin_scores(sources, targets, "ratio", 2), cosines / near)
    np.testing.assert_allclose(margin_scores(sources, targets, "distance", 2), cosines - near)


def test_a_margin_corrects_for_a_target_that_is_near_to_everything():
    sources = np.array([[1.0, 0.2, 0.0], [1.0, -0.2, 0.0], [1.0, 0.0, 0.3]])
    hub = np.array([[1.0, 0.0, 0.0]])
    moved = sources + np.array([[0.0, 0.3, 0.0], [0.0, -0.3, 0.0], [0.0, 0.0, 0.4]])
    targets = np.concatenate([moved, hub])
    assert xsim(sources, targets, margin="cosine") == 1
    assert xsim(sources, targets, margin="ratio", neighbours=3) == 0


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(DataError, match="translation for each sentence"):
        mining_accuracy(A, A[:3])
    with pytest.raises(ConfigError, match="Did you mean 'cosine'"):
        xsim(A, A, margin="cosin")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="neighbours=0"):
        xsim(A, A, neighbours=0)
    with pytest.raises(DataError, match="gold must name one of 3 targets"):
        xsim(A, A[:3])
    with pytest.raises(DataError, match="with one D"):
        margin_scores(A, A[:, :3])
    assert np.isfinite(margin_scores(np.zeros((2, 3)), A[:5, :3])).all()
