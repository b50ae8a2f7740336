import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.errors import ConfigError, DataError
from tokjax.models import ModelConfig, Transformer
from tokjax.steering import (
    Pair,
    ablation_differences,
    attribute_tokens,
    direction,
    steering_vector,
)

BOS, PAD = 1, 0
MODEL = Transformer(ModelConfig(vocab_size=61, d_model=32, n_layers=2, n_heads=4, max_positions=96))
PAIRS = [
    Pair([BOS, 5, 9, 2], [30, 4], [31]),
    Pair([BOS, 7], [3, 3, 3, 8], [60]),
    Pair([BOS, 11, 12, 13, 14, 15, 16], [17], [18]),
]
GIVEN = {"ablation_id": PAD, "bos_id": BOS, "baseline_id": PAD, "k": 2}


@pytest.fixture(scope="module")
def params():
    params = MODEL.init(jax.random.key(1))
    return {**params, "embedding": 50 * params["embedding"]}


@pytest.fixture(scope="module")
def vector(params):
    return steering_vector(MODEL, params, PAIRS, **GIVEN)


@jax.jit
def block_outputs(params, tokens):
    out = MODEL.backbone(params, MODEL.embed(params, tokens), capture={"resid_post"})
    return out.captured["resid_post"][:, 0]


def padded(ids):
    return np.array([[*ids, *[0] * (32 - len(ids))]], np.int32)


@pytest.mark.parametrize("place", ["last", "predicting"])
def test_differences_are_those_of_each_text_alone(params, place):
    positive, negative = ablation_differences(MODEL, params, PAIRS, **GIVEN, place=place)
    assert positive.shape == negative.shape == (2, 6, 32)
    attribute = jax.jit(
        lambda tokens, n: attribute_tokens(MODEL, params, tokens, n, n - 1, baseline_id=PAD)
    )
    texts = [([*pair.prompt, *answer], i) for pair in PAIRS for i, answer in enumerate(pair[1:])]
    for at, (ids, dispreferred) in enumerate(texts):
        scores = np.asarray(attribute(padded(ids), np.array([len(ids)])).scores[0, 1 : len(ids)])
        # A token that makes the dispreferred answer likelier speaks against the preferred one.
        scores = -scores if dispreferred else scores
        read = len(ids) - 1 - (place == "predicting")
        own = block_outputs(params, padded(ids))[:, read]
        for found, order in ((positive, np.argsort(-scores)), (negative, np.argsort(scores))):
            without = np.array(ids)
            if place == "predicting":  # the token that is read is left
                without[[1 + i for i in order if 1 + i != read][:2]] = PAD
            else:
                without[1 + order[: min(2, len(ids) - 2)]] = PAD
            changed = block_outputs(params, padded(without))[:, read]
            np.testing.assert_allclose(found[:, at], own - changed, atol=2e-4)


def test_the_vector_is_made_of_the_differences(params, vector):
    positive, negative = ablation_differences(MODEL, params, PAIRS, **GIVEN)
    np.testing.assert_allclose(vector, direction(positive) - direction(negative), atol=1e-5)
    assert vector.shape == (2, 32) and vector.dtype == np.float32
    mean = steering_vector(MODEL, params, PAIRS, **GIVEN, method="mean", mode="pos")
    np.testing.assert_allclose(mean, positive.mean(1), atol=1e-5)


def test_pairs_turned_round_give_the_negative(params, vector):
    turned = [Pair(prompt, worse, better) for prompt, better, worse in PAIRS]
    np.testing.assert_allclose(steering_vector(MODEL, params, turned, **GIVEN), -vector, atol=1e-5)


def test_batches_do_not_matter_and_are_reported(params, vector):
    seen = []
    found = steering_vector(
        MODEL, params, PAIRS, **GIVEN, batch_size=4, progress=lambda *done: seen.append(done)
    )
    np.testing.assert_allclose(found, vector, atol=1e-4)
    assert seen == [(4, 6), (6, 6)]


def test_other_ways_of_ranking_are_others(params, vector):
    random = [
        steering_vector(MODEL, params, PAIRS, **GIVEN, scores="random", seed=seed)
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(random[0], random[1])
    gradient = steering_vector(MODEL, params, PAIRS, **GIVEN, scores="gradient")
    for other in (random[0], random[2], gradient):
        assert np.isfinite(other).all()
        assert np.abs(other - vector).max() > 0.05
    assert np.abs(random[0] - random[2]).max() > 0.05


def test_more_tokens_than_there_are_leave_one(params):
    found = steering_vector(MODEL, params, PAIRS, **{**GIVEN, "k": 1000})
    assert np.isfinite(found).all()


def test_the_token_that_predicts_is_never_replaced(params):
    changes = {**GIVEN, "k": 1000, "place": "predicting"}
    for scores in ("integrated", "random"):
        found = ablation_differences(MODEL, params, PAIRS, **changes, scores=scores)
        np.testing.assert_array_equal(*found)  # all others are replaced, in both sets
        for at, (prompt, answer) in enumerate((p.prompt, a) for p in PAIRS for a in p[1:]):
            ids = np.array([*prompt, *answer])
            read = len(ids) - 2
            without = np.where(np.isin(np.arange(len(ids)), [0, read]), ids, PAD)
            own = block_outputs(params, padded(ids))[:, read]
            changed = block_outputs(params, padded(without))[:, read]
            np.testing.assert_allclose(found[0][:, at], own - changed, atol=2e-4)


def test_what_cannot_be_meant_is_refused(params):
    def run(pairs=PAIRS, **changes):
        return steering_vector(MODEL, params, pairs, **{**GIVEN, **changes})

    with pytest.raises(ConfigError, match="no pairs"):
        run([])
    with pytest.raises(ConfigError, match="text 1 has an empty answer"):
        run([Pair([1], [2], [])])
    with pytest.raises(ConfigError, match="max_positions=96"):
        run([Pair([1] * 96, [2], [3])])
    with pytest.raises(DataError, match="text 0 has id 61"):
        run([Pair([61], [2], [3])])
    with pytest.raises(DataError, match="ablation_id=-1"):
        run(ablation_id=-1)
    for name, value in (("k", 0), ("steps", 0), ("batch_size", 0)):
        with pytest.raises(ConfigError, match=f"{name}={value}"):
            run(**{name: value})
    for name in ("scores", "target", "place", "method", "mode"):
        with pytest.raises(ConfigError, match=f"{name}='x'"):
            run(**{name: "x"})


def test_bfloat16_models_give_finite_vectors(params):
    model = Transformer(
        ModelConfig(vocab_size=61, d_model=32, n_layers=2, n_heads=4, dtype="bfloat16")
    )
    found = steering_vector(model, params, PAIRS, **GIVEN)
    assert np.isfinite(found).all() and jnp.asarray(found).dtype == jnp.float32
