"""The encoder with two heads: what it reads, its loss, its training, and the metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tokjax.errors import CheckpointError, ConfigError, DataError
from tokjax.finetuning.quality_estimation import (
    Example,
    QualityEstimator,
    ScoreScale,
    balanced_ok_weight,
    evaluate_estimator,
    predict,
    qe_batch,
    qe_example,
    score_metrics,
    tag_metrics,
    train_estimator,
)
from tokjax.models import Encoder, ModelConfig
from tokjax.training import fitting
from tokjax.training.compiles import CompileWatch

ENCODER = Encoder(
    ModelConfig(vocab_size=24, d_model=32, n_layers=1, n_heads=2, max_positions=24, causal=False)
)
ESTIMATOR = QualityEstimator(ENCODER)


def example(rng):
    """Words are copies of the source's; a word is bad where it is another."""
    source = rng.integers(4, 24, 5)
    bad = rng.random(5) < 0.3
    words = np.where(bad, 4 + (source - 4 + rng.integers(1, 20, 5)) % 20, source)
    return qe_example(
        [str(w) for w in words],
        source.tolist(),
        lambda word: [int(word)],
        before=[0],
        between=[1],
        after=[2],
        bad=bad.tolist(),
        score=1 - bad.mean(),
    )


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return [example(rng) for _ in range(500)]


@pytest.fixture(scope="module")
def params():
    return ESTIMATOR.init(jax.random.key(0))


def test_an_example_is_hypothesis_then_source():
    pieces = {"ab": [5, 6], "c": [7]}.__getitem__
    made = qe_example(["ab", "c"], [8, 9], pieces, before=[0], between=[2, 2], after=[2])
    assert made == Example([0, 5, 6, 7, 2, 2, 8, 9, 2], 4, [1, 3])
    marked = qe_example(
        ["ab", "c"], [8], pieces, before=[0], between=[2], bad=[True, False], end_bad=True
    )
    assert marked == Example([0, 5, 6, 7, 2, 8], 5, [1, 3, 4], [True, False, True])
    with pytest.raises(DataError, match="give between"):
        qe_example(["c"], [8], pieces, end_bad=False)
    with pytest.raises(DataError, match="'' has no tokens"):
        qe_example([""], [8], lambda word: [])


def test_tags_are_read_at_words_and_scores_of_the_hypothesis_and_the_first(params):
    one = Example([0, 5, 6, 7, 1, 8, 9], 4, [1, 3])
    batch = qe_batch([one, Example([0, 5, 1], 2, [1])], ScoreScale())
    logits, scores = ESTIMATOR(params, batch)
    assert logits.shape == (2, 16, 2)
    x = np.asarray(ENCODER.encode(params["encoder"], jnp.array([one.tokens])).x[0])
    tags = x[[1, 3]] @ params["tags"]["weight"] + params["tags"]["bias"]
    np.testing.assert_allclose(logits[0, :2], tags, atol=1e-5)
    sentence = np.concatenate([x[:4].mean(0), x[0]])
    score = sentence @ params["score"]["weight"] + params["score"]["bias"]
    np.testing.assert_allclose(scores[0], 1 / (1 + np.exp(-score[0])), atol=1e-5)


def test_the_loss_by_hand(params):
    examples = [
        Example([0, 5, 6, 7, 1, 8, 9], 4, [1, 3], [True, False], 0.4),
        Example([0, 5, 1], 2, [1], [False], None),
        Example([0, 6, 1], 2, [1], None, -3.0),  # clipped to 0
    ]
    batch = qe_batch(examples, ScoreScale(), rows=5)
    logits, scores = jax.device_get(ESTIMATOR(params, batch))
    nll = -jax.nn.log_softmax(logits, axis=-1)
    tags = (nll[0, 0, 1] + 0.25 * nll[0, 1, 0] + 0.25 * nll[1, 0, 0]) / 3
    error = ((scores[0] - 0.4) ** 2 + scores[2] ** 2) / 2
    found = ESTIMATOR.loss(params, batch, 0.25, 2.0)
    np.testing.assert_allclose(found, tags + 2 * error, rtol=1e-5)
    # Without anything known there is no loss, and no gradient.
    unknown = qe_batch([Example([0, 6, 1], 2, [1])], ScoreScale())
    gradient = jax.grad(ESTIMATOR.loss)(params, unknown)
    assert all((g == 0).all() for g in jax.tree.leaves(gradient))


def test_rows_and_filling_do_not_touch_one_another(params, data):
    scale = ScoreScale()
    together = ESTIMATOR(params, qe_batch(data[:3], scale, rows=4))
    alone = ESTIMATOR(params, qe_batch(data[1:2], scale))
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a[1], b[0], atol=1e-5)


def test_scores_are_brought_into_the_unit_interval():
    scores = [1.0, 0.89, 0.0, -4.0]
    np.testing.assert_allclose(ScoreScale.of(scores)(scores), [1, 0.89, 0, 0])
    scale = ScoreScale.of(scores, "logistic")
    z = (np.array(scores) - np.mean(scores)) / np.std(scores)
    np.testing.assert_allclose(scale(scores), 1 / (1 + np.exp(-z)))
    assert ScoreScale.of([1.0, 1.0], "logistic")(1.0) == 0.5
    with pytest.raises(ConfigError, match="deviation=0"):
        ScoreScale("clip", deviation=0.0)


def test_ok_words_are_weighed_by_the_share_of_bad_ones():
    examples = [
        Example([0, 1], 1, [0] * 4, [True, False, False, False]),
        Example([0, 1], 1, [0] * 2, [False, False]),
        Example([0, 1], 1, [0]),
    ]
    assert balanced_ok_weight(examples) == 0.4
    assert balanced_ok_weight(examples, 1.0) == 0.2
    assert balanced_ok_weight(examples[1:]) == 1.0


SETTINGS = {"batch_size": 32, "epochs": 20, "peak_lr": 4e-3, "progress": False}


@pytest.fixture(scope="module")
def trained(data):
    return train_estimator(ESTIMATOR, data[:400], **SETTINGS)


def test_training_learns_to_tell_bad_words(trained, data):
    found = evaluate_estimator(trained, data[400:])
    assert found["mcc"] > 0.5 and found["f1_product"] > 0.5, found
    assert found["pearson"] > 0.5 and found["spearman"] > 0.5, found
    assert trained.losses.shape == (260,)
    said = predict(trained, data[200:203], batch_size=2)
    assert [len(p.bad) for p in said] == [5, 5, 5]
    assert all(0 <= p.score <= 1 for p in said)


def test_another_rate_and_weight_compile_nothing(trained, data):
    with CompileWatch() as watch:
        settings = SETTINGS | {"peak_lr": 1e-3, "epochs": 1}
        train_estimator(ESTIMATOR, data[:64], ok_weight=0.3, score_weight=0.0, **settings)
    assert watch.count == 0


class Killed(Exception):
    pass


def test_a_killed_training_goes_on_with_the_same_numbers(data, tmp_path, monkeypatch):
    settings = SETTINGS | {"epochs": 2, "checkpoint_steps": 2}
    whole = train_estimator(ESTIMATOR, data[:96], **settings)
    file, write = tmp_path / "training", fitting.write_state

    def dying(*arguments):
        write(*arguments)
        raise Killed

    monkeypatch.setattr(fitting, "write_state", dying)
    with pytest.raises(Killed):
        train_estimator(ESTIMATOR, data[:96], checkpoint=file, **settings)
    monkeypatch.undo()
    resumed = train_estimator(ESTIMATOR, data[:96], checkpoint=file, **settings)
    np.testing.assert_array_equal(resumed.losses, whole.losses)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    for changes, message in (
        ({"ok_weight": 0.7}, "ok_weight=.*not 0.7"),
        ({"seed": 1}, "seed=0, not 1"),
        ({"scale": ScoreScale("logistic")}, "scale="),
        ({"start": whole.params}, "start="),
    ):
        with pytest.raises(ConfigError, match=message):
            train_estimator(ESTIMATOR, data[:96], checkpoint=file, **settings | changes)
    file.write_bytes(b"nothing")
    with pytest.raises(CheckpointError):
        train_estimator(ESTIMATOR, data[:96], checkpoint=file, **settings)


def test_training_starts_from_an_encoder_or_from_what_was_trained(trained, data):
    settings = SETTINGS | {"epochs": 1, "peak_lr": 1e-9}  # it stays where it starts
    near = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)  # noqa: E731
    again = train_estimator(ESTIMATOR, data[:32], start=trained.params, **settings)
    jax.tree.map(near, again.params, trained.params)
    encoder = {"encoder": trained.params["encoder"]}
    fresh = train_estimator(ESTIMATOR, data[:32], start=encoder, **settings)
    jax.tree.map(near, fresh.params["encoder"], trained.params["encoder"])
    assert abs(fresh.params["tags"]["weight"] - trained.params["tags"]["weight"]).max() > 0.01
    for leaf in jax.tree.leaves(trained.params):
        assert not leaf.is_deleted()


def test_what_does_not_fit_is_refused(trained):
    good = Example([0, 5, 1], 2, [1], [True], 0.5)
    for wrong, message in (
        (Example([0, 24, 1], 2, [1]), "ids 0 to 24"),
        (Example([0] * 25, 2, [1]), "25 tokens"),
        (Example([0, 5, 1], 2, [2]), r"words \[2\] must lie"),
        (Example([0, 5, 1], 2, [1], [True, False]), "2 tags of 1 words"),
    ):
        with pytest.raises(DataError, match=message):
            train_estimator(ESTIMATOR, [good, wrong], progress=False)
        with pytest.raises(DataError, match=message):
            predict(trained, [wrong])
    with pytest.raises(DataError, match="no examples"):
        train_estimator(ESTIMATOR, [], progress=False)
    for settings, message in (
        ({"batch_size": 0}, "batch_size=0"),
        ({"peak_lr": 0.0}, "peak_lr=0.0"),
        ({"ok_weight": 0.0}, "ok_weight=0.0"),
        ({"score_weight": -1.0}, "score_weight=-1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_estimator(ESTIMATOR, [good], **settings, progress=False)


def test_metrics_are_those_of_their_definitions():
    rng = np.random.default_rng(0)
    bad, said = rng.random((2, 200)) < [[0.3], [0.4]]
    said |= bad & (rng.random(200) < 0.5)
    found = tag_metrics(bad, said)
    assert found["mcc"] == pytest.approx(np.corrcoef(bad, said)[0, 1])
    for name, one, other in (("f1_bad", bad, said), ("f1_ok", ~bad, ~said)):
        precision, recall = (one & other).sum() / other.sum(), (one & other).sum() / one.sum()
        assert found[name] == pytest.approx(2 * precision * recall / (precision + recall))
    assert found["f1_product"] == pytest.approx(found["f1_ok"] * found["f1_bad"])
    assert tag_metrics(bad, ~bad)["mcc"] == -1 and tag_metrics(bad, bad)["f1_product"] == 1
    constant = tag_metrics(bad, np.zeros(200, bool))
    assert constant["mcc"] == 0 and constant["f1_product"] == 0
    scores = rng.normal(size=50)
    other = np.exp(scores) + rng.normal(size=50) * 0.1
    both = score_metrics(scores, other)
    assert both["pearson"] == pytest.approx(np.corrcoef(scores, other)[0, 1])
    assert both["spearman"] == pytest.approx(
        np.corrcoef(scipy.stats.rankdata(scores), scipy.stats.rankdata(other))[0, 1]
    )
    assert np.isnan(score_metrics(scores, np.ones(50))["pearson"])
    for wrong in (([1.0], [1.0]), ([1.0, 2.0], [1.0])):
        with pytest.raises(DataError, match="cannot be correlated"):
            score_metrics(*wrong)
    with pytest.raises(DataError, match="cannot be compared"):
        tag_metrics(np.ones(0, bool), np.ones(0, bool))
