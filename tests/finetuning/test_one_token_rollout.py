import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tokjax.config import registered_name
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError
from tokjax.finetuning.one_token_rollout import (
    OneTokenRollout,
    draw,
    position_losses,
    rollout_loss,
)
from tokjax.models import ModelConfig, Transformer
from tokjax.models.head import Head
from tokjax.parallel.mesh import MeshConfig, build_mesh
from tokjax.signals import vocabulary
from tokjax.training.optimizers import Constant
from tokjax.training.state import init_state
from tokjax.training.step import StepConfig, make_train_step

MODEL = Transformer(ModelConfig(vocab_size=24, d_model=16, n_layers=1, n_heads=2, max_positions=32))
KEY = jax.random.key(0)
EXACT, SAMPLED = OneTokenRollout(mode="exact"), OneTokenRollout(draws=8)

# A worked example: logits, their log-probabilities and the target.
Z = jnp.array([[2.0, 1.0, 0.0, -1.0]])
LOGP = np.array([-0.44019, -1.44019, -2.44019, -3.44019])
Y = jnp.array([1])


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


def rows(seed=0):
    """Four rows of up to three samples; weights are any real numbers, some 0."""
    rng = np.random.default_rng(seed)
    shape = (4, 16)
    segments, places = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    examples = np.full((4, 3), -1, np.int32)
    for b, lengths in enumerate([[7, 5, 3], [9, 7], [16], [3, 4, 9]]):
        at = 0
        for s, n in enumerate(lengths):
            segments[b, at : at + n], places[b, at : at + n] = s + 1, np.arange(n)
            examples[b, s] = 5 * b + s
            at += n
    weights = rng.choice([0.0, 0.5, 1.0, -2.0], shape) * (segments > 0) * (places > 1)
    ids = rng.integers(0, 24, (2, *shape)).astype(np.int32)
    return Batch(ids[0], ids[1], places, segments, weights.astype(np.float32), examples)


@functools.cache
def graded(objective):
    """The compiled function (params, batch, key) -> (loss, gradient of its sum)."""

    def total(params, batch, key):
        loss = objective.loss(MODEL, params, (), batch, key)
        return loss.total, loss

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def of(objective, params, batch, key=KEY):
    """The loss as a mean, and its gradient."""
    (_, loss), gradient = graded(objective)(params, batch, key)
    return loss.total / loss.weight, jax.tree.map(lambda g: g / loss.weight, gradient)


def close(a, b, atol=2e-6, rtol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=rtol), a, b)


def naive(rule, logits, target):
    """The exact loss of one position, for automatic differentiation."""
    logp = jax.nn.log_softmax(logits)
    rewards = jnp.where(jnp.arange(logits.shape[-1]) == target, 1.0, rule.beta)
    proposal = jax.lax.stop_gradient(jax.nn.softmax(logits / rule.kappa))
    floored = jnp.where(jnp.arange(logits.shape[-1]) == target, logp, jnp.maximum(logp, rule.floor))
    return -(proposal * rewards * floored).sum()


# ---- numbers


def test_four_given_draws(monkeypatch):
    monkeypatch.setattr(
        "tokjax.finetuning.one_token_rollout.draw", lambda *_: jnp.array([[0, 0, 1, 3]])
    )
    rule = OneTokenRollout(draws=4)
    found, d_z = position_losses(rule, Z, Y, None)
    np.testing.assert_allclose(found.loss, 0.252033, atol=1e-6)
    assert found.hits == 0.25
    pulls = np.array([-0.05, 0.25, 0.0, -0.025])
    np.testing.assert_allclose(d_z[0], np.exp(LOGP) * pulls.sum() - pulls, atol=1e-6)


def test_exact_at_kappa_one_is_dft_times_one_minus_beta():
    with jax.enable_x64(True):
        z = jnp.array([[2.0, 1.0, 0.0, -1.0]], jnp.float64)
        _, d_z = position_losses(replace(EXACT, kappa=1.0), z, Y, None)
        p = jax.nn.softmax(z[0])
        np.testing.assert_allclose(d_z[0], 1.1 * p[1] * (p - jnp.eye(4)[1]), atol=1e-12, rtol=0)
    np.testing.assert_allclose(d_z[0], [0.167785, -0.198846, 0.022707, 0.008354], atol=1e-6)


def test_exact_at_kappa_of_the_defaults():
    found, d_z = position_losses(EXACT, Z, Y, None)
    np.testing.assert_allclose(found.loss, 0.301929, atol=1e-6)
    np.testing.assert_allclose(d_z[0], [0.176503, -0.216439, 0.028353, 0.011584], atol=1e-6)
    np.testing.assert_allclose(found.hits, 0.260676, atol=1e-6)
    np.testing.assert_allclose(found.nll, -LOGP[1], atol=1e-5)
    np.testing.assert_allclose(found.entropy, -(np.exp(LOGP) * LOGP).sum(), atol=1e-5)


def test_equal_rewards_move_nothing_on_average():
    rule = replace(EXACT, beta=1.0, kappa=1.0)
    np.testing.assert_allclose(position_losses(rule, Z, Y, None)[1], 0, atol=1e-7)


@pytest.mark.parametrize("mode", ["exact", "sampled"])
def test_a_target_that_is_always_proposed_gives_cross_entropy(mode):
    rule = OneTokenRollout(mode=mode, beta=0.0, kappa=1e-3, draws=5)
    found, d_z = position_losses(rule, Z, jnp.array([0]), jax.random.split(KEY, 1))
    np.testing.assert_allclose(found.loss, found.nll, rtol=1e-6)
    np.testing.assert_allclose(d_z[0], jax.nn.softmax(Z[0]) - jnp.eye(4)[0], atol=1e-6)


def test_the_mean_of_sampled_gradients_is_the_exact_one():
    n, rule = 100, replace(SAMPLED, draws=1000)
    z, targets = jnp.tile(Z, (n, 1)), jnp.tile(Y, n)
    found, d_z = position_losses(rule, z, targets, jax.random.split(jax.random.key(3), n))
    p, proposal = np.exp(LOGP), np.array([0.562565, 0.260676, 0.120789, 0.055970])
    rewards = np.array([-0.1, 1.0, -0.1, -0.1])
    single = rewards[:, None] * (p - np.eye(4))  # the gradient of each draw
    expected = proposal @ single
    error = np.sqrt((proposal @ single**2 - expected**2) / 1e5)
    assert (np.abs(d_z.mean(0) - expected) < 3 * error).all()
    np.testing.assert_allclose(expected, [0.176503, -0.216439, 0.028353, 0.011584], atol=2e-6)
    assert abs(found.hits.mean() - 0.260676) < 3 * np.sqrt(0.260676 * 0.739324 / 1e5)
    assert d_z.std(0).min() > 0  # every position has draws of its own


# ---- draws


def test_draws_follow_the_distribution_and_leave_out_the_impossible():
    probs = jnp.array([[0.0, 0.5, 0.0, 0.25, 0.25, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]])
    ids = draw(probs, 4000, jax.random.split(KEY, 2))
    shares = np.stack([np.bincount(row, minlength=6) for row in ids]) / 4000
    np.testing.assert_allclose(shares, probs, atol=0.03)
    assert not shares[np.asarray(probs) == 0].any()


def test_the_ends_of_the_uniform_numbers_draw_possible_ids(monkeypatch):
    ends = jnp.array([0.0, 1 - 2**-24], jnp.float32)
    monkeypatch.setattr(jax.random, "uniform", lambda *_: ends)
    probs = jnp.array([[0.0, 0.5, 0.0, 0.25, 0.25, 0.0]])
    assert draw(probs, 2, jax.random.split(KEY, 1)).tolist() == [[1, 4]]


def test_like_positions_have_draws_of_their_own():
    x, head = jnp.ones((2, 8, 4)), Head(jnp.zeros((8, 4)))
    _, found = rollout_loss(SAMPLED, x, head, jnp.zeros((2, 8), jnp.int32), jnp.ones((2, 8)), KEY)
    assert len(np.unique(found.hits)) > 2 and len(np.unique(found.hits, axis=0)) == 2


def test_draws_depend_on_neither_chunks_nor_other_rows(monkeypatch):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 6, 8)), jnp.float32)
    head = Head(jnp.asarray(rng.normal(size=(33, 8)), jnp.float32))
    targets = jnp.asarray(rng.integers(0, 33, (4, 6)), jnp.int32)

    def run(x):
        ones = jnp.ones((4, 6))
        return jax.jit(lambda x: rollout_loss(SAMPLED, x, head, targets, ones, KEY)[1])(x)

    whole = run(x)
    monkeypatch.setattr(vocabulary, "_CHUNK_TOKENS", 5)
    monkeypatch.setattr(vocabulary, "_CHUNK_LOGITS", 1)
    close(run(x), whole, atol=1e-6)
    moved = run(x.at[1:].mul(3.0))
    close(jax.tree.map(lambda a: a[0], moved), jax.tree.map(lambda a: a[0], whole), atol=1e-6)


@pytest.mark.parametrize("rule", [SAMPLED, EXACT], ids=["sampled", "exact"])
def test_a_mesh_gives_the_same_value_and_gradients(rule):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 6, 8)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(33, 8)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 33, (4, 6)), jnp.int32)
    weights = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)

    def total(x, table):
        return rollout_loss(rule, x, Head(table), targets, weights, KEY)[0]

    both = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    expected = both(x, table)
    with jax.set_mesh(build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        close(jax.device_get(both(x, table)), expected, atol=1e-5)


# ---- value and gradient


@pytest.mark.parametrize("floor", [-20.0, -3.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_value_and_gradients_equal_the_naive_form(monkeypatch, floor, dtype):
    monkeypatch.setattr(vocabulary, "_CHUNK_TOKENS", 5)
    monkeypatch.setattr(vocabulary, "_CHUNK_LOGITS", 1)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, 6, 8)), dtype)
    table = jnp.asarray(rng.normal(size=(33, 8)), dtype)
    bias = jnp.asarray(rng.normal(size=33), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 33, (2, 6)), jnp.int32)
    weights = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32).at[0, 1].set(0.0)
    rule = replace(EXACT, floor=floor)

    def streamed(x, table, bias):
        head = Head(table, bias, softcap=5.0, scale=0.7)
        return -1.7 * rollout_loss(rule, x, head, targets, weights, KEY)[0]

    def plain(x, table, bias):
        x, table = x.astype(jnp.float32), table.astype(jnp.float32)
        z = 5 * jnp.tanh(0.7 * (jnp.einsum("btd,vd->btv", x, table) + bias) / 5)
        each = jax.vmap(jax.vmap(lambda z, y: naive(rule, z, y)))(z, targets)
        return -1.7 * (weights * each).sum()

    arguments = (0, 1, 2)
    (a, ga), (b, gb) = (
        jax.jit(jax.value_and_grad(f, argnums=arguments))(x, table, bias) for f in (streamed, plain)
    )
    np.testing.assert_allclose(a, b, rtol=1e-5)
    for one, other in zip(ga, gb, strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        tolerance = 1e-5 if dtype == jnp.float32 else 0.02
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)
    lowest = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", x, table).astype(jnp.float32)).min()
    assert lowest < -3.0  # the higher floor is met


@pytest.mark.parametrize("rule", [SAMPLED, EXACT], ids=["sampled", "exact"])
def test_wrong_draws_below_the_floor_are_pushed_no_further(rule):
    z = jnp.array([[0.0, 0.0, -1.0]])
    rule = replace(rule, draws=64, floor=-0.5, beta=-1.0)  # all three lie below
    found, d_z = position_losses(rule, z, jnp.array([2]), jax.random.split(KEY, 1))
    p = jax.nn.softmax(z[0])
    np.testing.assert_allclose(d_z[0], found.hits * (p - jnp.eye(3)[2]), atol=1e-6)
    expected = found.hits * found.nll - (1 - found.hits) * 0.5
    np.testing.assert_allclose(found.loss, expected, atol=1e-6)


@pytest.mark.parametrize("rule", [SAMPLED, EXACT], ids=["sampled", "exact"])
def test_impossible_and_huge_logits_stay_finite(rule):
    z = jnp.array([[-jnp.inf, 3.0, 1.0, -jnp.inf], [1e4, -1e4, 0.0, 5.0]])
    found, d_z = position_losses(rule, z, jnp.array([1, 1]), jax.random.split(KEY, 2))
    assert np.isfinite(d_z).all()
    assert np.isfinite(found.loss).all() and np.isfinite(found.entropy).all()


# ---- the objective


def test_sampled_gradients_near_the_exact_form_as_draws_grow():
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(2, 8, 8)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(24, 8)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 24, (2, 8)), jnp.int32)

    def gradient(rule):
        ones = jnp.ones((2, 8))
        total = lambda x: rollout_loss(rule, x, Head(table), targets, ones, KEY)[0]  # noqa: E731
        return jax.jit(jax.grad(total))(x)

    exact = gradient(EXACT)
    errors = [jnp.linalg.norm(gradient(replace(SAMPLED, draws=k)) - exact) for k in (8, 512)]
    assert errors[1] < errors[0] / 4  # of the root of 64


def test_another_key_makes_other_draws_and_the_same_key_the_same(params):
    batch = rows()
    one, other = (of(SAMPLED, params, batch, jax.random.key(k))[0] for k in (1, 2))
    assert one != other
    assert one == of(SAMPLED, params, batch, jax.random.key(1))[0]
    assert of(EXACT, params, batch, KEY)[0] == of(EXACT, params, batch, jax.random.key(1))[0]


@pytest.mark.parametrize("norm", ["sequence", "token"])
def test_packed_rows_equal_samples_one_by_one(params, norm):
    batch = rows()
    found = np.argwhere(batch.example_id >= 0)
    alone = np.zeros((len(found), 16), np.int32)
    for i, (b, s) in enumerate(found):
        own = batch.segment_ids[b] == s + 1
        alone[i, : own.sum()] = batch.tokens[b, own]
    logits, _ = jax.jit(MODEL)(params, alone)
    each = jax.jit(jax.vmap(functools.partial(naive, EXACT)))
    means, total = [], 0.0
    for i, (b, s) in enumerate(found):
        own = np.flatnonzero(batch.segment_ids[b] == s + 1)
        targets = np.zeros(16, np.int32)
        targets[: own.size] = batch.targets[b, own]
        losses = each(logits[i], targets)[: own.size]
        w = batch.weights[b, own]
        total += (w * losses).sum()
        if np.abs(w).sum():
            means.append((w * losses).sum() / np.abs(w).sum())
    expected = np.mean(means) if norm == "sequence" else total / np.abs(batch.weights).sum()
    loss, _ = of(replace(EXACT, norm=norm), params, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-6)


def test_micro_batches_equal_the_large_batch(params):
    batch, optimizer = rows(), optax.sgd(1.0)
    states = []
    for k in (1, 2):
        state = init_state(MODEL, EXACT, optimizer, 0, False)
        config = StepConfig(0.5, Constant(), 0, 10, micro_batches=k)
        step = jax.jit(make_train_step(MODEL, EXACT, optimizer, config))
        states.append(step(state, batch)[0].params)
    close(*states)


def test_the_sampled_form_trains_in_micro_batches(params):
    batch, optimizer = rows().replace(weights=np.ones((4, 16), np.float32)), optax.sgd(1.0)
    state = init_state(MODEL, SAMPLED, optimizer, 0, False)
    config = StepConfig(0.5, Constant(), 0, 40, micro_batches=2)
    step = jax.jit(make_train_step(MODEL, SAMPLED, optimizer, config))
    rates = []
    for _ in range(40):
        state, metrics = step(state, batch)
        rates.append(float(metrics["hit_rate"]))
    assert metrics["finite"] == 1
    assert np.mean(rates[-5:]) > 1.5 * np.mean(rates[:5])


@pytest.mark.parametrize("rule", [SAMPLED, EXACT], ids=["sampled", "exact"])
def test_a_batch_without_weights_adds_nothing(params, rule):
    batch = rows().replace(weights=np.zeros((4, 16), np.float32))
    (_, loss), gradient = graded(rule)(params, batch, KEY)
    assert loss.total == 0 and loss.weight == 0
    assert all(not g.any() for g in jax.tree.leaves(gradient))
    assert all(part[0] == 0 and part[1] == 0 for part in loss.metrics.values())


@pytest.mark.parametrize("rule", [SAMPLED, EXACT], ids=["sampled", "exact"])
def test_what_follows_changes_no_earlier_loss(params, rule):
    batch = rows()
    before = (batch.segment_ids == 1) & (np.arange(16) < 5)
    batch = batch.replace(weights=np.where(before, 1.0, 0.0).astype(np.float32))
    later = np.arange(16) >= 5
    other = batch.replace(
        tokens=np.where(later, (batch.tokens + 5) % 24, batch.tokens),
        targets=np.where(later, (batch.targets + 5) % 24, batch.targets),
    )
    one, two = (graded(rule)(params, each, KEY)[0][1] for each in (batch, other))
    np.testing.assert_allclose(one.total, two.total, rtol=1e-6)
    np.testing.assert_allclose(one.metrics["hit_rate"], two.metrics["hit_rate"], rtol=1e-6)


def test_targets_without_weight_may_be_any_id(params):
    batch = rows()
    other = batch.replace(targets=np.where(batch.weights == 0, -100, batch.targets))
    (a, ga), (b, gb) = (of(SAMPLED, params, each) for each in (batch, other))
    assert a == b
    jax.tree.map(np.testing.assert_array_equal, ga, gb)
    wrong = batch.replace(targets=np.full_like(batch.targets, 24))
    assert np.isnan(of(SAMPLED, params, wrong)[0])


def largest(fn, x, table):
    """Elements of the largest array in the compiled gradient."""
    text = jax.jit(jax.grad(fn, argnums=(0, 1))).lower(x, table).compile().as_text()
    found = re.findall(r"(?:f32|s32|u32|pred)\[([\d,]+)\]", text)
    return max(np.prod([int(n) for n in s.split(",")]) for s in found)


@pytest.mark.parametrize("rule", [SAMPLED, EXACT], ids=["sampled", "exact"])
def test_no_buffer_of_all_logits(monkeypatch, rule):
    monkeypatch.setattr(vocabulary, "_CHUNK_TOKENS", 16)
    monkeypatch.setattr(vocabulary, "_CHUNK_LOGITS", 1)
    b, t, v, d = 8, 16, 512, 8
    x, table = jnp.ones((b, t, d)), jnp.ones((v, d))
    targets, weights = jnp.zeros((b, t), jnp.int32), jnp.ones((b, t))

    def streamed(x, table):
        return rollout_loss(rule, x, Head(table), targets, weights, KEY)[0]

    def plain(x, table):
        return jax.vmap(jax.vmap(lambda z: naive(rule, z, 0)))(x @ table.T).sum()

    assert (
        largest(plain, x, table) >= b * t * v
    )  # the measure sees such a buffer where there is one
    assert largest(streamed, x, table) < b * t * v / 4


def test_many_draws_make_no_buffer_of_draws_by_vocabulary(monkeypatch):
    monkeypatch.setattr(vocabulary, "_CHUNK_TOKENS", 4)
    monkeypatch.setattr(vocabulary, "_CHUNK_LOGITS", 1)
    rule, x, table = OneTokenRollout(draws=64), jnp.ones((2, 4, 8)), jnp.ones((256, 8))
    targets, weights = jnp.zeros((2, 4), jnp.int32), jnp.ones((2, 4))

    def streamed(x, table):
        return rollout_loss(rule, x, Head(table), targets, weights, KEY)[0]

    assert largest(streamed, x, table) < 64 * 256


# ---- configuration


def test_the_objective_is_found_by_name():
    assert registered_name(OneTokenRollout) == "one_token_rollout"
    assert OneTokenRollout().tokens_per_position == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"draws": 0}, "draws=0"),
        ({"beta": 1.5}, r"beta=1\.5 must be at most 1"),
        ({"beta": float("nan")}, "beta=nan"),
        ({"kappa": 0.0}, r"kappa=0\.0"),
        ({"floor": 0.0}, r"floor=0\.0"),
        ({"floor": -float("inf")}, "floor=-inf"),
        ({"mode": "exakt"}, "Did you mean 'exact'"),
        ({"norm": "kept"}, "norm='kept'"),
    ],
)
def test_impossible_settings_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        OneTokenRollout(**settings)
