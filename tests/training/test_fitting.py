"""Fits: weight decay, and an end before the last step."""

import jax.numpy as jnp
import numpy as np

from tokjax.training.fitting import adam_step, begin, fit


def test_decay_shrinks_weights_that_the_loss_does_not_move():
    state = begin({"w": jnp.array([2.0, -4.0])})
    still = lambda weights: 0.0 * weights["w"].sum()  # noqa: E731
    after, _ = adam_step(state, jnp.float32(0.1), still, decay=0.5)
    np.testing.assert_allclose(after.weights["w"], [1.9, -3.8], rtol=1e-6)
    plain, _ = adam_step(state, jnp.float32(0.1), still)
    np.testing.assert_array_equal(plain.weights["w"], state.weights["w"])


def test_a_fit_ends_where_it_is_told_to_and_stays_ended(tmp_path):
    calls = []

    def update(state, step):
        calls.append(step)
        return adam_step(state, jnp.float32(0.1), lambda weights: jnp.square(weights).sum())

    given = {
        "identity": lambda: {"x": 1},
        "checkpoint": tmp_path / "a.fit",
        "progress": False,
        "until": lambda state, steps: steps == 3,
    }
    weights, losses = fit(update, begin(jnp.ones(2)), 9, **given)
    assert calls == [0, 1, 2] and len(losses) == 3
    again, same = fit(update, begin(jnp.ones(2)), 9, **given)
    assert calls == [0, 1, 2]
    np.testing.assert_array_equal(again, weights)
    np.testing.assert_array_equal(same, losses)
