"""Baselines: what each of them scores, and gradients against those of jax.grad."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tokjax.config import choices, resolve
from tokjax.config.schema import Choice
from tokjax.errors import ConfigError, DataError
from tokjax.models import lora
from tokjax.selection import methods
from tokjax.selection.baselines import Longest, Loss, Random, Rds
from tokjax.selection.gradient import Gradient, _sketch
from tokjax.selection.scoring import budget_count, keep_best, score


def scores(lm, selector, pool, target=None, **options):
    return score(selector, lm.model, lm.params, pool, target, **options).scores


def responses(store, i):
    """The ids of an example, and which of them count."""
    tokens = store.tokens(i)
    return tokens, (store.weights(i) != 0) & (np.arange(len(tokens)) > 0)


def test_random_scores_depend_on_key_and_seed_alone(lm, pool, store):
    found = scores(lm, Random(), pool)
    assert (found >= 0).all() and (found < 1).all() and len(set(found)) == 20
    np.testing.assert_array_equal(found, scores(lm, Random(), pool, batch_tokens=1))
    np.testing.assert_array_equal(found[:3], scores(lm, Random(), store(pool.examples[:3])))
    assert not np.isin(found, scores(lm, Random(seed=1), pool)).any()


def test_longest_counts_the_tokens_in_scope(lm, pool):
    expected = [len(ids) - prompt for ids, prompt in pool.examples]
    assert scores(lm, Longest(), pool).tolist() == [*expected[:-1], -np.inf]
    assert scores(lm, Longest(scope="all"), pool).tolist() == [n - 1 for n in pool.lengths]


def test_loss_is_the_mean_nll_of_the_response(lm, pool):
    found = score(Loss(), lm.model, lm.params, pool, channels=True)
    for i in (0, 7):
        tokens, scope = responses(pool, i)
        logprobs = scipy.special.log_softmax(lm.forward(tokens)[0], axis=-1)
        nll = -logprobs[np.arange(len(tokens) - 1), tokens[1:]]
        np.testing.assert_allclose(found.scores[i], nll[scope[1:]].mean(), rtol=1e-5)
        np.testing.assert_allclose(
            found.channels["nll"][i][1:], np.where(scope[1:], nll, 0.0), atol=1e-5
        )
    assert found.scores[-1] == -np.inf
    np.testing.assert_array_equal(
        scores(lm, Loss(prefer="low"), pool), [*-found.scores[:-1], -np.inf]
    )


@pytest.mark.parametrize("over", ["mean", "max"])
def test_rds_is_the_cosine_of_mean_states(lm, pool, target, over):
    def pooled(store, i):
        tokens, scope = responses(store, i)
        mean = lm.forward(tokens)[1][scope].mean(0)
        return mean / np.linalg.norm(mean)

    goal = np.array([pooled(target, i) for i in range(3)])
    expected = [getattr(np, over)(goal @ pooled(pool, i)) for i in range(19)]
    found = scores(lm, Rds(over=over), pool, target)
    np.testing.assert_allclose(found, [*expected, -np.inf], atol=1e-5)


def test_gradients_are_those_of_each_example_alone(lm, pool, target):
    key = jax.random.key(0)
    model, params = lora.on(lm.model, lm.params, lora.LoraConfig(rank=8), key)
    base, adapters = lora.split(params)

    @jax.jit
    def of_adapters(tokens, weights):
        def loss(adapters):
            logits, _ = model(lora.join(base, adapters), tokens[None])
            logprobs = jax.nn.log_softmax(logits[0, :-1])
            nll = -jnp.take_along_axis(logprobs, tokens[1:, None], axis=1)[:, 0]
            return (nll * weights[1:]).sum() / weights[1:].sum()

        return jax.grad(loss)(adapters)["layers"]

    def gradient(store, i):
        tokens, weights = np.zeros(48, np.int32), np.zeros(48, np.float32)
        tokens[: store.lengths[i]] = store.tokens(i)
        weights[: store.lengths[i]] = store.weights(i)
        found = of_adapters(tokens, weights)
        named = [item for own in found.values() for item in own.items()]
        assert not any(np.asarray(w).any() for name, w in named if name.endswith(lora.A))
        second = {
            part: {name: w for name, w in own.items() if name.endswith(lora.B)}
            for part, own in found.items()
        }
        total = jnp.zeros(512)
        for n, leaf in enumerate(jax.tree.leaves(second)):
            total += _sketch(leaf, jax.random.fold_in(key, n), 512)
        return np.asarray(total / jnp.linalg.norm(total))

    mean = np.mean([gradient(target, i) for i in range(3)], axis=0)
    expected = [gradient(pool, i) @ mean / np.linalg.norm(mean) for i in range(4)]
    found = scores(
        lm,
        Gradient(rank=8, targets=("query", "value"), dimensions=512),
        pool,
        target,
        indices=[0, 1, 2, 3, 19],
    )
    np.testing.assert_allclose(found[:4], expected, atol=1e-4)
    assert found[19] == -np.inf


def test_sketches_keep_inner_products():
    rng = np.random.default_rng(0)
    a = rng.normal(size=4000)
    b = a + rng.normal(size=4000)
    one, two = (_sketch(jnp.array(x), jax.random.key(3), 2048) for x in (a, b))
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    np.testing.assert_allclose(
        one @ two / jnp.linalg.norm(one) / jnp.linalg.norm(two), cosine, atol=0.05
    )


def test_an_example_among_the_target_is_the_likest(lm, pool, target, store):
    mixed = store([*pool.examples[:5], target.examples[0]])
    alone = store(target.examples[:1])
    for selector in (Rds(), Gradient(rank=4, dimensions=512)):
        found = scores(lm, selector, mixed, alone)
        assert found.argmax() == 5
        np.testing.assert_allclose(found[5], 1.0, atol=1e-3)


@pytest.mark.parametrize("selector", [Rds(), Gradient()], ids=["rds", "gradient"])
def test_a_target_without_responses_is_an_error(lm, pool, store, selector):
    with pytest.raises(DataError, match="no token of the target counts"):
        scores(lm, selector, pool, store([([1, 2, 3], 3)]))


def test_methods_are_choices_whose_options_are_checked():
    assert set(methods.NAMES) == set(choices("selector"))
    chosen = methods.selector("trim", {"lam": 0.3})
    assert chosen.lam == 0.3
    assert resolve(type(chosen), {"lam": 0.3}) == chosen
    assert Choice("selector").kind == "selector"
    for name, options, message in (
        ("trimm", {}, "Did you mean 'trim'"),
        ("trim", {"lamb": 1.0}, "Did you mean 'lam'"),
        ("random", {"seed": -1}, "seed=-1"),
        ("gradient", {"rank": 0}, "rank=0"),
        ("gradient", {"targets": ["qeury"]}, "Did you mean 'query'"),
        ("loss", {"prefer": "hihg"}, "Did you mean 'high'"),
    ):
        with pytest.raises(ConfigError, match=message):
            methods.selector(name, options)


@pytest.mark.parametrize(
    ("budget", "examples", "count"),
    [
        ("5%", 4000, 200),
        ("5%", 59, 2),
        ("0.5%", 1000, 5),
        ("29%", 100, 29),
        ("100%", 7, 7),
        ("7", 7, 7),
        (" 3 ", 9, 3),
    ],
)
def test_budgets_are_shares_or_counts(budget, examples, count):
    assert budget_count(budget, examples) == count


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("0", "keeps nothing"),
        ("0%", "keeps nothing"),
        ("-5%", "keeps nothing"),
        ("101%", "more than the whole pool"),
        ("11", "more than the pool's 10"),
        ("1%", "of 10 examples keeps none"),
        ("five", "neither a share"),
        ("2.5", "neither a share"),
        ("", "neither a share"),
        ("nan%", "neither a share"),
    ],
)
def test_impossible_budgets_are_errors(budget, message):
    with pytest.raises(ConfigError, match=message):
        budget_count(budget, 10)


def test_the_best_are_kept_and_never_one_without_a_score():
    found = keep_best(np.array([0.1, np.nan, 0.5, -np.inf, 0.5, np.inf]), 5)
    assert found.tolist() == [True, False, True, False, True, False]
    assert keep_best(np.array([0.1, 0.5, 0.5]), 1).tolist() == [False, True, False]
