import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax import signals
from tokjax.signals import init_moments, init_pair_cosines

pytestmark = pytest.mark.usefixtures("strict_dtypes")
# Compiled as a whole, the way a step uses them.
effective_rank = jax.jit(signals.effective_rank, static_argnames="kind")
mean_pair_cosine = jax.jit(signals.mean_pair_cosine)
merge_moments = jax.jit(signals.merge_moments)
merge_pair_cosines = jax.jit(signals.merge_pair_cosines)
pair_cosines = jax.jit(signals.pair_cosines)
spectral_anisotropy = jax.jit(signals.spectral_anisotropy)
spectrum = jax.jit(signals.spectrum, static_argnames="centred")
state_moments = jax.jit(signals.state_moments)


def batch(seed, B=3, T=5, D=4, shift=1.0):
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(B, T, D)) + shift
    return jnp.asarray(states, jnp.float32), jnp.asarray(rng.random((B, T)) < 0.7)


def rows(*batches):
    return np.concatenate([np.asarray(x, np.float64)[np.asarray(m)] for x, m in batches])


def assert_trees_close(a, b, rtol=1e-5, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def test_effective_rank_of_a_known_spectrum():
    energies = jnp.array([4.0, 1, 9, 16])  # singular values 2, 1, 3, 4
    for share, rank in ((0.9, 3), (0.8, 2), (1.0, 4)):
        assert effective_rank(energies, share=share) == rank
    p = np.array([0.4, 0.3, 0.2, 0.1])
    np.testing.assert_allclose(
        effective_rank(energies, "entropy"), np.exp(-(p * np.log(p)).sum()), rtol=1e-6
    )
    found = effective_rank(energies, "participation")
    np.testing.assert_allclose(found, 30**2 / (16**2 + 9**2 + 4**2 + 1), rtol=1e-6)
    with pytest.raises(ValueError, match="entropy"):
        effective_rank(energies, "entropie")  # type: ignore[arg-type]


def test_all_of_the_energy_is_reached_in_spite_of_rounding():
    # The shares of n equal energies may add up to a little less than 1.
    energies = np.tril(np.full((30, 31), 0.3, np.float32))
    np.testing.assert_array_equal(effective_rank(energies, share=1.0), np.arange(1, 31))


@pytest.mark.parametrize("kind", ["threshold", "entropy", "participation"])
def test_every_rank_is_one_on_a_line_and_full_when_isotropic(kind):
    line, isotropic = jnp.array([2.0, 0, 0, 0]), jnp.ones(4)
    found = effective_rank(jnp.stack([line, isotropic, jnp.zeros(4)]), kind)
    np.testing.assert_allclose(found, [1, 4, 0], rtol=1e-6)


def test_spectral_anisotropy():
    states = jnp.array([[[3.0, 0], [-3, 0], [0, 1], [0, -1]]])
    energies = spectrum(state_moments(states, np.ones((1, 4), bool)), centred=True)
    np.testing.assert_allclose(spectral_anisotropy(energies), 0.9, rtol=1e-6)
    assert spectral_anisotropy(jnp.zeros(3)) == 0
    gaussian = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4000, 8)), jnp.float32)
    energies = spectrum(state_moments(gaussian, np.ones((1, 4000), bool)), centred=True)
    np.testing.assert_allclose(spectral_anisotropy(energies), 1 / 8, rtol=0.15)
    assert effective_rank(energies) in (7, 8)


@pytest.mark.parametrize("centred", [True, False])
def test_streamed_spectrum_equals_singular_values_of_all_states(centred):
    parts = [batch(seed) for seed in range(3)]
    total = init_moments(4)
    for states, mask in parts:
        total = merge_moments(total, state_moments(states, mask))
    all_rows = rows(*parts)
    assert total.count == len(all_rows)
    matrix = all_rows - all_rows.mean(0) * centred
    expected = np.linalg.svd(matrix, compute_uv=False) ** 2 / len(matrix)
    np.testing.assert_allclose(spectrum(total, centred), expected, rtol=1e-5)


def test_a_large_mean_does_not_drown_the_covariance():
    parts = [batch(seed, shift=3000.0) for seed in range(2)]
    total = merge_moments(*(state_moments(*p) for p in parts))
    expected = np.linalg.eigvalsh(np.cov(rows(*parts).T, ddof=0))[::-1]
    np.testing.assert_allclose(spectrum(total, True), expected, rtol=2e-3)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 50), min_size=3, max_size=3))
def test_merging_is_associative_and_commutative(seeds):
    a, b, c = (batch(seed) for seed in seeds)
    for gather, merge in ((state_moments, merge_moments), (pair_cosines, merge_pair_cosines)):
        x, y, z = gather(*a), gather(*b), gather(*c)
        assert_trees_close(merge(merge(x, y), z), merge(x, merge(y, z)))
        assert_trees_close(merge(x, y), merge(y, x))


def test_nothing_merged_changes_nothing():
    found = state_moments(*batch(0))
    assert_trees_close(merge_moments(init_moments(4), found), found, rtol=0, atol=0)
    masked = state_moments(batch(1)[0], np.zeros((3, 5), bool))
    assert_trees_close(merge_moments(found, masked), found, rtol=0, atol=0)
    np.testing.assert_array_equal(spectrum(init_moments(4), True), np.zeros(4))
    assert mean_pair_cosine(init_pair_cosines(4)) == 0


def test_mean_pair_cosine_equals_all_pairs_of_different_sequences():
    parts = [batch(seed) for seed in range(2)]
    total = init_pair_cosines(4)
    for states, mask in parts:
        total = merge_pair_cosines(total, pair_cosines(states, mask))
    unit, owner = [], []
    for i, (states, mask) in enumerate(parts):
        for b in range(len(states)):
            chosen = np.asarray(states[b], np.float64)[np.asarray(mask[b])]
            unit.append(chosen / np.linalg.norm(chosen, axis=-1, keepdims=True))
            owner += [(i, b)] * len(chosen)
    unit = np.concatenate(unit)
    different = np.array([[p != q for q in owner] for p in owner])
    np.testing.assert_allclose(
        mean_pair_cosine(total), (unit @ unit.T)[different].mean(), rtol=1e-5
    )


def test_mean_pair_cosine_of_equal_and_of_isotropic_states():
    mask = np.ones((4, 50), bool)
    equal = jnp.broadcast_to(jnp.array([0.3, -2.0, 1.0]), (4, 50, 3))
    np.testing.assert_allclose(mean_pair_cosine(pair_cosines(equal, mask)), 1, rtol=1e-5)
    gaussian = jnp.asarray(np.random.default_rng(0).normal(size=(4, 50, 256)), jnp.float32)
    assert abs(mean_pair_cosine(pair_cosines(gaussian, mask))) < 0.01
    one_sequence = pair_cosines(gaussian[:1], mask[:1])
    assert mean_pair_cosine(one_sequence) == 0  # no pair of different sequences
    assert mean_pair_cosine(pair_cosines(gaussian, ~mask)) == 0
