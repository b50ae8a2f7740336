"""Rewards of paths: worked numbers, titles within titles, and the personal variants."""

import jax.numpy as jnp
import numpy as np
import pytest
from catalogues_for_tests import END, along, drawn, example, padded

from tokjax.gflownet.balance import subtb_loss
from tokjax.gflownet.exact import flow_policy
from tokjax.gflownet.path_rewards import (
    ending,
    path_rewards,
    personal_bonuses,
    personal_divisors,
)

PATHS = [(1, 2), (1,), (4,), (1, 5, 2), (5,), (4, 4), (1, 3)]


def rewards(paths=PATHS, **options):
    return path_rewards(example().arrays(8), padded(paths, 4), **options)


@pytest.mark.parametrize("form", ["dense", "compact"])
def test_the_path_of_the_example(form):
    arrays = example().arrays(8, form)
    found = path_rewards(arrays, padded([(1, 2)], 3))
    np.testing.assert_allclose(found.log_r, [[-15, -1.79176, -0.69315]], atol=5e-6)
    compat = path_rewards(arrays, padded([(1, 2)], 3), compat=True)
    np.testing.assert_allclose(compat.log_r, [[-15, -15.08701, -0.69315]], atol=5e-6)


def test_states_off_the_tree_pay_the_floor_for_every_edge():
    found = rewards()
    np.testing.assert_allclose(
        found.log_r[3], [-15, np.log(2 / 12), np.log(11 / 12) - 30, np.log(11 / 12) - 45], rtol=1e-5
    )
    np.testing.assert_allclose(found.log_r[4, :2], [-15, -30])
    # "4 4" begins with an item.
    np.testing.assert_allclose(
        found.log_r[5, :3], [-15, np.log(1 / 12), np.log(1 / 12) - 30], rtol=1e-5
    )
    np.testing.assert_array_equal(found.item, [0, 3, 2, -1, -1, -1, 1])
    np.testing.assert_array_equal(found.states.sum(1), [3, 2, 2, 4, 2, 3, 3])


def test_the_reward_is_a_function_of_the_state():
    # "1" ends there, goes on to "1 2", and off the tree: always the same reward.
    found = rewards().log_r
    assert len({round(float(found[row, 1]), 6) for row in (0, 1, 3, 6)}) == 1
    compat = rewards(compat=True).log_r
    assert compat[1, 1] == found[1, 1]
    assert compat[0, 1] == compat[3, 1] < found[0, 1]


def test_titles_within_titles_balance_only_as_functions_of_the_state():
    trie = example()
    tokens = padded(trie.items, 3)
    found, compat = (path_rewards(trie.arrays(7), tokens, compat=c) for c in (False, True))
    log_pf, log_pterm = along(flow_policy(trie, 7), found.nodes, tokens)
    assert subtb_loss(log_pf, log_pterm, found.log_r, found.states) < 1e-9
    assert subtb_loss(log_pf, log_pterm, compat.log_r, compat.states) > 10
    # Without titles within titles the two are one.
    trie = example().__class__.of([(1, 2), (3,)], [2.0, 1.0], END)
    both = [path_rewards(trie.arrays(7), padded(trie.items, 3), compat=c) for c in (0, 1)]
    np.testing.assert_array_equal(both[0].log_r, both[1].log_r)


def test_the_floor_is_a_parameter():
    np.testing.assert_allclose(rewards(floor=-4.0).log_r[4, :2], [-4, -8])


def test_tokens_behind_the_end_are_of_no_account():
    arrays = example().arrays(8)
    tokens = padded([(1, 2)], 6)
    short, long = path_rewards(arrays, tokens[:, :3]), path_rewards(arrays, tokens)
    np.testing.assert_array_equal(short.log_r, long.log_r[:, :3])
    assert not np.any(long.log_r[:, 3:])
    assert not np.any(long.states[:, 3:])


def test_one_token_an_action_is_the_default():
    for a, b in zip(
        (rewards().log_r, rewards().states),
        (rewards(granularity=1).log_r, rewards(granularity=1).states),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_whole_items_as_actions():
    found = rewards(granularity=150)
    np.testing.assert_array_equal(found.states.sum(1), [2] * len(PATHS))
    ends = np.asarray(found.log_r)[np.arange(len(PATHS)), [2, 1, 1, 3, 1, 2, 2]]
    shares = np.log(np.array([6, 2, 1, 3]) / 12)
    np.testing.assert_allclose(ends[[0, 1, 2, 6]], shares, rtol=1e-5)
    # The way off the tree and the end that is no item, 15 x 150 each.
    np.testing.assert_allclose(ends[[3, 4, 5]], -2 * 15 * 150)
    np.testing.assert_allclose(found.log_r[:, 0], -15 * 150)


def test_actions_of_two_tokens():
    trie = drawn(0, longest=5)
    item = next(i for i in trie.items if len(i) == 5)
    off = (*item[:3], 7, 7)
    found = path_rewards(trie.arrays(9), padded([item, off], 6), granularity=2)
    np.testing.assert_array_equal(found.states[0], [True, False, True, False, True, True])
    logs = [trie.edges(item[:k])[item[k]] for k in range(5)]
    share = sum(logs) + trie.edges(item)[END]
    np.testing.assert_allclose(found.log_r[0, 5], share, rtol=1e-5)
    two = item[:2]
    at_two = sum(logs[:2]) + trie.edges(two).get(END, -30.0)
    np.testing.assert_allclose(found.log_r[:, 2], at_two, rtol=1e-5)
    # The second action leaves the tree, with whichever of its tokens; the third is off it.
    np.testing.assert_allclose(found.log_r[1, 4], sum(logs[:2]) - 30 - 30, rtol=1e-5)
    np.testing.assert_allclose(found.log_r[1, 5], sum(logs[:2]) - 30 - 30 - 30, rtol=1e-5)


def test_div_s_of_the_example():
    found = personal_divisors(np.array([0.5, 0.3, 0.15, 0.05]))
    np.testing.assert_allclose(found, [1.5556, 1.1111, 0.7778, 0.5556], atol=5e-5)
    np.testing.assert_array_equal(personal_divisors(np.full((2, 3), 0.2)), 1.0)


def test_div_s_takes_the_root_of_the_reward():
    s = np.array([2.0, 0.5, 1.0, 1.0, 1.0, 1.0, 4.0])
    plain, found = rewards(), rewards(divisor=jnp.asarray(s, jnp.float32))
    for row, last in ((0, 2), (1, 1), (2, 1), (6, 2)):
        np.testing.assert_allclose(
            found.log_r[row, last], plain.log_r[row, last] / s[row], rtol=1e-5
        )
    np.testing.assert_allclose(found.log_r[:, 0], -15)  # the floor is not divided
    # And the interior depends on the path's end.
    np.testing.assert_allclose(found.log_r[0, 1], plain.log_r[0, 1] / 2, rtol=1e-5)


def test_add_logs_adds_to_every_edge_of_the_tree():
    bonus = personal_bonuses(np.array([0.5, 0.3, 0.05]), strength=2.0)
    np.testing.assert_allclose(bonus, 2 * np.log([1.0, 0.25 / 0.45, 1e-20]), rtol=1e-6)
    np.testing.assert_array_equal(personal_bonuses(np.full(3, 0.1)), 0.0)
    plain, found = rewards(), rewards(bonus=jnp.full(len(PATHS), -0.7))
    np.testing.assert_allclose(
        found.log_r[0], plain.log_r[0] - np.array([0, 1.4, 2.1, 0]), rtol=1e-5
    )
    # Off the tree nothing is added.
    np.testing.assert_allclose(found.log_r[3, 2:], plain.log_r[3, 2:] - 0.7, rtol=1e-5)


def test_paths_that_are_no_items_end_nowhere():
    tokens = padded([(1, 2), (1, 2, 2), ()], 4).at[1, 3].set(2)
    np.testing.assert_array_equal(ending(example().arrays(8), tokens), [0, -1, -1])
