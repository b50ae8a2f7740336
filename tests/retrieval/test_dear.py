"""The objective: scores from the last tokens, groups, the teacher; and what its head learns."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tokjax.config import resolve
from tokjax.data.batch import Batch
from tokjax.data.loader import EvalLoader
from tokjax.errors import ConfigError
from tokjax.retrieval import losses
from tokjax.retrieval.dear import DeAR, passage_scores
from tokjax.training.config import TrainConfig
from tokjax.training.metrics import read_metrics
from tokjax.training.optimizers import Constant
from tokjax.training.run import build_run
from tokjax.training.state import init_state
from tokjax.training.step import StepConfig, make_train_step

KEY = jax.random.key(0)


@partial(jax.jit, static_argnums=(0, 1))
def graded(objective, model, params, batch):
    def total(params):
        loss = objective.loss(model, params, (), batch, KEY)
        return loss.total, loss

    (_, loss), gradient = jax.value_and_grad(total, has_aux=True)(params)
    return loss, gradient


@pytest.fixture(scope="module")
def store(stored, records):
    return stored(records)


@pytest.fixture(scope="module")
def alone(store, lm):
    """The scores of each example's passages, every one computed in a row of its own."""
    model, params = lm

    @jax.jit
    def score(tokens, last):
        x = model.backbone(params, model.embed(params, tokens[None])).x[0, last]
        head = params["heads"]["score"]
        return (x @ head["weight"] + head["bias"])[0]

    found = []
    for i in range(5):
        tokens, scores = store.tokens(i), []
        for first, last in itertools.pairwise([0, *store.cuts(i), len(tokens) - 1]):
            row = np.zeros(64, np.int32)
            row[: last - first] = tokens[first:last]
            scores.append(score(row, last - first - 1))
        found.append(np.array(scores))
    return found


def by_query(values, batch):
    """Values of segments, a row for each query that is there, by its example."""
    rows = zip(batch.example_id.reshape(-1, 3), np.asarray(values).reshape(-1, 3), strict=True)
    found = {}
    for ids, own in rows:
        assert len(set(ids.tolist())) == 1
        if ids[0] >= 0:
            found[int(ids[0])] = own
    return found


def test_scores_are_read_from_the_last_token_of_each_whole_sequence(lm, batch, alone):
    found = by_query(passage_scores(*lm, batch), batch)
    assert found.keys() == set(range(5))
    for i, scores in found.items():
        np.testing.assert_allclose(scores, alone[i], atol=1e-5)


def binary(labels):
    return (labels > 0) * 1.0


@pytest.mark.parametrize(
    ("settings", "of"),
    [
        ({"main": "softmax_ce"}, lambda s, y, t: losses.softmax_ce(s, y)),
        ({"main": "ranknet"}, lambda s, y, t: losses.ranknet(s, binary(y))),
        (
            {"main": "ranknet", "hard": True},
            lambda s, y, t: losses.ranknet(s, binary(y), hard=True),
        ),
        ({"main": "ranknet", "relevance": "labels"}, lambda s, y, t: losses.ranknet(s, y)),
        ({"main": "ranknet", "relevance": "teacher"}, lambda s, y, t: losses.ranknet(s, t)),
        ({}, lambda s, y, t: (losses.ranknet(s, binary(y)) + losses.softmax_ce(s, y)) / 2),
        ({"main": "listnet", "relevance": "teacher"}, lambda s, y, t: losses.listnet(s, t)),
        ({"main": "lambdarank", "relevance": "labels"}, lambda s, y, t: losses.lambdarank(s, y)),
        (
            {"main": "lambdarank", "relevance": "teacher"},
            lambda s, y, t: losses.lambdarank(s, (t - t.min()) / (t.max() - t.min())),
        ),
    ],
)
def test_the_loss_is_a_sum_over_queries(batch, store, settings, of):
    scores = np.random.default_rng(0).normal(size=batch.example_id.shape).astype(np.float32)
    main, kls = [], []
    for i, own in by_query(scores, batch).items():
        s, y, t = (jnp.array(v) for v in (own, *(store.values(n, i) for n in ("label", "score"))))
        main.append(float(of(s, y, t)))
        kls.append(float(losses.distillation_kl(s, t, 2.0)))
    assert len(main) == 5
    for alpha in (0.0, 0.1, 1.0):
        loss = DeAR(alpha=alpha, **settings).of_scores(jnp.array(scores), batch)
        expected = (1 - alpha) * np.sum(main) + alpha * np.sum(kls)
        np.testing.assert_allclose(loss.total, expected, rtol=1e-4)
        assert loss.weight == 5
        np.testing.assert_allclose(loss.metrics["kl"], (np.sum(kls), 5), rtol=1e-4)


def test_places_without_a_query_get_no_gradient(batch):
    gradient = jax.grad(lambda s: DeAR().of_scores(s, batch).total)(
        jnp.zeros(batch.example_id.shape)
    )
    assert (batch.example_id < 0).any()
    assert not gradient[batch.example_id < 0].any() and gradient[batch.example_id >= 0].any()


def test_the_head_is_trained_beside_the_model(lm, batch):
    loss, gradient = graded(DeAR(), *lm, batch)
    assert loss.weight == 5
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    assert np.abs(gradient["heads"]["score"]["weight"]).max() > 0
    assert np.abs(gradient["embedding"]).max() > 0
    # Adding a constant to all scores changes nothing, so the bias learns nothing.
    np.testing.assert_allclose(gradient["heads"]["score"]["bias"], 0.0, atol=1e-6)


def test_queries_do_not_see_each_other(lm, batch, store):
    """Rows of one query each give the same as rows of two."""
    rows = EvalLoader([store], seq_len=160, batch_size=5, packing="none").batch(0)
    assert rows.example_id.shape == (5, 3) and batch.example_id.shape != (5, 3)
    (one, a), (two, b) = (graded(DeAR(), *lm, each) for each in (batch, rows))
    np.testing.assert_allclose(one.total, two.total, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a, b)


def test_micro_batches_equal_the_large_batch(lm, store):
    model, params = lm
    rows = EvalLoader([store], seq_len=160, batch_size=6, packing="none").batch(0)
    assert (rows.example_id[-1] == -1).all()  # an empty row is in it
    start = init_state(model, DeAR(), optax.sgd(1.0), 0, False).replace(params=params)
    states = []
    for k in (1, 2):
        config = StepConfig(0.1, Constant(), 0, 10, micro_batches=k)
        step = jax.jit(make_train_step(model, DeAR(), optax.sgd(1.0), config))
        states.append(step(start, rows)[0].params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *states)


def test_without_the_teachers_share_its_scores_do_not_matter(batch):
    scores = jnp.arange(float(batch.example_id.size)).reshape(batch.example_id.shape)
    other = batch.replace(values={**batch.values, "score": -3 * batch.values["score"]})
    for alpha, same in ((0.0, True), (0.1, False)):
        one, two = (DeAR(alpha=alpha).of_scores(scores, each).total for each in (batch, other))
        assert (one == two) == same


def test_top1_counts_queries_whose_best_passage_comes_first(batch):
    labels = jnp.array(batch.values["label"])
    assert DeAR().of_scores(labels, batch).metrics["top1"] == (5, 5)
    assert DeAR().of_scores(-labels, batch).metrics["top1"] == (0, 5)


# ---- configuration


def test_what_the_data_lack_is_named_with_its_remedy(lm, batch):
    plain = batch.replace(values={"label": batch.values["label"]})
    for settings in ({}, {"alpha": 0.0, "relevance": "teacher"}):
        with pytest.raises(ConfigError, match=r"teacher's scores.*tokjax.rerank.*alpha=0"):
            DeAR(**settings).loss(*lm, (), plain, KEY)
    scores = jnp.zeros(batch.example_id.shape)
    assert np.isfinite(DeAR(alpha=0.0).of_scores(scores, plain).total)
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(Batch)}
    with pytest.raises(ConfigError, match="records of kind 'ranking'"):
        DeAR().loss(*lm, (), Batch(**{**fields, "values": {}}), KEY)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"main": "ranknett"}, "main='ranknett'.*'ranknet'"),
        ({"relevance": "gold"}, "relevance='gold'"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"temperature": 0}, "temperature=0"),
        ({"main": "listnet", "hard": True}, "hard is for ranknet"),
    ],
)
def test_impossible_settings_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        DeAR(**settings)


# ---- runs


def test_a_run_learns_and_evaluates(trained):
    table = read_metrics(trained[0])
    steps = {
        n: [v for v in table[n] if v is not None] for n in ("main", "kl", "eval/held_out/top1")
    }
    assert steps["main"][-1] < 0.8 * steps["main"][0]
    assert steps["kl"][-1] < 0.5 * steps["kl"][0]
    assert steps["eval/held_out/top1"][-1] > 0.8


def test_rankings_need_an_objective_of_rankings(trained):
    _, tree = trained
    refused = (("next_token", "reads single.*holds rankings"), ("dpo", "reads pairs"))
    for objective, said in refused:
        changed = resolve(TrainConfig, {**tree, "objective": {"name": objective}})
        with pytest.raises(ConfigError, match=said):
            build_run(changed, devices=jax.devices()[:1], show_progress=False)
