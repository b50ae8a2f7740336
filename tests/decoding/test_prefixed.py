"""Prompts with vectors in them: what is written is what the whole pass says."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.decoding import decode
from tokjax.decoding.engine import _run
from tokjax.decoding.prefixed import prefixed, slotted_prompts
from tokjax.errors import ConfigError
from tokjax.models import ModelConfig, Transformer
from tokjax.models.views import placed

V, D, N = 23, 32, 5
MODEL = Transformer(
    ModelConfig(
        vocab_size=V,
        d_model=D,
        n_layers=2,
        n_heads=2,
        max_positions=64,
        tie_embeddings=False,
        remat="none",
    )
)
COUNTS = [3, 7, 0]
PROMPTS, SLOTS = slotted_prompts(COUNTS, before=[4], after=[6, 1])


@pytest.fixture(scope="module")
def params():
    params = MODEL.init(jax.random.key(1))
    # Sharper than a fresh model: texts differ, and the likeliest token leads by a margin.
    return {**params, "embedding": 50 * params["embedding"], "head": 3 * params["head"]}


@pytest.fixture(scope="module")
def vectors():
    return jax.random.normal(jax.random.key(2), (len(COUNTS), max(COUNTS), D))


def written(params, vectors, prompts=PROMPTS):
    """Two samples of each prompt, which are alike when greedy."""
    return decode(*prefixed(MODEL, params, vectors, SLOTS), prompts, max_new_tokens=N, samples=2)


def test_greedy_text_is_that_of_the_whole_pass_and_samples_share_the_vectors(params, vectors):
    found = written(params, vectors)
    rows = found.rows()
    width = max(COUNTS) + 3 + N
    ids, slots = np.zeros((3, width), np.int32), np.full((3, width), -1, np.int32)
    for b, n in enumerate(COUNTS):
        assert rows[2 * b] == rows[2 * b + 1]
        ids[b, : n + 3 + N] = [4, *[0] * n, 6, 1, *rows[2 * b]]
        slots[b, 1 : n + 1] = range(n)

    @jax.jit
    def whole(params, ids, slots):
        x = placed(MODEL.embed(params, ids), vectors, slots)
        return MODEL.unembed(params, MODEL.backbone(params, x).x)

    logits = np.asarray(whole(params, jnp.asarray(ids), jnp.asarray(slots)))
    assert len({tuple(row) for row in rows}) == 3
    for b, n in enumerate(COUNTS):
        own = logits[b, n + 2 : n + 2 + N]
        np.testing.assert_array_equal(rows[2 * b], own.argmax(-1))
        logprobs = own.max(-1) - np.log(np.exp(own).sum(-1))
        np.testing.assert_allclose(found.logprobs[2 * b, :N], logprobs, atol=1e-4)


def test_a_text_depends_on_its_own_vectors_alone_and_others_compile_nothing(params, vectors):
    found = written(params, vectors)
    compiled: Any = _run
    before = compiled._cache_size()
    other = written(params, vectors.at[1].multiply(-1.0))
    np.testing.assert_array_equal(other.tokens[jnp.array([0, 4])], found.tokens[jnp.array([0, 4])])
    assert abs(float(other.logprobs[2, 0] - found.logprobs[2, 0])) > 1e-3
    # What no slot names has no effect; neither have the ids in the gaps.
    ids = np.where(SLOTS >= 0, V - 1, PROMPTS.tokens)
    same = written(params, vectors.at[0, 3:].set(1e6), dataclasses.replace(PROMPTS, tokens=ids))
    assert same.rows() == found.rows()
    assert compiled._cache_size() == before


def test_vectors_that_do_not_belong_to_the_prompts_are_refused(params, vectors):
    prompts, slots = slotted_prompts(COUNTS, before=[4])
    for given, places, said in (
        (vectors, slots[:2], r"slots of shape \(2, 8\)"),
        (vectors, slots[:, :4], r"slots of shape \(3, 4\)"),
        (vectors[:2], slots, r"vectors of shape \(2, 7, 32\)"),
        (vectors[..., :5], slots, "d_model=32"),
        (vectors[:, :6], slots, "up to 6"),
    ):
        with pytest.raises(ConfigError, match=said):
            decode(*prefixed(MODEL, params, given, places), prompts, max_new_tokens=2)
