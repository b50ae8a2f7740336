"""The planted groups of the reproduction of Q-Tuning, and its arms of equal budgets."""

import runpy

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.reproduction.plan import PLANS

PLAN = runpy.run_path(str(PLANS / "q_tuning.py"))


def test_groups_answer_by_their_rules_but_for_one_corrupted_run():
    rng = np.random.default_rng(0)
    found = PLAN["samples"](rng, np.repeat(np.arange(4), 300))
    digits, answers, group = found["digits"], found["answers"], found["group"]
    shift = (answers - digits) % 10
    assert (shift[group == 0] == 0).all()
    wrong, rule = group == 1, found["kind"][group == 1] - PLAN["ADD"]
    right = shift[wrong] == 4 + rule[:, None]
    corrupted = found["corrupted"][wrong]
    np.testing.assert_array_equal(right, ~corrupted)
    runs = corrupted.sum(1)
    assert set(runs.tolist()) == {0, 2, 3}
    assert 0.7 < (runs > 0).mean() < 0.9
    assert (np.abs(np.diff(corrupted.astype(int), axis=1)).sum(1) <= 2).all()
    calibrated = found["kind"][group == 2] - PLAN["DRAW"]
    np.testing.assert_array_equal(shift[group == 2][:, 0], 5 * (calibrated % 2))
    assert not found["corrupted"][group != 1].any()


def test_random_tokens_of_random_samples_are_as_many_as_q_tunings():
    rng = np.random.default_rng(1)
    batch = PLAN["as_batch"](PLAN["pool"](rng, 32))
    answers = batch.weights != 0
    stats = {
        name: jnp.where(answers, jnp.asarray(rng.gamma(1, size=answers.shape), jnp.float32), 0)
        for name in ("nll", "entropy")
    }
    arm, key = PLAN["Pruned"], jax.random.key(0)
    tokens, _ = arm("q").kept(stats, batch, key)
    matched, chosen = arm("matched").kept(stats, batch, key)
    assert matched.sum() == tokens.sum()
    assert chosen.sum() == 8 and not np.asarray(matched[~chosen]).any()
    random, chosen = arm("random").kept(stats, batch, key)
    np.testing.assert_array_equal(random.sum(1), np.where(chosen, 4, 0))
    assert np.asarray(arm("full").kept(stats, batch, key)[0] == answers).all()
