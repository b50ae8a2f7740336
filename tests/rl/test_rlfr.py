"""A flow over hidden states: its errors in closed form, its penalties, and runs (RLFR)."""

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
from tokjax.rl.advantages import GroupAdvantage
from tokjax.rl.flow_network import (
    FlowConfig,
    flow_errors,
    flow_loss,
    flow_scores,
    init_flow,
    row_numbers,
    state_pairs,
    velocity,
    whole_rows,
)
from tokjax.rl.rlfr import RLFR, GroupReturns, flow_values
from tokjax.rl.rollout import Rollout
from tokjax.training.config import TrainConfig
from tokjax.training.loop import train
from tokjax.training.metrics import read_metrics
from tokjax.training.trained import load_trained

REWARDS = [{"name": "function", "path": "rewards_for_tests:first_token"}]
ROLLOUTS = {"group": 4, "minibatches": 2, "max_new_tokens": 3}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    yield
    sys.modules.pop("rewards_for_tests", None)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def rollout_of(reward, lengths, group, **more):
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
        **more,
    )


# ---------------------------------------------------------------- the network and its errors


def draws(n=20_000, D=4, key=0):
    keys = jax.random.split(jax.random.key(key), 3)
    return [jax.random.normal(k, (n, D)) for k in keys]


def at(t, n=20_000):
    return jnp.full(n, t)


def test_at_first_it_returns_zero_and_the_error_is_that_of_the_path():
    flow = init_flow(jax.random.key(1), 4, depth=3)
    noise, h, condition = draws()
    layer = at(0.5)
    assert not np.any(velocity(flow, h, at(0.3), condition, layer))
    found = flow_errors(
        lambda *args: velocity(flow, *args), 2 * h, condition, layer, noise, at(0.3)
    )
    np.testing.assert_allclose(found, np.square(2 * h - noise).mean(-1), rtol=1e-5)
    # Its expectation is the mean square of the states and 1.
    np.testing.assert_allclose(found.mean(), np.square(2 * h).mean() + 1, rtol=0.02)


def test_a_state_that_its_condition_determines_scores_zero():
    noise, c, _ = draws(n=12)
    known = lambda x, t, condition, layer: (condition - x) / (1 - t[..., None])  # noqa: E731
    for t in (0.0, 0.3, 0.8):
        found = flow_errors(known, c, c, at(0.5, 12), noise, at(t, 12))
        np.testing.assert_allclose(found, 0.0, atol=1e-10)
    pairs = (c.reshape(1, 3, 4, 4), c.reshape(1, 3, 4, 4), jnp.full((1, 1, 1), 0.5))
    scores = flow_scores(known, pairs, jnp.arange(3, dtype=jnp.uint32), (0.8, 0.5))
    np.testing.assert_allclose(scores, 0.0, atol=1e-9)


@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_the_least_error_of_pure_noise(t):
    """E[h - n | x_t] = (2t - 1) / (t^2 + (1 - t)^2) x_t; what is left is 1 / (t^2 + (1 - t)^2)."""
    spread = t**2 + (1 - t) ** 2
    best = lambda x, t, condition, layer: (2 * t[..., None] - 1) / spread * x  # noqa: E731
    noise, h, _ = draws()
    found = flow_errors(best, h, h, at(0.5), noise, at(t))
    np.testing.assert_allclose(found.mean(), 1 / spread, rtol=0.02)
    if t == 0.8:
        assert 1 / spread == pytest.approx(1.47059, abs=1e-5)
        pairs = (h.reshape(1, 100, 200, 4), h.reshape(1, 100, 200, 4), jnp.full((1, 1, 1), 0.5))
        scores = flow_scores(best, pairs, jnp.arange(100, dtype=jnp.uint32), (0.8,))
        np.testing.assert_allclose(scores.mean(), 4 * 1.47059, rtol=0.02)


def test_a_flow_learns_what_its_condition_tells():
    """h is the condition plus little noise: the error falls below all that is possible without it.

    That is 1 / (t^2 + (1 - t)^2), 1 at least, for whatever t.
    """
    import optax

    keys = jax.random.split(jax.random.key(3), 3)
    condition = jax.random.normal(keys[0], (1, 64, 8, 16))
    h = condition + 0.05 * jax.random.normal(keys[1], condition.shape)
    pairs = (h, condition, jnp.full((1, 1, 1), 0.5))
    flow = init_flow(keys[2], 16, depth=2)
    config = FlowConfig(depth=2)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(flow, state, key):
        loss = lambda flow: flow_loss(flow, config, pairs, key).mean()  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(flow)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(flow, updates), state, value

    state, values = optimizer.init(flow), []
    for i in range(300):
        flow, state, value = step(flow, state, jax.random.key(i))
        values.append(float(value))
    assert values[0] > 1.5
    assert np.mean(values[-20:]) < 0.7


def test_which_blocks_are_read():
    assert FlowConfig().blocks(8) == (2, 4, 6)
    assert FlowConfig(layers=(1.0,)).blocks(8) == (7,)
    assert FlowConfig().blocks(28) == (7, 14, 21)


# ---------------------------------------------------------------- penalties


def test_values_and_returns_of_five_tokens():
    scores = jnp.array([[0.8, 2, 1.4, 0.5, 3.5]])
    mask = jnp.ones((1, 5), bool)
    plain = flow_values(scores, mask, threshold=-1.0)
    np.testing.assert_allclose(plain, [[0.1, 0.5, 0.3, 0, 1]], atol=1e-6)
    kept = flow_values(scores, mask, threshold=0.4)
    np.testing.assert_allclose(kept, [[0, 0.5, 0, 0, 1]], atol=1e-6)
    rollout = rollout_of([1.0], [5], 1)
    penalties = jnp.zeros(rollout.mask.shape).at[:, 1:6].set(-0.01 * kept)
    found, _ = GroupReturns()(dataclasses.replace(rollout, token_rewards=penalties))
    np.testing.assert_allclose(found[0, 1:6], [0.985, 0.985, 0.99, 0.99, 0.99], atol=1e-6)


def test_only_the_largest_are_kept():
    scores = jnp.arange(40.0)[None]
    mask = jnp.ones((1, 40), bool)
    found = flow_values(scores, mask, threshold=0.0, top_k=15)
    assert np.flatnonzero(found[0]).tolist() == list(range(25, 40))
    few = flow_values(scores, mask, threshold=0.9, top_k=15)
    assert np.flatnonzero(few[0]).tolist() == list(range(36, 40))


def test_filling_never_sets_the_least_score_and_constant_rows_have_none():
    scores = jnp.array([[5.0, 6.0, 7.0, 0.0, 0.0], [3.0, 3.0, 3.0, 0.0, 9.0]])
    mask = jnp.array([[True] * 3 + [False] * 2] * 2)
    found = flow_values(scores, mask, threshold=0.4)
    np.testing.assert_allclose(found, [[0, 0.5, 1, 0, 0], [0] * 5])
    other = flow_values(scores.at[:, 3:].set(-100.0), mask, threshold=0.4)
    np.testing.assert_array_equal(found, other)


def test_without_penalty_the_returns_are_the_groups_advantages_bitwise():
    rollout = rollout_of([1.0, 0, 0, 1, 0.3, 0.1, 0, 0], [3, 2, 1, 4, 2, 2, 3, 1], 4)
    for options in ({}, {"scale": False}, {"drop_constant": True}):
        expected = GroupAdvantage(**options)(rollout)
        zeros = jnp.zeros(rollout.mask.shape)
        for dense in (None, zeros):
            given = dataclasses.replace(rollout, token_rewards=dense)
            assert_equal(GroupReturns(**options)(given), expected)


# ---------------------------------------------------------------- states of a model


@pytest.fixture(scope="module")
def tiny():
    from tokjax.models import ModelConfig, Transformer

    model = Transformer(
        ModelConfig(vocab_size=31, d_model=16, n_layers=4, n_heads=2, max_positions=32)
    )
    return model, model.init(jax.random.key(0))


def batch_of(rows, T=9):
    """Rows of single segments, as a collector makes them."""
    arrays = [np.zeros((len(rows), T), np.int32) for _ in range(4)]
    tokens, targets, positions, segments = arrays
    weights = np.zeros((len(rows), T), np.float32)
    for r, row in enumerate(rows):
        n = len(row) - 1
        tokens[r, :n], targets[r, :n] = row[:-1], row[1:]
        positions[r, :n], segments[r, :n] = np.arange(n), 1
        weights[r, 1:n] = 1.0
    ids = np.arange(len(rows), dtype=np.int32)[:, None]
    return Batch(*map(jnp.asarray, (tokens, targets, positions, segments, weights, ids)))


ROWS = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [1, 2, 3]]


def test_states_are_those_behind_each_actions_token(tiny):
    model, params = tiny
    batch = batch_of(ROWS)
    config = FlowConfig(layers=(0.25, 1.0))
    states, condition, layer = state_pairs(config, model, params, batch, whole=True)
    for r, row in enumerate(ROWS):
        tokens = jnp.asarray(row)[None]
        out = model.backbone(params, model.embed(params, tokens), capture={"resid_post"})
        h = np.asarray(out.captured["resid_post"])[[1, 3], 0]
        np.testing.assert_allclose(states[:, r, : len(row) - 1], h[:, 1:], atol=1e-4)
        np.testing.assert_allclose(condition[:, r, : len(row) - 1], h[:, :-1], atol=1e-4)
    np.testing.assert_allclose(layer.ravel(), [0.25, 0.75])
    swapped = state_pairs(
        dataclasses.replace(config, pairing="token_pre"), model, params, batch, whole=True
    )
    assert_equal(swapped[:2], (condition, states))
    same = state_pairs(
        dataclasses.replace(config, pairing="identity"), model, params, batch, whole=True
    )
    assert_equal(same[:2], (states, states))
    packed = state_pairs(config, model, params, batch, whole=False)[0]
    np.testing.assert_allclose(packed[:, 1, :7], states[:, 1, :7], atol=1e-4)
    assert whole_rows(batch).tokens.shape == (3, 10)


def test_scores_depend_on_their_row_alone(tiny):
    model, params = tiny
    flow = init_flow(jax.random.key(2), 16, 2)

    def scores(rows, T):
        batch = batch_of(rows, T)
        pairs = state_pairs(FlowConfig(), model, params, batch, whole=True)
        keys = row_numbers(batch.targets, batch.segment_ids != 0)
        return np.asarray(flow_scores(flow, pairs, keys, (0.8,)))

    found = scores(ROWS, 9)
    permuted = scores([ROWS[2], ROWS[0], ROWS[1]], 12)
    for r, other in ((0, 1), (1, 2), (2, 0)):
        n = len(ROWS[r]) - 1
        np.testing.assert_allclose(found[r, :n], permuted[other, :n], rtol=1e-4)
    assert len(set(np.asarray(found[:, 0]).round(3))) == 3


def test_no_gradient_of_the_flow_goes_into_the_model(tiny):
    model, params = tiny
    batch = batch_of(ROWS)
    channels = dict.fromkeys(("advantage", "weight", "old", "accepted"), batch.weights)
    objective = RLFR(rewards=(GroupAdvantage(),), flow=FlowConfig(depth=1))  # type: ignore[arg-type]
    flow = {"flow": init_flow(jax.random.key(2), 16, 1)}
    # Away from its start, where its output layer's zeros hide the other gradients.
    flow = jax.tree.map(lambda p: p + 0.1, flow)

    def total(params, batch):
        whole = {**params, "heads": flow}
        return objective.loss(model, whole, (), batch, jax.random.key(0)).total

    silent = {**channels, "advantage": jnp.zeros_like(batch.weights)}
    gradient = jax.grad(total)(params, batch.replace(channels=silent))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))

    def of_flow(flow, accepted):
        given = batch.replace(channels={**channels, "accepted": accepted})
        whole = {**params, "heads": flow}
        return objective.loss(model, whole, (), given, jax.random.key(0)).total

    moved = jax.grad(of_flow)(flow, batch.weights)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(moved))
    refused = jax.grad(of_flow)(flow, jnp.zeros_like(batch.weights))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(refused))


# ---------------------------------------------------------------- runs


def objective_of(**changes):
    flow = {"depth": 1, "layers": [0.5]}
    base = {"name": "rlfr", "rewards": REWARDS, "rollouts": ROLLOUTS, "flow": flow}
    return {**base, **changes}


def test_without_penalty_it_is_bitwise_the_policy(rl_run, tmp_path):
    plain = {"name": "policy", "rewards": REWARDS, "rollouts": ROLLOUTS}
    expected = train(rl_run(steps=4, objective=plain), tmp_path / "a").state.params
    found = train(rl_run(steps=4, objective=objective_of(coef=0.0)), tmp_path / "b").state.params
    assert_equal({k: v for k, v in found.items() if k != "heads"}, expected)
    table = read_metrics(tmp_path / "b")
    assert all(v >= 0 for v in table["flow_loss"])


def test_a_flow_is_fitted_kept_and_trained_on(rl_run, tmp_path):
    stages = [
        {"objective": {"name": "flow", "flow": {"depth": 1, "layers": [0.5]}}, "share": 0.5},
        {"objective": objective_of(coef=0.5, threshold=0.2, head_rate=0.0), "share": 0.5},
    ]
    optimizer = {"name": "adamw", "peak_lr": 1e-2, "weight_decay": 0.0}
    options = {"objective": {"name": "next_token"}, "optimizer": optimizer}
    options["data__packing"] = "none"
    alone = rl_run(steps=4, **{**options, "objective": stages[0]["objective"]})
    train(alone, tmp_path / "flow")
    fitted = load_trained(tmp_path / "flow")
    assert_equal(dict(fitted.params), jax.jit(lambda: alone.model.init(start_key(alone)))())
    assert np.any(fitted.heads["flow"]["output"]["weight"])
    # With a rate of 0 the flow stays what the first stage made of it.
    frozen = train(rl_run(steps=8, stages=stages, **options), tmp_path / "frozen").state.params
    moved = [
        {**stages[0]},
        {**stages[1], "objective": {**stages[1]["objective"], "head_rate": 2.0}},
    ]
    trained = train(rl_run(steps=8, stages=moved, **options), tmp_path / "moved").state.params
    assert_equal(dict(fitted.heads), dict(frozen["heads"]))
    changed = jax.tree.map(lambda a, b: np.any(a != b), frozen["heads"], trained["heads"])
    assert all(jax.tree.leaves(changed))
    table = read_metrics(tmp_path / "frozen")
    penalties = [v for v in table["reward/token_mean"] if v is not None]
    assert all(-0.5 <= v < 0 for v in penalties)


def start_key(run):
    return jax.random.split(jax.random.key(run.config.seed), 3)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"times": [1.0]}, "times"),
        ({"times": []}, "times"),
        ({"top_k": 0}, "top_k=0"),
        ({"head_rate": -1.0}, "head_rate"),
        ({"flow": {"depth": 0}}, "depth=0"),
        ({"flow": {"layers": []}}, "layers"),
        ({"flow": {"pairing": "token_past"}}, "token_post"),
    ],
)
def test_impossible_settings_are_refused(rl_tree, changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve(TrainConfig, rl_tree(objective=objective_of(**changes)))
