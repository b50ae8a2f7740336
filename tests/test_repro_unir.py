"""UniR's tasks: probabilities are enumerated, styles are told apart, and late means late."""

import itertools
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from tokjax.decoding import Prompts, decode
from tokjax.decoding.contrast import with_reasoners
from tokjax.decoding.predictors import as_predictor
from tokjax.models import ModelConfig, Transformer
from tokjax.reproduction.tasks import format_and_fact as toy
from tokjax.reproduction.tasks import styled_sums as sums

PLAN = runpy.run_path(str(Path(__file__).parent.parent / "configs/repro/unir.py"))


def test_probabilities_are_those_of_all_answers():
    tables = toy.backbone(2.0, 0)
    reasoner = jax.random.normal(jax.random.key(0), (toy.STEPS, toy.SYMBOLS + 1, toy.SYMBOLS))
    found = toy.outcome(tables, [reasoner], [0.7], "right")
    r = np.asarray(reasoner, np.float64)
    for x in range(4):
        total = 0.0
        for y1, y2, y3 in itertools.product(range(4), repeat=3):
            steps = (tables[0][x], r[0, toy.START]), (tables[1][x, y1], r[1, y1])
            steps += ((tables[2][x, y1, y2], r[2, y2]),)
            p = 1.0
            for (z, own), y in zip(steps, (y1, y2, y3), strict=True):
                p *= scipy.special.softmax(z + 0.7 * own)[y]
            total += p * (y2 == 3 and y3 == (x + y1) % 4)
        np.testing.assert_allclose(found[x], total, rtol=1e-5)
    late = toy.shifted(reasoner)
    np.testing.assert_array_equal(late[1:], reasoner[:-1])


def test_a_backbone_knows_the_fact_and_avoids_the_form():
    form = toy.outcome(toy.backbone(4.0, 0), [], [], "form").mean()
    right = toy.outcome(toy.backbone(4.0, 0), [], [], "right").mean()
    assert 0.08 < form < 0.15
    assert right > 0.85 * form
    chance = toy.outcome(toy.no_backbone(), [toy.no_reasoner()], [1.0], "right")
    np.testing.assert_allclose(chance, 1 / 16, rtol=1e-5)


def test_training_raises_what_is_rewarded_and_nothing_else_by_itself():
    tables = toy.backbone(2.0, 0)
    reasoner = toy.trained(tables, "clean", 0, steps=100)
    assert toy.outcome(tables, [reasoner], [1.0], "clean").mean() > 0.9
    assert toy.outcome(tables, [reasoner], [1.0], "form").mean() < 0.3


def test_answers_are_right_in_the_styles_asked_for():
    records = list(sums.examples(2000, 0))
    assert {record["prompt"] for record in records} == set(sums.prompts())
    assert all(sums.met(r["prompt"], r["response"], prefix=False, tail=False) for r in records)
    for mark, share in sums.SHARES.items():
        found = np.mean([mark in record["response"] for record in records])
        np.testing.assert_allclose(found, share, atol=0.03)
    met = lambda answer: sums.met("3+4=", answer, prefix=True, tail=True)  # noqa: E731
    assert met("#7!")
    assert not any(map(met, ("7!", "#7.", "#8!", "#7!!", "#7", "")))


def test_a_late_reasoner_says_what_it_said_before():
    model = Transformer(
        ModelConfig(vocab_size=11, d_model=8, n_layers=1, n_heads=2, max_positions=16)
    )
    params = jax.tree.map(lambda p: 5 * p, model.init(jax.random.key(1)))
    prompts = Prompts.of([[1, 2, 3], [4]])
    late = PLAN["Late"](as_predictor(model))
    recorded = {"logits": lambda context: context.logits}
    plain = decode(model, params, prompts, max_new_tokens=1, record=recorded)
    pair = with_reasoners((model, params), [(late, params)])
    found = decode(*pair, prompts, max_new_tokens=2, record=recorded)
    first = np.asarray(plain.recorded["logits"][:, 0])
    np.testing.assert_allclose(found.recorded["logits"][:, 0], first, atol=1e-5)
    tokens = np.asarray(found.tokens[:, :1])
    rows = [[*row, int(new)] for row, new in zip(([1, 2, 3], [4]), tokens[:, 0], strict=True)]
    second = [np.asarray(model(params, jnp.array([row]))[0][0, -1]) for row in rows]
    np.testing.assert_allclose(found.recorded["logits"][:, 1], second + first, atol=1e-4)
