import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.data.batch import Batch
from tokjax.errors import ConfigError
from tokjax.models import ModelConfig, Transformer
from tokjax.models.encoder import Encoder
from tokjax.pretraining.corruption import Corruption, corrupt
from tokjax.pretraining.masked_lm import MaskedLM, own_weights

V, MASK, B, T = 17, 16, 3, 12
CONFIG = ModelConfig(
    vocab_size=V, d_model=16, n_layers=2, n_heads=2, d_ff=24, remat="none", causal=False,
    mlm_head="gelu", init_scale=0.5,
)  # fmt: skip
MODEL = Encoder(CONFIG)
KEY = jax.random.key(4)
FIXED = MaskedLM(Corruption(rate=0.3, count="fixed", mask_id=MASK, random_ids=MASK), exempt=(0,))
FREE = dataclasses.replace(
    FIXED, corruption=dataclasses.replace(FIXED.corruption, count="bernoulli")
)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(1))


def batch_of(tokens, segments=None):
    segments = np.ones_like(tokens) if segments is None else segments
    ids = jnp.asarray(tokens, jnp.int32)
    targets = np.roll(tokens, -1, 1)
    return Batch(
        tokens=ids,
        targets=jnp.asarray(targets, jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape),
        segment_ids=jnp.asarray(segments, jnp.int32),
        weights=jnp.asarray(segments > 0, jnp.float32),
        example_id=jnp.zeros((len(tokens), 1), jnp.int32),
    )


TOKENS = np.random.default_rng(0).integers(1, MASK, (B, T)).astype(np.int32)
TOKENS[:, 0] = 0
SEGMENTS = np.where(np.arange(T) < np.array([[T], [8], [5]]), 1, 0).astype(np.int32)
BATCH = batch_of(TOKENS, SEGMENTS)


def loss(objective, params, batch=BATCH, key=KEY):
    return jax.jit(lambda p, b: objective.loss(MODEL, p, (), b, key))(params, batch)


@pytest.mark.parametrize("objective", [FIXED, FREE], ids=["fixed", "bernoulli"])
def test_the_loss_is_the_mean_over_masked_tokens_of_their_nll(params, objective):
    found = loss(objective, params)
    eligible = (SEGMENTS > 0) & (TOKENS != 0)
    corrupted = corrupt(KEY, BATCH.tokens, jnp.asarray(eligible), objective.corruption)
    logits, _ = MODEL(params, corrupted.tokens, jnp.asarray(SEGMENTS > 0))
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), TOKENS[..., None], -1)[..., 0]
    chosen = np.asarray(corrupted.chosen)
    assert chosen.any() and not (chosen & ~eligible).any()
    np.testing.assert_allclose(found.total, nll[chosen].sum(), rtol=1e-5)
    assert float(found.weight) == chosen.sum()
    assert float(found.metrics["nll"][0]) == pytest.approx(float(found.total), rel=1e-6)


def test_what_was_masked_and_filling_are_never_seen(params):
    """The model cannot read the tokens that it restores, nor those behind a row's end."""
    masked = dataclasses.replace(FIXED.corruption, masked=1.0, random=0.0)
    objective = dataclasses.replace(FIXED, corruption=masked)
    read = jax.jit(lambda batch: objective.predictions(MODEL, params, batch, KEY).x)
    chosen = np.asarray(
        corrupt(KEY, BATCH.tokens, jnp.asarray((SEGMENTS > 0) & (TOKENS != 0)), masked).chosen
    )
    hidden = chosen | (SEGMENTS == 0)
    other = batch_of(np.where(hidden, TOKENS % (MASK - 1) + 1, TOKENS).astype(np.int32), SEGMENTS)
    kept = np.asarray(objective.predictions(MODEL, params, BATCH, KEY).weights[..., 0]) > 0
    assert (np.asarray(other.tokens) != TOKENS)[hidden].all()
    np.testing.assert_array_equal(np.asarray(read(BATCH))[kept], np.asarray(read(other))[kept])
    seen = TOKENS.copy()
    seen[~hidden & (TOKENS != 0)] = 3
    moved = read(batch_of(seen, SEGMENTS))
    assert np.abs(np.asarray(moved) - np.asarray(read(BATCH)))[kept].max() > 1e-3


def test_fixed_counts_score_no_more_states_than_they_choose(params):
    found = FIXED.predictions(MODEL, params, BATCH, KEY)
    assert found.x.shape[1] == FIXED.corruption.most(T) == 4


def test_an_encoder_without_a_head_of_its_own_is_scored_by_its_states():
    model = Encoder(dataclasses.replace(CONFIG, mlm_head=None))
    params = model.init(jax.random.key(0))
    assert np.isfinite(float(FIXED.loss(model, params, (), BATCH, KEY).total))


def test_weights_of_tokens_are_those_of_their_targets_moved():
    segments = np.array([[1, 1, 1, 2, 2, 0]], np.int32)
    batch = batch_of(np.ones((1, 6), np.int32), segments)
    batch = dataclasses.replace(batch, weights=jnp.array([[0.0, 1, 2, 3, 4, 0]]))
    assert own_weights(batch).tolist() == [[0, 0, 1, 3, 3, 0]]


def test_causal_models_are_refused(params):
    model = Transformer(dataclasses.replace(CONFIG, causal=True, mlm_head=None))
    with pytest.raises(ConfigError, match=r"set model\.causal=False"):
        FIXED.loss(model, params, (), BATCH, KEY)
