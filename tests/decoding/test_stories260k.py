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


def _score(model, params, ids):
    """Statistics of each id given those before it, and of the first five behind each id."""

    @jax.jit
    def score(params, ids):
        x, head = model.backbone(params, model.embed(params, ids)).x, model.head(params)
        want = ("nll", "logprob", "entropy")
        return (
            token_stats(x[:, :-1], head, ids[:, 1:], want=want),
            token_stats(x, head, ids, want=("top_k",), k=5),
        )

    return score(params, ids)


def test_nll_and_next_tokens_are_the_published_ones(stories):
    model, params, golden = stories
    longest = max(len(case["ids"]) for case in golden["cases"])
    # Causal, so that the filling has no effect on what comes before it.
    ids = np.array([case["ids"] + [0] * (longest - len(case["ids"])) for case in golden["cases"]])
    stats, behind = _score(model, params, ids)
    for b, case in enumerate(golden["cases"]):
        n = len(case["ids"])
        np.testing.assert_allclose(stats.nll[b, : n - 1], case["nll"], atol=2e-5)
        assert behind.top_ids[b, n - 1].tolist() == case["last_top5_ids"]
        expected = case["last_top5_logprobs"]
        np.testing.assert_allclose(behind.top_logprobs[b, n - 1], expected, atol=2e-5)


def test_sampled_logprobs_are_those_of_scoring(stories):
    model, params, _ = stories
    prompts = Prompts.of([[1]] * 3)
    generation = decode(
        model, params, prompts, max_new_tokens=100, sampler=categorical(), seeds=[1, 2, 3]
    )
    ids = np.concatenate([np.ones((3, 1), np.int32), np.asarray(generation.tokens)[:, :100]], 1)
    stats, _ = _score(model, params, ids)
    np.testing.assert_allclose(generation.logprobs[:, :100], stats.logprob, atol=1e-5)
    np.testing.assert_allclose(generation.sampling_logprobs[:, :100], stats.logprob, atol=1e-5)
    np.testing.assert_allclose(generation.entropies[:, :100], stats.entropy, atol=1e-5)
