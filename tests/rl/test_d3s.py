"""Selected rollouts and tokens: exact, scheduled, compiled once (arXiv 2509.22115)."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.errors import ConfigError
from tokjax.rl.advantages import GroupAdvantage, group_advantages
from tokjax.rl.d3s import D3S, scheduled, select_answers, select_tokens
from tokjax.rl.policy_loss import policy_loss
from tokjax.training.loop import train
from tokjax.training.metrics import read_metrics

WORKED = jnp.array([[1.0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
SEEDS = st.integers(0, 2**32 - 1)


def best_variance(values, n):
    return max(np.var(subset) for subset in itertools.combinations(values, n))


def test_advantages_and_choice_of_the_worked_example():
    advantages = group_advantages(WORKED, ddof=0, eps=1e-8)
    third = -0.57735
    np.testing.assert_allclose(
        advantages, [[1.73205, third, third, third], [0] * 4, [1, 1, -1, -1]], atol=1e-5
    )
    flat = advantages.reshape(-1)
    kept = np.asarray(select_answers(flat, 4))
    assert np.flatnonzero(kept).tolist() == [0, 8, 10, 11]
    np.testing.assert_allclose(np.var(np.asarray(flat)[kept]), 1.46651, atol=1e-5)
    np.testing.assert_allclose(best_variance(np.asarray(flat), 4), 1.46651, atol=1e-5)


@given(SEEDS, st.integers(2, 9))
@settings(max_examples=200, deadline=None)
def test_the_scan_finds_what_trying_all_subsets_finds(seed, n):
    values = np.random.default_rng(seed).normal(size=9).astype(np.float32)
    kept = np.asarray(_select(jnp.asarray(values), n))
    assert kept.sum() == n
    np.testing.assert_allclose(np.var(values[kept]), best_variance(values, n), rtol=1e-4)


@given(SEEDS, st.integers(2, 9))
@settings(max_examples=60, deadline=None)
def test_so_it_does_where_values_are_equal(seed, n):
    values = np.random.default_rng(seed).integers(-2, 3, 9).astype(np.float32)
    kept = np.asarray(_select(jnp.asarray(values), n))
    assert kept.sum() == n
    np.testing.assert_allclose(np.var(values[kept]), best_variance(values, n), atol=1e-5)


_select = jax.jit(select_answers)


def test_ties_are_split_in_half_and_lowest_places_come_first():
    assert np.flatnonzero(_select(jnp.zeros(6), 4)).tolist() == [0, 1, 2, 3]
    values = jnp.array([1.0, -1, 1, -1, 1, -1, 1, -1])
    assert np.flatnonzero(_select(values, 4)).tolist() == [0, 1, 2, 3]
    # k = 1 and k = 2 of three have the same variance: the smaller k, of those as near to half.
    assert np.flatnonzero(_select(jnp.array([1.0, 0.0, -1.0, 1.0, -1.0]), 3)).tolist() == [0, 2, 4]


@given(SEEDS, st.integers(2, 12), st.permutations(range(12)))
@settings(max_examples=40, deadline=None)
def test_a_choice_ignores_a_constant_and_a_scale_and_follows_an_order(seed, n, order):
    rng = np.random.default_rng(seed)
    values, order = rng.normal(size=12).astype(np.float32), np.array(order)
    kept = np.asarray(_select(jnp.asarray(values), n))
    np.testing.assert_array_equal(_select(jnp.asarray(values + np.float32(1.5)), n), kept)
    np.testing.assert_array_equal(_select(jnp.asarray(values * np.float32(8)), n), kept)
    np.testing.assert_array_equal(_select(jnp.asarray(values[order]), n), kept[order])


@given(SEEDS, st.integers(2, 32))
@settings(max_examples=60, deadline=None)
def test_answers_of_equal_groups_come_last(seed, n):
    rng = np.random.default_rng(seed)
    rewards = rng.random((4, 8)) < rng.random((4, 1))
    advantages = group_advantages(jnp.asarray(rewards, jnp.float32), ddof=0, eps=1e-8).reshape(-1)
    kept, some = np.asarray(_select(advantages, n)), np.asarray(advantages != 0)
    if n <= some.sum():
        assert not np.any(kept & ~some)
    else:
        assert np.all(kept[some])


def test_tokens_of_the_highest_score_are_kept_over_all_answers():
    scores = jnp.array([[0.9, 0.1, 0.0], [0.8, 0.7, 9.0]])
    mask = jnp.array([[True, True, True], [True, True, False]])
    kept = select_tokens(scores, mask, 0.6)  # three of five
    np.testing.assert_array_equal(kept, [[True, False, False], [True, True, False]])


@pytest.mark.parametrize(
    ("share", "kept"), [(0.0, 1), (0.2, 1), (0.201, 2), (0.6, 3), (0.9, 5), (1.0, 5)]
)
def test_the_count_of_tokens_is_rounded_up_and_at_least_one(share, kept):
    scores = jnp.array([[5.0, 4, 3], [2, 1, 9]])
    mask = jnp.array([[True, True, True], [True, True, False]])
    assert select_tokens(scores, mask, share).sum() == kept


def test_tokens_without_score_are_kept_after_all_others():
    scores = jnp.array([[0.0, 0.5, 0.0, 0.2]])
    mask = jnp.ones((1, 4), bool)
    for share, expected in ((0.25, [1]), (0.5, [1, 3]), (0.75, [0, 1, 3])):
        assert np.flatnonzero(select_tokens(scores, mask, share)[0]).tolist() == expected


def test_where_nothing_scores_all_tokens_stay():
    mask = jnp.array([[True, True, False]])
    np.testing.assert_array_equal(select_tokens(jnp.zeros((1, 3)), mask, 0.1), mask)


def test_the_schedule_of_the_worked_example():
    assert [float(scheduled(8 / 32, 1.0, jnp.float32(p))) * 32 for p in (0, 0.5, 1)] == [8, 20, 32]


def rolled(rollout_of, rewards, progress, seed=0, group=4):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 5, len(rewards))
    lengths[0] = 4
    entropies = jnp.asarray(rng.uniform(0.1, 1, (len(rewards), 6)), jnp.float32)
    rollout = rollout_of(rewards, lengths, group, entropies=entropies)
    return rollout.replace(progress=jnp.float32(progress))


def test_everything_kept_is_grpo_bit_for_bit(rollout_of):
    rewards = np.asarray(WORKED).reshape(-1)
    start, end = (rolled(rollout_of, rewards, progress) for progress in (0.0, 1.0))
    rng = np.random.default_rng(3)
    new, old = (jnp.asarray(rng.normal(-1, 0.2, (12, 6)), jnp.float32) for _ in range(2))

    def loss(advantage, norm, rollout=end):
        advantages, weights = advantage(rollout)
        found = policy_loss(new, old, advantages, rollout.mask, weights=weights, norm=norm)
        return np.asarray(found)

    grpo = loss(GroupAdvantage(ddof=0, eps=1e-8), "token")
    np.testing.assert_array_equal(loss(D3S(), "kept"), grpo)
    early = D3S(answers_init=1.0, tokens_init=1.0)
    np.testing.assert_array_equal(loss(early, "kept", start), grpo)
    assert loss(D3S(), "kept", start)[1] < grpo[1]


def test_the_choice_grows_with_progress(rollout_of):
    rewards = np.random.default_rng(0).integers(0, 2, 32).astype(float)
    answers, tokens = [], []
    for progress in (0.0, 0.5, 1.0):
        rollout = rolled(rollout_of, rewards, progress)
        weights = np.asarray(D3S(tokens_init=1.0)(rollout)[1])
        answers.append(int((weights != 0).any(-1).sum()))
        tokens.append(int(D3S()(rollout)[1].sum()))
    assert answers == [8, 20, 32]
    assert tokens[0] < tokens[1] < tokens[2] == int(rollout.mask.sum())


def test_advantages_are_those_of_all_answers(rollout_of):
    rollout = rolled(rollout_of, np.asarray(WORKED).reshape(-1), 0.0)
    found, weights = D3S()(rollout)
    np.testing.assert_array_equal(found, GroupAdvantage(ddof=0, eps=1e-8)(rollout)[0])
    assert set(np.unique(weights)) == {0.0, 1.0}


def test_pooled_tokens_are_the_top_of_the_chosen_answers(rollout_of):
    rewards = np.random.default_rng(2).integers(0, 2, 16).astype(float)
    rollout = rolled(rollout_of, rewards, 0.0, seed=5)
    advantages, weights = D3S(answers_init=0.5, tokens_init=0.25)(rollout)
    answers = np.asarray(select_answers(advantages.max(-1) + advantages.min(-1), 8))
    mask = np.asarray(rollout.mask) & answers[:, None]
    scores = np.where(mask, np.abs(advantages) * rollout.entropies, -1)
    least = np.sort(scores.reshape(-1))[-int(np.ceil(0.25 * mask.sum()))]
    np.testing.assert_array_equal(weights != 0, mask & (scores >= least))


def test_within_prompts_each_has_its_share(rollout_of):
    rewards = np.asarray(WORKED).reshape(-1)
    rollout = rolled(rollout_of, rewards, 0.0)
    weights = D3S(within=True, answers_init=0.5, tokens_init=1.0)(rollout)[1]
    by_prompt = np.asarray(rollout.by_prompt((weights != 0).any(-1)))
    assert by_prompt.sum(1).tolist() == [2, 2, 2]
    assert np.flatnonzero(by_prompt[2]).tolist() == [0, 2]


def test_two_answers_are_the_fewest(rollout_of):
    rollout = rolled(rollout_of, np.asarray(WORKED).reshape(-1), 0.0)
    weights = D3S(answers_init=0.01, tokens_init=1.0)(rollout)[1]
    assert (weights != 0).any(-1).sum() == 2


def test_a_batch_without_advantages_trains_nothing(rollout_of):
    rollout = rolled(rollout_of, [1.0] * 4 + [0.0] * 4, 0.0)
    assert not np.any(D3S()(rollout)[1])


def test_padding_and_the_order_of_groups_change_nothing(rollout_of):
    rewards = np.random.default_rng(2).integers(0, 2, 16).astype(float)
    rollout = rolled(rollout_of, rewards, 0.0, seed=5)
    weights = np.asarray(D3S(answers_init=0.5)(rollout)[1])
    wide = jax.tree.map(
        lambda a: jnp.pad(a, ((0, 0), (0, 3))) if a.ndim == 2 and a.shape[1] == 6 else a, rollout
    )
    np.testing.assert_array_equal(D3S(answers_init=0.5)(wide)[1][:, :6], weights)
    # Behind a random bonus no advantages are equal, so that the choice follows the order.
    bonus = np.random.default_rng(3).normal(0, 0.1, 16).astype(np.float32)
    noisy = rollout.replace(reward=rollout.reward + bonus)
    order = np.array([2, 0, 3, 1])
    rows = (order[:, None] * 4 + np.arange(4)).reshape(-1)
    moved = jax.tree.map(lambda a: a[rows] if a.ndim else a, noisy)
    np.testing.assert_array_equal(
        D3S(answers_init=0.5)(moved)[1], np.asarray(D3S(answers_init=0.5)(noisy)[1])[rows]
    )


def test_progress_recompiles_nothing(rollout_of):
    shape = jax.jit(D3S())
    for progress in (0.0, 0.3, 0.9):
        shape(rolled(rollout_of, np.asarray(WORKED).reshape(-1), progress))
    assert shape._cache_size() == 1
    select = jax.jit(lambda values, n: select_answers(values, n))  # with a cache of its own
    for n in (2, 3, 5):
        select(jnp.arange(6.0), n)
    assert select._cache_size() == 1


def test_a_run_trains_on_more_tokens_as_it_goes(rl_run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    run = rl_run(steps=8, objective__advantage={"name": "d3s"}, objective__norm="kept")
    train(run, tmp_path)
    table = read_metrics(tmp_path)
    assert table["target_weight"][0] + table["target_weight"][1] < 16
    assert sum(table["target_weight"][-2:]) > sum(table["target_weight"][:2])
    assert all(np.isfinite(v) for v in table["loss"])


def test_impossible_shares_are_refused():
    for name in ("answers_init", "answers_final", "tokens_init", "tokens_final"):
        with pytest.raises(ConfigError, match=f"{name}=1.5"):
            D3S(**{name: 1.5})
        with pytest.raises(ConfigError, match=f"{name}=0"):
            D3S(**{name: 0.0})
