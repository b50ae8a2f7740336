"""Toucan: groups, the expanded row, what each slot is predicted from, decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows_for_tests import batch_of, gradient_of, loss_of, noisy, scored_slots, slots

from tokjax import struct
from tokjax.decoding import Prompts, categorical, decode
from tokjax.errors import ConfigError
from tokjax.models import ModelConfig, Transformer
from tokjax.models.stack import StackConfig
from tokjax.tokenization.toucan import (
    Boundaries,
    Expansion,
    Toucan,
    boundary_prior_loss,
    expanded_rows,
    relaxed_bernoulli,
    toucan,
    whitespace_boundaries,
    without_ends,
)
from tokjax.tokenization.toucan.expansion import slot_targets
from tokjax.tokenization.toucan.predictor import BACKBONE_STEPS

T, END = 20, 257
SMALL = StackConfig(n_layers=1)
FIXED = Toucan(before=SMALL, behind=SMALL, boundaries=Boundaries("whitespace"))
LEARNED = dataclasses.replace(FIXED, boundaries=Boundaries(), room=1.0)
CONFIG = ModelConfig(
    vocab_size=257, d_model=32, n_layers=2, n_heads=2, d_ff=32, max_positions=64, init_scale=0.3
)
MODEL = Transformer(CONFIG)
IDS = [256, *b"the cat sat on it"]
MARKS = np.array([i == 32 for i in IDS[:-1]])
CLOSE = {"rtol": 5e-5, "atol": 5e-5}


def params_of(objective, model=MODEL):
    own = model.init(jax.random.key(0))
    return noisy({**own, "heads": objective.init_heads(jax.random.key(1), model)})


@pytest.fixture(scope="module")
def params():
    return params_of(LEARNED)


@jax.jit
def given_marks(params, batch, marks):
    """Log-probabilities, targets and weights of the slots, with given boundaries."""
    groups = LEARNED.grouped(
        MODEL, params, batch.tokens, batch.segment_ids, batch.positions, None, marks
    )
    return scored_slots(LEARNED.spelled(MODEL, params, batch, groups))


def test_characters_and_ends_stand_where_they_belong():
    marks, ones = jnp.array([[0, 0, 1, 0, 1, 0]], bool), jnp.ones((1, 6), jnp.int32)
    letters = jnp.array([list(b"abcdef")])
    places = Expansion.of(marks, ones, 8)
    np.testing.assert_array_equal(places.characters, [[0, 1, 3, 4, 6, 7]])
    np.testing.assert_array_equal(places.ends, [[8, 8, 2, 8, 5, 8]])
    row = places.spread(letters, jnp.full((1, 6), END))
    assert [chr(i) if i != END else "E" for i in row[0].tolist()] == list("abEcdEef")
    targets = slot_targets(jnp.array([list(b"bcdefg")]), letters, marks, ones, END)
    wanted = places.spread(*targets)[0].tolist()
    assert [chr(i) if i != END else "E" for i in wanted] == list("bEcdEefg")


def test_an_end_may_stand_before_the_first_character():
    marks, ones = jnp.array([[1, 0, 1]], bool), jnp.ones((1, 3), jnp.int32)
    places = Expansion.of(marks, ones, 5)
    letters = jnp.array([[5, 6, 7]])
    np.testing.assert_array_equal(places.spread(letters, letters * 0 + 9), [[9, 5, 6, 9, 7]])
    targets = slot_targets(jnp.array([[6, 7, 8]]), letters, marks, ones, 9)
    np.testing.assert_array_equal(places.spread(*targets), [[5, 6, 9, 7, 8]])


def test_what_has_no_room_is_dropped():
    marks, ones = jnp.array([[0, 1, 1]], bool), jnp.ones((1, 3), jnp.int32)
    places = Expansion.of(marks, ones, 3)
    np.testing.assert_array_equal(
        places.spread(jnp.array([[5, 6, 7]]), jnp.full((1, 3), 9)), [[5, 9, 6]]
    )


def test_the_prior_is_a_binomials():
    totals, n = jnp.array([2.0, 5.0]), jnp.array([10, 10])
    found = boundary_prior_loss(totals, n, 0.2)
    np.testing.assert_allclose(found, [0.119736, 0.363348], atol=1e-6)
    slopes = jax.grad(lambda k: boundary_prior_loss(k, n, 0.2).sum())(totals)
    assert slopes[0] < slopes[1] and slopes[1] > 0


def test_draws_are_hard_and_their_gradient_is_not_zero():
    z = jnp.linspace(-2.0, 2.0, 40)
    for key in (None, jax.random.key(0)):
        hard, slope = jax.value_and_grad(
            lambda z, key=key: relaxed_bernoulli(z, key, 0.5, 0.5).sum()
        )(z)
        values = relaxed_bernoulli(z, key, 0.5, 0.5)
        assert set(np.unique(values)) == {0.0, 1.0} and float(hard) == values.sum()
        assert (np.asarray(slope) > 0).all()
    likely = np.asarray(relaxed_bernoulli(jnp.full(4000, 1.0), jax.random.key(1), 0.5, 0.5)).mean()
    assert likely == pytest.approx(1 / (1 + np.exp(-1)), abs=0.03)


def test_white_space_begins_a_group():
    found = whitespace_boundaries(jnp.array([list(b" a\n\tb c")]))
    np.testing.assert_array_equal(found, [[1, 0, 1, 0, 0, 1, 0]])


def test_both_losses_move_the_boundaries(params):
    batch = batch_of([[IDS]], T)

    @jax.jit
    def prior_alone(params):
        def total(params):
            groups = LEARNED.grouped(
                MODEL, params, batch.tokens, batch.segment_ids, batch.positions, jax.random.key(3)
            )
            n = (batch.segment_ids > 0).sum(-1)
            return (boundary_prior_loss(groups.drawn.sum(-1), n, 0.2) * n).sum()

        return jax.grad(total)(params)

    both = gradient_of(MODEL, LEARNED, params, batch, 3)["heads"]["toucan"]["boundaries"]
    prior = prior_alone(params)["heads"]["toucan"]["boundaries"]
    text = jax.tree.map(jnp.subtract, both, prior)
    for gradient in (prior, text):
        assert all(np.abs(a).max() > 1e-5 for a in jax.tree.leaves(gradient))


def test_every_parameter_is_trained(params):
    found = gradient_of(MODEL, LEARNED, params, batch_of([[IDS]], T), 3)
    assert all(np.isfinite(a).all() and np.abs(a).max() > 0 for a in jax.tree.leaves(found))


def test_without_boundaries_all_is_the_base(params):
    batch = batch_of([[IDS]], T)
    marks = jnp.zeros((1, T), bool)
    _, targets, weights = given_marks(params, batch, marks)
    base = dataclasses.replace(FIXED, ends=False, boundaries=Boundaries("whitespace"))
    nothing = batch.replace(tokens=jnp.where(batch.tokens == 32, 33, batch.tokens))
    same = given_marks(params, nothing, marks)[0]
    plain, wanted, _ = slots(MODEL, base, params, nothing)
    n = len(IDS) - 1
    np.testing.assert_allclose(same[0, :n], plain[0, :n], **CLOSE)
    assert END not in targets[0, :n].tolist()
    np.testing.assert_array_equal(targets[0, :n], wanted[0, :n])
    assert weights[0].sum() == n


def test_an_altered_character_changes_no_slot_before_its_own(params):
    marks = jnp.asarray(np.pad(MARKS, (0, T - len(MARKS)))[None])
    before = np.asarray(given_marks(params, batch_of([[IDS]], T), marks)[0][0])
    places = np.arange(len(MARKS)) + np.cumsum(MARKS)
    for at in (2, 4, 5, 8, 14):
        changed = [*IDS[:at], ord("z"), *IDS[at + 1 :]]
        after = np.asarray(given_marks(params, batch_of([[changed]], T), marks)[0][0])
        moved = np.flatnonzero(np.abs(after - before).max(-1) > 1e-5)
        assert moved.min() == places[at]
        assert moved.max() == places[-1]


def test_a_leak_gives_itself_away_and_a_cut_context_too(params):
    batch = batch_of([[IDS]], T)
    changed = batch_of([[[*IDS[:7], ord("z"), *IDS[8:]]]], T)

    def first_moved(objective):
        one, other = (slots(MODEL, objective, params, b)[0][0] for b in (batch, changed))
        return np.flatnonzero(np.abs(one - other).max(-1) > 1e-5)

    own = 7 + 1
    assert first_moved(FIXED).min() == own
    assert first_moved(dataclasses.replace(FIXED, control="leak")).min() < own
    # What the last stack reads itself still reaches later slots.
    assert first_moved(dataclasses.replace(FIXED, control="zero")).min() == own


def test_documents_of_a_row_know_nothing_of_one_another(params):
    first, second = [256, *b"a bit of"], [256, *b"no b"]
    packed = slots(MODEL, FIXED, params, batch_of([[first, second]], T))[0][0]
    alone = slots(MODEL, FIXED, params, batch_of([[first], [second]], T))[0]
    n, m = len(first) - 1 + 2, len(second) - 1 + 1
    np.testing.assert_allclose(packed[:n], alone[0, :n], **CLOSE)
    np.testing.assert_allclose(packed[n : n + m], alone[1, :m], **CLOSE)


def test_every_end_is_paid_for_and_divided_by_characters_alone(params):
    batch = batch_of([[IDS]], T)
    loss = loss_of(MODEL, FIXED, params, batch)
    logp, targets, weights = slots(MODEL, FIXED, params, batch)
    nll = -np.take_along_axis(np.asarray(logp), np.asarray(targets)[..., None], -1)[..., 0]
    assert float(weights.sum()) == len(IDS) - 1 + 4
    assert float(loss.weight) == len(IDS) - 1
    assert float(loss.total) == pytest.approx(float((nll * weights).sum()), rel=1e-5)
    bits, units = map(float, loss.metrics["bits_per_byte"])
    assert units == len(IDS) - 1 and bits == pytest.approx(float(loss.total) / np.log(2), rel=1e-5)
    assert "boundary_loss" not in loss.metrics


def test_groups_without_room_are_left_out_and_the_others_stay(params):
    batch = batch_of([[IDS]], T)
    small = dataclasses.replace(FIXED, room=2 / T)
    logp, targets, weights = slots(MODEL, small, params, batch)
    whole, wanted, _ = slots(MODEL, FIXED, params, batch)
    # Two groups: 8 characters and an end; what follows the last one is its own target.
    assert float(weights.sum()) == 9
    np.testing.assert_allclose(logp[0, :9], whole[0, :9], **CLOSE)
    np.testing.assert_array_equal(targets[0, :8], wanted[0, :8])


@pytest.mark.parametrize("chunk", [2, 16])
def test_decoding_says_slot_by_slot_what_training_said(params, chunk):
    marks = np.pad(MARKS, (0, T - len(MARKS)))[None]
    wanted = given_marks(params, batch_of([[IDS]], T), jnp.asarray(marks))[0][0]
    predictor, own = toucan(MODEL, params, params["heads"], LEARNED, chunk=chunk)
    row = [i for i, mark in zip(IDS[:-1], MARKS, strict=True) for i in ([END] * int(mark) + [i])]

    @jax.jit
    def all_steps(own, row):
        prepared = predictor.prepare(own)
        state, out = predictor.init(prepared, Prompts(row[None, :1], jnp.array([1])), 32)

        def step(state, symbol):
            state, out = predictor.step(prepared, state, symbol[None])
            return state, (out.logits[0], out.signals[BACKBONE_STEPS][0])

        later, steps = jax.lax.scan(step, state, row[1:])[1]
        return jnp.concatenate([out.logits, later]), steps

    found, steps = all_steps(own, jnp.array(row))
    np.testing.assert_allclose(jax.nn.log_softmax(found), wanted[: len(row)], **CLOSE)
    np.testing.assert_array_equal(steps, 1 + np.cumsum(np.array(row[1:]) == END))


@struct.dataclass
class _OneEndAtATime:
    """Makes ends likelier, but none right behind another."""

    def init(self, prompts, vocab_size):
        return ()

    def update(self, logits, state, context):
        bias = jnp.where(context.last == END, -50.0, 8.0)
        return logits.at[:, END].add(bias), state


def test_what_is_sampled_has_the_probability_it_is_scored_with(params):
    method = toucan(MODEL, params, params["heads"], FIXED, chunk=4)
    rows = expanded_rows(*method, [IDS[:7], IDS[1:3]])
    assert rows == [[256, *b"the", END, *b" ca"], [*b"th"]]
    found = decode(
        *method,
        Prompts.of(rows),
        max_new_tokens=10,
        samples=2,
        sampler=categorical(),
        seeds=[1, 2, 3, 4],
        transform=_OneEndAtATime(),
    )
    scores = []
    whole = [rows[b // 2] + row for b, row in enumerate(found.rows())]
    assert sum(row.count(END) for row in found.rows()) > 3
    kept = []
    marks = np.zeros((len(whole), T), bool)
    for b, row in enumerate(whole):
        if row[-1] == END:  # what it stands before is not known
            row = [*row, 7]
        ids = without_ends(method[0], row)
        kept.append([ids])
        ends = np.flatnonzero(np.array(row) == END)
        marks[b, ends - np.arange(len(ends))] = True
    kept = [[[*ids, 0]] for (ids,) in kept]
    logp = np.asarray(given_marks(params, batch_of(kept, T), jnp.asarray(marks))[0])
    for b, row in enumerate(whole):
        start = len(rows[b // 2])
        scores = [logp[b, at - 1, row[at]] for at in range(start, len(row))]
        np.testing.assert_allclose(found.logprobs[b][: len(scores)], scores, rtol=1e-4, atol=1e-4)


def test_rows_do_not_depend_on_those_beside_them(params):
    method = toucan(MODEL, params, params["heads"], FIXED)
    rows = expanded_rows(*method, [IDS[:9], IDS[:3], IDS[4:9]])
    together = decode(*method, Prompts.of(rows), max_new_tokens=8).rows()
    alone = [decode(*method, Prompts.of([row]), max_new_tokens=8).rows()[0] for row in rows]
    assert together == alone


def test_evaluation_draws_nothing(params):
    batch = batch_of([[IDS]], T)
    losses = [loss_of(MODEL, LEARNED.evaluates, params, batch, seed) for seed in (0, 1)]
    assert float(losses[0].total) == float(losses[1].total)
    assert "boundary_loss" not in losses[0].metrics
    drawn = [loss_of(MODEL, LEARNED, params, batch, seed) for seed in (0, 1)]
    assert float(drawn[0].total) != float(drawn[1].total)
    assert "boundary_loss" in drawn[0].metrics


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Boundaries("whitspace"), "whitespace"),
        (lambda: Boundaries(prior=1.0), "prior=1.0"),
        (lambda: Toucan(before=StackConfig(n_layers=0)), "before.n_layers=0"),
        (lambda: Toucan(behind=StackConfig(1, d_model=8)), "d_model=8"),
        (lambda: Toucan(control="leek"), "leak"),
        (lambda: toucan(MODEL, {}, {"hat": {}}), "not those of objective 'toucan'"),
        (lambda: toucan(MODEL, {}, {"toucan": {}}, Toucan(ends=False)), "ends=False"),
    ],
)
def test_what_cannot_work_is_refused(make, says):
    with pytest.raises(ConfigError, match=says):
        make()
