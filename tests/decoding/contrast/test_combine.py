import hypothesis
import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from tokjax.decoding.contrast.combine import (
    SCORED,
    contrast,
    log_probabilities,
    plausible,
    restrict,
    sequence_score,
    weighted_sum,
)


def logp(*probabilities):
    return jnp.log(jnp.array(probabilities, jnp.float32))


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(
    arrays.arrays(np.float32, (3, 7), elements=st.floats(-60, 60, width=32)),
    st.floats(0, 5),
    st.integers(1, 7),
)
def test_a_row_keeps_its_likeliest_tokens_whatever_the_share(logits, share, min_keep):
    kept = np.asarray(plausible(log_probabilities(logits), share, min_keep))
    assert (kept.sum(-1) >= min_keep).all()
    assert kept[np.arange(3), logits.argmax(-1)].all()
    assert plausible(log_probabilities(logits), 0.0).all()


def test_plausible_tokens_have_a_share_of_the_largest_probability():
    p = logp(0.40, 0.35, 0.15, 0.07, 0.03)
    assert plausible(p, 0.1).tolist() == [True, True, True, True, False]
    assert plausible(p, 0.9).tolist() == [True, False, False, False, False]
    assert plausible(p, 0.9, min_keep=3).tolist() == [True, True, True, False, False]
    shares = jnp.array([0.1, 0.5])
    assert plausible(jnp.stack([p, p]), shares).sum(-1).tolist() == [4, 2]


def test_a_contrast_of_weight_zero_is_bitwise_the_expert():
    expert, amateur = (
        log_probabilities(jax.random.normal(jax.random.key(i), (2, 50))) for i in range(2)
    )
    np.testing.assert_array_equal(contrast(expert, amateur, 0.0), expert)
    mixed = contrast(expert, amateur, jnp.array([0.0, 2.0]))
    np.testing.assert_array_equal(mixed[0], expert[0])
    np.testing.assert_allclose(mixed[1], 3 * expert[1] - 2 * amateur[1], rtol=1e-6)


def test_impossible_tokens_give_no_nan():
    expert, amateur = logp(0.5, 0.5, 0.0, 0.0), logp(0.5, 0.0, 0.5, 0.0)
    for alpha in (0.0, 1.0, -0.5):
        scores = contrast(expert, amateur, alpha)
        assert jnp.isneginf(scores[2:]).all()
        assert jnp.isfinite(scores[:2]).all()
    assert not jnp.isnan(jax.nn.softmax(contrast(expert, amateur, 1.0))).any()


def test_constants_of_a_row_change_no_distribution():
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(2, 4, 9)).astype(np.float32)
    mix = lambda a, b: jax.nn.softmax(  # noqa: E731
        weighted_sum([log_probabilities(a), log_probabilities(b)], [1.7, -0.7])
    )
    np.testing.assert_allclose(mix(one + 3, two - 5), mix(one, two), atol=1e-6)


def test_scores_of_answers_are_sums_with_a_finite_sentinel():
    scores = restrict(logp(0.7, 0.3), jnp.array([True, False]), SCORED)
    rows = jnp.stack([scores, scores, scores])
    np.testing.assert_allclose(
        sequence_score(rows, jnp.array([0, 1, 0])), 2 * np.log(0.7) - 1000, rtol=1e-6
    )
