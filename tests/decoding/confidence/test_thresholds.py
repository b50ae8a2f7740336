import numpy as np
import pytest
import scipy.special
import scipy.stats

from tokjax.decoding.confidence import (
    bayes,
    calibrate,
    entropy_mean,
    mutual_information,
    overall_mean,
    separation,
)
from tokjax.errors import ConfigError, DataError

RIGHT, WRONG = [0.20, 0.30, 0.25, 0.35], [0.60, 0.50, 0.70, 0.55]
ENTROPIES, CORRECT = np.array(RIGHT + WRONG), np.array([True] * 4 + [False] * 4)
NEVER = -np.inf


def test_thresholds_are_the_papers():
    assert entropy_mean(ENTROPIES, CORRECT) == pytest.approx(0.275)
    assert overall_mean(ENTROPIES, CORRECT) == pytest.approx(0.43125)
    assert bayes(ENTROPIES, CORRECT) == pytest.approx(0.41444, abs=5e-6)
    assert mutual_information(ENTROPIES, CORRECT) == pytest.approx((0.35 + 0.5) / 2)


def test_the_separation_is_the_papers():
    found = separation(ENTROPIES, CORRECT)
    assert (found.n_correct, found.n_wrong) == (4, 4)
    assert found.mean_correct == pytest.approx(0.275)
    assert found.mean_wrong == pytest.approx(0.5875)
    assert found.sd_correct == pytest.approx(0.06455, abs=5e-6)
    assert found.sd_wrong == pytest.approx(0.08539, abs=5e-6)
    assert found.cohens_d == pytest.approx(4.1286, abs=5e-5)
    assert found.auroc == 1.0
    assert found.clear
    welch = scipy.stats.ttest_ind(WRONG, RIGHT, equal_var=False)
    interval = welch.confidence_interval(0.95)
    assert found.t == pytest.approx(welch.statistic)
    assert found.p == pytest.approx(welch.pvalue)
    assert found.interval == pytest.approx((interval.low, interval.high))
    wider = separation(ENTROPIES, CORRECT, level=0.99).interval
    assert wider[0] < found.interval[0]


def test_unequal_classes_are_pooled_by_their_degrees_of_freedom():
    found = separation([*RIGHT, 0.1, 0.4, *WRONG], [True] * 6 + [False] * 4)
    right, wrong = np.array([*RIGHT, 0.1, 0.4]), np.array(WRONG)
    pooled = np.sqrt((5 * right.var(ddof=1) + 3 * wrong.var(ddof=1)) / 8)
    assert found.cohens_d == pytest.approx((wrong.mean() - right.mean()) / pooled)


@pytest.mark.parametrize("prior", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("spread", [0.4, 1.0, 2.5])
def test_at_the_bayes_threshold_right_and_wrong_are_equally_likely(prior, spread):
    wrong = 0.5875 + spread * (np.array(WRONG) - 0.5875)
    entropies = np.concatenate([RIGHT, wrong])
    tau = bayes(entropies, CORRECT, prior=prior)
    assert 0.275 < tau < 0.5875

    def gap(x):
        densities = (
            p * scipy.stats.norm.pdf(x, np.mean(values), np.std(values, ddof=1))
            for p, values in ((prior, RIGHT), (1 - prior, wrong))
        )
        a, b = densities
        return (a - b) / (a + b)

    assert abs(gap(tau)) < 1e-9
    assert gap(tau - 0.01) > 0 > gap(tau + 0.01)


def test_equal_variances_have_one_root():
    entropies = [0.1, 0.2, 0.3, 0.6, 0.7, 0.8]
    correct = [True] * 3 + [False] * 3
    for prior in (0.4, 0.5, 0.6):
        expected = 0.45 + 0.01 * np.log(prior / (1 - prior)) / 0.5
        assert bayes(entropies, correct, prior=prior) == pytest.approx(expected)


def test_the_prior_is_the_share_of_right_answers_unless_given():
    entropies, correct = [*ENTROPIES, 0.6, 0.55], [*CORRECT, False, False]
    assert bayes(entropies, correct) == pytest.approx(bayes(entropies, correct, prior=0.4))
    assert bayes(entropies, correct) < bayes(entropies, correct, prior=0.5)


def test_without_a_root_between_the_means_their_mean_is_taken():
    # So sure that answers are right that no entropy between the means speaks against it.
    assert bayes(ENTROPIES, CORRECT, prior=1 - 1e-9) == entropy_mean(ENTROPIES, CORRECT)
    # Nor for it.
    assert bayes(ENTROPIES, CORRECT, prior=1e-9) == entropy_mean(ENTROPIES, CORRECT)


def test_one_class_alone_gives_its_mean():
    for rule in (entropy_mean, overall_mean, bayes, mutual_information):
        for label in (True, False):
            assert rule(RIGHT, [label] * 4) == pytest.approx(0.275)


def test_equal_or_reversed_means_never_stop():
    for entropies in (RIGHT + RIGHT, WRONG + RIGHT):
        assert bayes(entropies, CORRECT) == NEVER
    assert mutual_information(WRONG + RIGHT, CORRECT) == NEVER
    assert mutual_information([0.3] * 8, CORRECT) == NEVER


def test_no_variance_counts_as_a_small_one():
    entropies = [0.1] * 3 + [0.7] * 3
    correct = [True] * 3 + [False] * 3
    assert bayes(entropies, correct) == pytest.approx(0.4)
    found = separation(entropies, correct)
    assert found.cohens_d == pytest.approx(600)
    assert found.clear
    assert calibrate(entropies, correct, method="bayes").threshold == pytest.approx(0.4)


def test_the_cut_tells_most_about_being_right():
    # One wrong answer among the lowest: cutting above it, and above all right ones, tells less.
    entropies = [0.1, 0.2, 0.3, 0.25, 0.6, 0.7, 0.8]
    correct = [True, True, True, False, False, False, False]

    def information(cut):
        below, right = np.array(entropies) <= cut, np.array(correct)
        table = np.array([[np.sum(b & c) for b in (below, ~below)] for c in (right, ~right)])
        joint = table / table.sum()
        outer = joint.sum(0) * joint.sum(1, keepdims=True)
        return scipy.special.rel_entr(joint, outer).sum()

    values = np.sort(entropies)
    cuts = (values[1:] + values[:-1]) / 2
    best = cuts[np.argmax([information(cut) for cut in cuts])]
    assert mutual_information(entropies, correct) == pytest.approx(best)
    # Of equally good cuts the lowest.
    assert mutual_information([1.0, 2.0, 3.0, 4.0], [True, False, True, False]) == 1.5


@pytest.mark.parametrize("method", ["entropy_mean", "overall_mean", "bayes", "mutual_information"])
def test_entropies_that_do_not_separate_clearly_never_stop(method):
    clear = calibrate(ENTROPIES, CORRECT, method=method)
    assert not clear.refused
    assert 0.2 < clear.threshold < 0.6
    rng = np.random.default_rng(0)
    noise = rng.normal(0.5, 0.1, 20)
    labels = np.arange(20) % 2 == 0
    found = calibrate(noise, labels, method=method)
    assert found.refused
    assert found.threshold == NEVER
    forced = calibrate(noise, labels, method=method, force=True)
    assert not forced.refused
    assert forced.separation == found.separation
    # Reversed: wrong answers are the surer ones.
    assert calibrate(ENTROPIES, ~CORRECT, method=method).refused
    # With one example of a class nothing is clear, nor with none.
    assert calibrate(ENTROPIES[:5], CORRECT[:5], method=method).refused
    assert calibrate(RIGHT, [True] * 4, method=method).refused
    assert calibrate(RIGHT, [True] * 4, method=method, force=True).threshold == pytest.approx(0.275)


def test_what_cannot_be_calibrated_is_refused():
    with pytest.raises(DataError, match="must be of one length"):
        calibrate([0.1, 0.2], [True])
    with pytest.raises(DataError, match="1 or more"):
        calibrate([], [])
    with pytest.raises(DataError, match="entropy 1 is inf"):
        calibrate([0.1, np.inf], [True, False])
    with pytest.raises(ConfigError, match="'bayes'"):
        calibrate(ENTROPIES, CORRECT, method="baye")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="prior=1"):
        bayes(ENTROPIES, CORRECT, prior=1)
    with pytest.raises(ConfigError, match="level=95"):
        separation(ENTROPIES, CORRECT, level=95)
