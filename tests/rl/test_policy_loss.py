"""The clipped loss: each algorithm's ratio and divisor, against the formulas by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.rl.policy_loss import NORMS, RATIOS, aggregate, importance_ratios, policy_loss

MASK = jnp.array([[False, True, True, True, False], [True, True, False, False, False]])
RNG = np.random.default_rng(0)
NEW = jnp.asarray(RNG.normal(-1, 0.5, (2, 5)), jnp.float32)
OLD = jnp.asarray(RNG.normal(-1, 0.5, (2, 5)), jnp.float32)
ADVANTAGES = jnp.array([[9.0, 1.0, 1.0, 1.0, 9.0], [-2.0, -2.0, 9.0, 9.0, 9.0]])


def test_token_ratios_are_those_of_the_actions_alone():
    found = importance_ratios(NEW, OLD, MASK)
    np.testing.assert_allclose(found, np.where(MASK, np.exp(NEW - OLD), 1.0), rtol=1e-6)


def test_sequence_ratios_pool_a_rows_actions():
    difference = np.asarray(NEW - OLD)
    geometric = importance_ratios(NEW, OLD, MASK, "sequence_geo")
    arithmetic = importance_ratios(NEW, OLD, MASK, "sequence_arith")
    for r in range(2):
        own = difference[r][MASK[r]]
        np.testing.assert_allclose(geometric[r][MASK[r]], np.exp(own.mean()), rtol=1e-6)
        np.testing.assert_allclose(arithmetic[r][MASK[r]], np.exp(own).mean(), rtol=1e-6)
    assert np.all(geometric[~MASK] == 1)


def test_mixed_ratios_pool_what_is_named():
    part = MASK & (jnp.arange(5) >= 2)
    found = importance_ratios(NEW, OLD, MASK, "mixed", part)
    difference = np.asarray(NEW - OLD)
    np.testing.assert_allclose(found[0, 1], np.exp(difference[0, 1]), rtol=1e-6)
    np.testing.assert_allclose(found[0, 2:4], np.exp(difference[0, 2:4].mean()), rtol=1e-6)


def test_one_action_has_one_ratio_whatever_the_kind():
    mask = jnp.arange(5)[None] == 1
    for kind in RATIOS[:3]:
        found = importance_ratios(NEW[:1], OLD[:1], mask, kind)
        np.testing.assert_allclose(found[0, 1], np.exp(NEW[0, 1] - OLD[0, 1]), rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_divisors(norm):
    values = jnp.ones((2, 5))
    weights = jnp.array([[1.0, 1, 0, 1, 1], [1, 1, 1, 1, 1]])
    total, divisor = aggregate(values, MASK, weights, norm, most_tokens=10)
    expected = {
        "token": (4.0, 5.0),
        "kept": (4.0, 4.0),
        "response": (2 / 3 + 1.0, 2.0),
        "constant": (4.0, 20.0),
    }[norm]
    np.testing.assert_allclose((total, divisor), expected, rtol=1e-6)


def test_micro_batches_add_up():
    for norm in NORMS:
        whole = policy_loss(NEW, OLD, ADVANTAGES, MASK, norm=norm, most_tokens=4)
        parts = [
            policy_loss(NEW[i], OLD[i], ADVANTAGES[i], MASK[i], norm=norm, most_tokens=4)
            for i in (slice(0, 1), slice(1, 2))
        ]
        np.testing.assert_allclose(whole, np.sum(parts, axis=0), rtol=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_clip_ends_the_gradient_on_one_side_only(sign):
    mask = jnp.ones((1, 2), bool)
    old = jnp.zeros((1, 2))
    new = jnp.log(jnp.array([[1.5, 0.5]]))
    slope = jax.grad(
        lambda new: policy_loss(new, old, jnp.full((1, 2), sign), mask, clip=(0.2, 0.3))[0]
    )(new)
    # A ratio above the window is let go for a good action and pulled back for a bad one.
    stopped, moved = (0, 1) if sign > 0 else (1, 0)
    assert slope[0, stopped] == 0
    np.testing.assert_allclose(slope[0, moved], -sign * np.exp(new[0, moved]), rtol=1e-6)


def test_on_policy_the_gradient_is_reinforce():
    mask = jnp.ones((1, 3), bool)
    for kind in RATIOS[:3]:
        loss = lambda new, kind=kind: policy_loss(  # noqa: E731
            new, jnp.zeros((1, 3)), jnp.full((1, 3), 2.0), mask, ratio=kind, norm="response"
        )[0]
        np.testing.assert_allclose(jax.grad(loss)(jnp.zeros((1, 3))), -2.0 / 3, rtol=1e-6)


def test_what_is_no_action_changes_nothing():
    noise = jnp.where(MASK, 0.0, 7.0)
    for kind in RATIOS[:3]:
        for norm in NORMS:
            options = {"ratio": kind, "norm": norm, "most_tokens": 3}
            plain = policy_loss(NEW, OLD, ADVANTAGES, MASK, **options)
            other = policy_loss(NEW + noise, OLD - noise, ADVANTAGES + noise, MASK, **options)
            np.testing.assert_array_equal(plain, other)


def test_weights_of_zero_leave_actions_out_even_where_they_are_not_finite():
    weights = jnp.where(jnp.arange(5) == 1, 0.0, 1.0) * jnp.ones((2, 1))
    new = NEW.at[:, 1].set(-jnp.inf)
    total, divisor = policy_loss(new, OLD, ADVANTAGES, MASK, weights=weights, norm="kept")
    assert np.isfinite(total)
    assert divisor == 3
