import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from tokjax import signals
from tokjax.signals import layer_divergences

pytestmark = pytest.mark.usefixtures("strict_dtypes")
# Compiled as a whole, the way a step uses them.
js_divergence = jax.jit(signals.js_divergence, static_argnames="form")
kl_divergence = jax.jit(signals.kl_divergence)
total_variation = jax.jit(signals.total_variation)


def log(*p):
    return jnp.log(jnp.asarray(p, jnp.float32))


@pytest.mark.parametrize(
    ("premature", "definition", "code"),
    [((0.4, 0.4, 0.1, 0.1), 0.006367, 0.001601), ((0.1, 0.2, 0.3, 0.4), 0.152158, 0.044456)],
)
def test_both_forms_of_jensen_shannon(premature, definition, code):
    final, early = log(0.5, 0.3, 0.1, 0.1), log(*premature)
    np.testing.assert_allclose(js_divergence(final, early), definition, atol=1e-6)
    np.testing.assert_allclose(js_divergence(final, early, "dola_code"), code, atol=1e-6)


def test_total_variation_of_uniform_rows():
    # The L1 distance of uniform distributions over n and n + 1 is 2 / (n + 1).
    for n, l1 in ((10, 0.181818), (100, 0.019802), (1000, 0.001998)):
        short = jnp.where(jnp.arange(n + 1) < n, -jnp.log(jnp.float32(n)), -jnp.inf)
        found = total_variation(short, jnp.full(n + 1, -jnp.log(jnp.float32(n + 1))))
        np.testing.assert_allclose(2 * found, l1, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 8))
def test_divergences_equal_scipy(seed, scale):
    logits = np.random.default_rng(seed).normal(size=(2, 3, 7)) * scale
    logp, logq = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
    p, q = (np.exp(np.asarray(a, np.float64)) for a in (logp, logq))
    np.testing.assert_allclose(kl_divergence(logp, logq), entropy(p, q, axis=-1), atol=2e-5)
    expected = jensenshannon(p, q, axis=-1) ** 2
    np.testing.assert_allclose(js_divergence(logp, logq), expected, atol=2e-6)
    np.testing.assert_allclose(js_divergence(logq, logp), expected, atol=2e-6)


def test_probabilities_of_zero_give_numbers():
    p, q = log(0.5, 0.5, 0), log(1, 0, 0)
    np.testing.assert_allclose(kl_divergence(q, p), np.log(2), rtol=1e-6)
    assert kl_divergence(p, q) == np.inf
    assert kl_divergence(p, p) == js_divergence(p, p) == 0
    np.testing.assert_allclose(js_divergence(log(1, 0), log(0, 1)), np.log(2), rtol=1e-6)
    # exp(-200) is 0 in float32, though its logarithm is finite.
    assert kl_divergence(jnp.array([0.0, -200.0]), log(1, 0)) == 0


def test_an_unknown_form_names_the_right_one():
    with pytest.raises(ValueError, match="definition"):
        js_divergence(log(1), log(1), "definitoin")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("one_for_all", "divergence"), [(True, js_divergence), (False, kl_divergence)]
)
def test_layer_divergences_equal_those_of_whole_logits(one_for_all, divergence):
    L, B, T, D, V = 3, 2, 35, 4, 11  # 70 tokens: one full run of 64 and a rest
    rng = np.random.default_rng(0)
    states, others = (jnp.asarray(rng.normal(size=(L, B, T, D)), jnp.float32) for _ in range(2))
    others = others[:1] if one_for_all else others
    table = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    logp, logq = (jax.nn.log_softmax(a @ table.T) for a in (states, others))
    found = jax.jit(lambda *a: layer_divergences(*a, divergence))(states, others, table)
    expected = divergence(logp, jnp.broadcast_to(logq, logp.shape))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_layer_divergences_name_shapes_that_do_not_fit():
    states = jnp.zeros((3, 1, 2, 4))
    with pytest.raises(ValueError, match=r"\(2, 1, 2, 4\)"):
        layer_divergences(states, states[:2], jnp.zeros((5, 4)))
