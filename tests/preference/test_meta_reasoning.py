import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.errors import ConfigError, DataError
from tokjax.preference.kto import KTO
from tokjax.preference.meta_reasoning import (
    STATES,
    Polarities,
    fit_polarities,
    fit_transitions,
    merged_labels,
    meta_reasoning_weights,
    segment_weights,
    state_numbers,
    thinking_segments,
    transition_likelihood,
)
from tokjax.training.reference import log_ratios, sample_sums

TRACE = [[{1}, {1, 2}]]
label_sets = st.sets(st.integers(1, 3), min_size=0, max_size=2)
traces = st.lists(st.lists(label_sets, max_size=4), max_size=5)

RATED = [
    {"prompt": "q", "response": "<think>ab\n\ncd\n\nef</think>yes", "label": True},
    {"prompt": "q", "response": "<think>gh\n\nij</think>no", "label": False},
]
LABELS = [[{1}, {2}, {1, 3}], [{1}, {3}]]


# ---- transitions


def test_numbers_of_the_fit():
    found = fit_transitions(TRACE, 2).matrix
    expected = [
        [0, 0.571429, 0.214286, 0.214286],
        [0, 0.345941, 0.345941, 0.308117],
        [0, 0.247906, 0.247906, 0.504188],
        [0, 0, 0, 1],
    ]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert transition_likelihood(found, {0}, {1}) == pytest.approx(0.571429, abs=1e-6)
    assert transition_likelihood(found, {1}, {1, 2}) == pytest.approx(0.345941, abs=1e-6)


def test_two_labels_average_entries():
    matrix = np.arange(16.0).reshape(4, 4)
    assert transition_likelihood(matrix, {1, 2}, {2, 3}) == (6 + 7 + 10 + 11) / 4


def test_singletons_are_counted_in_one_step():
    found = fit_transitions([[{1}, {2}, {1}], [{2}]], 3, smoothing=0, iterations=1).matrix
    half, quarter = 1 / 2, 1 / 4
    expected = [
        [0, half, half, 0, 0],
        [0, 0, half, 0, half],
        [0, half, 0, 0, half],
        [0, quarter, quarter, quarter, quarter],  # never visited
        [0, 0, 0, 0, 1],
    ]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    again = fit_transitions([[{1}, {2}, {1}], [{2}]], 3, smoothing=0)
    np.testing.assert_array_equal(again.matrix, found)
    assert len(again.log_likelihood) == 3  # nothing changes in the second iteration


@settings(max_examples=60, deadline=None)
@given(traces, st.sampled_from([0.0, 0.6, 3.0]))
def test_rows_are_distributions_and_the_likelihood_does_not_fall(data, smoothing):
    fit = fit_transitions(data, 3, smoothing=smoothing, iterations=8, tol=0)
    np.testing.assert_allclose(fit.matrix.sum(1), 1, atol=1e-12)
    assert (fit.matrix >= 0).all() and not fit.matrix[:, 0].any()
    np.testing.assert_array_equal(fit.matrix[-1], [0, 0, 0, 0, 1])
    if smoothing == 0:
        assert (np.diff(fit.log_likelihood) >= -1e-9).all()


def test_without_traces_every_allowed_edge_is_equally_likely():
    found = fit_transitions([], 2).matrix
    np.testing.assert_allclose(found[:3], [[0, 1 / 3, 1 / 3, 1 / 3]] * 3)


def test_a_segment_without_labels_is_passed_over():
    with_gap = fit_transitions([[set(), {1}, set(), {2}]], 2).matrix
    np.testing.assert_array_equal(with_gap, fit_transitions([[{1}, {2}]], 2).matrix)


def test_polarities_are_fitted_apart_and_together():
    data = [[{1}], [{2}], [{1}, {2}]]
    fit = fit_polarities(data, [True, False, True], 2)
    np.testing.assert_array_equal(fit.good, fit_transitions([data[0], data[2]], 2).matrix)
    np.testing.assert_array_equal(fit.bad, fit_transitions(data[1:2], 2).matrix)
    np.testing.assert_array_equal(fit.every, fit_transitions(data, 2).matrix)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: fit_transitions([[{3}]], 2), DataError, r"trace 0, segment 0: states \[3\]"),
        (lambda: fit_transitions([[{1}, {0}]], 2), DataError, "trace 0, segment 1"),
        (lambda: fit_transitions([], 2, smoothing=-1), ConfigError, "smoothing=-1"),
        (lambda: fit_transitions([], 0), ConfigError, "num_states=0"),
        (lambda: fit_polarities([[{1}]], []), DataError, "0 ratings for 1 traces"),
        (lambda: state_numbers(["retreival"]), DataError, "unknown state 'retreival'"),
        (lambda: segment_weights([], np.eye(3), np.eye(3), 0.5), ConfigError, "clip=0.5"),
    ],
)
def test_what_makes_no_sense_is_refused(call, error, said):
    with pytest.raises(error, match=said):
        call()


def test_the_fifteen_states_are_numbered_from_one():
    assert len(STATES) == 15 and state_numbers(STATES) == frozenset(range(1, 16))


# ---- labels of two annotators


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"a": 3, "b": 2}, {"b": 1, "a": 1}, {"a", "b"}),
        ({"a": 9}, {"a": 1}, {"a"}),
        ({"a": 9, "b": 8}, {"a": 5, "c": 9}, {"a", "c"}),
        ({"a": 9, "b": 7}, {"a": 5}, {"a"}),
        ({"a": 10}, {"b": 10}, None),
        ({}, {}, None),
    ],
)
def test_labels_of_two_annotators(first, second, expected):
    assert merged_labels(first, second) == expected


# ---- weights


def test_weights_are_clipped_ratios_along_the_trace():
    own, every = (np.full((5, 5), 0.25) for _ in range(2))
    own[0, 1], own[1, 2], own[2, 3] = 0.5, 0.9, 0.01
    every[1, 2] = 0.1
    found = segment_weights([{1}, {2}, {3}, {3}], own, every)
    np.testing.assert_allclose(found, [2.0, math.e, 1 / math.e, 1.0])
    np.testing.assert_allclose(segment_weights([{1}, {2}], own, every, clip=1.0), [1, 1])


def test_a_segment_without_labels_weighs_one_and_carries_the_state_on():
    own, every = (np.full((4, 4), 0.25) for _ in range(2))
    own[1, 2] = 0.5
    np.testing.assert_allclose(segment_weights([{1}, set(), {2}], own, every), [1, 1, 2])
    assert segment_weights([], own, every).shape == (0,)


def test_excluded_transitions_weigh_one_or_the_most():
    own, every = np.zeros((4, 4)), np.zeros((4, 4))
    own[0, 2] = 0.5
    np.testing.assert_allclose(segment_weights([{1}], own, every), [1.0])
    np.testing.assert_allclose(segment_weights([{2}], own, every), [math.e])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("q<think>ab\n\ncd</think>yes", "-00000000000" + "11" + "-" * 11),
        ("q<think>\n\nab\n \n\ncd\n\n</think>", "-" + "0" * 15 + "1111" + "-" * 8),
        ("q<think>ab", "-" + "0" * 9),
        ("q<think>\n</think>a", "-" * 18),
        ("no thinking", "-" * 11),
        ("<think> old </think> then <think>x</think>", "-" * 26 + "0" * 8 + "-" * 8),
    ],
)
def test_blank_lines_divide_the_thinking(text, expected):
    tokenizer = ByteTokenizer()
    found = thinking_segments(tokenizer, [256, *tokenizer.encode(text), 256])
    # The special token before and after belongs to what is around it.
    shown = "".join("-" if s < 0 else str(s) for s in found[1:-1])
    assert shown == expected


def test_broken_characters_move_no_segment():
    tokenizer = ByteTokenizer()
    whole = tokenizer.encode("<think>é\n\nb</think>c")
    broken = [0xFF, *whole[:-1], 0xC3]
    expected = thinking_segments(tokenizer, whole)
    np.testing.assert_array_equal(thinking_segments(tokenizer, broken)[1:], expected)
    assert set(expected.tolist()) == {-1, 0, 1}


@pytest.fixture(scope="module")
def store(stored):
    return stored(RATED, "rated")


@pytest.fixture(scope="module")
def segments(store):
    return [thinking_segments(ByteTokenizer(), store.tokens(i)) for i in range(2)]


def even():
    matrix = np.full((5, 5), 0.25)
    matrix[:, 0] = 0
    return matrix


def test_tokens_weigh_as_their_segment_in_their_own_polarity(store, segments):
    good, bad = even(), even()
    good[0, 1], good[2, 1], good[2, 3] = 0.5, 0.3, 0.1
    bad[1, 3] = 0.2
    weights = meta_reasoning_weights(store, LABELS, segments, Polarities(good, bad, even()))
    # Prompt and begin 0; "<think>ab\n\n" 2; "cd\n\n" 1; "ef" (.3 + .1) / .5; the answer 1.
    np.testing.assert_allclose(weights[0], [0] * 2 + [2] * 11 + [1] * 4 + [0.8] * 2 + [1] * 12)
    np.testing.assert_allclose(weights[1], [0] * 2 + [1] * 11 + [0.8] * 2 + [1] * 11, rtol=1e-6)


@pytest.fixture(scope="module")
def setting(lm):
    model, params = lm
    return model, jax.tree.map(lambda a: 1.05 * a, params), params


def kto(setting, batch):
    model, params, reference = setting
    aux = {"reference": reference, "kl": np.zeros((), np.float32)}
    objective = KTO(beta=0.05, bad_weight=1.5)
    return jax.jit(lambda b: objective.loss(model, params, aux, b, jax.random.key(0)))(batch)


def test_equal_matrices_give_kto(store, segments, setting, batch_of):
    fit = Polarities(even(), even(), even())
    batch = batch_of(store, meta_reasoning_weights(store, LABELS, segments, fit))
    plain = batch_of(store)
    np.testing.assert_array_equal(batch.weights, plain.weights)
    assert kto(setting, batch).total == kto(setting, plain).total


def test_a_weight_scales_the_log_ratios_of_its_segment_alone(store, segments, setting, batch_of):
    model, params, reference = setting
    good = even()
    good[1, 2] = 0.5  # into the second segment of the first trace: weight 2
    fit = Polarities(good, even(), even())
    batch = batch_of(store, meta_reasoning_weights(store, LABELS, segments, fit))
    plain = batch_of(store)
    ratio = np.array(log_ratios(model, params, reference, plain).ratio)
    scaled = batch.weights != plain.weights
    # Targets stand one place before their tokens.
    assert scaled.sum() == (segments[0] == 1).sum() == 4
    expected = sample_sums(np.where(scaled, 2 * ratio, ratio), plain)
    np.testing.assert_allclose(sample_sums(ratio, batch), expected, rtol=1e-5)
    assert abs(float(kto(setting, batch).total - kto(setting, plain).total)) > 1e-5
    assert kto(setting, batch).aux["kl"] == kto(setting, plain).aux["kl"]


def test_the_answer_is_left_alone_by_any_label(store, segments):
    rng = np.random.default_rng(0)
    for _ in range(5):
        fit = Polarities(*(even() * rng.uniform(0.1, 4, (5, 5)) for _ in range(3)))
        labels = [[set(rng.integers(1, 4, 2).tolist()) for _ in own] for own in LABELS]
        for i, own in enumerate(meta_reasoning_weights(store, labels, segments, fit)):
            assert set(own[(segments[i] < 0) & (store.weights(i) != 0)].tolist()) == {1.0}
            assert own.max() <= np.float32(math.e)


def test_what_does_not_fit_the_store_is_refused(store, stored, segments):
    fit = Polarities(even(), even(), even())
    with pytest.raises(DataError, match="labels of 1"):
        meta_reasoning_weights(store, LABELS[:1], segments, fit)
    with pytest.raises(DataError, match="3 segments and 2 sets"):
        meta_reasoning_weights(store, LABELS[1:] * 2, segments, fit)
    with pytest.raises(DataError, match="not the 3 of segments"):
        meta_reasoning_weights(store, LABELS, [segments[0][:3], segments[1]], fit)
    pairs = stored([{"prompt": "a", "chosen": "b", "rejected": "c"}], "preference")
    with pytest.raises(DataError, match="kind 'rated'"):
        meta_reasoning_weights(pairs, [[]], [np.full(6, -1)], fit)
