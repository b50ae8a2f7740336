from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax import struct
from tokjax.decoding import top_p
from tokjax.decoding.speculative import (
    disjoint_groups,
    exact,
    exact_match,
    grouped,
    relative_threshold,
    speculative_verify,
    typical_acceptance,
)
from tokjax.errors import ConfigError

RUNS = 40_000
# Worked numbers of Persona-judge.
P, Q = [0.5, 0.3, 0.15, 0.05], [0.2, 0.4, 0.3, 0.1]
# Those of grouped acceptance, with groups {0, 1}, {2, 3}, {4}.
GP, GQ = [0.30, 0.25, 0.20, 0.15, 0.10], [0.10, 0.35, 0.15, 0.30, 0.10]
LABELS = [0, 0, 1, 1, 2]


@jax.jit
def _runs(rule, target, drawn_from, key):
    drawn_from = jnp.broadcast_to(drawn_from, (RUNS, *drawn_from.shape))
    target = jnp.broadcast_to(target, (RUNS, *target.shape))
    keys = jax.vmap(jax.random.split)(jax.random.split(key, RUNS))
    draft = jax.vmap(jax.random.categorical)(keys[:, 0], drawn_from)
    return draft, speculative_verify(keys[:, 1], target, drawn_from, draft, acceptance=rule)


def verified(rule, p=P, q=Q, gamma=1, seed=0):
    """Drafts and verdicts of many rows, whose every step has the laws p and q."""
    target, drawn_from = (np.asarray(jnp.log(np.array(law, np.float32))) for law in (p, q))
    found = _runs(
        rule,
        np.tile(target, (gamma + 1, 1)),
        np.tile(drawn_from, (gamma, 1)),
        jax.random.key(seed),
    )
    return jax.device_get(found)


def near(frequencies, expected):
    np.testing.assert_allclose(frequencies, expected, atol=5 * 0.5 / np.sqrt(RUNS / len(P)))


def test_accepted_are_tokens_by_the_ratio_and_the_law_is_the_targets(follows):
    draft, verdict = verified(exact())
    ratios = [verdict.accepted[draft[:, 0] == token].mean() for token in range(4)]
    near(ratios, [1, 0.75, 0.5, 0.5])
    assert ratios[0] == 1
    near(verdict.accepted.mean(), 0.7)
    follows(verdict.tokens[:, 0], P)
    both = verdict.accepted == 1
    follows(verdict.tokens[both, 1], P)
    assert (verdict.tokens[~both, 1] == 0).all()
    np.testing.assert_array_equal(verdict.tested, 1)
    residual = exact().residual(np.log([P]), np.log([Q]), np.array([1]))
    np.testing.assert_allclose(jax.nn.softmax(residual)[0], [1, 0, 0, 0])


def test_a_block_of_four_has_the_expected_length():
    _, verdict = verified(exact(), gamma=4)
    assert abs(verdict.accepted.mean() + 1 - 2.7731) < 0.015
    stood = np.bincount(verdict.accepted, minlength=5) / RUNS
    np.testing.assert_allclose(stood, [0.3, 0.21, 0.147, 0.1029, 0.2401], atol=0.008)
    np.testing.assert_array_equal(verdict.tested, np.minimum(verdict.accepted + 1, 4))


def test_tokens_behind_the_accepted_ones_are_zeros():
    draft, verdict = verified(exact(), p=P[::-1], q=Q[::-1], gamma=4)
    at = np.arange(5)
    assert (verdict.tokens[at > verdict.accepted[:, None]] == 0).all()
    stands = at[:4] < verdict.accepted[:, None]
    np.testing.assert_array_equal(verdict.tokens[:, :4][stands], draft[stands])


def test_a_filtered_token_is_always_rejected(follows):
    filtered = np.asarray(top_p(0.9).update(np.log([P]), (), None)[0])[0]
    law = np.asarray(jax.nn.softmax(filtered))
    np.testing.assert_allclose(law, [0.5263, 0.3158, 0.1579, 0], atol=5e-5)
    draft, verdict = verified(exact(), p=law)
    assert (verdict.accepted[draft[:, 0] == 3] == 0).all()
    follows(verdict.tokens[:, 0], law)


@pytest.mark.parametrize(
    "rule", [exact(), grouped(disjoint_groups([0, 0, 1, 1])), grouped(disjoint_groups([0] * 4))]
)
def test_equal_laws_accept_everything(rule, follows):
    _, verdict = verified(rule, q=P)
    np.testing.assert_array_equal(verdict.accepted, 1)
    follows(verdict.tokens[:, 0], P)


def test_a_residual_of_rounding_is_replaced_by_the_targets_law():
    p = np.log([P])
    np.testing.assert_allclose(exact().residual(p, p, np.array([1])), p)
    above = np.log(np.add(P, [1e-13, 0, 0, 0]))
    np.testing.assert_allclose(exact().residual(above[None], p, np.array([1])), above[None])


def test_exact_match_accepts_what_the_target_draws_as_well(follows):
    draft, verdict = verified(exact_match())
    near([verdict.accepted[draft[:, 0] == token].mean() for token in range(4)], P)
    near(verdict.accepted.mean(), np.dot(P, Q))
    follows(verdict.tokens[:, 0], P)


def test_only_proposed_tokens_count(follows):
    keys = jax.random.split(jax.random.key(0), 4)
    law = np.log(np.array(P, np.float32))
    target = np.tile(law, (4, 3, 1))
    verdict = speculative_verify(
        keys, target, target[:, :2], np.full((4, 2), 1), proposed=np.array([-1, 0, 1, 2])
    )
    assert verdict.accepted.tolist() == verdict.tested.tolist() == [0, 0, 1, 2]
    target = np.tile(law, (RUNS, 2, 1))
    nothing = jax.jit(speculative_verify)(
        jax.random.split(jax.random.key(1), RUNS),
        target,
        np.log(np.tile(np.float32(Q), (RUNS, 1, 1))),
        np.ones((RUNS, 1), np.int32),
        proposed=np.zeros(RUNS, np.int32),
    )
    follows(nothing.tokens[:, 0], P)


def test_disjoint_groups_accept_by_their_mass(follows):
    rule = grouped(disjoint_groups(LABELS))
    draft, verdict = verified(rule, GP, GQ)
    near(verdict.accepted.mean(), 0.9)
    follows(verdict.tokens[:, 0], [0.18, 0.35, 0.1366667, 0.2333333, 0.10])
    near(
        [verdict.accepted[draft[:, 0] == token].mean() for token in range(5)],
        [1, 1, 7 / 9, 7 / 9, 1],
    )


def test_a_group_residual_makes_the_law_of_groups_exact(follows):
    rule = grouped(disjoint_groups(LABELS), residual="group")
    _, verdict = verified(rule, GP, GQ)
    law = [0.15454545, 0.39545455, 0.11666667, 0.23333333, 0.10]
    follows(verdict.tokens[:, 0], law)
    follows(np.array(LABELS)[verdict.tokens[:, 0]], [0.55, 0.35, 0.10])


def test_one_group_of_everything_writes_the_drafts_law(follows):
    _, verdict = verified(grouped(disjoint_groups([0] * 5)), GP, GQ)
    np.testing.assert_array_equal(verdict.accepted, 1)
    follows(verdict.tokens[:, 0], GQ)


@struct.dataclass
class _Neighbours:
    """The token and those below it in the target's order, as near as `delta`."""

    below: int = struct.field(pytree_node=False)
    above: int = struct.field(pytree_node=False)
    delta: Any

    def masses(self, keys, target, draft, tokens):
        p, q = jnp.exp(target), jnp.exp(draft)
        rank = jnp.argsort(jnp.argsort(p, axis=-1), axis=-1)
        own = jnp.take_along_axis(rank, tokens[..., None], axis=-1)
        mine = jnp.take_along_axis(p, tokens[..., None], axis=-1)
        near = (rank >= own - self.below) & (rank <= own + self.above)
        near &= jnp.abs(p - mine) < self.delta
        return jnp.where(near, p, 0).sum(-1), jnp.where(near, q, 0).sum(-1)


@pytest.mark.parametrize(
    ("below", "above", "expected"),
    [
        (0, 0, [1, 5 / 7, 1, 0.5, 1]),
        (1, 0, [1, 0.9, 7 / 9, 0.625, 1]),
        (2, 1, [1, 1, 7 / 9, 9 / 11, 0.625]),
    ],
)
def test_groups_may_be_a_function_of_the_probabilities(below, above, expected, follows):
    rule = grouped(_Neighbours(below, above, np.float32(0.15)))
    draft, verdict = verified(rule, GP, GQ)
    near([verdict.accepted[draft[:, 0] == token].mean() for token in range(5)], expected)
    if below == 0:
        follows(verdict.tokens[:, 0], GP)


@struct.dataclass
class _Owned:
    """Overlapping groups: each token belongs to one of its own, drawn with the keys."""

    member: Any  # [V, V], symmetric

    def _groups(self, p):
        return (p / self.member.sum(0)) @ self.member

    def masses(self, keys, target, draft, tokens):
        owner = jax.vmap(jax.random.categorical)(keys, jnp.log(self.member[tokens]))
        found = (self._groups(jnp.exp(p)) for p in (target, draft))
        return tuple(jnp.take_along_axis(p, owner[..., None], axis=-1)[..., 0] for p in found)

    def residual(self, target, draft):
        p = jnp.exp(target)
        own = self._groups(p)
        excess = jnp.maximum(own - self._groups(jnp.exp(draft)), 0)
        return jnp.log((excess / own) @ self.member.T * p / self.member.sum(0))


def test_groups_may_overlap_and_be_drawn(follows):
    member = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]], np.float32)
    rule = grouped(_Owned(member), residual="group")
    p, q = [0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]
    _, verdict = verified(rule, p, q)
    near(verdict.accepted.mean(), 0.68333)
    follows(verdict.tokens[:, 0], [0.28888889, 0.28931624, 0.32179487, 0.1])
    _, alone = verified(grouped(_Owned(np.eye(4, dtype=np.float32)), residual="group"), p, q)
    near(alone.accepted.mean(), 0.6)
    follows(alone.tokens[:, 0], p)
    _, together = verified(grouped(_Owned(np.ones((4, 4), np.float32)), residual="group"), p, q)
    follows(together.tokens[:, 0], q)


def test_a_relative_threshold_accepts_near_the_best_and_is_lossy(follows):
    draft, verdict = verified(relative_threshold(0.6))
    np.testing.assert_array_equal(verdict.accepted, draft[:, 0] <= 1)
    follows(verdict.tokens[:, 0], np.array([0.2, 0.4, 0, 0]) + 0.4 * np.array(P))
    _, everything = verified(relative_threshold(0.0))
    np.testing.assert_array_equal(everything.accepted, 1)
    draft, best = verified(relative_threshold(1.0))
    np.testing.assert_array_equal(best.accepted, draft[:, 0] == 0)


def test_typical_acceptance_lowers_its_floor_with_the_entropy():
    draft, verdict = verified(typical_acceptance(0.2, 1.0))
    np.testing.assert_array_equal(verdict.accepted, draft[:, 0] <= 1)
    floor = np.exp(np.dot(P, np.log(P)))  # 0.319
    draft, verdict = verified(typical_acceptance(1.0, 1.0))
    assert 0.3 < floor < 0.5
    np.testing.assert_array_equal(verdict.accepted, draft[:, 0] == 0)
    draft, verdict = verified(typical_acceptance(1.0, 0.4))  # floor 0.128
    np.testing.assert_array_equal(verdict.accepted, draft[:, 0] <= 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: disjoint_groups([0.5, 1]), "integers"),
        (lambda: disjoint_groups([[0], [1]]), "one for each id"),
        (lambda: disjoint_groups([0, 7]), "number the groups"),
        (lambda: grouped(disjoint_groups([0]), residual="both"), "residual='both'"),
        (lambda: relative_threshold(1.5), "share=1.5"),
        (lambda: typical_acceptance(0.0), "epsilon"),
        (lambda: verified(grouped(disjoint_groups([0, 0, 1]))), "labels of 3 tokens"),
    ],
)
def test_impossible_rules_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
