"""Balance losses: zero at exact flows, worked numbers, and what must not change them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogues_for_tests import (
    END,
    along,
    double,
    drawn,
    example,
    padded,
    uniform,
)
from jax.test_util import check_grads

from tokjax.gflownet.balance import (
    action_mask,
    detailed_balance,
    subtb,
    subtb_loss,
    trajectory_balance,
)
from tokjax.gflownet.exact import flow_policy
from tokjax.gflownet.path_rewards import path_rewards

RNG = np.random.default_rng(0)
ROWS = {
    "log_pf": jnp.asarray(RNG.normal(-1, 1, (4, 6)), jnp.float32),
    "log_pterm": jnp.asarray(RNG.normal(-2, 1, (4, 6)), jnp.float32),
    "log_r": jnp.asarray(RNG.normal(-5, 3, (4, 6)), jnp.float32),
}
STATES = jnp.arange(6) < jnp.array([[1], [3], [6], [4]])


def by_hand(log_pf, log_pterm, log_r, states, lam):
    """The published form: squared partial sums of the transitions' deltas."""
    total = weight = 0.0
    for row in range(len(log_pf)):
        n = int(states[row].sum())
        f, e, r = (np.asarray(a[row], np.float64) for a in (log_pf, log_pterm, log_r))
        delta = [r[i] + f[i] + e[i + 1] - r[i + 1] - e[i] for i in range(n - 1)]
        for length in range(1, n):
            for i in range(n - length):
                total += lam ** (length - 1) * sum(delta[i : i + length]) ** 2
                weight += lam ** (length - 1)
    return total / weight


def test_masks_differ_by_the_first_end_token():
    tokens = jnp.array([[3, 1, 0, 0], [0, 0, 0, 0], [2, 2, 2, 2]])
    np.testing.assert_array_equal(action_mask(tokens, END).sum(1), [2, 0, 4])
    np.testing.assert_array_equal(action_mask(tokens, END, offset=1).sum(1), [3, 1, 4])


def test_a_path_of_the_example():
    tokens = padded([(1, 2)], 3)
    states = action_mask(tokens, END, offset=1)
    for log_r, loss in (
        ([-15, -1.79176, -0.69315], 178.01610),
        ([-15, -15.08701, -0.69315], 188.52487),
    ):
        flat = uniform((1, 3), 5)
        found = subtb_loss(flat, flat, jnp.array([log_r]), states)
        np.testing.assert_allclose(found, loss, rtol=2e-6)


def test_deltas_of_the_example():
    flat = uniform((1, 3), 5)
    log_r = jnp.array([[-15, -1.79176, -0.69315]])
    for pair, delta in (((0, 1), -14.81768), ((1, 2), -2.70805)):
        states = jnp.isin(jnp.arange(3), jnp.array(pair))[None]
        found = subtb_loss(flat, flat, log_r, states)
        np.testing.assert_allclose(found, delta**2, rtol=1e-5)


@pytest.mark.parametrize("lam", [1.0, 0.9, 0.3, 1.5, 0.0])
def test_it_is_the_sum_over_all_sub_trajectories(lam):
    expected = by_hand(**ROWS, states=STATES, lam=lam)
    np.testing.assert_allclose(subtb_loss(**ROWS, states=STATES, lam=lam), expected, rtol=1e-5)


def test_detailed_balance_is_its_limit_of_neighbours():
    total, count = detailed_balance(**ROWS, states=STATES)
    np.testing.assert_array_equal(count, [0, 2, 5, 3])
    np.testing.assert_allclose(
        total.sum() / count.sum(), by_hand(**ROWS, states=STATES, lam=0.0), rtol=1e-5
    )


def test_trajectory_balance_of_whole_rows():
    total, count = trajectory_balance(**ROWS, states=STATES, log_z=0.5)
    n = np.asarray(STATES.sum(1))
    expected = [
        (
            0.5
            + ROWS["log_pf"][i, : n[i] - 1].sum()
            + (ROWS["log_pterm"] - ROWS["log_r"])[i, n[i] - 1]
        )
        ** 2
        for i in range(4)
    ]
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_array_equal(count, 1)
    nothing = trajectory_balance(**ROWS, states=jnp.zeros_like(STATES), log_z=0.5)
    assert not np.any(nothing[0])
    assert not np.any(nothing[1])


@pytest.mark.parametrize("trie", [example(), drawn(3)], ids=["example", "drawn"])
def test_exact_flows_have_no_loss(trie):
    with double(True):
        tokens = padded(trie.items, trie.longest + 1)
        rewards = path_rewards(trie.arrays(7), tokens)
        # The device's logs are float32: here they are the tree's own.
        log_r = np.zeros(tokens.shape)
        for row, item in enumerate(trie.items):
            for i in range(len(item) + 1):
                edges = [trie.edges(item[:k])[item[k]] for k in range(i)]
                log_r[row, i] = sum(edges) + trie.edges(item[:i]).get(END, -15.0)
        np.testing.assert_allclose(rewards.log_r, log_r, rtol=1e-5)
        table = flow_policy(trie, 7)
        log_pf, log_pterm = along(table, rewards.nodes, tokens)
        given = (log_pf, log_pterm, jnp.asarray(log_r), rewards.states)
        assert subtb_loss(*given) < 1e-20
        assert subtb_loss(*given, 0.7) < 1e-20
        assert detailed_balance(*given)[0].sum() < 1e-20
        # An item that nothing follows has all its reward in itself.
        root = np.log(sum(np.exp(log_r[i, len(item)]) for i, item in enumerate(trie.items)))
        log_z = np.log(np.exp(root) + _floors(trie))
        assert trajectory_balance(*given, log_z)[0].sum() < 1e-20


def _floors(trie):
    """Rewards of the prefixes that are no items."""
    prefixes = {item[:i] for item in trie.items for i in range(len(item))} - set(trie.items)
    sums = [sum(trie.edges(p[:k])[p[k]] for k in range(len(p))) for p in prefixes]
    return np.exp(np.array(sums) - 15.0).sum()


def test_the_policy_of_exact_flows():
    table = np.exp(flow_policy(example(), 5))
    np.testing.assert_allclose(table[0, END], 3.059e-7, rtol=1e-4)
    np.testing.assert_allclose(table[0, 1], 0.91667, atol=5e-6)
    node = 1  # behind the token 1, the first that was added
    np.testing.assert_allclose(table[node, END], 2 / 11, rtol=1e-9)


def test_paths_in_the_tree_do_not_see_what_leaks_off_it():
    # Two items of one token, R = 1/2 each; a third of the mass behind item 1 goes elsewhere.
    tokens = padded([(1,), (2,)], 2)
    log_r = jnp.log(jnp.array([[1e-30, 0.5], [1e-30, 0.5]]))
    to = jnp.log(jnp.array([2 / 3, 1 / 3]))  # of items 1 and 2
    ends = jnp.log(jnp.array([0.5, 1.0]))
    # The root's own end, in balance with both.
    root = log_r[:, 0] + to + ends - log_r[:, 1]
    np.testing.assert_allclose(root[0], root[1], rtol=1e-6)
    log_pf = jnp.stack([to, jnp.zeros(2)], 1)
    log_pterm = jnp.stack([root, ends], 1)
    states = action_mask(tokens, END, offset=1)
    assert subtb_loss(log_pf, log_pterm, log_r, states) < 1e-9
    masked = np.exp(to) / np.exp(to).sum()  # behind the token only the end is in the tree
    np.testing.assert_allclose(masked, [2 / 3, 1 / 3], rtol=1e-6)


def test_a_constant_in_all_rewards_changes_nothing():
    moved = {**ROWS, "log_r": ROWS["log_r"] + 7.0}
    for lam in (1.0, 0.5):
        np.testing.assert_allclose(
            subtb_loss(**moved, states=STATES, lam=lam),
            subtb_loss(**ROWS, states=STATES, lam=lam),
            rtol=1e-5,
        )


def test_tokens_behind_the_end_change_nothing():
    junk = {name: jnp.where(STATES, values, 99.0) for name, values in ROWS.items()}
    for a, b in zip(subtb(**junk, states=STATES), subtb(**ROWS, states=STATES), strict=True):
        np.testing.assert_array_equal(a, b)
    slopes = jax.grad(lambda log_pf: subtb_loss(**{**ROWS, "log_pf": log_pf}, states=STATES))(
        ROWS["log_pf"]
    )
    last = STATES & ~jnp.pad(STATES[:, 1:], ((0, 0), (0, 1)))
    assert not np.any(slopes[~STATES | last])
    assert np.any(slopes)


def test_rows_may_change_places():
    order = jnp.array([2, 0, 3, 1])
    found = subtb(**ROWS, states=STATES)
    moved = subtb(**{n: a[order] for n, a in ROWS.items()}, states=STATES[order])
    for a, b in zip(moved, found, strict=True):
        np.testing.assert_array_equal(a, b[order])


def test_tokens_between_states_are_one_transition():
    # Summing the tokens of an action by hand gives the same.
    states = STATES[2:3] & (jnp.arange(6) % 2 == 0)
    row = {name: values[2:3] for name, values in ROWS.items()}
    pairs = {name: values[:, ::2] for name, values in row.items()}
    pairs["log_pf"] = row["log_pf"][:, ::2] + row["log_pf"][:, 1::2]
    np.testing.assert_allclose(
        subtb_loss(**row, states=states),
        by_hand(**pairs, states=jnp.ones((1, 3), bool), lam=1.0),
        rtol=1e-5,
    )


def test_the_gradient_is_that_of_finite_differences():
    with double(True):
        rows = {name: jnp.asarray(np.asarray(a, np.float64)) for name, a in ROWS.items()}

        def loss(log_pf, log_pterm):
            given = {**rows, "log_pf": log_pf, "log_pterm": log_pterm}
            return subtb_loss(**given, states=STATES, lam=0.8)

        check_grads(loss, (rows["log_pf"], rows["log_pterm"]), 1, ["rev"])
