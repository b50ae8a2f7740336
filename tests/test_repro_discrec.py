"""The made-up catalogue of the reproduction: tastes say nothing of meaning, arms fit each other."""

import numpy as np

from tokjax.reproduction.tasks import tastes


def test_each_group_is_followed_by_one_other_about_as_often_as_told():
    own = tastes.groups(0, 60, 6)
    assert np.bincount(own).tolist() == [10] * 6
    found = np.array(tastes.sequences(0, 400, 6, 60, 6))
    assert found.shape == (400, 6)
    pairs = np.zeros((6, 6))
    np.add.at(pairs, (own[found[:, :-1]].ravel(), own[found[:, 1:]].ravel()), 1)
    shares = pairs / pairs.sum(1, keepdims=True)
    # .8, and of the rest a sixth.
    np.testing.assert_allclose(shares.max(1), 0.8 + 0.2 / 6, atol=0.06)
    assert sorted(shares.argmax(1).tolist()) == list(range(6))


def test_groups_say_nothing_about_embeddings():
    x, own = tastes.embeddings(0, 300), tastes.groups(0, 300, 20)
    near = np.square(x[:, None] - x[None]).sum(-1) + 1e9 * np.eye(300)
    same = (own[near.argmin(1)] == own).mean()
    assert same < 0.12  # a twentieth by chance
