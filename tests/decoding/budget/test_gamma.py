import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tokjax.decoding.budget import (
    Reliability,
    finish_probability,
    fit_gamma,
    gamma_nll,
    guided_logits,
    mean_length,
    mode_length,
)
from tokjax.errors import ConfigError, DataError

P = jnp.array([0.5, 0.3, 0.15, 0.05])
ALPHA, RATE = jnp.array([40.0, 60.0, 75.0, 52.0]), jnp.array([10.0, 12.0, 12.0, 10.0])
PAPER, OFF = Reliability.of(Reliability()), Reliability.of(None)


def guided(budget, alpha=ALPHA, rate=RATE, reliability=PAPER, p=P):
    return jax.nn.softmax(guided_logits(jnp.log(p), jnp.float32(budget), alpha, rate, reliability))


@pytest.mark.parametrize(("length", "nll"), [(1, 3.6565), (99, 1.94977), (999, 3.78178)])
def test_nll_is_minus_the_log_density_of_the_log_length(length, nll):
    found = gamma_nll(jnp.float32(length), jnp.float32(5), jnp.float32(1.5))
    np.testing.assert_allclose(found, nll, atol=5.1e-5)
    density = scipy.stats.gamma.logpdf(np.log(length + 1), 5, scale=1 / 1.5)
    np.testing.assert_allclose(found, -density, atol=1e-5)


def test_nll_and_its_gradient_are_finite_at_every_extreme():
    lengths, alpha, rate = jnp.meshgrid(
        jnp.array([0.0, 1, 1e6]), jnp.array([0.0, 1e-6, 1, 3e3]), jnp.array([0.0, 1e-6, 1, 3e3])
    )
    gradients = jax.grad(lambda *given: gamma_nll(*given).sum(), argnums=(1, 2))
    for found in (gamma_nll(lengths, alpha, rate), *gradients(lengths, alpha, rate)):
        assert jnp.isfinite(found).all()


def test_a_shape_of_one_is_the_exponential_distribution():
    found = finish_probability(jnp.expm1(0.7), jnp.ones(1), 2 * jnp.ones(1))
    np.testing.assert_allclose(found, 0.753403, atol=1e-6)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (30, [0.9873, 0.0111, 0.0000, 0.0016]),
        (100, [0.8115, 0.1658, 0.0020, 0.0206]),
        (300, [0.5995, 0.3124, 0.0418, 0.0463]),
        (1000, [0.5147, 0.3077, 0.1268, 0.0507]),
    ],
)
def test_guided_probabilities_are_the_papers(budget, expected):
    np.testing.assert_allclose(guided(budget), expected, atol=5.1e-5)


def test_lengths_at_mode_and_mean():
    assert PAPER.passed(ALPHA, RATE).all()
    np.testing.assert_allclose(mode_length(ALPHA, RATE), [48.4, 135.5, 475.6, 163.0], atol=0.05)
    np.testing.assert_allclose(mean_length(ALPHA, RATE), [53.6, 147.4, 517.0, 180.3], atol=0.05)


def test_no_limit_and_equal_predictions_change_nothing():
    logits = jax.random.normal(jax.random.key(0), (3, 50)) * 5
    alpha, rate = jnp.exp(jax.random.normal(jax.random.key(1), (2, 3, 50)))
    found = guided_logits(logits, jnp.full(3, jnp.inf), alpha, rate, OFF)
    np.testing.assert_array_equal(found, logits)
    for budget in (1, 30, 1000):
        same = guided(budget, alpha=jnp.full(4, 40.0), rate=jnp.full(4, 10.0))
        np.testing.assert_allclose(same, P, atol=1e-6)


def test_a_smaller_budget_shifts_probability_to_shorter_thinking():
    alpha, rate = jnp.array([40.0, 50.0, 60.0]), jnp.full(3, 12.0)
    p = jnp.array([0.2, 0.3, 0.5])
    found = np.array([guided(b, alpha, rate, p=p) for b in (400, 200, 100, 50, 25)])
    assert (np.diff(found[:, 0] / found[:, 1]) > 0).all()
    assert (np.diff(found[:, 1] / found[:, 2]) > 0).all()


@pytest.mark.parametrize(
    ("alpha", "rate"),
    [
        (100.0, 9.9),  # too vague
        (1.0, 10.0),  # no peak
        (7.3, 10.0),  # peak at .878 tokens
    ],
)
def test_unreliable_predictions_get_no_probability(alpha, rate):
    alphas, rates = ALPHA.at[1].set(alpha), RATE.at[1].set(rate)
    found = guided(300, alphas, rates)
    assert found[1] == 0
    np.testing.assert_allclose(found.sum(), 1, atol=1e-6)
    assert guided(300, alphas, rates, OFF)[1] > 0
    one = jnp.ones(4)
    np.testing.assert_array_equal(guided(300, alpha * one, rate * one), [1, 0, 0, 0])


def test_the_thresholds_themselves():
    # Rate 10 is enough, shape 1 is not, and a peak at .9 tokens is.
    peak = 1 + 10 * float(np.log(1.9001))
    passed = PAPER.passed(jnp.array([peak, 1.0, 7.3]), jnp.array([10.0, 10.0, 10.0]))
    assert passed.tolist() == [True, False, False]


def test_where_nothing_can_end_in_time_the_likeliest_token_is_taken():
    # Probabilities of the shortest budget below what float32 holds.
    found = guided(1, alpha=3000 * jnp.ones(4), rate=10 * jnp.ones(4))
    np.testing.assert_array_equal(found, [1, 0, 0, 0])
    # The only reliable token is one that the model excludes.
    rates = jnp.array([9.0, 9.0, 12.0, 9.0])
    np.testing.assert_array_equal(guided(300, ALPHA, rates, p=P.at[2].set(0.0)), [1, 0, 0, 0])


def test_rows_have_budgets_of_their_own():
    logits = jnp.log(jnp.stack([P, P]))
    both = guided_logits(logits, jnp.array([30.0, 300.0]), ALPHA[None], RATE[None], PAPER)
    found = jax.nn.softmax(both)
    np.testing.assert_allclose(found, [guided(30), guided(300)], atol=1e-6)


def test_the_constant_gamma_is_the_maximum_of_the_likelihood():
    lengths = np.random.default_rng(0).integers(1, 2000, 500)
    alpha, rate = fit_gamma(lengths)
    shape, _, scale = scipy.stats.gamma.fit(np.log1p(lengths), floc=0)
    np.testing.assert_allclose([alpha, rate], [shape, 1 / scale], rtol=1e-3)
    nll = lambda a, r: gamma_nll(jnp.float32(lengths), jnp.float32(a), jnp.float32(r)).mean()  # noqa: E731
    for a, r in ((1.03, 1), (0.97, 1), (1, 1.03), (1, 0.97)):
        assert nll(a * alpha, r * rate) > nll(alpha, rate)
    for wrong in ([], [5], [5, 5], [0, 5]):
        with pytest.raises(DataError, match="cannot be fitted"):
            fit_gamma(wrong)


def test_thresholds_that_are_no_numbers_are_refused():
    with pytest.raises(ConfigError, match="rate=nan"):
        Reliability.of(Reliability(rate=np.nan))
