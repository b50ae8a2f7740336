"""Gradients of embedding rows, context by context, and how they add up."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.data.batch import Batch
from tokjax.models import ModelConfig, Transformer
from tokjax.signals import weighted_nll
from tokjax.signals.row_gradients import (
    add_step,
    begin_history,
    cancellation,
    context_gradients,
    displacement,
    init_cumulative,
    matched_tokens,
    observe,
    occurrence_gradients,
    pairwise_cosine,
)

V, B, T, IDS = 13, 4, 8, (11, 3, 12)
TIED = Transformer(
    ModelConfig(
        vocab_size=V, d_model=16, n_layers=1, n_heads=2, d_ff=24, remat="none", embedding_scale=2.0
    )
)
UNTIED = Transformer(dataclasses.replace(TIED.config, tie_embeddings=False))
rng = np.random.default_rng(0)
TOKENS = rng.integers(0, 11, (B, T)).astype(np.int32)
TOKENS[:, 3:5] = 11  # in every context, twice
TOKENS[TOKENS == 3] = 4
TOKENS[1, 1] = 3  # in one context; 12 is in none
WEIGHTS = (rng.random((B, T)) * (np.arange(T) > 2)).astype(np.float32)
BATCH = Batch(
    tokens=jnp.asarray(TOKENS),
    targets=jnp.asarray(np.roll(TOKENS, -1, 1)),
    positions=jnp.broadcast_to(jnp.arange(T), (B, T)),
    segment_ids=jnp.ones((B, T), jnp.int32),
    weights=jnp.asarray(WEIGHTS),
    example_id=jnp.zeros((B, 1), jnp.int32),
)


@pytest.fixture(scope="module")
def found():
    """Of a tied and an untied model with the same parameters: gradients by context, occurrence and
    batch."""
    own = TIED.init(jax.random.key(0))
    own = {**own, "embedding": own["embedding"] * 10}

    def of(model, params):
        def batch_loss(params):
            out = model.backbone(params, model.embed(params, BATCH.tokens))
            targets, weights = BATCH.targets[..., None], BATCH.weights[..., None]
            total, _ = weighted_nll(out.x, model.head(params), targets, weights)
            return total / weights.sum()

        found = {"contexts": context_gradients(model, params, BATCH, IDS)}
        if model is UNTIED:
            found["batch"] = jax.grad(batch_loss)(params)["embedding"][jnp.asarray(IDS)]
            found["occurrences"] = occurrence_gradients(model, params, BATCH, mean=False)
        return found

    both = jax.jit(lambda p: (of(TIED, p), of(UNTIED, {**p, "head": p["embedding"]})))(own)
    return jax.tree.map(np.asarray, both)


def test_gradients_of_contexts_average_to_that_of_the_batch_by_their_scored_tokens(found):
    tied, untied = found
    scored = WEIGHTS.sum(1)
    share = scored / scored.sum()
    mean = np.einsum("b,brw->rw", share, untied["contexts"])
    np.testing.assert_allclose(mean, untied["batch"], atol=1e-6)
    assert np.abs(mean[0]).max() > 1e-3
    # Of a tied table the softmax's part is left out.
    np.testing.assert_allclose(tied["contexts"], untied["contexts"], atol=1e-6)


def test_gradients_of_occurrences_add_up_to_those_of_their_row(found):
    _, each = found
    for r, token in enumerate(IDS):
        total = np.where(TOKENS[..., None] == token, each["occurrences"], 0).sum(1)
        sums = each["contexts"][:, r] * WEIGHTS.sum(1, keepdims=True)
        np.testing.assert_allclose(total, sums, atol=1e-5)
    # A token that the context has not has no gradient there.
    there = np.abs(each["contexts"]).max(-1) > 0
    assert there.tolist() == [[True, b == 1, False] for b in range(B)]


def test_rho_and_cosine_of_opposite_equal_and_spread_directions():
    g = jnp.array([[3.0, -4.0, 1.0]])

    def rho(*steps):
        sums = init_cumulative(1, 3)
        for step in steps:
            sums = add_step(sums, step)
        return float(cancellation(sums)[0]), sums

    assert rho(g, -g)[0] == 0 and not np.asarray(rho(g, -g)[1].total).any()
    assert float(pairwise_cosine(jnp.concatenate([g, -g]))) == pytest.approx(-1, abs=1e-6)
    assert rho(g, g)[0] == pytest.approx(1, abs=1e-6)
    assert float(pairwise_cosine(jnp.concatenate([g, g]))) == pytest.approx(1, abs=1e-6)
    angles = 2 * np.pi * np.arange(3) / 3
    spread = jnp.asarray(np.stack([np.cos(angles), np.sin(angles)], 1), jnp.float32)
    assert float(pairwise_cosine(spread)) == pytest.approx(-0.5, abs=1e-6)
    assert rho()[0] == 0  # no step, no NaN
    assert rho(g, 0 * g)[1].steps.tolist() == [1]


def test_random_signs_cancel_by_the_root_of_the_number_of_steps():
    n, rows = 10_000, 400
    signs = np.random.default_rng(1).choice([-1.0, 1.0], (n, rows, 1)).astype(np.float32)
    sums, _ = jax.lax.scan(
        lambda sums, g: (add_step(sums, g), None), init_cumulative(rows, 1), jnp.asarray(signs)
    )
    rho = np.asarray(cancellation(sums))
    assert rho.mean() == pytest.approx(0.798 / np.sqrt(n), rel=0.1)
    assert rho.mean() == pytest.approx(0.008, abs=1e-3)
    assert np.sqrt(np.square(rho).mean()) == pytest.approx(1 / np.sqrt(n), rel=0.1)


def test_the_closed_form_is_the_mean_over_pairs_and_leaves_zeros_out():
    g = np.random.default_rng(2).normal(size=(6, 5)).astype(np.float32)
    g *= np.array([1e-12, 1, 1e6, 3, 1e-3, 1], np.float32)[:, None]
    unit = g / np.linalg.norm(g, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i in range(6) for j in range(i)]
    assert float(pairwise_cosine(g)) == pytest.approx(np.mean(pairs), abs=1e-5)
    more = np.concatenate([g, np.zeros((3, 5), np.float32)])
    assert float(pairwise_cosine(more)) == pytest.approx(np.mean(pairs), abs=1e-5)
    assert float(pairwise_cosine(g[:1])) == 0 and float(pairwise_cosine(0 * g)) == 0


def test_a_history_sums_gradients_and_updates_and_averages_cosines():
    start = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)
    history = begin_history(jnp.asarray(start))
    g = np.array([[[1, 0], [0, 0]], [[1, 0], [0, 3]]], np.float32)  # 2 contexts, 2 rows
    scored, moved = jnp.array([1.0, 3.0]), np.array([[0, 1], [0, -1]], np.float32)
    history = observe(history, jnp.asarray(g), scored, jnp.asarray(start + moved))
    history = observe(history, jnp.asarray(-g), scored, jnp.asarray(start))
    np.testing.assert_allclose(history.gradients.total, 0, atol=1e-7)
    np.testing.assert_allclose(history.gradients.length, [2.0, 2 * 0.75 * 3])
    np.testing.assert_allclose(history.updates.length, [2.0, 2.0])
    np.testing.assert_allclose(cancellation(history.updates), 0, atol=1e-7)
    np.testing.assert_allclose(history.mean_cosine, [1.0, 0.0], atol=1e-6)
    assert history.measured.tolist() == [2, 0]
    far, cosine = displacement(history.now, history.start)
    np.testing.assert_allclose(far, 0)
    np.testing.assert_allclose(cosine, 1, atol=1e-6)
    far, cosine = displacement(jnp.array([[0.0, 3.0], [0.0, 0.0]]), jnp.asarray(start))
    np.testing.assert_allclose(far, [np.sqrt(10), 2], rtol=1e-6)
    np.testing.assert_allclose(cosine, [0, 0])


def test_a_control_is_as_frequent_as_what_it_is_matched_with():
    counts = [100, 90, 0, 55, 1000, 101, 100]
    assert matched_tokens(counts, 0, most=3) == [6, 5, 1]
    assert matched_tokens(counts, 0, exclude=(6,), most=1) == [5]
    assert matched_tokens(counts, 4, within=20, most=9) == [5, 0, 6, 1, 3]
    for token, within, said in ((2, 2, "does not occur"), (4, 2, "larger ratio"), (0, 0.5, "0.5")):
        with pytest.raises(ValueError, match=said):
            matched_tokens(counts, token, within=within)
