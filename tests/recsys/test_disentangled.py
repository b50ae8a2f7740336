"""The block at the embeddings: masks, gates, and each part switched off."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.errors import ConfigError
from tokjax.recsys.disentangled import Disentangled, encoder_positions, item_mask

D, L = 8, 4
BLOCK = Disentangled(D, L, d_ff=16)
S = 2 * L + 1  # two items and the end token
E = jax.random.normal(jax.random.key(1), (2, S, D))
EVERYTHING = jnp.ones((2, S), bool)
PARAMS = BLOCK.init(jax.random.key(0))


def branch(block, params, e, kept=EVERYTHING, levels=L):
    """The second branch of the encoder's side: (u, attended, c)."""
    items = (e.shape[1] - 1) // levels
    w = params["encoder"]
    where = encoder_positions(items, levels, block.shift)
    placed = e + w["positions"][where] if block.positions else e
    mask = jnp.asarray(item_mask(items, levels, block.shift))[None]
    return block.within(w, placed, mask, kept)


def without_gate(params, rows):
    return {side: {**w, "gate": rows} for side, w in params.items()}


def test_the_mask_of_two_items_of_four_and_an_end_token_has_41_pairs():
    mask = item_mask(2, 4)
    assert mask.sum() == 41
    assert (mask == mask.T).all()
    assert not mask[:4, 4:].any()
    assert mask[8].tolist() == [False] * 4 + [True] * 5


def test_shifted_borders_lie_within_items():
    mask = item_mask(2, 4, shift=1)
    assert mask[0, :3].all() and not mask[0, 3]
    assert mask[3, 6] and not mask[3, 7]
    assert encoder_positions(2, 4, shift=1).tolist() == [2, 3, 4, 1, 2, 3, 4, 1, 5]


def test_a_gate_of_zeros_is_the_mean_of_both_branches():
    params = without_gate(PARAMS, jnp.zeros((2, D)))
    c = branch(BLOCK, params, E)[2]
    x = BLOCK.encoder(params, E, EVERYTHING)
    np.testing.assert_allclose(x, (E + c) / 2, rtol=1e-6, atol=1e-6)
    ungated = dataclasses.replace(BLOCK, gate=False)
    np.testing.assert_allclose(ungated.encoder(params, E, EVERYTHING), x, rtol=1e-6, atol=1e-6)


def test_a_gate_that_is_all_for_the_embeddings_leaves_them_as_they_are():
    e = E.at[..., 0].set(1.0)
    params = without_gate(PARAMS, jnp.zeros((2, D)).at[0, 0].set(1e4))
    np.testing.assert_array_equal(BLOCK.encoder(params, e, EVERYTHING), e)
    np.testing.assert_array_equal(BLOCK.decoder(params, e[:, : L + 1]), e[:, : L + 1])


def test_without_any_part_the_embeddings_are_left_as_they_are():
    plain = Disentangled(D, L, positions=False, branch="none", gate=False)
    params = plain.init(jax.random.key(0))
    assert not jax.tree.leaves(params)
    np.testing.assert_array_equal(plain.encoder(params, E, EVERYTHING), E)
    np.testing.assert_array_equal(plain.decoder(params, E[:, :5]), E[:, :5])


def test_positions_alone_are_added():
    block = Disentangled(D, L, branch="none", gate=False)
    params = block.init(jax.random.key(0))
    rows = params["encoder"]["positions"]
    assert rows.shape == (L + 2, D)
    found = block.encoder(params, E, EVERYTHING)
    np.testing.assert_allclose(found, E + rows[jnp.array([1, 2, 3, 4, 1, 2, 3, 4, 5])], rtol=1e-6)
    found = block.decoder(params, E[:, :5])
    np.testing.assert_allclose(found, E[:, :5] + params["decoder"]["positions"][:5], rtol=1e-6)


@pytest.mark.parametrize("items", [2, 3])
def test_a_token_changes_its_own_item_alone_and_the_end_token_behind_the_last(items):
    e = jax.random.normal(jax.random.key(2), (1, items * L + 1, D))
    kept = jnp.ones(e.shape[:2], bool)
    before = branch(BLOCK, PARAMS, e, kept)[2]
    after = branch(BLOCK, PARAMS, e.at[0, 5, 0].add(1.0), kept)[2]
    changed = np.flatnonzero(np.asarray((before != after).any(-1))[0]).tolist()
    assert changed == [4, 5, 6, 7] + ([8] if items == 2 else [])


def test_full_attention_carries_a_change_everywhere():
    block = dataclasses.replace(BLOCK, branch="full")
    before = block.encoder(PARAMS, E, EVERYTHING)
    after = block.encoder(PARAMS, E.at[0, 5, 0].add(1.0), EVERYTHING)
    assert bool((before != after).any(-1)[0].all())
    np.testing.assert_array_equal(before[1], after[1])


def test_the_decoder_sees_no_later_token():
    e = E[:, : L + 1]
    before, after = (BLOCK.decoder(PARAMS, each) for each in (e, e.at[:, 3, 0].add(1.0)))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert bool((before[:, 3:] != after[:, 3:]).any(-1).all())


def test_items_of_one_code_attend_to_themselves_except_the_last_and_the_end_token():
    block = Disentangled(D, 1, d_ff=16)
    params = block.init(jax.random.key(0))
    params["encoder"]["positions"] *= 0
    e = jax.random.normal(jax.random.key(3), (1, 4, D))
    u, attended, _ = branch(block, params, e, jnp.ones((1, 4), bool), levels=1)
    own = u + u @ params["encoder"]["value"]
    np.testing.assert_allclose(attended[:, :2], own[:, :2], rtol=1e-5, atol=1e-5)
    assert bool((jnp.abs(attended - own)[:, 2:] > 1e-3).any(-1).all())


def test_attention_adds_nothing_where_there_is_no_token():
    kept = EVERYTHING.at[0, :4].set(False)
    u, attended, _ = branch(BLOCK, PARAMS, E, kept)
    np.testing.assert_array_equal(attended[0, :4], u[0, :4])
    assert bool((attended[0, 4:] != u[0, 4:]).any(-1).all())


def test_dropout_is_for_training_alone():
    quiet = BLOCK.encoder(PARAMS, E, EVERYTHING)
    noisy = BLOCK.encoder(PARAMS, E, EVERYTHING, jax.random.key(5))
    assert not np.allclose(quiet, noisy)
    np.testing.assert_array_equal(quiet, BLOCK.encoder(PARAMS, E, EVERYTHING))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"branch": "some"}, "branch='some'"),
        ({"branch": "none"}, "gate=True mixes two branches"),
        ({"n_heads": 3}, "not divisible by n_heads=3"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"shift": -1}, "shift=-1"),
    ],
)
def test_impossible_settings_are_named(settings, told):
    with pytest.raises(ConfigError, match=told):
        Disentangled(D, L, **settings)
