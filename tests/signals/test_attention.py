import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax import signals

pytestmark = pytest.mark.usefixtures("strict_dtypes")
# Compiled as a whole, the way a step uses them.
attention_entropy = jax.jit(signals.attention_entropy)
attention_given = jax.jit(signals.attention_given)
attention_received = jax.jit(signals.attention_received, static_argnames="reduce")
attention_saliency = jax.jit(signals.attention_saliency, static_argnames="norm")
attention_sinks = jax.jit(signals.attention_sinks)
column_saliency = jax.jit(signals.column_saliency, static_argnames="norm")
row_saliency = jax.jit(signals.row_saliency, static_argnames="norm")
uniform_attention = jax.jit(signals.uniform_attention)
visible_pairs = jax.jit(signals.visible_pairs, static_argnames="include_self")
ALL = np.ones(4, bool)
TRIM = jnp.array([[1, 0, 0], [0.25, 0.75, 0], [0.2, 0.3, 0.5]])


def random_attention(rng, *leading, T):
    raw = np.tril(rng.random((*leading, T, T)) + 0.01)
    return jnp.asarray(raw / raw.sum(-1, keepdims=True), jnp.float32)


def test_sink_mass_of_uniform_attention():
    uniform = uniform_attention(visible_pairs(ALL))
    mass = attention_received(uniform, visible_pairs(ALL))
    np.testing.assert_allclose(mass[jnp.array([0, 3])], [0.520833, 0.25], atol=1e-6)
    # Without itself, the last key has no query: 0, not NaN.
    others = attention_received(uniform, visible_pairs(ALL, include_self=False))
    np.testing.assert_allclose(others, [(1 / 2 + 1 / 3 + 1 / 4) / 3, 7 / 24, 1 / 4, 0], atol=1e-6)


def test_row_and_column_saliency():
    visible, scope = visible_pairs(ALL[:3]), ALL[:3]
    rows = row_saliency(TRIM, visible)
    columns = column_saliency(TRIM, visible, scope)
    np.testing.assert_allclose(rows, [0, 0.188722, 0.062769], atol=1e-6)
    received = attention_received(TRIM, visible)
    np.testing.assert_allclose(received, [0.483333, 0.525, 0.5], atol=1e-6)
    np.testing.assert_allclose(columns, [0.920635, 1, 0.952381], atol=1e-6)
    saliency = attention_saliency(TRIM, visible, scope)
    np.testing.assert_allclose(saliency, [0.460317, 0.594361, 0.507575], atol=1e-6)


def test_saliency_of_uniform_and_of_one_hot_rows():
    visible = visible_pairs(ALL)
    assert np.abs(row_saliency(uniform_attention(visible), visible)).max() < 1e-6
    np.testing.assert_allclose(row_saliency(jnp.eye(4), visible), [0, 1, 1, 1], atol=1e-6)


def test_saliency_is_zero_outside_its_scope_and_scales_by_the_largest_inside():
    visible, scope = visible_pairs(ALL[:3]), jnp.array([True, False, True])
    columns = column_saliency(TRIM, visible, scope)
    np.testing.assert_allclose(columns, [0.483333 / 0.5, 0, 1], atol=1e-6)
    assert attention_saliency(TRIM, visible, scope)[1] == 0
    nothing = column_saliency(TRIM, visible, np.zeros(3, bool))
    np.testing.assert_array_equal(nothing, np.zeros(3))


def test_unnormalised_saliency_is_minus_entropy_and_the_column_sum():
    visible, scope = visible_pairs(ALL[:3]), ALL[:3]
    entropy = attention_entropy(TRIM, visible)
    np.testing.assert_allclose(entropy[1], -(0.25 * np.log(0.25) + 0.75 * np.log(0.75)), rtol=1e-6)
    mixed = attention_saliency(TRIM, visible, scope, norm="none")
    np.testing.assert_allclose(mixed, 0.5 * (TRIM.sum(0) - entropy), rtol=1e-6)
    with pytest.raises(ValueError, match="visible"):
        attention_saliency(TRIM, visible, scope, norm="visibel")  # type: ignore[arg-type]


def test_right_padding_changes_no_saliency():
    rng = np.random.default_rng(0)
    attention = random_attention(rng, T=5)
    padded = jnp.zeros((8, 8)).at[:5, :5].set(attention).at[5:, 0].set(1.0)
    real = jnp.arange(8) < 5
    short = attention_saliency(attention, visible_pairs(np.ones(5, bool)), np.ones(5, bool))
    long = attention_saliency(padded, visible_pairs(real), real)
    np.testing.assert_allclose(long, np.pad(short, (0, 3)), atol=1e-6)


def test_attention_on_a_class_of_tokens():
    scores = jnp.array([2.0, 1, 0, 1, 0])
    concepts = jnp.array([False, True, False, True, False])
    given = attention_given(jax.nn.softmax(scores)[None], concepts[None])
    np.testing.assert_allclose(given, [0.3667], atol=5e-4)
    assert attention_given(jax.nn.softmax(scores)[None], np.zeros((1, 5), bool)) == 0


def test_reductions_over_queries():
    visible = visible_pairs(ALL[:3], include_self=False)
    later = attention_received(TRIM, visible, "max")
    np.testing.assert_allclose(later, [0.25, 0.3, 0])
    np.testing.assert_allclose(attention_received(TRIM, visible, "sum"), [0.45, 0.3, 0], rtol=1e-6)
    with pytest.raises(ValueError, match="mean"):
        attention_received(TRIM, visible, "means")  # type: ignore[arg-type]


def test_pairs_stay_within_segments_and_real_tokens():
    pairs = visible_pairs(jnp.array([True, True, True, False]), jnp.array([0, 0, 1, 1]))
    expected = np.zeros((4, 4), bool)
    expected[[0, 1, 1, 2], [0, 0, 1, 2]] = True
    np.testing.assert_array_equal(pairs, expected)
    assert not visible_pairs(np.zeros(4, bool)).any()


def test_sinks_are_far_above_the_uniform_share_and_the_other_keys():
    T = 40
    attention = np.full((T, T), 0.0)
    for i in range(T):
        attention[i, : i + 1] = 0.1 / (i + 1)
        attention[i, 0] += 0.9 if i < 12 else 0.45
        attention[i, 12] += 0.0 if i < 12 else 0.45
    visible = visible_pairs(np.ones(T, bool))
    mass = attention_received(jnp.asarray(attention, jnp.float32), visible)
    share = attention_received(uniform_attention(visible), visible)
    found = attention_sinks(mass, share, np.ones(T, bool))
    np.testing.assert_array_equal(np.flatnonzero(found), [0, 12])
    output = jnp.arange(T) < 12
    np.testing.assert_array_equal(np.flatnonzero(attention_sinks(mass, share, output)), [0])
    assert not attention_sinks(share, share, np.ones(T, bool)).any()
    assert not attention_sinks(mass, share, np.zeros(T, bool)).any()


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 6), min_size=5, max_size=5), st.integers(0, 31), st.integers(1, 9))
def test_the_median_is_that_of_the_other_candidates(mass, bits, thirds):
    candidates = np.array([bits >> i & 1 for i in range(5)], bool)
    factor = np.float32(thirds / 3)
    found = attention_sinks(
        np.array(mass, np.float32), np.zeros(5, np.float32), candidates, over_median=factor
    )
    for i in range(5):
        others = [m for k, m in enumerate(mass) if candidates[k] and k != i]
        median = np.float32(np.median(others)) if others else np.float32(0)
        expected = candidates[i] and mass[i] > 0 and np.float32(mass[i]) > factor * median
        assert found[i] == expected
