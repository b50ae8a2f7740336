from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokjax.decoding.search import pass_at_k
from tokjax.errors import ConfigError, DataError
from tokjax.models import Transformer, lora
from tokjax.models.head import Head
from tokjax.models.lora import LoraConfig
from tokjax.preference.critical_tokens import (
    Chains,
    choose_chains,
    contrastive_scores,
    critical_scores,
    critical_token,
    critical_weights,
)
from tokjax.preference.dpo import DPO, pair_loss
from tokjax.signals.vocabulary import tile_size

PLUS, MINUS = [2.0, 0.0, -1.0], [0.0, 2.0, -1.0]
OF_PLUS = [0.843795, 0.114195, 0.042010]
PAIRS = [
    {"prompt": "2+2=", "chosen": "4", "rejected": "five"},
    {"prompt": "a", "chosen": "bcd", "rejected": "b"},
    {"prompt": "say ", "chosen": "é", "rejected": "eeee"},
]


def scores_of(plus, minus, beta=1.0, bias=(0.0, 0.0)):
    """Scores of ids 0, 1, 2 under models that have these logits everywhere."""
    x = jnp.ones((1, 3, 1))
    sides = [
        (x, Head(jnp.array(z, jnp.float32)[:, None], jnp.full(3, b)))
        for z, b in zip((plus, minus), bias, strict=True)
    ]
    return np.asarray(contrastive_scores(*sides, jnp.array([[0, 1, 2]]), beta)[0])


def log_softmax(z):
    return np.asarray(z) - np.log(np.exp(z).sum())


@pytest.mark.parametrize(
    ("plus", "minus", "beta", "bias", "expected"),
    [
        (PLUS, MINUS, 1.0, (0.0, 0.0), [0.990867, 0.002456, 0.006676]),
        (log_softmax(PLUS), log_softmax(MINUS), 1.0, (0.0, 0.0), [0.990867, 0.002456, 0.006676]),
        (PLUS, MINUS, 1.0, (3.0, -7.0), [0.990867, 0.002456, 0.006676]),
        (PLUS, MINUS, 0.0, (0.0, 0.0), OF_PLUS),
        (PLUS, PLUS, 1.0, (0.0, 0.0), OF_PLUS),
        (PLUS, PLUS, 2.5, (0.0, 5.0), OF_PLUS),
    ],
    ids=["logits", "log-probabilities", "constants", "no contrast", "equal", "equal, stronger"],
)
def test_numbers_of_three_tokens(plus, minus, beta, bias, expected):
    np.testing.assert_allclose(scores_of(plus, minus, beta, bias), expected, atol=1e-6)


def test_streamed_scores_equal_those_of_all_logits():
    vocabulary, keys = 5003, jax.random.split(jax.random.key(0), 6)
    assert tile_size(vocabulary, 18)[1] < vocabulary
    a, b = (jax.random.normal(k, (2, 9, d)) for k, d in zip(keys[:2], (8, 6), strict=True))
    first = Head(jax.random.normal(keys[2], (vocabulary, 8)))
    second = Head(jax.random.normal(keys[3], (vocabulary, 6)), softcap=4.0)
    # One id that the first excludes, one that the second does.
    first = first.replace(bias=jnp.zeros(vocabulary).at[4000].set(-jnp.inf))
    targets = (
        jax.random.randint(keys[4], (2, 9), 0, vocabulary).at[0, :3].set(jnp.array([4000, 5002, 0]))
    )
    mask = jnp.ones((2, 9), bool).at[1, 4:].set(False)
    found = jax.jit(contrastive_scores)((a, first), (b, second), targets, 0.7, mask=mask)
    p = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", a, first.table) + first.bias)
    q = jax.nn.log_softmax(4 * jnp.tanh(jnp.einsum("btd,vd->btv", b, second.table) / 4))
    z = jax.nn.softmax(jnp.where(p == -jnp.inf, -jnp.inf, 1.7 * p - 0.7 * q))
    expected = jnp.take_along_axis(z, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(found, jnp.where(mask, expected, 1.0), rtol=2e-4, atol=1e-7)
    assert found[0, 0] == 0


def test_a_token_that_the_second_model_excludes_takes_all():
    x, table = jnp.ones((1, 2, 1)), jnp.zeros((3, 1))
    bias = jnp.array([0.0, -jnp.inf, 0.0])
    found = contrastive_scores((x, table), (x, Head(table, bias)), jnp.array([[0, 1]]))
    np.testing.assert_array_equal(found, [[0.0, 1.0]])


def test_vocabularies_and_shapes_must_fit():
    x, ids = jnp.ones((1, 3, 1)), jnp.zeros((1, 3), jnp.int32)
    with pytest.raises(ValueError, match="3 and 4 ids differ"):
        contrastive_scores((x, jnp.ones((3, 1))), (x, jnp.ones((4, 1))), ids)
    with pytest.raises(ValueError, match="shape of targets"):
        contrastive_scores((x, jnp.ones((3, 1))), (x, jnp.ones((3, 1))), ids[:, 1:])


@pytest.fixture(scope="module")
def store(stored):
    return stored(PAIRS, "preference")


@pytest.fixture(scope="module")
def adapted(lm):
    """The model with adapters, and the parameters of p+ and p-: one base, two sets of adapters."""
    model, params = lora.on(*lm, LoraConfig(rank=2), jax.random.key(1))
    base, adapters = lora.split(params)
    sides = [
        lora.join(
            base, jax.tree.map(lambda a, k=k: a + 0.1 * jax.random.normal(k, a.shape), adapters)
        )
        for k in jax.random.split(jax.random.key(2), 2)
    ]
    return model, *sides


@pytest.fixture(scope="module")
def scores(store, adapted):
    model, plus, minus = adapted
    return critical_scores(store, (model, plus), (model, minus), beta=1.5)


def test_pairs_are_scored_as_each_answer_alone(store, adapted, scores, next_logprobs):
    model, plus, minus = adapted
    for i in range(store.num_examples):
        cut, ids, own = store.cut(i), store.tokens(i), scores[i]
        assert own.shape == ids.shape and (own[store.weights(i) == 0] == 1).all()
        for start, stop in ((0, cut), (cut, len(ids))):
            part = ids[start:stop]
            p, q = (next_logprobs(lora.merge(model, side)[1], part) for side in (plus, minus))
            z = 2.5 * p - 1.5 * q
            z = np.exp(z - z.max(-1, keepdims=True))
            expected = (z / z.sum(-1, keepdims=True))[np.arange(len(part) - 1), part[1:]]
            counted = store.weights(i)[start + 1 : stop] != 0
            assert counted.any()
            np.testing.assert_allclose(
                own[start + 1 : stop][counted], expected[counted], rtol=5e-3, atol=1e-7
            )


def test_batching_changes_no_score(store, adapted, scores):
    model, plus, minus = adapted
    small = critical_scores(store, (model, plus), (model, minus), beta=1.5, batch_tokens=1)
    for one, other in zip(small, scores, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4)


def test_positions_begin_anew_with_the_rejected_answer(store, lm):
    model = Transformer(replace(lm[0].config, positions="learned"))
    params = model.init(jax.random.key(3))
    params = {k: 20 * a if k.endswith("embedding") else a for k, a in params.items()}
    forward = jax.jit(lambda tokens: jax.nn.log_softmax(model(params, tokens)[0][0]))
    found = critical_scores(store, (model, params), (model, params), beta=0.0)
    for i in range(store.num_examples):
        part = np.zeros(16, np.int32)
        size = int(store.lengths[i]) - store.cut(i)
        part[:size] = store.tokens(i, store.cut(i))
        logp = np.asarray(forward(part[None]))[np.arange(size - 1), part[1:size]]
        own, counted = found[i][store.cut(i) + 1 :], store.weights(i)[store.cut(i) + 1 :] != 0
        np.testing.assert_allclose(np.log(own[counted]), logp[counted], atol=1e-3)


@pytest.mark.parametrize("only_negative", [True, False])
def test_weights_of_answers_ends_and_prompts(store, only_negative):
    scores = [np.full(n, 0.25, np.float32) for n in store.lengths]
    scores[0][-2] = 1.0
    weights = critical_weights(store, scores, only_negative=only_negative)
    chosen = 1.0 if only_negative else 0.25
    # 256 2 + 2 = 4 256, then 256 2 + 2 = f i v e 256
    expected = [0] * 5 + [chosen, 1] + [0] * 5 + [0.75] * 3 + [1e-7, 1]
    np.testing.assert_allclose(weights[0], expected, rtol=1e-6)


def test_a_score_of_zero_is_dpo(store, batch_of):
    weights = critical_weights(store, [np.zeros(n, np.float32) for n in store.lengths])
    np.testing.assert_array_equal(batch_of(store, weights).weights, batch_of(store).weights)


def test_a_score_of_one_everywhere_removes_the_rejected_side(store, lm, batch_of):
    model, params = lm
    weights = critical_weights(store, [np.ones(n, np.float32) for n in store.lengths])
    for i in range(store.num_examples):  # the end tokens included
        weights[i][store.cut(i) :] = np.minimum(weights[i][store.cut(i) :], 1e-7)
    moved = jax.tree.map(lambda a: 1.1 * a, params)
    loss = jax.jit(lambda b: DPO(beta=0.3).loss(model, moved, params, b, jax.random.key(0)))
    found = loss(batch_of(store, weights))
    chosen = found.metrics["chosen_reward"][0]
    assert found.weight == store.num_examples  # the pairs are still there
    np.testing.assert_allclose(found.metrics["reward_margin"][0], chosen, rtol=1e-5)
    plain = loss(batch_of(store))
    np.testing.assert_allclose(plain.metrics["chosen_reward"][0], chosen, rtol=1e-6)
    assert abs(float(plain.total - found.total)) > 1e-4
    assert float(pair_loss(jnp.float32(0.0), 0.3)) * 3 != float(found.total)


def test_the_margin_is_that_of_the_weights(store, scores, lm, batch_of):
    model, params = lm
    weights, objective = critical_weights(store, scores), DPO(beta=0.1)
    moved = jax.tree.map(lambda a: 1.1 * a, params)
    loss = jax.jit(lambda b: objective.loss(model, moved, params, b, jax.random.key(0)))
    whole = float(loss(batch_of(store, weights)).metrics["rejected_reward"][0])
    halved = [np.where(np.arange(len(w)) >= store.cut(i), w / 2, w) for i, w in enumerate(weights)]
    half = float(loss(batch_of(store, halved)).metrics["rejected_reward"][0])
    np.testing.assert_allclose(half, whole / 2, rtol=1e-4)


def test_what_does_not_fit_is_refused(store, stored, lm):
    model, params = lm
    with pytest.raises(ConfigError, match="beta=-1"):
        critical_scores(store, lm, lm, beta=-1)
    rated = stored([{"prompt": "a", "response": "b", "label": True}], "rated")
    with pytest.raises(DataError, match="kind 'preference'"):
        critical_scores(rated, lm, lm)
    with pytest.raises(DataError, match="score it again"):
        critical_weights(store, [np.zeros(3, np.float32)] * 3)
    config = model.config
    wide = Transformer(replace(config, vocab_size=300))
    with pytest.raises(ConfigError, match=r"models of \[257, 300\] ids"):
        critical_scores(store, lm, (wide, params))
    short = Transformer(replace(config, max_positions=8))
    with pytest.raises(ConfigError, match=r"an answer of x:0 has 10 tokens.* 8 positions"):
        critical_scores(store, (short, params), lm)
    table = replace(short.config, positions="learned", max_positions=16)
    with pytest.raises(ConfigError, match=r"the pair x:2 has 18 tokens.* 16 positions"):
        critical_scores(store, (Transformer(table), params), lm)
    broken = {**params, "embedding": params["embedding"] * jnp.nan}
    with pytest.raises(DataError, match="not finite"):
        critical_scores(store, lm, (model, broken))


# ---- chains and rollouts


def test_chains_of_a_question():
    answers = ["7", "3", None, "3", "8", "9", "7", "4", "9", "3"]
    right = [a in ("7", "8") for a in answers]
    # Wrong: 3 three times, 9 twice, 4 once; half of six is covered by the first.
    assert choose_chains(answers, right) == Chains(0, (1,))
    assert choose_chains(answers, right, share=0.51) == Chains(0, (1, 5))
    assert choose_chains(answers, right, share=1.0) == Chains(0, (1, 5, 7))
    assert choose_chains(answers, right).pair == (0, 1)


def test_chains_of_a_question_that_is_always_right_or_wrong():
    assert choose_chains(["1", "1"], [True, True]) == Chains(0, ())
    assert choose_chains([None, "1"], [False, False]) == Chains(None, (1,))
    assert choose_chains([], []) == Chains(None, ())
    assert choose_chains([], []).pair is None
    with pytest.raises(ConfigError, match="share=2"):
        choose_chains([], [], share=2)


def test_pass_at_k_of_rollouts():
    assert pass_at_k(4, 1, 2) == 0.5


@pytest.mark.parametrize(
    ("successes", "expected"),
    [
        ([30, 20, 0, 0, 3, 0], 2),
        ([30, 0, 20, 4, 0, 3], 4),
        ([0, 0], 0),
        ([30, 1], None),
        ([], None),
    ],
)
def test_the_critical_token_of_rollouts(successes, expected):
    assert critical_token(successes, samples=64) == expected


@given(st.lists(st.sampled_from([0, 1, 3, 4, 64]), max_size=8))
def test_the_critical_token_is_the_first_that_satisfies_the_definition(successes):
    def satisfies(t):
        return successes[t] == 0 and all(later <= 3 for later in successes[t + 1 :])

    expected = next((t for t in range(len(successes)) if satisfies(t)), None)
    assert critical_token(successes, samples=64) == expected


def test_impossible_counts_are_refused():
    with pytest.raises(ConfigError, match="counts of 4 samples"):
        critical_token([5], samples=4)
