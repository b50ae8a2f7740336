"""Collapse of last states, paths through attention, Jacobians."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.analysis.over_squashing import (
    all_equal,
    attend,
    attention_of,
    collapse_curve,
    ends,
    first_differs,
    jacobian_norms,
    jacobian_profile,
    last_repeated,
    last_states,
    ones_then,
    path_bound,
    path_counts,
    path_sums,
    rounded,
    separated,
    variant,
    with_separators,
)
from tokjax.analysis.over_squashing import collapse as collapses
from tokjax.errors import ConfigError, DataError
from tokjax.models import ModelConfig, Transformer

MODEL = Transformer(ModelConfig(vocab_size=16, d_model=32, n_layers=2, n_heads=2, max_positions=64))
WITHOUT = Transformer(dataclasses.replace(MODEL.config, positions="none"))


@jax.jit
def states_of(params, tokens):
    return MODEL.backbone(params, MODEL.embed(params, tokens)).x


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 16, (2, 12)).astype(np.int32)


def mean_of(sequences):
    """What uniform attention over ids as values gives, as float64."""
    return np.array([[np.mean(sequence)] for sequence in sequences])


@pytest.mark.parametrize(("n", "expected"), [(10, 0.181818), (100, 0.019802), (1000, 0.001998)])
def test_uniform_attention_over_n_and_one_more_differs_by_two_of_n_plus_one(n, expected):
    rows = np.array([[1 / n] * n + [0.0], [1 / (n + 1)] * (n + 1)])
    curve = collapse_curve(lambda _: rows, all_equal(1), [n])
    assert curve.distances[0] == pytest.approx(expected, abs=1e-6)
    assert curve.distances[0] == pytest.approx(2 / (n + 1))


def test_means_of_ones_and_a_zero_have_the_distances_of_the_theorem():
    ns = [10, 100, 1000]
    twice = collapse_curve(mean_of, ones_then(1, 0, "last"), ns)
    np.testing.assert_allclose(twice.distances, [0.081818, 0.009802, 0.000998], atol=1e-6)
    more = collapse_curve(mean_of, ones_then(1, 0), ns)
    np.testing.assert_allclose(more.distances, [1 / (n * (n + 1)) for n in ns], rtol=1e-9)
    assert twice.slope() == pytest.approx(-1, abs=0.05)
    assert more.slope() == pytest.approx(-2, abs=0.05)


@pytest.mark.parametrize(("more", "first", "last"), [("last", 341, 1022), ("one", 19, 511)])
def test_rounded_means_become_equal_where_bfloat16_says(more, first, last):
    in_bf16 = lambda sequences: rounded(mean_of(sequences), "bfloat16")  # noqa: E731
    curve = collapse_curve(in_bf16, ones_then(1, 0, more), range(2, 1300))
    assert curve.first_equal == first
    assert curve.last_unequal == last
    in_float32 = lambda sequences: rounded(mean_of(sequences), "float32")  # noqa: E731
    wide = collapse_curve(in_float32, ones_then(1, 0, more), range(2, 1300, 7))
    assert wide.first_equal is None


def test_path_counts_are_binomial_numbers():
    assert path_counts(5, 2) == [5, 4, 3, 2, 1]
    assert path_counts(5, 3) == [15, 10, 6, 3, 1]
    assert path_counts(9, 6) == [math.comb(9 - i + 5, 5) for i in range(1, 10)]
    assert path_counts(200, 40)[0] == math.comb(199 + 39, 39)  # beyond 64 bits


def test_a_window_cuts_paths():
    assert path_counts(5, 1, window=2) == [0, 0, 0, 1, 1]
    assert path_counts(5, 2, window=2) == [0, 0, 1, 2, 1]
    assert path_counts(5, 3, window=5) == path_counts(5, 3)


def uniform(n):
    return np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (1, [0.25] * 4),
        (2, [0.520833, 0.270833, 0.145833, 0.0625]),
        (5, [0.917619, 0.071988, 0.009416, 0.000977]),
        (50, [1, 0, 0, 0]),
    ],
)
def test_attention_alone_comes_to_depend_on_the_first_token(layers, expected):
    found = path_sums(jnp.asarray([uniform(4)] * layers), residual=0.0)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_residual_additions_keep_the_last_token():
    found = path_sums(jnp.asarray([uniform(6)] * 3))
    np.testing.assert_allclose(found, [2.349, 1.441, 1.070, 0.851, 0.700, 1.588], atol=6e-4)


def test_beta_weighs_attention_beside_the_residual_stream():
    found = path_sums(jnp.asarray([uniform(3)]), beta=2.0)
    np.testing.assert_allclose(found, [1 / 6, 1 / 6, 1 / 6 + 1], atol=1e-6)


def random_attention(layers, n):
    scores = np.random.default_rng(1).normal(size=(layers, n, n))
    weights = np.exp(np.where(np.tril(np.ones((n, n))) > 0, scores, -np.inf))
    return weights / weights.sum(-1, keepdims=True)


def test_jacobians_of_a_linear_model_are_the_path_sums():
    attention = jnp.asarray(random_attention(3, 6), jnp.float32)
    x = jax.random.normal(jax.random.key(0), (2, 6, 4))

    def last(x):
        for layer in attention:
            x = x + jnp.einsum("ts,bsd->btd", layer, x)
        return x[:, -1]

    found = jacobian_norms(last, x, probes=None)
    # The Jacobian is the entry times the identity of 4 dimensions, whose norm is 2.
    np.testing.assert_allclose(found, 2 * np.tile(path_sums(attention), (2, 1)), rtol=1e-5)
    # The order of the layers matters: the first layer's matrix stands rightmost.
    assert not np.allclose(path_sums(attention), path_sums(attention[::-1]), rtol=1e-3)


def test_random_probes_come_close_to_the_exact_norm():
    a = jax.random.normal(jax.random.key(1), (5, 8, 8))
    function = lambda x: jnp.einsum("btd,tde->be", x, a)  # noqa: E731
    x = jnp.zeros((1, 5, 8))
    exact = jacobian_norms(function, x, probes=None)
    np.testing.assert_allclose(exact[0], jnp.sqrt(jnp.square(a).sum((1, 2))), rtol=1e-5)
    drawn = jacobian_norms(function, x, key=jax.random.key(0), probes=400)
    np.testing.assert_allclose(drawn, exact, rtol=0.1)


def test_without_positions_equal_tokens_cannot_be_counted(params):
    sequences = [[5] * n for n in (1, 2, 7)]
    states = last_states(WITHOUT, params, sequences)
    np.testing.assert_allclose(states, np.tile(states[:1], (3, 1)), atol=1e-6)
    turned = last_states(MODEL, params, [[5, 3], [5, 5, 3]])
    assert np.abs(turned[0] - turned[1]).max() > 1e-3


def test_last_states_are_those_of_each_sequence_alone(params, tokens):
    rows = [tokens[0].tolist(), tokens[1, :5].tolist(), tokens[1].tolist()]
    found = last_states(MODEL, params, rows, batch_size=2)
    for row, state in zip(rows, found, strict=True):
        alone = states_of(params, jnp.array([row]))[0, -1]
        np.testing.assert_allclose(state, alone, atol=2e-6)


def test_lengths_share_one_program(params):
    last_states(MODEL, params, [[1] * 9, [2] * 3])
    before = collapses._last._cache_size()
    last_states(MODEL, params, [[1] * 9, [2] * 8])
    assert collapses._last._cache_size() == before


def test_equal_tokens_fade_with_their_number_and_dtypes_are_of_the_pass(params):
    pairs, ns = all_equal(5), (4, 16, 56)
    after_one = lambda n: tuple([1, *each] for each in pairs(n))  # noqa: E731
    wide = collapse_curve(WITHOUT, after_one, ns, params=params, dtype="float32")
    assert not wide.equal.any()
    assert wide.distances[0] > wide.distances[1] > wide.distances[2]
    assert wide.first_below(wide.distances[0]) == 16
    assert len(wide.table.splitlines()) == len(ns) + 1
    rows = [after_one(4)[0]]
    low, high = (last_states(WITHOUT, params, rows, dtype=d) for d in ("bfloat16", "float32"))
    assert (low.dtype, high.dtype) == (jnp.bfloat16, jnp.float32)
    assert 0 < np.abs(low.astype(np.float32) - high).max() < 0.2


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_norms_are_ordered_and_equal_pairs_are_at_distance_0(params, norm):
    curve = collapse_curve(MODEL, lambda n: ([1] * n, [1] * n), [2, 3], params=params, norm=norm)
    assert curve.equal.all()
    assert not curve.distances.any()
    with pytest.raises(DataError, match="slope"):
        curve.slope()


def test_attention_rows_are_probabilities_and_the_bound_is_their_path_sum(params, tokens):
    attention = attention_of(MODEL, params, tokens)
    assert attention.shape == (2, 2, 12, 12)
    np.testing.assert_allclose(attention.sum(-1), 1.0, atol=1e-5)
    assert not np.triu(np.asarray(attention), 1).any()
    most = attention_of(MODEL, params, tokens, heads="max")
    assert (np.asarray(most) >= np.asarray(attention) - 1e-6).all()
    bound = path_bound(MODEL, params, tokens, beta=2.0)
    np.testing.assert_allclose(bound, path_sums(attention, beta=2.0), rtol=1e-5)
    # Rows of (A / 2 + I) add up to 1.5 in every layer.
    np.testing.assert_allclose(bound.sum(-1), 1.5**2, rtol=1e-5)


def test_a_profile_is_the_jacobian_of_the_model(params, tokens):
    found = jacobian_profile(MODEL, params, tokens[:1], probes=None)
    x = MODEL.embed(params, tokens[:1])
    jacobian = jax.jit(jax.jacrev(lambda x: MODEL.backbone(params, x).x[0, -1]))(x)[:, 0]
    expected = jnp.sqrt(jnp.square(jacobian).sum((0, 2)))
    np.testing.assert_allclose(found[0], expected, rtol=1e-4)
    again = jacobian_profile(MODEL, params, tokens[:1], probes=4)
    np.testing.assert_array_equal(again, jacobian_profile(MODEL, params, tokens[:1], probes=4))


def test_a_window_hides_tokens_from_the_profile(params, tokens):
    narrow = variant(MODEL, window=3)  # two layers reach four tokens back
    profile = np.asarray(jacobian_profile(narrow, params, tokens, probes=2))
    assert not profile[:, :7].any()
    assert profile[:, 7:].all()


def test_the_gradient_of_a_logit_has_the_likeliest_as_default(params, tokens):
    likeliest = np.asarray(MODEL.unembed(params, states_of(params, tokens))[:, -1].argmax(-1))
    found = jacobian_profile(MODEL, params, tokens, of="logit")
    given = jacobian_profile(MODEL, params, tokens, of="logit", targets=likeliest)
    np.testing.assert_allclose(found, given, rtol=1e-5)
    other = jacobian_profile(MODEL, params, tokens, of="logit", targets=(likeliest + 1) % 16)
    assert not np.allclose(found, other, rtol=1e-2)


def test_ends_are_relative_to_the_middle():
    found = ends(np.array([[4.0, 1.0, 2.0, 3.0, 1.0]]))
    assert found.first.tolist() == [2.0]
    assert found.last.tolist() == [0.5]


def rate(ns, positions, attention="softmax", pair="last", seeds=20):
    """The slope of the mean distance by n of one layer, at random tokens."""
    distances = []
    for n in ns:
        total = 0.0
        for seed in range(seeds):
            rng = np.random.default_rng([seed, n if pair == "last" else 0])
            q, k, v = rng.normal(size=(3, n, 64))
            if pair == "last":
                at = [*range(n), n - 1]
            else:
                at, (q, k, v) = [0] * n + [1], (a[[0] * (n - 1) + [1]] for a in (q, k, v))
                at = [*range(n - 1), 0, n - 1]
            options = {"positions": positions, "attention": attention}
            first = attend(q, k, v, **options)
            total += np.abs(first - attend(q[at], k[at], v[at], **options)).sum()
        distances.append(total / seeds)
    return np.polyfit(np.log(ns), np.log(distances), 1)[0]


@pytest.mark.parametrize(
    ("positions", "attention", "slope"),
    [
        ("none", "softmax", -1.0),
        ("rotary", "softmax", -0.5),
        ("sinusoids", "softmax", -0.5),
        ("alibi", "softmax", 0.0),
        ("none", "sum", 0.0),
    ],
)
def test_positions_decide_the_rate_of_the_collapse(positions, attention, slope):
    assert rate((128, 512, 2048), positions, attention) == pytest.approx(slope, abs=0.2)


def test_one_more_one_before_a_zero_fades_quadratically():
    assert rate((128, 512, 2048), "none", pair="one") == pytest.approx(-2.0, abs=0.2)


@pytest.mark.parametrize("positions", ["none", "rotary", "sinusoids", "alibi"])
def test_a_lone_token_gets_its_own_value_and_positions_change_longer_ones(positions):
    q, k, v = np.random.default_rng(0).normal(size=(3, 5, 8))
    np.testing.assert_allclose(attend(q[:1], k[:1], v[:1], positions=positions), v[0])
    same = np.allclose(attend(q, k, v, positions=positions), attend(q, k, v))
    assert same == (positions == "none")


def test_pairs_are_what_they_say():
    first, second = last_repeated(range(10), seed=3)(6)
    assert second == [*first, first[-1]]
    assert last_repeated(range(10), seed=3)(6) == (first, second)
    a, b = first_differs(range(10))(6)
    assert a[0] != b[0]
    assert a[1:] == b[1:]
    short, long = with_separators(all_equal(1), 0, 3)(6)
    assert short == [1, 1, 1, 0, 1, 1, 1]
    assert long == [*short, 0, 1]
    assert separated([], 0) == []


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: collapse_curve(MODEL, all_equal(1), [2]), "params="),
        (lambda p: collapse_curve(mean_of, all_equal(1), [2], dtype="float32"), "function"),
        (lambda p: collapse_curve(MODEL, all_equal(1), [3, 2], params=p), "rising"),
        (lambda p: collapse_curve(MODEL, all_equal(1), [], params=p), "rising"),
        (lambda p: collapse_curve(MODEL, all_equal(1), [2], params=p, norm="l3"), "l1"),
        (lambda p: collapse_curve(MODEL, all_equal(1), [64], params=p), "max_positions=64"),
        (lambda p: variant(MODEL, dtype="float64"), "float32"),
        (lambda p: last_states(MODEL, p, [[1]], batch_size=0), "batch_size=0"),
        (lambda p: ones_then(1, 0, "two"), "last"),
        (lambda p: first_differs([1, 1]), "two different"),
        (lambda p: separated([1], 0, 0), "every=0"),
        (lambda p: path_counts(0, 1), "n=0"),
        (lambda p: path_sums(jnp.zeros((1, 2, 2)), beta=0.0), "beta=0"),
        (lambda p: attention_of(MODEL, p, [[1]], heads="sum"), "mean"),
        (lambda p: jacobian_profile(MODEL, p, [[1]], of="loss"), "state"),
        (lambda p: jacobian_profile(MODEL, p, [[1]], targets=[1]), "logit"),
        (lambda p: jacobian_profile(MODEL, p, [[1]], of="logit", targets=[1, 2]), "2 targets"),
        (lambda p: jacobian_profile(MODEL, p, [[1]], probes=0), "probes=0"),
        (lambda p: ends(np.ones(2)), "middle"),
        (lambda p: attend(*np.ones((3, 2, 4)), positions="rope"), "rotary"),
        (lambda p: attend(*np.ones((3, 2, 3)), positions="rotary"), "even"),
        (lambda p: rounded(1.0, "bf16"), "bfloat16"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(params, make, said):
    with pytest.raises(ConfigError, match=said):
        make(params)


def test_encoders_and_unknown_ids_are_refused(params):
    encoder = Transformer(dataclasses.replace(MODEL.config, causal=False))
    with pytest.raises(ConfigError, match="causal=False"):
        last_states(encoder, params, [[1]])
    with pytest.raises(DataError, match="sequence 1"):
        last_states(MODEL, params, [[1], [16]])
    with pytest.raises(DataError, match="empty"):
        last_states(MODEL, params, [[]])
