"""Speed of learning by type, gaps between bins, and the closed form of what a penalty costs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tokjax.signals.type_learning import (
    fairness,
    learning_area,
    learning_step,
    penalised_logit,
    penalised_loss,
)
from tokjax.signals.type_statistics import frequency_bins, init_type_stats, update_type_stats

CLASSES = 10
PROBABILITIES = (0.5, 0.1, 0.01)
LOSSES = {
    0.001: (0.0120, 0.0480, 0.3312),
    0.01: (0.0865, 0.3312, 1.5570),
    0.1: (0.5787, 1.5570, 2.2140),
}


def gathered(ids, losses, vocabulary):
    ids, losses = np.asarray([ids], np.int32), np.asarray([losses], np.float32)
    return update_type_stats(init_type_stats(vocabulary), ids, losses, np.ones(ids.shape, bool))


@pytest.mark.parametrize("decay", list(LOSSES))
def test_what_a_penalty_costs_contexts(decay):
    found = [penalised_loss(decay / p, CLASSES) for p in PROBABILITIES]
    np.testing.assert_allclose(found, LOSSES[decay], atol=5e-5)


def test_equal_ratios_have_equal_losses():
    assert penalised_loss(0.001 / 0.01, 10) == pytest.approx(penalised_loss(0.01 / 0.1, 10))
    assert penalised_loss(1e-9, 10) < 1e-6  # without a penalty nothing is lost
    np.testing.assert_allclose(penalised_loss(1e9, 10), np.log(10), rtol=1e-6)
    a = penalised_logit(0.02, 10)
    q = np.exp(a) / (np.exp(a) + 9 * np.exp(-a / 9))
    np.testing.assert_allclose(a, (1 - q) / 0.02, rtol=1e-9)


@pytest.mark.parametrize("decay", list(LOSSES))
def test_gradient_descent_meets_the_closed_form(decay):
    p = jnp.asarray(PROBABILITIES)

    def objective(w):
        nll = -jax.nn.log_softmax(w)[:, 0]
        return (p * nll).sum() + decay / 2 * jnp.square(w).sum()

    @jax.jit
    def fit(w):
        solver = optax.adam(optax.exponential_decay(0.3, 500, 0.3))

        def step(carry, _):
            w, state = carry
            updates, state = solver.update(jax.grad(objective)(w), state)
            return (optax.apply_updates(w, updates), state), None

        (w, _), _ = jax.lax.scan(step, (w, solver.init(w)), length=4000)
        return w

    w = fit(jnp.zeros((3, CLASSES)))
    np.testing.assert_allclose(-jax.nn.log_softmax(w)[:, 0], LOSSES[decay], atol=1e-4)
    at = [penalised_logit(decay / each, CLASSES) for each in PROBABILITIES]
    np.testing.assert_allclose(w[:, 0], at, rtol=2e-3)
    np.testing.assert_allclose(w[:, 1:], -np.array(at)[:, None] / 9 * np.ones(9), rtol=5e-3)


def test_micro_and_macro_and_the_gap():
    stats = gathered([0] * 8 + [1, 1], [0.1] * 8 + [2.0, 3.0], 4)
    bins = frequency_bins(np.array([80, 20, 5, 0]), 3)
    found = fairness(stats, bins, 3)
    assert (found.micro, found.macro) == (pytest.approx(0.58), pytest.approx(1.3))
    # Type 2 was trained on but never seen here: the bin of type 1 is the rarest with values.
    assert found.gap == pytest.approx(2.5 - 0.1)
    assert int(found.bins.types.sum()) == 2 and int(found.bins.count.sum()) == 10


def test_a_uniform_model_has_no_gap():
    ids = np.random.default_rng(0).integers(0, 50, 400)
    counts = np.bincount(ids, minlength=50)
    stats = gathered(ids, np.full(400, np.log(50)), 50)
    for num, by in ((10, "types"), (4, "mass")):
        found = fairness(stats, frequency_bins(counts, num, by), num)
        assert abs(found.gap) < 1e-5
        np.testing.assert_allclose([found.micro, found.macro], np.log(50), rtol=1e-6)


def test_bins_leave_no_type_and_no_mass_out():
    counts = np.random.default_rng(0).zipf(1.5, 300) - 1
    for by in ("types", "mass"):
        bins = frequency_bins(counts, 7, by)
        assert sum((bins == b).sum() for b in range(7)) == (counts > 0).sum()
        assert sum(counts[bins == b].sum() for b in range(7)) / counts.sum() == 1.0


def test_nothing_to_average_is_refused():
    with pytest.raises(ValueError, match="no type"):
        fairness(init_type_stats(3), np.array([0, 0, 1]), 2)


def test_the_first_step_below_the_middle():
    losses = np.array([[4.0, 4, 4, np.nan], [1, 3.5, 5, np.nan], [0, 2, 4, np.nan]])
    np.testing.assert_array_equal(learning_step([0, 10, 20], losses), [10, 20, np.nan, np.nan])
    area = learning_area([0, 10, 20], losses)
    np.testing.assert_allclose(area[:2], [0.375, 0.625])
    assert np.isnan(area[2:]).all()  # what does not fall has no speed


def test_steps_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="must rise"):
        learning_step([0, 0], np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"\[S\] and \[S, V\]"):
        learning_area([0], np.zeros((1, 3)))
    with pytest.raises(ValueError, match="ratio=0"):
        penalised_loss(0.0, 10)
