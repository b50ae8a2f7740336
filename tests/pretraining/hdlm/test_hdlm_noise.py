"""The two noises: weights, closed forms, score entropy and the reversed chain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from tokjax.errors import ConfigError
from tokjax.pretraining.hdlm import EpsilonHybrid, GammaHybrid
from tokjax.pretraining.hdlm.epsilon import Noised, random_tokens
from tokjax.pretraining.hdlm.gamma import transition

KEY = jax.random.key(3)
V, MASK = 4, 4


def kinds():
    """Three positions: masked, drawn for replacement, untouched; and one that is not active."""
    return Noised(
        jnp.array([[MASK, 1, 2, 3]]),
        jnp.array([[True, False, False, False]]),
        jnp.array([[False, True, False, False]]),
    )


def test_weights_of_the_epsilon_hybrid():
    active, p = jnp.array([[True, True, True, False]]), jnp.full((1, 4), 0.5)
    noise = EpsilonHybrid(epsilon=0.01, visible_weight=1.0)
    np.testing.assert_allclose(noise.weights(kinds(), active, p)[0], [2, 0.99, 0.01, 0], rtol=1e-6)
    noise = EpsilonHybrid(0.01, 1.0, divide_visible=True)
    np.testing.assert_allclose(noise.weights(kinds(), active, p)[0], [2, 1.98, 0.02, 0], rtol=1e-6)
    plain = EpsilonHybrid(0.0, 0.0)
    np.testing.assert_array_equal(plain.weights(kinds(), active, p)[0], [2, 0, 0, 0])
    tiny, one = jnp.full((1, 4), 1e-9), jnp.ones((1, 4))
    assert float(plain.weights(kinds(), active, tiny)[0, 0]) == pytest.approx(1e4)
    assert float(plain.weights(kinds(), active, one)[0, 0]) == 1  # one level: autoregression


def test_masks_and_random_ids_come_as_often_as_said():
    tokens = jnp.full((200, 200), 2)
    active = jnp.arange(200)[None] < jnp.full((200, 1), 150)
    p = jnp.broadcast_to(jnp.where(jnp.arange(200)[:, None] < 100, 0.2, 0.7), tokens.shape)
    found = EpsilonHybrid(epsilon=0.3).corrupt(KEY, tokens, active, p, MASK, MASK)
    masked, replaced = np.asarray(found.masked), np.asarray(found.replaced)
    assert not (masked | replaced)[:, 150:].any() and not (masked & replaced).any()
    assert masked[:100, :150].mean() == pytest.approx(0.2, abs=0.015)
    assert masked[100:, :150].mean() == pytest.approx(0.7, abs=0.015)
    assert replaced[:100, :150].mean() == pytest.approx(0.8 * 0.3, abs=0.015)
    ids = np.asarray(found.tokens)
    assert (ids[masked] == MASK).all() and (ids[~masked & ~replaced] == 2).all()
    # A random id may be the token itself, which then counts as replaced.
    shares = np.bincount(ids[replaced], minlength=5) / replaced.sum()
    np.testing.assert_allclose(shares, [0.25, 0.25, 0.25, 0.25, 0], atol=0.03)
    same = EpsilonHybrid(epsilon=0.0).corrupt(KEY, tokens, active, p, MASK, MASK)
    np.testing.assert_array_equal(same.masked, found.masked)
    assert not np.asarray(same.replaced).any()


def test_random_ids_leave_a_mask_among_them_out():
    ids = np.asarray(random_tokens(KEY, (4000,), 1, 4))
    np.testing.assert_allclose(
        np.bincount(ids, minlength=4) / 4000, [1 / 3, 0, 1 / 3, 1 / 3], atol=0.04
    )


def rates(gamma):
    """The rate matrix from column to row, the mask last."""
    absorb = -np.eye(V + 1)
    absorb[-1] += 1
    uniform = np.zeros((V + 1, V + 1))
    uniform[:V, :V] = 1 / V - np.eye(V)
    return (1 - gamma) * absorb + gamma * uniform


def matrix(gamma, sigma):
    """The closed form as a matrix from column to row."""
    found = transition(gamma, jnp.float32(sigma), V)
    full = np.full((V + 1, V + 1), float(found.other))
    np.fill_diagonal(full, float(found.stay))
    full[-1], full[:, -1] = float(found.mask), 0
    full[-1, -1] = 1
    return full


def test_the_closed_form_of_the_gamma_hybrid():
    found = transition(0.25, jnp.float32(0.7), V)
    assert float(found.stay) == pytest.approx(0.520328, abs=1e-6)
    assert float(found.other) == pytest.approx(0.023743, abs=1e-6)
    assert float(found.mask) == pytest.approx(0.408445, abs=1e-6)
    for gamma, sigma in ((0.25, 0.7), (0.0, 1.3), (1.0, 0.4), (0.6, -0.5)):
        exact = scipy.linalg.expm(sigma * rates(gamma))
        np.testing.assert_allclose(matrix(gamma, sigma), exact, atol=2e-6)
        np.testing.assert_allclose(matrix(gamma, sigma).sum(0), 1, atol=1e-6)
    absorbing, uniform = transition(0.0, jnp.float32(1.0), V), transition(1.0, jnp.float32(50.0), V)
    assert float(absorbing.other) == 0
    assert float(absorbing.mask) == pytest.approx(1 - np.exp(-1), abs=1e-6)
    assert float(uniform.mask) == 0 and float(uniform.stay) == pytest.approx(1 / V)


def test_gamma_corruption_has_the_frequencies_of_the_closed_form():
    noise = GammaHybrid(0.4)
    shape = (250, 400)
    found = noise.corrupt(
        KEY, jnp.full(shape, 1), jnp.ones(shape, bool), jnp.full(shape, 0.6), V, V
    )
    shares = np.bincount(np.asarray(found.tokens).ravel(), minlength=V + 1) / found.tokens.size
    np.testing.assert_allclose(shares, matrix(0.4, float(noise.sigma(0.6)))[:, 1], atol=0.006)


def test_noise_rises_to_its_clip_and_its_rate_is_the_derivative():
    noise = GammaHybrid(clip=5e-3)
    assert float(noise.sigma(jnp.float32(0))) == 0
    assert float(noise.sigma(jnp.float32(1))) == pytest.approx(-np.log(5e-3), rel=1e-4)
    slope = jax.grad(noise.sigma)(jnp.float32(0.7))
    assert float(noise.rate(jnp.float32(0.7))) == pytest.approx(float(slope), rel=1e-5)


def brute_force(noise, log_scores, present, clean, sigma):
    """The score entropy as its definition says, from the rate matrix and its exponential."""
    Q, P = rates(noise.gamma), matrix(noise.gamma, sigma)
    total = 0.0
    for y in range(V):
        if y == present or Q[present, y] == 0:
            continue
        s, r = np.exp(float(log_scores[y])), P[y, clean] / P[present, clean]
        total += Q[present, y] * (s - r * np.log(s) + (r * (np.log(r) - 1) if r else 0.0))
    return total


@pytest.mark.parametrize(
    ("gamma", "reading"), [(0.0, "denoiser"), (0.3, "denoiser"), (0.3, "score"), (1.0, "score")]
)
def test_score_entropy_is_that_of_its_definition(gamma, reading):
    noise = GammaHybrid(gamma, reading)
    pairs = [(x, c) for x in (0, 2, MASK) for c in (0, 1) if gamma < 1 or x != MASK]
    if gamma == 0:
        pairs = [(x, c) for x, c in pairs if x in (c, MASK)]  # nothing is replaced
    x, clean = (jnp.array(part) for part in zip(*pairs, strict=True))
    logits = jnp.broadcast_to(jax.random.normal(KEY, (V + 1,)), (len(pairs), V + 1))
    sigma = jnp.full(len(pairs), 0.7)

    @jax.jit
    def run(logits):
        def total(logits):
            each = noise.score_entropy(logits, x, clean, sigma, MASK)
            return each.sum(), each

        gradient, each = jax.grad(total, has_aux=True)(logits)
        return each, gradient, noise.log_scores(logits, x, sigma, MASK)

    found, gradient, scores = run(logits)
    exact = [brute_force(noise, s, *pair, 0.7) for s, pair in zip(scores, pairs, strict=True)]
    np.testing.assert_allclose(found, exact, rtol=2e-4, atol=1e-5)
    assert np.isfinite(gradient).all()


def true_logits(noise, prior, sigma):
    """Logits (reading `score`) under which all scores of a prior are right, for each present id."""
    P = matrix(noise.gamma, sigma)
    p = P[:, :V] @ prior
    with np.errstate(divide="ignore"):
        exact = np.log(p[None, :] / p[:, None])
    shift = noise.log_scores(
        jnp.zeros((V + 1, V + 1)), jnp.arange(V + 1), jnp.full(V + 1, sigma), MASK
    )
    return jnp.asarray(exact, jnp.float32) - shift, P, p


def test_score_entropy_is_least_at_the_true_scores():
    noise, prior, sigma = GammaHybrid(0.3), np.array([0.1, 0.2, 0.3, 0.4]), 0.9
    logits, P, _ = true_logits(noise, prior, sigma)

    def expected(logits):
        x, clean = jnp.meshgrid(jnp.arange(V + 1), jnp.arange(V), indexing="ij")
        loss = noise.score_entropy(
            logits[x.ravel()], x.ravel(), clean.ravel(), jnp.full(x.size, sigma), MASK
        )
        weights = jnp.asarray(P[:, :V] * prior).ravel()
        return (loss * weights).sum()

    run = jax.jit(jax.value_and_grad(expected))
    least, gradient = run(logits)
    off = np.ones((V + 1, V + 1), bool)
    off[:, MASK] = False
    np.fill_diagonal(off, False)
    np.testing.assert_allclose(np.asarray(gradient)[off], 0, atol=1e-6)
    assert float(run(logits + 0.3 * jax.random.normal(KEY, logits.shape))[0]) > float(least) + 1e-3
    sure = GammaHybrid(0.3)
    logits, _, _ = true_logits(sure, np.eye(V)[2], sigma)
    zero = sure.score_entropy(logits[:V], jnp.arange(V), jnp.full(V, 2), jnp.full(V, sigma), MASK)
    np.testing.assert_allclose(zero, 0, atol=1e-5)


def test_without_uniform_draws_a_denoiser_has_the_loss_of_masked_diffusion():
    noise, t = GammaHybrid(0.0, "denoiser"), jnp.float32(0.37)
    logits = jax.random.normal(KEY, (3, V + 1))
    clean = jnp.array([0, 3, 1])
    present = jnp.array([MASK, MASK, 1])
    found = noise.rate(t) * noise.score_entropy(
        logits, present, clean, jnp.full(3, noise.sigma(t)), MASK
    )
    nll = -jax.nn.log_softmax(logits[:, :V])[jnp.arange(3), clean]
    np.testing.assert_allclose(found, jnp.array([1, 1, 0]) * nll / t, rtol=1e-4, atol=1e-6)


def test_the_reversed_chain_goes_back_to_the_earlier_marginal():
    noise, prior = GammaHybrid(0.3), np.array([0.1, 0.2, 0.3, 0.4])
    for sigma, earlier in ((0.9, 0.5), (0.9, 0.0), (2.0, 2.0)):
        logits, _, p = true_logits(noise, prior, sigma)
        both = (jnp.full(V + 1, s) for s in (sigma, earlier))
        weights = np.exp(noise.reverse(logits, jnp.arange(V + 1), *both, MASK))
        back = weights / weights.sum(1, keepdims=True)
        np.testing.assert_allclose(p @ back, matrix(0.3, earlier)[:, :V] @ prior, atol=2e-5)


def test_impossible_noises_are_refused():
    for make, said in (
        (lambda: EpsilonHybrid(epsilon=1.5), "epsilon=1.5"),
        (lambda: EpsilonHybrid(visible_weight=-1.0), "visible_weight"),
        (lambda: GammaHybrid(gamma=-0.1), "gamma=-0.1"),
        (lambda: GammaHybrid(reading="scores"), "Did you mean 'score'"),
        (lambda: GammaHybrid(clip=0.0), "clip=0.0"),
    ):
        with pytest.raises(ConfigError, match=said):
            make()
