"""Segments of answers, credited by fresh continuations: cutpoints, chains, trees, and runs."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.config import resolve
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError
from tokjax.rl.advantages import GroupAdvantage, group_advantages
from tokjax.rl.policy import Policy
from tokjax.rl.rollout import Rollout
from tokjax.rl.spo import (
    SPOChain,
    SPOTree,
    chain_boundaries,
    cutpoints,
    segment_advantages,
    tree_values,
)
from tokjax.training.config import TrainConfig
from tokjax.training.loop import train
from tokjax.training.metrics import read_metrics

P = [0.95, 0.4, 0.99, 0.85, 0.6, 0.97, 0.3, 0.99, 0.7, 0.92]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    yield
    sys.modules.pop("rewards_for_tests", None)


def rollout_of(reward, lengths, group):
    """Answers of these lengths behind prompts of two tokens."""
    lengths = np.asarray(lengths)
    places = np.arange(int(lengths.max()) + 2)
    mask = (places >= 1) & (places < 1 + lengths[:, None])
    zero, ids = jnp.zeros(mask.shape), jnp.zeros(mask.shape, jnp.int32)
    weights = jnp.asarray(mask, jnp.float32)
    return Rollout(
        batch=Batch(ids, ids, ids, ids, weights, jnp.arange(len(mask))[:, None]),
        reward=jnp.asarray(reward, jnp.float32),
        logprobs=zero,
        entropies=zero,
        stopped=jnp.ones(len(mask), bool),
        progress=jnp.float32(0),
        group=group,
    )


class Known:
    """An environment whose continuations have known values."""

    def __init__(self, values, tokens=()):
        self.values, self.asked = values, []
        self.answers = type("Answers", (), {"tokens": tokens, "prompts": [(1,)] * len(tokens)})

    def continued(self, rows, kept, samples):
        self.asked += list(zip(rows, kept, strict=True))
        return np.array([[self.values[n]] * samples for n in kept], np.float32)


def with_logprobs(p, reward=(1.0,), group=1):
    """A rollout of answers with these probabilities, as `rollout_of` lays them out."""
    p = np.atleast_2d(np.asarray(p, np.float32))
    rollout = rollout_of(list(reward), [p.shape[1]] * len(p), group)
    logprobs = np.zeros(rollout.mask.shape, np.float32)
    logprobs[np.asarray(rollout.mask)] = np.log(p).ravel()
    return dataclasses.replace(rollout, logprobs=logprobs)


def gathered(chain, rollout, values, tokens=None):
    tokens = tokens or [[10 + r] * int(n) for r, n in enumerate(np.asarray(rollout.lengths))]
    environment = Known(values, tokens)
    extra = chain.gather(rollout, environment)
    return dataclasses.replace(rollout, extra=extra), environment


# ---------------------------------------------------------------- chain


def test_segments_between_three_values_and_the_reward():
    found = segment_advantages(6, [0, 2, 4], [0.25, 0.5, 0.5], 1.0)
    np.testing.assert_allclose(found[[0, 2, 4]], [0.25, 0.0, 0.5])
    np.testing.assert_allclose(found, [0.25, 0.25, 0, 0, 0.5, 0.5])
    assert found[[0, 2, 4]].sum() == 0.75  # telescopes to the reward less the prompt's value


def test_cutpoints_boundaries_filling_and_mask_of_ten_tokens():
    logprobs = np.log(np.asarray(P, np.float32))
    cuts = cutpoints(logprobs, 0.9)
    assert cuts.tolist() == [1, 3, 4, 6, 8]
    kept = chain_boundaries(cuts, 2)
    assert kept.tolist() == [1, 4, 8]
    assert (kept - 1).tolist() == [0, 3, 7]
    filled = segment_advantages(10, kept, [0.25, 0.5, 0.5], 1.0)
    np.testing.assert_allclose(filled, [0, 0.25, 0.25, 0.25, 0, 0, 0, 0, 0.5, 0.5])
    chain = SPOChain(interval=2, samples=3, whiten=False)
    rollout, environment = gathered(chain, with_logprobs(P), {1: 0.25, 4: 0.5, 8: 0.5})
    assert environment.asked == [(0, 1), (0, 4), (0, 8)]
    advantages, weights = chain(rollout)
    masked = np.asarray(advantages * weights)[np.asarray(rollout.mask)]
    np.testing.assert_allclose(masked, [0, 0.25, 0, 0.25, 0, 0, 0, 0, 0.5, 0])
    assert np.asarray(weights)[np.asarray(rollout.mask)].tolist() == [0, 1, 0, 1, 1, 0, 1, 0, 1, 0]


def test_whitening_is_over_the_masked_tokens():
    chain = SPOChain(interval=2, samples=3)
    rollout, _ = gathered(chain, with_logprobs(P), {1: 0.25, 4: 0.5, 8: 0.5})
    advantages, weights = chain(rollout)
    own = np.array([0.25, 0.25, 0, 0, 0.5])
    found = np.asarray(advantages)[np.asarray(weights) != 0]
    np.testing.assert_allclose(found, (own - own.mean()) / own.std(), rtol=1e-5)


def test_one_segment_without_mask_is_the_reward_less_the_prompts_value():
    chain = SPOChain(interval=1000, threshold=2.0, whiten=False)
    rollout, environment = gathered(chain, with_logprobs(P), {0: 0.3})
    assert environment.asked == [(0, 0)]
    advantages, weights = chain(rollout)
    np.testing.assert_allclose(advantages, 0.7 * rollout.mask, rtol=1e-6)
    np.testing.assert_array_equal(weights, rollout.mask.astype(np.float32))


def test_boundaries_at_a_separator_are_those_of_vineppo():
    chain = SPOChain(threshold=2.0, whiten=False, separator=7)
    rollout = with_logprobs([0.5] * 6)
    tokens = [[3, 7, 4, 5, 7, 7]]
    rollout, environment = gathered(chain, rollout, {0: 0.2, 2: 0.6, 5: 0.5}, tokens)
    assert environment.asked == [(0, 0), (0, 2), (0, 5)]
    found = np.asarray(chain(rollout)[0])[np.asarray(rollout.mask)]
    np.testing.assert_allclose(found, [0.4, 0.4, -0.1, -0.1, -0.1, 0.5], rtol=1e-5)


def test_a_probability_of_exactly_the_threshold_has_no_mask():
    logprobs = np.log(np.array([0.9, 0.89999, 0.90001], np.float32))
    assert cutpoints(logprobs, 0.9).tolist() == [1]


def test_thresholds_at_both_ends():
    everything = SPOChain(threshold=1.5, samples=1)
    rollout, _ = gathered(everything, with_logprobs(P), dict.fromkeys(range(10), 0.5))
    np.testing.assert_array_equal(everything(rollout)[1], rollout.mask.astype(np.float32))
    nothing = SPOChain(threshold=0.0, samples=1)
    rollout, environment = gathered(nothing, with_logprobs(P), {})
    assert environment.asked == []
    advantages, weights = nothing(rollout)
    assert not np.any(weights)
    assert not np.any(advantages)
    policy = Policy(advantage=nothing, norm="kept")
    channels = {"advantage": advantages, "weight": weights, "old": rollout.logprobs}
    batch = rollout.batch.replace(channels=channels)

    def loss(logprobs):
        return policy.loss_of(logprobs, jnp.zeros_like(logprobs), batch).total

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(rollout.logprobs))
    assert value == 0
    assert not np.any(gradient)
    assert np.isfinite(gradient).all()


def test_equal_states_are_continued_once():
    chain = SPOChain(interval=1, samples=2, whiten=False)
    rollout = with_logprobs([[0.5, 0.99], [0.5, 0.5]], reward=(1.0, 0.0), group=2)
    tokens = [[4, 5], [4, 6]]
    rollout, environment = gathered(chain, rollout, {0: 0.5, 1: 0.25}, tokens)
    assert environment.asked == [(0, 0), (1, 1)]
    found = np.asarray(chain(rollout)[0])[np.asarray(rollout.mask)].reshape(2, 2)
    np.testing.assert_allclose(found, [[0.5, 0], [-0.25, -0.25]])


def test_the_value_of_fresh_answers_is_unbiased():
    """A toy of two states: values of 1/4 and 2/3, estimated from N = 8 draws."""
    rng = np.random.default_rng(0)
    for value in (0.25, 2 / 3):
        drawn = (rng.random((10_000, 8)) < value).mean(1)
        assert abs(drawn.mean() - value) < 3 * drawn.std() / 100
        assert drawn.var() <= 0.25 / 8


# ---------------------------------------------------------------- tree

LEAVES = jnp.array([[1.0, 0, 1, 0, 0, 1]])  # [[1, 0, 1], [0, 0, 1]]


def test_values_and_advantages_of_a_small_tree():
    root, inner, leaves = tree_values(LEAVES, (2, 3))
    np.testing.assert_allclose(root, [[0.5]])
    np.testing.assert_allclose(inner, [[2 / 3, 1 / 3]], rtol=1e-6)
    np.testing.assert_array_equal(leaves, LEAVES)
    level1, level2 = SPOTree(branches=(2, 3)).by_level(LEAVES)
    np.testing.assert_allclose(level1, [[0.16667, -0.16667]], atol=1e-5)
    np.testing.assert_allclose(
        level2, [[0.33333, -0.66667, 0.33333, -0.33333, -0.33333, 0.66667]], atol=1e-5
    )


@pytest.mark.parametrize(("ddof", "size"), [(0, 1.0), (1, 0.70711)])
def test_normalised_advantages_of_the_first_level(ddof, size):
    level1, _ = SPOTree(branches=(2, 3), scale=True, ddof=ddof).by_level(LEAVES)
    np.testing.assert_allclose(level1, [[size, -size]], atol=1e-5)


def test_equal_children_give_no_advantage_and_no_division():
    for scale in (False, True):
        for level in SPOTree(branches=(2, 3), scale=scale).by_level(jnp.full((1, 6), 0.1)):
            assert not np.any(level)


def tree_rollout(reward, lengths, group, p=0.5):
    rollout = rollout_of(reward, lengths, group)
    return dataclasses.replace(
        rollout, logprobs=jnp.where(rollout.mask, jnp.log(p), 0.0).astype(jnp.float32)
    )


def test_every_node_is_trained_on_once():
    tree = SPOTree(branches=(2, 3), segment=2)
    rollout = tree_rollout(LEAVES[0], [4] * 6, 6)
    advantages, weights = tree(rollout)
    rows = np.asarray(rollout.mask)
    shown = np.asarray(weights)[rows].reshape(6, 4)
    assert shown.tolist() == [
        [1, 1, 1, 1],
        [0, 0, 1, 1],
        [0, 0, 1, 1],
        [1, 1, 1, 1],
        [0, 0, 1, 1],
        [0, 0, 1, 1],
    ]
    found = np.asarray(advantages)[rows].reshape(6, 4)
    np.testing.assert_allclose(found[0], [1 / 6, 1 / 6, 1 / 3, 1 / 3], rtol=1e-5)
    np.testing.assert_allclose(found[5], [-1 / 6, -1 / 6, 2 / 3, 2 / 3], rtol=1e-5)


def test_nodes_without_advantage_and_likely_tokens_have_no_weight():
    tree = SPOTree(branches=(2, 2), segment=1)
    rollout = tree_rollout([1.0, 0, 1, 0], [3] * 4, 4)  # both inner nodes are worth a half
    weights = np.asarray(tree(rollout)[1])[np.asarray(rollout.mask)].reshape(4, 3)
    assert weights.tolist() == [[0, 1, 1]] * 4
    likely = tree_rollout([1.0, 0, 1, 0], [3] * 4, 4, p=0.95)
    assert not np.any(tree(likely)[1])


def test_a_tree_of_depth_one_is_the_mean_centred_group():
    rollout = tree_rollout([1.0, 0, 0, 1, 1, 0, 0, 0], [3, 2, 1, 4, 2, 2, 3, 1], 4)
    found, weights = SPOTree(branches=(4,), threshold=2.0)(rollout)
    expected, mask = GroupAdvantage(scale=False)(rollout)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(weights, mask)
    assert group_advantages(rollout.by_prompt(rollout.reward), scale=False).shape == (2, 4)


# ---------------------------------------------------------------- runs


def test_a_chain_runs_and_resamples(rl_run, tmp_path):
    run = rl_run(
        objective__advantage={"name": "spo_chain", "interval": 1, "samples": 3},
        objective__norm="kept",
        steps=2,
    )
    assert train(run, tmp_path).finished
    table = read_metrics(tmp_path)
    assert table["rollout/further_answers"][0] > 0
    assert table["rollout/further_answers"][0] % 3 == 0
    assert all(np.isfinite(v) for v in table["loss"])


def started(run, folder):
    from tokjax.rl.collector import Collector

    state = jax.jit(lambda: run.init_state(run.stages[0]))()
    return state, Collector(run.config.objective, run, run.stages[0], folder)


def test_a_tree_shares_its_beginnings(rl_run, tmp_path):
    run = rl_run(
        objective__advantage={"name": "spo_tree", "branches": [2, 2], "segment": 1},
        objective__norm="kept",
    )
    state, collector = started(run, tmp_path)
    prompts = [q.prompt for q in collector.asked(0)]
    with collector:
        answers = collector.drawn(state, prompts, 5)
        batch = collector.rows_of(answers)
        scores = collector.scores(state, batch)
        again = collector.drawn(state, prompts, 5)
    assert answers.tokens == again.tokens
    assert len(answers.tokens) == 4 * len(prompts)
    assert answers.prompts == [p for p in prompts for _ in range(4)]
    for i in range(0, len(answers.tokens), 2):
        one, two = answers.tokens[i : i + 2]
        assert one[0] == two[0]
        if len(one) == 1:  # an answer that ended early is a leaf
            assert one == two
    eos = run.tokenizer.eos_id
    assert [t[-1] == eos for t in answers.tokens] == answers.stopped.tolist()
    assert all(1 <= len(t) <= 3 for t in answers.tokens)
    assert len({tuple(t) for t in answers.tokens}) > len(answers.tokens) // 2
    mask = np.asarray(batch.weights) != 0
    np.testing.assert_allclose(scores["logprob"][mask], scores["decoded"][mask], atol=1e-5)


def test_a_tree_learns_what_is_rewarded(rl_run, tmp_path):
    run = rl_run(
        objective__advantage={"name": "spo_tree", "branches": [4, 2], "segment": 1},
        objective__norm="kept",
        objective__rollouts={"group": 8, "minibatches": 2, "max_new_tokens": 3},
        steps=40,
        data__batch_size=32,
        optimizer__peak_lr=2e-2,
    )
    assert train(run, tmp_path).finished
    rewards = [r for r in read_metrics(tmp_path)["reward/mean"] if r is not None]
    assert np.mean(rewards[-3:]) > 0.95


@pytest.mark.parametrize(
    ("advantage", "message"),
    [
        ({"name": "spo_chain", "interval": 0}, "interval=0"),
        ({"name": "spo_chain", "samples": 0}, "samples=0"),
        ({"name": "spo_chain", "threshold": -0.1}, "threshold=-0.1"),
        ({"name": "spo_tree", "branches": []}, "branches"),
        ({"name": "spo_tree", "branches": [2, 0]}, "branches"),
        ({"name": "spo_tree", "segment": 0}, "segment=0"),
    ],
)
def test_impossible_settings_are_refused(rl_tree, advantage, message):
    with pytest.raises(ConfigError, match=message):
        resolve(TrainConfig, rl_tree(objective__advantage=advantage))


def test_a_tree_says_how_large_groups_must_be(rl_run, tmp_path):
    run = rl_run(objective__advantage={"name": "spo_tree", "branches": [3, 2], "segment": 1})
    with pytest.raises(ConfigError, match=r"rollouts.group=4 .* 3 x 2 = 6"):
        train(run, tmp_path)
