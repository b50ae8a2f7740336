"""TRIM: worked numbers, its invariances, and scoring over a store."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.errors import ConfigError, DataError
from tokjax.selection import trim as module
from tokjax.selection.rows import rows_of
from tokjax.selection.scoring import Target, score
from tokjax.selection.trim import (
    Fingerprints,
    TokenClasses,
    Trim,
    fingerprints,
    sample_scores,
    token_classes,
    token_scores,
)
from tokjax.signals.attention import (
    attention_saliency,
    column_saliency,
    row_saliency,
    visible_pairs,
)

A = jnp.array([[1.0, 0, 0], [0.25, 0.75, 0], [0.2, 0.3, 0.5]])
REAL = jnp.ones(3, bool)
ALPHA = np.array([0.460317, 0.594361, 0.507575])


def classes_of(found, near, lam, size):
    """Fingerprints for `size` ids, those without one borrowing from the id that `near` names."""
    at = {int(i): k for k, i in enumerate(found.ids)}
    place = [at[i] if i in at else at[near] for i in range(size)]
    factor = [1.0 if i in at else lam for i in range(size)]
    return TokenClasses(found.vectors, jnp.array(place), jnp.array(factor))


def test_saliency_of_a_map():
    pairs = visible_pairs(REAL)
    rows = row_saliency(A, pairs)
    np.testing.assert_allclose(rows, [0, 0.188722, 0.062769], atol=1e-6)
    columns = column_saliency(A, pairs, REAL)
    np.testing.assert_allclose(columns, [0.920635, 1, 0.952381], atol=1e-6)
    np.testing.assert_allclose(attention_saliency(A, pairs, REAL), ALPHA, atol=1e-6)


def test_fingerprints_of_a_sample():
    found = fingerprints(np.array([7, 5, 7]), np.array([[3.0, 4], [0, 2], [1, 0]]), ALPHA)
    assert found.ids.tolist() == [5, 7]
    np.testing.assert_allclose(found.vectors, [[0, 1], [0.905075, 0.425252]], atol=1e-6)


def test_scores_of_a_candidate():
    found = Fingerprints(jnp.array([5, 7]), jnp.array([[0, 1], [0.905075, 0.425252]]))
    classes = classes_of(found, near=7, lam=0.5, size=100)
    states = jnp.array([[1.0, 1], [0, -1], [2, 0]])
    scores = token_scores(states, jnp.array([7, 5, 99]), classes)
    np.testing.assert_allclose(scores, [0.940683, -1, 0.452538], atol=1e-6)
    np.testing.assert_allclose(sample_scores(scores, REAL), 0.535878, atol=1e-6)


def test_a_sample_agrees_with_its_own_fingerprints():
    rng = np.random.default_rng(0)
    ids, states = np.arange(6), rng.normal(size=(6, 8))
    found = fingerprints(ids, states, rng.uniform(0.1, 1, 6))
    scores = token_scores(jnp.array(states), jnp.array(ids), classes_of(found, 0, 0.5, 6))
    np.testing.assert_allclose(scores, 1.0, atol=1e-6)
    np.testing.assert_allclose(sample_scores(scores, jnp.ones(6, bool)), 1.0, atol=1e-6)


def test_lengths_of_states_and_the_scale_of_saliency_do_not_matter():
    rng = np.random.default_rng(0)
    ids, states = np.array([3, 1, 3, 1, 2]), rng.normal(size=(5, 8))
    alpha, scale = rng.uniform(0.1, 1, 5), rng.uniform(0.01, 100, (5, 1))
    plain = fingerprints(ids, states, alpha)
    np.testing.assert_allclose(fingerprints(ids, scale * states, alpha).vectors, plain.vectors,
                               atol=1e-6)  # fmt: skip
    louder = np.where(ids == 3, 7.0, 1.0) * alpha
    np.testing.assert_allclose(fingerprints(ids, states, louder).vectors, plain.vectors, atol=1e-6)
    classes = classes_of(plain, 1, 0.5, 4)
    one = token_scores(jnp.array(states), jnp.array(ids), classes)
    np.testing.assert_allclose(
        token_scores(jnp.array(scale * states), jnp.array(ids), classes), one, atol=1e-6
    )


def test_uniform_and_one_hot_attention():
    T = 5
    pairs = visible_pairs(jnp.ones(T, bool))
    uniform = jnp.tril(jnp.ones((T, T))) / jnp.arange(1, T + 1)[:, None]
    np.testing.assert_allclose(row_saliency(uniform, pairs), 0.0, atol=1e-6)
    received = np.array([np.mean([1 / (i + 1) for i in range(j, T)]) for j in range(T)])
    expected = received / received.max()
    np.testing.assert_allclose(
        column_saliency(uniform, pairs, jnp.ones(T, bool)), expected, atol=1e-6
    )
    np.testing.assert_allclose(row_saliency(jnp.eye(T), pairs), [0, 1, 1, 1, 1], atol=1e-6)


def test_ids_whose_directions_cancel_or_have_no_saliency_have_no_fingerprint():
    states = np.array([[1.0, 0], [-2, 0], [0, 3], [0, 0], [1, 1]])
    found = fingerprints(np.array([1, 1, 2, 3, 4]), states, np.array([0.5, 0.5, 0.0, 1.0, 0.1]))
    assert found.ids.tolist() == [4]


def test_an_id_without_a_fingerprint_borrows_that_of_the_nearest_embedding(monkeypatch):
    monkeypatch.setattr(module, "_EMBEDDINGS", 4)  # several blocks, the last of them filled up
    module._nearest.clear_cache()
    embedding = np.random.default_rng(0).normal(size=(11, 6))
    found = Fingerprints(jnp.array([2, 5, 9]), jnp.eye(3, 6))
    classes = token_classes(found, jnp.array(embedding), lam=0.25)
    unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    np.testing.assert_array_equal(classes.place, (unit @ unit[[2, 5, 9]].T).argmax(1))
    np.testing.assert_array_equal(classes.place[jnp.array([2, 5, 9])], [0, 1, 2])
    np.testing.assert_array_equal(
        classes.factor, [1.0 if i in (2, 5, 9) else 0.25 for i in range(11)]
    )
    module._nearest.clear_cache()


def test_no_token_in_scope_is_minus_infinity():
    scores = jnp.array([[0.5, 0.25], [0.5, 0.25]])
    scope = jnp.array([[False, False], [True, False]])
    np.testing.assert_array_equal(sample_scores(scores, scope), [-jnp.inf, 0.5])
    np.testing.assert_allclose(sample_scores(scores, scope | True, 1.0), 0.375)
    np.testing.assert_allclose(sample_scores(scores, scope | True, 0.0), 0.5)


@pytest.mark.parametrize("which", ["response", "prompt", "all"])
def test_the_scope_never_holds_the_first_token(store, which):
    rows = rows_of(store([([7, 8, 9, 7], 2), ([7, 8], 0)]), [0, 1], 6)
    expected = {
        "response": [[0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0]],
        "prompt": [[0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
        "all": [[0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0]],
    }[which]
    np.testing.assert_array_equal(rows.scope(which), np.array(expected, bool))
    without = np.array(expected, bool) & (rows.tokens != 7)
    np.testing.assert_array_equal(rows.scope(which, [7]), without)


def test_the_end_token_that_a_store_appends_is_left_out_where_states_are_compared(store):
    memory = store([([7, 8, 9, 2], 2), ([7, 8, 9], 1), ([7, 8, 9, 9, 2], 2)])
    memory.manifest = {"tokenizer": {"after": [2]}}
    rows = rows_of(memory, [0, 1, 2], 4)
    assert rows.ended.tolist() == [True, False, False]  # the last is cut before its end
    found = rows.scope("response", end=False)
    np.testing.assert_array_equal(found.sum(1), [1, 2, 2])
    np.testing.assert_array_equal(rows.scope("response").sum(1), [2, 2, 2])
    assert not found[0, 3]


def by_hand(lm, pool, target, selector):
    """Scores with loops in NumPy, an example at a time and without filling."""
    layers = selector.layers or max(1, lm.model.config.n_layers // 2)
    ids, states, alphas = [], [], []

    def forward(store, i):
        tokens = store.tokens(i)
        _, x, probs = lm.forward(tokens)
        return tokens, x, probs, (store.weights(i) != 0) & (np.arange(len(tokens)) > 0)

    for i in range(target.num_examples):
        tokens, x, probs, scope = forward(target, i)
        if not scope.any():
            continue
        attention = probs[-layers:].mean((0, 1))
        T = len(tokens)
        entropy = np.array([-(p[p > 0] * np.log(p[p > 0])).sum() for p in attention])
        q = np.array([0.0] + [1 - entropy[t] / np.log(t + 1) for t in range(1, T)])
        k = np.array([attention[j:, j].mean() for j in range(T)])
        k = k / k[scope].max()
        alpha = selector.row_weight * q + (1 - selector.row_weight) * k
        ids += tokens[scope].tolist()
        states += list(x[scope])
        alphas += (alpha[scope] if selector.saliency == "attention" else np.ones(T)[scope]).tolist()
    prints = {}
    for t in set(ids):
        total = sum(
            a * s / np.linalg.norm(s) for i, s, a in zip(ids, states, alphas, strict=True) if i == t
        )
        prints[t] = total / np.linalg.norm(total)
    table = np.asarray(lm.params["embedding"], np.float64)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    scores = []
    for i in range(pool.num_examples):
        tokens, x, _, scope = forward(pool, i)
        own = []
        for t, s in zip(tokens[scope], x[scope], strict=True):
            near = t if t in prints else max(prints, key=lambda c, t=t: table[t] @ table[c])
            factor = 1.0 if t in prints else selector.lam
            own.append(factor * float(s @ prints[near]) / np.linalg.norm(s))
        mixed = selector.mean_weight * np.mean(own) + (1 - selector.mean_weight) * max(own) if own \
            else -np.inf  # fmt: skip
        scores.append(mixed)
    return np.array(scores)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers": 2, "lam": 0.9, "row_weight": 0.2, "mean_weight": 0.7},
        {"saliency": "uniform"},
    ],
    ids=["default", "all options", "uniform"],
)
def test_scores_of_a_store_are_those_of_loops_whatever_the_batches(lm, pool, target, options):
    selector = Trim(**options)
    expected = by_hand(lm, pool, target, selector)
    for batch_tokens in (4096, 1):
        found = score(
            selector, lm.model, lm.params, pool, target, batch_tokens=batch_tokens, channels=True
        )
        np.testing.assert_allclose(found.scores, expected, atol=2e-5)
        assert expected[-1] == found.scores[-1] == -np.inf
    tokens = found.channels["trim"][0]
    scope = np.arange(len(tokens)) >= pool.examples[0][1]
    assert len(tokens) == pool.lengths[0] and not tokens[~scope].any()
    np.testing.assert_allclose(
        found.scores[0],
        selector.mean_weight * tokens[scope].mean()
        + (1 - selector.mean_weight) * tokens[scope].max(),
        atol=1e-6,
    )


def test_only_the_indices_asked_for_are_scored_and_get_the_same_scores(lm, pool, target):
    whole = score(Trim(), lm.model, lm.params, pool, target, batch_tokens=256)
    some = score(Trim(), lm.model, lm.params, pool, target, batch_tokens=256, indices=[5, 2, 11])
    assert np.flatnonzero(~np.isnan(some.scores)).tolist() == [2, 5, 11]
    np.testing.assert_array_equal(some.scores[[2, 5, 11]], whole.scores[[2, 5, 11]])


def test_long_examples_are_cut_and_a_response_that_is_cut_away_does_not_count(lm, store, target):
    long = [1, *range(3, 60)]
    cut = score(Trim(), lm.model, lm.params, store([(long, 2), (long, 30)]), target, max_tokens=20)
    short = score(Trim(), lm.model, lm.params, store([(long[:20], 2)]), target)
    np.testing.assert_allclose(cut.scores[0], short.scores[0], atol=1e-6)
    assert cut.scores[1] == -np.inf


def test_other_values_of_swept_options_compile_nothing_new(lm, pool, target):
    score(Trim(lam=0.5), lm.model, lm.params, pool, target)
    before = module._scored._cache_size()
    score(Trim(lam=0.4, mean_weight=0.1), lm.model, lm.params, pool, target)
    assert module._scored._cache_size() == before


def test_what_cannot_be_scored_is_an_error(lm, pool, target, store):
    for options, message in (
        ({"lam": 0.0}, "lam=0.0 must lie in"),
        ({"lam": 1.5}, "lam=1.5"),
        ({"layers": 0}, "layers=0"),
        ({"mean_weight": 1.1}, "mean_weight=1.1"),
        ({"row_weight": -0.1}, "row_weight=-0.1"),
    ):
        with pytest.raises(ConfigError, match=message):
            Trim(**options)
    with pytest.raises(ConfigError, match="layers=3, but the model has 2"):
        score(Trim(layers=3), lm.model, lm.params, pool, target)
    with pytest.raises(ConfigError, match="compares with a target"):
        score(Trim(), lm.model, lm.params, pool)
    with pytest.raises(DataError, match="the pool has no examples"):
        score(Trim(), lm.model, lm.params, store([]), target)
    with pytest.raises(DataError, match="the target has no examples"):
        score(Trim(), lm.model, lm.params, pool, store([]))
    with pytest.raises(DataError, match="no token of the target counts"):
        score(Trim(), lm.model, lm.params, pool, store([([1, 2, 3], 3)]))


def test_fingerprints_do_not_depend_on_the_filling(lm, target, store):
    alone = Trim().fingerprints(lm.model, lm.params, Target(target, batch_tokens=1))
    long = store([*target.examples, ([1, *range(3, 60)], 58)])  # a longer row with no response
    beside = Trim().fingerprints(lm.model, lm.params, Target(long, batch_tokens=4096))
    np.testing.assert_array_equal(alone.ids, beside.ids)
    np.testing.assert_allclose(alone.vectors, beside.vectors, atol=1e-6)
    assert jax.numpy.isfinite(beside.vectors).all()
