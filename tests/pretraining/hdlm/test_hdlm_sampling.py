"""Sampling: samplers step by step, caches, ragged prompts, limits, and the bound."""

import dataclasses
from itertools import product
from math import factorial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.data.batch import Batch
from tokjax.decoding.prompts import Prompts
from tokjax.errors import ConfigError
from tokjax.models import ModelConfig
from tokjax.models.encoder import Encoder
from tokjax.pretraining.hdlm import (
    HDLM,
    Block,
    EpsilonHybrid,
    GammaHybrid,
    Hybrid,
    SimpleAnnealing,
    acs,
    autoregressive,
    likelihood_bound,
    original,
    remask,
    reverse,
    sample,
)
from tokjax.pretraining.hdlm.masks import step_mask
from tokjax.pretraining.hdlm.passes import step_states
from tokjax.pretraining.hdlm.samplers import Draws, draws, gumbel_max, update
from tokjax.pretraining.hdlm.sampling import _cached_walk, _walk

V, L = 6, 7
MASK = V
MODEL = Encoder(ModelConfig(
    vocab_size=V + 1, d_model=16, n_layers=1, n_heads=2, d_ff=24, remat="none", causal=False,
    max_positions=16, init_scale=0.5,
))  # fmt: skip
PROMPTS = Prompts.of([[1, 2, 3], [4], [5, 0, 5, 1]])
BLOCKS = HDLM(Block(3, 4), mask_id=MASK, random_ids=V)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(1))


def written(params, objective=BLOCKS, prompts=PROMPTS, **options):
    return np.asarray(sample(objective, MODEL, params, prompts, length=L, **options).tokens)


def check_rows(tokens, prompts=PROMPTS):
    assert ((tokens >= 0) & (tokens < V)).all()  # no mask is left, none is drawn
    for row, ids, n in zip(tokens, prompts.tokens, prompts.lengths, strict=True):
        np.testing.assert_array_equal(row[:n], ids[:n])


def test_acs_without_corrections_is_the_original_sampler(params):
    plain = written(params, sampler=original())
    check_rows(plain)
    np.testing.assert_array_equal(written(params, sampler=acs(0.0)), plain)
    corrected = written(params, sampler=acs(1.0))
    check_rows(corrected)
    assert (corrected != plain).any()


def test_a_cache_of_settled_blocks_changes_nothing(params):
    other = {"settled_attention": "causal", "active_attention": "causal", "shifted": True}
    for changes in ({}, other):
        options = {"objective": dataclasses.replace(BLOCKS, **changes), "sampler": acs(0.5)}
        cached, computed = (written(params, cache=cache, **options) for cache in (True, False))
        np.testing.assert_array_equal(cached, computed)
        check_rows(cached)


def test_logits_beside_a_cache_are_those_of_the_whole_row(params):
    from tokjax.models.parameters import unstack

    tokens = jnp.asarray(np.random.default_rng(0).integers(0, V, (2, 6)), jnp.int32)
    places = jnp.broadcast_to(jnp.arange(6), (2, 6))
    visible = step_mask(places, places < 4, places >= 4, 2)
    whole = jax.jit(lambda p: step_states(MODEL, p, tokens, visible, places))(params)
    loose, cache = unstack(params), MODEL.init_cache(2, 6)

    @jax.jit
    def run(params, x, cache, end):
        seen = jnp.broadcast_to(jnp.arange(6) < end, (1, 2, 6))
        return MODEL.backbone(params, x, cache=cache, visible=seen)

    for start in (0, 2, 4):
        x = MODEL.embed(loose, tokens[:, start : start + 2])
        out = run(loose, x, cache, start + 2)
        np.testing.assert_allclose(out.x, whole[:, start : start + 2], atol=2e-5)
        cache = out.cache
    with pytest.raises(ValueError, match="beside a cache it needs visible"):
        MODEL.backbone(loose, x, cache=cache)


def test_rows_do_not_depend_on_each_other_and_nothing_compiles_again(params):
    together = written(params, sampler=acs(0.3), seed=5)
    size = _cached_walk._cache_size()
    other = Prompts.of([[1, 2, 3], [0, 0, 0, 0, 0, 1, 2], [3]])
    beside = written(params, prompts=other, sampler=acs(0.9), temperature=0.5, seed=5)
    check_rows(beside, other)
    beside = written(params, prompts=other, sampler=acs(0.3), seed=5)
    assert _cached_walk._cache_size() == size
    np.testing.assert_array_equal(beside[0], together[0])
    whole = sample(BLOCKS, MODEL, params, other, length=L, sampler=acs(0.3), cache=False)
    assert whole.rows()[1] == []  # a prompt that fills its row
    short = whole.rows(stop=[int(whole.tokens[0, 4])])[0]
    assert short == np.asarray(whole.tokens)[0, 3 : 3 + len(short)].tolist() and len(short) <= 2
    two = written(params, sampler=original(), samples=2)
    assert two.shape == (6, L) and (two[0, :3] == two[1, :3]).all() and (two[0] != two[1]).any()


def test_other_schedules_and_noises_leave_no_mask_and_one_program_serves_all_settings(params):
    ramp = {"schedule": SimpleAnnealing(3, 3)}
    check_rows(written(params, sampler=acs(0.2), **ramp))
    size = _walk._cache_size()
    again = written(params, sampler=acs(0.7), temperature=2.0, seed=9, **ramp)
    check_rows(again)
    assert _walk._cache_size() == size
    objective = dataclasses.replace(BLOCKS, noise=GammaHybrid(0.4))
    check_rows(written(params, objective, schedule=Hybrid(3, 2)))


def test_one_position_a_step_at_temperature_0_is_greedy_autoregression(params):
    found = written(params, schedule=autoregressive(), temperature=0.0, sampler=original())
    rows = np.full((3, L), MASK, np.int32)
    for row, ids, n in zip(rows, PROMPTS.tokens, PROMPTS.lengths, strict=True):
        row[:n] = ids[:n]
    places = jnp.broadcast_to(jnp.arange(L), (3, L))

    @jax.jit
    def logits(tokens, i):
        visible = step_mask(places, places < i, places == i, 1)
        return step_states(MODEL, params, tokens, visible, places)[:, i] @ params["embedding"].T

    for i in range(L):
        best = np.asarray(logits(rows, i))
        rows[:, i] = np.where(rows[:, i] == MASK, best[:, :V].argmax(-1), rows[:, i])
    np.testing.assert_array_equal(found, rows)


def test_draws_have_the_frequencies_of_the_softmax():
    logits = jnp.array([0.0, 1.0, -1.0, 2.0])
    keys = jax.vmap(jax.random.key)(jnp.arange(20))
    found = draws(keys, jnp.int32(1), jnp.arange(1000), 4)
    for temperature in (1.0, 0.5):
        ids = np.asarray(gumbel_max(logits, jnp.float32(temperature), found.gumbel)).ravel()
        shares = np.bincount(ids, minlength=4) / len(ids)
        np.testing.assert_allclose(shares, jax.nn.softmax(logits / temperature), atol=0.012)
    assert (np.asarray(gumbel_max(logits, jnp.float32(0), found.gumbel)) == 3).all()
    few = draws(keys[3:4], jnp.int32(1), jnp.array([7]), 4)
    np.testing.assert_array_equal(few.gumbel[0, 0], found.gumbel[3, 7])
    assert (
        np.asarray(draws(keys, jnp.int32(2), jnp.arange(9), 4).unmask) != found.unmask[:, :9]
    ).all()


def test_steps_of_the_samplers():
    tokens = jnp.array([[MASK, MASK, 1, 2, 3]])
    drawn = jnp.array([[5, 5, 5, 5, 5]])
    may_change = jnp.array([[True, True, True, True, False]])
    low, high = 0.1, 0.9
    found = Draws(
        jnp.array([[low, high, low, high, low]]),
        jnp.array([[low, low, low, high, low]]),
        jnp.zeros((1, 5, 7)),
    )

    def after(sampler, p):
        return update(sampler, tokens, drawn, may_change, jnp.full((1, 5), p), found, MASK)[
            0
        ].tolist()

    assert after(original(), 0.5) == [5, MASK, 1, 2, 3]
    assert after(acs(0.4), 0.5) == [5, MASK, 5, 2, 3]  # 0.1 < 0.4 (1 - 0.5) < 0.9
    assert after(acs(0.1), 0.5) == [5, MASK, 1, 2, 3]
    assert after(acs(1.0), 1.0) == [5, 5, 1, 2, 3]  # the last step corrects nothing
    assert after(remask(), 0.5) == [5, MASK, 1, MASK, 3]
    assert after(remask(), 1.0) == [5, 5, 1, 2, 3]
    assert after(remask(visible_too=False), 0.5) == after(original(), 0.5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"length": 3}, "prompt 2 has 4 tokens"),
        ({"length": 99}, "max_positions=16"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"samples": 0}, "samples=0"),
        ({"sampler": reverse()}, "does not fit EpsilonHybrid"),
        ({"schedule": SimpleAnnealing(2), "cache": True}, "several blocks"),
        ({"prompts": Prompts.of([[MASK]])}, "holds the mask"),
    ],
)
def test_impossible_samples_are_refused(params, options, said):
    given = {"prompts": PROMPTS, "length": L, **options}
    with pytest.raises(ConfigError, match=said):
        sample(BLOCKS, MODEL, params, **given)
    with pytest.raises(ConfigError, match="eta=2"):
        acs(2)
    shifted = dataclasses.replace(BLOCKS, shifted=True)
    with pytest.raises(ConfigError, match="give prompts"):
        sample(shifted, MODEL, params, length=L)
    gamma = dataclasses.replace(BLOCKS, noise=GammaHybrid())
    with pytest.raises(ConfigError, match="temperature 1 alone"):
        sample(gamma, MODEL, params, length=L, temperature=0.5)


def batch_of(tokens):
    tokens = jnp.asarray(tokens, jnp.int32)
    return Batch(
        tokens=tokens,
        targets=jnp.roll(tokens, -1, 1),
        positions=jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
        segment_ids=jnp.ones_like(tokens),
        weights=jnp.ones(tokens.shape),
        example_id=jnp.zeros((len(tokens), 1), jnp.int32),
    )


TEXTS = batch_of([[1, 2, 3], [5, 0, 4]])


@jax.jit
def nll_under(params, tokens, visible):
    """-log p of each text's tokens, given other tokens in the input."""
    places = jnp.broadcast_to(jnp.arange(3), tokens.shape)
    x = step_states(MODEL, params, tokens, visible, places)
    logp = jax.nn.log_softmax((x @ params["embedding"].T)[..., :V])
    return -jnp.take_along_axis(logp, TEXTS.tokens[..., None], -1)[..., 0]


def test_the_bound_of_diffusion_is_the_integral_over_all_masks(params):
    """The integral of t^(m-1) (1-t)^(n-m) is (m-1)! (n-m)! / n!."""
    exact = np.zeros(2)
    for masked in product([False, True], repeat=3):
        m = sum(masked)
        if m:
            tokens = jnp.where(jnp.array(masked), MASK, TEXTS.tokens)
            nll = np.asarray(nll_under(params, tokens, jnp.ones((1, 3, 3), bool)))
            exact += (
                factorial(m - 1) * factorial(3 - m) / factorial(3) * nll[:, list(masked)].sum(1)
            )
    objective = dataclasses.replace(BLOCKS, schedule=Block())
    many = batch_of(np.repeat(TEXTS.tokens, 64, axis=0))
    found = likelihood_bound(objective, MODEL, params, many, draws=500)
    # Weights of 1/t have heavy tails: 32,000 draws of each text are good for about 1.5 %.
    np.testing.assert_allclose(found.nats.reshape(2, 64).mean(1), exact, rtol=0.05)
    assert found.tokens.tolist() == [3] * 128
    assert found.perplexity == pytest.approx(np.exp(exact.sum() / 6), rel=0.1)


def test_the_bound_of_autoregression_is_the_likelihood(params):
    exact = np.zeros(2)
    places = jnp.broadcast_to(jnp.arange(3), (2, 3))
    for i in range(3):
        tokens = jnp.where(jnp.arange(3) == i, MASK, TEXTS.tokens)
        visible = step_mask(places, places < i, places == i, 1)
        exact += np.asarray(nll_under(params, tokens, visible))[:, i]
    objective = dataclasses.replace(
        BLOCKS, schedule=autoregressive(), noise=EpsilonHybrid(0.5), times="levels"
    )
    found = likelihood_bound(objective, MODEL, params, TEXTS, draws=1)
    np.testing.assert_allclose(found.nats, exact, rtol=1e-4)
    # A ramp of one position is the same; as many draws as steps visit each step once.
    ramp = dataclasses.replace(BLOCKS, schedule=SimpleAnnealing(1))
    np.testing.assert_allclose(
        likelihood_bound(ramp, MODEL, params, TEXTS, draws=3).nats, exact, rtol=1e-4
    )
    with pytest.raises(ConfigError, match="draws=0"):
        likelihood_bound(ramp, MODEL, params, TEXTS, draws=0)
    full = dataclasses.replace(BLOCKS, settled_attention="full")
    with pytest.raises(ConfigError, match="is not known to likelihood_bound"):
        likelihood_bound(full, MODEL, params, TEXTS)
