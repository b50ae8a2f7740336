"""A trained model from elsewhere, against numbers from an implementation of its own."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.decoding import Prompts, categorical, chain, decode, temperature, top_k
from tokjax.models import ModelConfig, Transformer
from tokjax.signals import token_stats

pytestmark = pytest.mark.real_data


def _half_split(rows, heads):
    """Reorders each head's rows from pairs (2i, 2i + 1) to pairs (i, i + d/2)."""
    L, H, D = rows.shape
    pairs = rows.reshape(L, heads, H // heads // 2, 2, D)
    return pairs.transpose(0, 1, 3, 2, 4).reshape(L, H, D)


@pytest.fixture(scope="module")
def stories(real_data):
    data = (real_data / "checkpoints/stories260k/stories260K.bin").read_bytes()
    D, F, L, H, K, V, positions = np.frombuffer(data, "<i4", 7)
    floats, at = np.frombuffer(data, "<f4", offset=28), 0

    def take(*shape):
        nonlocal at
        size = int(np.prod(shape))
        at += size
        return floats[at - size : at].reshape(shape)

    d = D // H
    embedding, attention_norm = take(V, D), take(L, D)
    query, key = take(L, H * d, D), take(L, K * d, D)
    value, out = take(L, K * d, D), take(L, D, H * d)
    mlp_norm, gate, down, up = take(L, D), take(L, F, D), take(L, D, F), take(L, F, D)
    norm = take(D)
    columns = lambda a: a.transpose(0, 2, 1)  # noqa: E731
    params = {
        "embedding": embedding,
        "layers": {
            "attention": {
                "norm": attention_norm,
                "query": columns(_half_split(query, H)),
                "key": columns(_half_split(key, K)),
                "value": columns(value),
                "out": columns(out),
            },
            "mlp": {
                "norm": mlp_norm,
                "gate": columns(gate),
                "up": columns(up),
                "down": columns(down),
            },
        },
        "norm": norm,
    }
    config = ModelConfig(
        *map(int, (V, D, L, H, K)), d_ff=int(F), max_positions=int(positions), norm_eps=1e-5
    )
    model = Transformer(config)
    params = jax.tree.map(jnp.asarray, params)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, model.abstract_params())
    golden = json.loads((real_data / "golden/stories260k.json").read_text())
    return model, params, golden


def test_greedy_text_is_the_published_one(stories):
    model, params, golden = stories
    ids = golden["greedy_ids_bos_plus_200"]
    generation = decode(model, params, Prompts.of([[1], ids[:40]]), max_new_tokens=[200, 161])
    assert generation.rows() == [ids[1:], ids[40:]]
    limit = chain(temperature(5.0), top_k(1))
    sampled = decode(
        model,
        params,
        Prompts.of([[1]]),
        max_new_tokens=200,
        transform=limit,
        sampler=categorical(),
        seeds=[0],
    )
    assert sampled.rows() == [ids[1:]]


def test_nll_and_next_tokens_are_the_published_ones(stories):
    model, params, golden = stories
    for case in golden["cases"]:
        ids = np.array([case["ids"]])
        x = model.backbone(params, model.embed(params, ids)).x
        head = model.unembedding(params)
        nll = token_stats(x[:, :-1], head, ids[:, 1:]).nll
        np.testing.assert_allclose(nll[0], case["nll"], atol=2e-5)
        stats = token_stats(x[:, -1:], head, ids[:, -1:], want=("top_k",), k=5)
        assert stats.top_ids[0, 0].tolist() == case["last_top5_ids"]
        np.testing.assert_allclose(stats.top_logprobs[0, 0], case["last_top5_logprobs"], atol=2e-5)


def test_sampled_logprobs_are_those_of_scoring(stories):
    model, params, _ = stories
    generation = decode(
        model,
        params,
        Prompts.of([[1]] * 3),
        max_new_tokens=100,
        sampler=categorical(),
        seeds=[1, 2, 3],
    )
    ids = np.concatenate([np.ones((3, 1), np.int32), np.asarray(generation.tokens)[:, :100]], 1)
    x = model.backbone(params, model.embed(params, ids[:, :-1])).x
    stats = token_stats(x, model.unembedding(params), ids[:, 1:], want=("logprob", "entropy"))
    np.testing.assert_allclose(generation.logprobs[:, :100], stats.logprob, atol=1e-5)
    np.testing.assert_allclose(generation.sampling_logprobs[:, :100], stats.logprob, atol=1e-5)
    np.testing.assert_allclose(generation.entropies[:, :100], stats.entropy, atol=1e-5)
