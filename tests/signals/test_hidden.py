import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax import signals
from tokjax.signals import l2_norm

pytestmark = pytest.mark.usefixtures("strict_dtypes")
# Compiled as a whole, the way a step uses them.
cosine = jax.jit(signals.cosine)
cosine_to_bos = jax.jit(signals.cosine_to_bos)
layer_deltas = jax.jit(signals.layer_deltas)
massive_activations = jax.jit(signals.massive_activations)
position_deltas = jax.jit(signals.position_deltas)
previous_states = jax.jit(signals.previous_states, static_argnames="shift")
token_deltas = jax.jit(signals.token_deltas, static_argnames="shift")
BOS_ROWS = jnp.array([[1.0, 0], [1, 1], [0, 2], [-3, 0]])


def random(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def test_cosine_to_bos():
    cosines = cosine_to_bos(BOS_ROWS[None])[0]
    np.testing.assert_allclose(cosines, [1, 0.707107, 0, -1], atol=1e-6)
    np.testing.assert_allclose(jnp.square(cosines[1:]).mean(), 0.5, rtol=1e-6)
    np.testing.assert_allclose(jnp.square(cosines).mean(), 0.625, rtol=1e-6)


def test_cosine_to_the_bos_of_each_packed_document():
    states = random(2, 1, 5, 3)
    found = cosine_to_bos(states, jnp.array([[0, 0, 2, 2, 2]]))
    np.testing.assert_allclose(found[..., 2:], cosine_to_bos(states[..., 2:, :]), rtol=1e-6)
    np.testing.assert_allclose(found[..., [0, 2]], 1, rtol=1e-6)


@settings(deadline=None, max_examples=25)
@given(st.floats(0.01, 100), st.floats(0, 6))
def test_squared_cosine_ignores_scale_sign_and_rotation(scale, angle):
    turn = jnp.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], jnp.float32)
    changed = (BOS_ROWS * jnp.array([1, -scale, 1, scale])[:, None]) @ turn
    expected = jnp.square(cosine_to_bos(BOS_ROWS[None]))
    np.testing.assert_allclose(jnp.square(cosine_to_bos(changed[None])), expected, atol=1e-5)


def test_gradient_of_the_cosine_is_orthogonal_to_its_vector_and_finite_at_zero():
    gradient_of = jax.jit(jax.grad(lambda h: jnp.square(cosine_to_bos(h[None])).sum()))
    rows = np.asarray(BOS_ROWS) + np.float32(0.3)
    np.testing.assert_allclose((np.asarray(gradient_of(rows)) * rows).sum(-1), 0, atol=1e-6)
    assert np.isfinite(gradient_of(np.zeros_like(rows))).all()
    np.testing.assert_array_equal(jax.jit(jax.grad(l2_norm))(np.zeros(3, np.float32)), np.zeros(3))
    assert cosine(jnp.zeros(3), jnp.ones(3)) == 0


def test_differences_of_bfloat16_states_are_taken_in_float32():
    states = random(2, 1, 3, 4, dtype=jnp.bfloat16)
    wide = np.asarray(states, np.float64)
    np.testing.assert_array_equal(layer_deltas(states), wide[1:] - wide[:-1])
    np.testing.assert_array_equal(token_deltas(states)[..., 1:, :], np.diff(wide, axis=-2))
    ends = position_deltas(states, jnp.array([0]), jnp.array([2]))
    np.testing.assert_array_equal(ends, wide[..., 2, :] - wide[..., 0, :])
    assert ends.dtype == jnp.float32


def test_no_delta_reaches_over_a_document_or_before_the_first_token():
    states, segments = random(2, 1, 5, 3), jnp.array([[7, 7, 8, 8, 8]])
    earlier, exists = previous_states(states, segments)
    np.testing.assert_array_equal(exists, [[False, True, False, True, True]])
    assert not np.asarray(earlier[..., [0, 2], :]).any()
    np.testing.assert_array_equal(earlier[..., [1, 3, 4], :], states[..., [0, 2, 3], :])
    assert not np.asarray(token_deltas(states, segments)[..., [0, 2], :]).any()
    _, exists = previous_states(states, segments, shift=2)
    np.testing.assert_array_equal(exists, [[False, False, False, False, True]])
    _, exists = previous_states(states, shift=9)
    assert not exists.any()
    with pytest.raises(ValueError, match="shift=0"):
        previous_states(states, shift=0)


def test_the_future_does_not_move_a_delta():
    states = random(2, 1, 6, 3)
    changed = states.at[..., 4:, :].add(1.0)
    deltas = token_deltas
    np.testing.assert_array_equal(deltas(states)[..., :4, :], deltas(changed)[..., :4, :])
    assert np.abs(deltas(states) - deltas(changed))[..., 4, :].min() > 0.9


def test_nearest_centroid_of_deltas():
    success = jnp.array([[[1.0, 0], [2, 0]], [[1, 2], [2, 2]]]).mean(0)
    failure = jnp.array([[[-1.0, 0], [0, 0]], [[-1, -2], [0, -2]]]).mean(0)
    # States whose rows change by [[1, 1], [1, 0]] between positions 1 and 3.
    states = random(2, 1, 4, 2)
    new = jnp.array([[1.0, 1], [1, 0]])
    states = states.at[:, 0, 3].set(states[:, 0, 1] + new)
    delta = position_deltas(states, jnp.array([1]), jnp.array([3]))[:, 0]
    distances = [l2_norm(delta - centre).mean(-1) for centre in (success, failure)]
    np.testing.assert_allclose(distances, [0.707107, 2.121320], atol=1e-6)
    same = position_deltas(states, jnp.array([2]), jnp.array([2]))
    np.testing.assert_array_equal(same, np.zeros((2, 1, 2)))


def test_massive_activations_name_token_and_feature():
    states = random(2, 2, 6, 8)
    states = states.at[0, 0, 0, 3].set(-5000.0).at[1, 0, 5, 2].set(7e3)
    mask = jnp.array([[True] * 5 + [False], [True] * 6])
    found = massive_activations(states, mask)
    np.testing.assert_array_equal(np.argwhere(found.massive), [[0, 0, 0]])
    assert found.largest[0, 0, 0] == 5000 and found.feature[0, 0, 0] == 3
    assert found.largest[1, 0, 5] == 0  # filling
    for layer in range(2):
        sizes = np.abs(np.asarray(states[layer], np.float64))[np.asarray(mask)]
        np.testing.assert_allclose(found.median[layer], np.median(sizes), rtol=1e-6)


def test_both_thresholds_must_be_passed():
    states, mask = jnp.ones((1, 3, 4)).at[0, 1, 2].set(150.0), np.ones((1, 3), bool)
    assert not massive_activations(states, mask).massive.any()
    relative = massive_activations(states, mask, over_zero=0.0, over_median=100.0)
    np.testing.assert_array_equal(relative.massive, [[False, True, False]])
    nothing = massive_activations(states, np.zeros((1, 3), bool), 0.0, 0.0)
    assert not nothing.massive.any() and nothing.median == 0
