"""Losses of rankings against numbers worked out by hand, and what changes none of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.retrieval.losses import distillation_kl, lambdarank, listnet, ranknet, softmax_ce

S, T, FIRST = (jnp.array(x) for x in ([1.0, 0.0, -1.0], [3.0, 1.0, 2.0], [1.0, 0.0, 0.0]))


def kl2(scores, relevance):
    return distillation_kl(scores, relevance, 2.0)


def hard(scores, relevance):
    return ranknet(scores, relevance, hard=True)


LOSSES = [softmax_ce, ranknet, hard, listnet, lambdarank, kl2]


def test_the_numbers_of_the_method():
    pairs, ce = ranknet(S, FIRST), softmax_ce(S, FIRST)
    kl = distillation_kl(S, T, 2.0)
    mixed = 0.5 * pairs + 0.5 * ce
    found = [ranknet(S, T), pairs, ce, mixed, kl, 0.9 * mixed + 0.1 * kl]
    expected = [0.713865, 0.686759, 0.407606, 0.547182, 0.241744, 0.516638]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_no_divergence_from_a_teacher_with_the_same_scores():
    for temperature in (0.5, 1.0, 2.0):
        np.testing.assert_allclose(distillation_kl(T, T, temperature), 0.0, atol=1e-7)
        np.testing.assert_allclose(distillation_kl(T, T + 5, temperature), 0.0, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_constant_of_each_query_changes_nothing(loss):
    scores = jnp.stack([S, T])
    moved = scores + jnp.array([[3.0], [-7.0]])
    labels = jnp.array([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    np.testing.assert_allclose(loss(moved, labels), loss(scores, labels), rtol=1e-5)
    one, two = (jax.grad(lambda s: loss(s, labels).sum())(s) for s in (scores, moved))
    np.testing.assert_allclose(one, two, atol=1e-6)
    np.testing.assert_allclose(one.sum(-1), 0.0, atol=1e-6)


@pytest.mark.parametrize("loss", [ranknet, hard])
def test_equal_targets_are_met_best_by_equal_scores(loss):
    equal = jnp.full(4, 0.7)
    np.testing.assert_allclose(loss(jnp.zeros(4), equal), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(loss)(jnp.zeros(4), equal), 0.0, atol=1e-7)
    assert loss(jnp.array([0.1, 0.0, 0.0, 0.0]), equal) > np.log(2)


def test_soft_labels_are_not_hard_ones():
    """A soft target is met by a difference of 1, a hard one never."""
    apart = jnp.array([1.0, 0.0])
    np.testing.assert_allclose(jax.grad(ranknet)(apart, apart), 0.0, atol=1e-7)
    assert jax.grad(hard)(apart, apart)[0] < -0.2
    p = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(ranknet(apart, apart), -p * np.log(p) - (1 - p) * np.log(1 - p))
    np.testing.assert_allclose(hard(apart, apart), -np.log(p), rtol=1e-6)


def test_the_first_of_the_most_relevant_passages_is_the_positive_one():
    scores = jnp.array([0.0, 1.0, 2.0])
    logp = np.asarray(scores) - np.log(np.exp(np.asarray(scores)).sum())
    for labels, best in (([0, 2, 2], 1), ([0, 0, 0], 0), ([1, 2, 3], 2)):
        np.testing.assert_allclose(softmax_ce(scores, jnp.array(labels, float)), -logp[best], 1e-6)


def test_listnet_is_the_divergence_of_chances_to_come_first():
    p, q = (np.exp(np.asarray(x)) / np.exp(np.asarray(x)).sum() for x in (T, S))
    np.testing.assert_allclose(listnet(S, T), (p * np.log(p / q)).sum(), rtol=1e-5)


def naive_lambdarank(scores, relevance):
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    place = {item: at for at, item in enumerate(order)}
    gain = [2.0**r - 1 for r in relevance]
    ideal = sum(g / np.log2(at + 2) for at, g in enumerate(sorted(gain, reverse=True)))
    total = 0.0
    for i in range(len(scores)):
        for j in range(len(scores)):
            if relevance[i] > relevance[j]:
                moved = 1 / np.log2(place[i] + 2) - 1 / np.log2(place[j] + 2)
                change = abs((gain[i] - gain[j]) * moved) / ideal
                total += change * np.log1p(np.exp(scores[j] - scores[i]))
    return total


@settings(deadline=None, max_examples=30)  # programs are compiled
@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 3)), min_size=4, max_size=4))
def test_lambdarank_is_its_definition(rows):
    scores, relevance = np.array(rows, np.float32).T
    scores = scores / 3
    expected = naive_lambdarank(scores.tolist(), relevance.tolist())
    np.testing.assert_allclose(lambdarank(scores, relevance), expected, rtol=1e-4, atol=1e-6)


def test_lambdarank_is_turned_by_the_labels_not_by_the_places():
    """The relevant passage is raised wherever it lies among the inputs."""
    for labels in ([1.0, 0.0, 0.0], [0.0, 0.0, 1.0]):
        gradient = jax.grad(lambdarank)(S, jnp.array(labels))
        assert gradient[int(np.argmax(labels))] < 0
    assert lambdarank(S, jnp.zeros(3)) == 0
    assert not jax.grad(lambdarank)(S, jnp.zeros(3)).any()


def test_the_teacher_gets_no_gradient():
    assert not jax.grad(lambda t: distillation_kl(S, t, 2.0))(T).any()


@pytest.mark.parametrize("loss", LOSSES)
def test_extreme_scores_stay_finite(loss):
    scores = jnp.array([1e4, -1e4, 0.0])
    for relevance in (FIRST, FIRST[::-1]):
        value, gradient = jax.value_and_grad(loss)(scores, relevance)
        assert np.isfinite(value) and np.isfinite(gradient).all()
