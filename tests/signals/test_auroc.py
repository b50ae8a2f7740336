import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from tokjax.signals import auroc, average_precision, fpr_at_tpr, roc_curve, tpr_at_fpr

PAIRS = st.lists(st.tuples(st.integers(-4, 4), st.booleans(), st.integers(0, 3)), min_size=2)


def of(positives, negatives):
    return auroc([*positives, *negatives], [1] * len(positives) + [0] * len(negatives))


def drawn(pairs):
    scores, labels, weights = map(np.array, zip(*pairs, strict=True))
    assume(weights[labels].sum() and weights[~labels].sum())
    return scores, labels, weights


def test_first_token_of_a_span_against_the_rest():
    others = [0.2, 0.1, 0.6, 0.3]
    assert [of(h, others) for h in ([1.5, 2.0], [0.4, 0.5], [0.15])] == [1.0, 0.75, 0.25]
    assert of([1.5, 2.0, 0.4, 0.5, 0.15], others) == 0.75
    assert of([0.9, 0.4], [0.1, 0.4, 0.6]) == 0.75  # 3 + 1 wins and a tie of 6


def test_equal_scores_and_perfect_separation():
    assert of([1, 1], [1, 1, 1]) == 0.5
    assert of([0.3, 0.7], [0.3, 0.7]) == 0.5
    assert of([2, 3], [0, 1]) == 1
    assert of([0, 1], [2, 3]) == 0
    assert of([np.inf], [1, -np.inf]) == 1


@given(PAIRS)
def test_equals_counting_pairs(pairs):
    scores, labels, weights = drawn(pairs)
    wins = np.sign(scores[labels][:, None] - scores[~labels]) / 2 + 0.5
    both = weights[labels][:, None] * weights[~labels]
    np.testing.assert_allclose(auroc(scores, labels, weights), (wins * both).sum() / both.sum())
    # A weight is that many copies of the entry.
    copies = auroc(np.repeat(scores, weights), np.repeat(labels, weights))
    np.testing.assert_allclose(auroc(scores, labels, weights), copies)
    u = mannwhitneyu(scores[labels], scores[~labels]).statistic
    np.testing.assert_allclose(auroc(scores, labels), u / (labels.sum() * (~labels).sum()))


@given(PAIRS, st.randoms(use_true_random=False))
def test_depends_on_the_order_of_scores_only(pairs, random):
    scores, labels, weights = drawn(pairs)
    expected = auroc(scores, labels, weights)
    assert auroc(np.exp(scores), labels, weights) == expected
    assert auroc(3.0 * scores - 7, labels, weights) == expected
    order = random.sample(range(len(scores)), len(scores))
    assert auroc(scores[order], labels[order], weights[order]) == expected
    np.testing.assert_allclose(auroc(-scores, labels, weights), 1 - expected, atol=1e-12)
    ap = average_precision(scores, labels, weights)
    assert average_precision(np.exp(scores), labels, weights) == ap
    np.testing.assert_allclose(
        average_precision(scores[order], labels[order], weights[order]), ap, rtol=1e-12
    )


def test_a_mask_equals_leaving_entries_out():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 9, (4, 25)), rng.random((4, 25)) < 0.4
    mask = rng.random((4, 25)) < 0.5
    for measure in (auroc, average_precision):
        assert measure(scores, labels, mask=mask) == measure(scores[mask], labels[mask])
        assert measure(scores, labels, weights=mask * 2.5) == pytest.approx(
            measure(scores[mask], labels[mask]), rel=1e-12
        )


def test_average_precision_sums_precision_over_gains_in_recall():
    # Ranked + - + -: precision 1 at recall 1/2, 2/3 at recall 1.
    assert average_precision([4, 3, 2, 1], [1, 0, 1, 0]) == pytest.approx((1 + 2 / 3) / 2)
    # A tie is one threshold: recall goes from 0 to 1 at precision 2/4.
    assert average_precision([1, 1, 1, 1], [1, 0, 1, 0]) == 0.5
    assert average_precision([2, 1, 0], [1, 1, 0]) == 1


@given(PAIRS)
def test_average_precision_equals_its_definition(pairs):
    scores, labels, weights = drawn(pairs)
    value, recall = 0.0, 0.0
    for threshold in sorted(set(scores[weights > 0]), reverse=True):
        called = weights * (scores >= threshold)
        gained = (called * labels).sum() / weights[labels].sum()
        value += (gained - recall) * (called * labels).sum() / called.sum()
        recall = gained
    np.testing.assert_allclose(average_precision(scores, labels, weights), value)


def test_operating_points():
    curve = roc_curve([5, 4, 4, 3, 2, 1], [1, 1, 0, 0, 1, 0])
    np.testing.assert_allclose(curve.fpr, [0, 0, 1 / 3, 2 / 3, 2 / 3, 1])
    np.testing.assert_allclose(curve.tpr, [0, 1 / 3, 2 / 3, 2 / 3, 1, 1])
    np.testing.assert_array_equal(curve.thresholds, [np.inf, 5, 4, 3, 2, 1])
    assert tpr_at_fpr(curve, 0.05) == pytest.approx(1 / 3)
    assert tpr_at_fpr(curve, 1) == 1
    assert fpr_at_tpr(curve, 0.9) == pytest.approx(2 / 3)
    assert fpr_at_tpr(curve, 0) == 0


@given(PAIRS)
def test_the_area_under_the_curve_is_auroc(pairs):
    scores, labels, weights = drawn(pairs)
    curve = roc_curve(scores, labels, weights)
    np.testing.assert_allclose(np.trapezoid(curve.tpr, curve.fpr), auroc(scores, labels, weights))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0], [1, 1]), "no negative"),
        (([1.0, 2.0], [0, 0]), "no positive"),
        (([1.0, 2.0], [0, 1], [1, 0]), "no positive"),
        (([1.0, 2.0], [0, 1], None, [False, False]), "no positive entry among 0"),
        (([], []), "no positive"),
        (([1.0, np.nan], [0, 1]), "1 of 2 scores are NaN"),
        (([1.0, 2.0], [0, 1], [1, -1]), "not negative"),
        (([1.0, 2.0], [0, 1, 1]), r"labels \(3,\)"),
    ],
)
def test_what_cannot_be_ranked_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        auroc(*arguments)


def test_a_million_tokens_lose_nothing():
    # Sums of ranks pass 2^24 and 2^31 here; half of the negatives tie with the positives.
    n = 400_000
    scores = np.concatenate([np.ones(n), np.arange(n) % 2])
    assert auroc(scores, np.arange(2 * n) < n) == 0.75
