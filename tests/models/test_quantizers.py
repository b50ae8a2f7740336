"""Quantisers: exact codes, straight-through gradients, masks, running means, even shares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.errors import ConfigError
from tokjax.models.quantizers import (
    Codebooks,
    ResidualQuantizer,
    kmeans,
    sinkhorn_ids,
)

KEY = jax.random.key(0)


def test_each_level_takes_the_entry_nearest_to_what_is_left():
    codes = jnp.array(
        [[[0.0, 0.0], [2.0, 2.0], [9.0, 9.0]], [[0.5, 0.0], [0.0, -0.5], [-0.5, 0.5]]]
    )
    quantizer = ResidualQuantizer(2, levels=2, size=3)
    x = jnp.array([[1.6, 2.3]])
    found = quantizer(x, None, Codebooks(codes))
    assert found.ids.tolist() == [[1, 2]]
    np.testing.assert_allclose(jnp.square(x - codes[0, 1]).sum(), 0.25, rtol=1e-5)
    np.testing.assert_allclose(jnp.square(x - found.z_q).sum(), 0.05, rtol=1e-5)
    np.testing.assert_allclose(found.z_q, quantizer.decode(Codebooks(codes), found.ids), rtol=1e-6)
    # Means over levels, vectors and dimensions; .25 of the same for the vectors.
    np.testing.assert_allclose(found.losses["codebook"], (0.25 + 0.05) / 4, rtol=1e-5)
    np.testing.assert_allclose(found.losses["commitment"], 0.25 * 0.075, rtol=1e-5)


def test_a_code_of_zeros_never_raises_the_error():
    x = jax.random.normal(KEY, (50, 4))
    quantizer = ResidualQuantizer(4, levels=2, size=5)
    state = quantizer.init(jax.random.key(1))
    first = ResidualQuantizer(4, levels=1, size=5)(x, None, Codebooks(state.codes[:1]))
    both = quantizer(x, None, Codebooks(state.codes.at[1, 0].set(0.0)))
    error = lambda found: jnp.square(x - found.z_q).sum(-1)  # noqa: E731
    assert bool(jnp.all(error(both) <= error(first) + 1e-6))
    assert bool(jnp.any(error(both) < error(first) - 1e-6))


def test_gradients_go_straight_through_and_each_loss_moves_its_own_side():
    quantizer = ResidualQuantizer(3, levels=2, size=4)
    state, x = quantizer.init(KEY), jax.random.normal(jax.random.key(1), (6, 3))
    weights = jax.random.normal(jax.random.key(2), x.shape)
    through = jax.grad(lambda x: (weights * quantizer(x, None, state, True).z_q).sum())(x)
    np.testing.assert_allclose(through, weights, rtol=1e-6)

    def of(name, x, codes):
        return quantizer(x, None, Codebooks(codes), True).losses[name]

    by_x, by_codes = jax.grad(lambda *a: of("codebook", *a), (0, 1))(x, state.codes)
    assert not by_x.any() and by_codes.any()
    by_x, by_codes = jax.grad(lambda *a: of("commitment", *a), (0, 1))(x, state.codes)
    assert by_x.any() and not by_codes.any()


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_what_the_mask_leaves_out_changes_neither_losses_nor_state(update):
    quantizer = ResidualQuantizer(3, levels=2, size=4, update=update, balance=(0.0, 0.1))
    state, x = quantizer.init(KEY), jax.random.normal(jax.random.key(1), (2, 5, 3))
    mask = jnp.arange(5) < jnp.array([[3], [5]])
    one = quantizer(x, mask, state, True)
    other = quantizer(jnp.where(mask[..., None], x, 7.0), mask, state, True)
    assert one.ids.shape == (2, 5, 2)
    np.testing.assert_array_equal(one.ids[mask], other.ids[mask])
    for a, b in zip(
        jax.tree.leaves((one.losses, one.state)),
        jax.tree.leaves((other.losses, other.state)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    nothing = quantizer(x, jnp.zeros((2, 5), bool), state, True)
    assert all(float(loss) == 0 for loss in nothing.losses.values())
    for a, b in zip(jax.tree.leaves(nothing.state), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_running_means_end_at_the_means_of_what_chose_each_entry():
    quantizer = ResidualQuantizer(1, levels=1, size=2, update="ema", decay=0.5)
    state = Codebooks(jnp.array([[[0.0], [10.0]]]), jnp.ones((1, 2)), jnp.array([[[0.0], [10.0]]]))
    x = jnp.array([[1.0], [3.0], [8.0]])
    step = quantizer(x, None, state, True)
    # Counts .5 + .5 x 2 and .5 + .5; sums .5 x 4 and 5 + .5 x 8.
    np.testing.assert_allclose(step.state.counts, [[1.5, 1.0]])
    np.testing.assert_allclose(step.state.sums[0, :, 0], [2.0, 9.0])
    np.testing.assert_allclose(step.state.codes[0, :, 0], [2 / 1.5, 9.0], rtol=1e-4)
    for _ in range(60):
        state = quantizer(x, None, state, True).state
    np.testing.assert_allclose(state.codes[0, :, 0], [2.0, 8.0], rtol=1e-4)
    assert set(step.losses) == {"commitment"}
    assert quantizer(x, None, state, False).state is state


def test_kmeans_finds_separate_clusters():
    centres = jnp.array([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    x = centres[jnp.arange(60) % 3] + 0.1 * jax.random.normal(KEY, (60, 2))
    found = kmeans(jax.random.key(3), x, 3)
    order = jnp.argsort(found[:, 0] + 2 * found[:, 1])
    np.testing.assert_allclose(found[order], centres, atol=0.1)
    assert bool(jnp.isfinite(kmeans(KEY, x[:2], 4)).all())


def test_entries_from_data_have_a_smaller_error_than_random_ones():
    quantizer = ResidualQuantizer(4, levels=3, size=8)
    x = jax.random.normal(KEY, (100, 4))
    error = lambda state: jnp.square(x - quantizer(x, None, state).z_q).mean()  # noqa: E731
    assert error(quantizer.from_data(KEY, x)) < 0.3 * error(quantizer.init(KEY))


def test_sinkhorn_shares_codes_out_evenly_and_without_pressure_takes_the_nearest():
    away = jnp.square(jnp.linspace(0.0, 1.0, 12)[:, None] - jnp.array([0.0, 0.1, 0.2])[None])
    everything = jnp.ones(12, bool)
    assert np.bincount(sinkhorn_ids(away, everything, 0.01)).tolist() == [4, 4, 4]
    assert np.bincount(away.argmin(-1)).tolist() == [1, 1, 10]
    half = jnp.arange(12) < 6
    found = sinkhorn_ids(away.at[6:].set(1e3), half, 0.01)
    assert np.bincount(found[:6]).tolist() == [2, 2, 2]


def test_one_with_balance_is_only_even_in_training():
    quantizer = ResidualQuantizer(1, levels=1, size=3, balance=(0.01,))
    state, x = Codebooks(jnp.array([[[0.0], [0.1], [0.2]]])), jnp.linspace(0.0, 1.0, 12)[:, None]
    assert np.bincount(quantizer(x, None, state, True).ids[:, 0]).tolist() == [4, 4, 4]
    assert np.bincount(quantizer(x, None, state, False).ids[:, 0]).tolist() == [1, 1, 10]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"levels": 0}, "levels=0"),
        ({"update": "mean"}, "update='mean'"),
        ({"balance": (0.1,), "levels": 2}, "balance has 1 values for levels=2"),
        ({"balance": (-1.0, 0.0), "levels": 2}, "must not be negative"),
        ({"decay": 1.0}, "decay=1.0"),
    ],
)
def test_impossible_settings_are_named(settings, told):
    with pytest.raises(ConfigError, match=told):
        ResidualQuantizer(2, **settings)
