"""The tasks of the reproductions of FIGA, OTR and cDPO, and what their arms share."""

import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokjax.errors import ConfigError, DataError
from tokjax.models import ModelConfig, Transformer
from tokjax.preference.figa import figa_weights
from tokjax.pretraining.next_token import NextToken
from tokjax.reproduction.plan import PLANS
from tokjax.reproduction.rows import Row, batch_of, epochs, store_of
from tokjax.reproduction.small_runs import fitted, kept
from tokjax.reproduction.tasks import Chains, given_answer, listing, rewriting
from tokjax.reproduction.tasks.chains import apply
from tokjax.reproduction.tasks.confusions import Confusions
from tokjax.signals.edit_script import edit_script


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 1))
def test_a_revision_is_right_and_leaves_the_style_alone(seed, drop, filler):
    rng = np.random.default_rng(seed)
    digits = listing.question(rng, 6)
    answer = listing.Habits(drop=drop, misread=0.5, filler=filler).answer(digits, rng)
    new = listing.revised(digits, answer, rng)
    assert listing.is_right(digits, new)
    styles = [[token for token in told if token in listing.SEPARATORS] for told in (answer, new)]
    # Separators are put in with a digit that was left out, and none is replaced or taken away.
    assert all(edit.kind == "insert" for edit in edit_script(*styles))
    assert (answer == new) == listing.is_right(digits, answer)


def test_a_revision_of_anything_is_right():
    rng = np.random.default_rng(0)
    for _ in range(200):
        digits = listing.question(rng, 5)
        answer = rng.integers(0, listing.VOCABULARY, rng.integers(0, 12)).tolist()
        assert listing.is_right(digits, listing.revised(digits, answer, rng))


def test_rules_rewrite_digits():
    rng = np.random.default_rng(0)
    digits = rng.integers(0, 10, 2000).tolist()
    same = np.array(digits)
    of = lambda rule: np.array(rewriting.rewritten(rule, digits, rng))  # noqa: E731
    assert (of(rewriting.COPY) == same).all() and (of(rewriting.REVERSE) == same[::-1]).all()
    assert set(((of(rewriting.ADD) - same) % 10).tolist()) == {3}
    shift = (of(rewriting.MIXED) - same) % 10
    assert set(shift.tolist()) == {0, 5} and 0.3 < (shift == 0).mean() < 0.4
    noisy = np.array(rewriting.corrupted(digits, 0.15, rng))
    assert 0.12 < (noisy != same).mean() < 0.18


def test_mistakes_are_always_the_same_and_carry_on():
    chains = Chains(steps=(3, 3), operations=(("@", 1.0),), lines=(1, 2), redraw=1.0)
    confusions, rng = Confusions(share=0.3, probability=0.5), np.random.default_rng(0)
    table = {(a, b): confusions.mistaken("@", a, b) for a in range(10) for b in range(10)}
    wrong = {k: v for k, v in table.items() if v is not None}
    assert 20 <= len(wrong) <= 40 and all(v != apply("@", *k) for k, v in wrong.items())
    mistakes = []
    for _ in range(300):
        question = chains.question(rng)
        numbers = confusions.numbers(chains, question, rng)
        told = chains.response(question, rng, numbers).split()
        assert given_answer(told) == str(numbers[-1])
        for (_, digit), a, after in zip(question, numbers, numbers[1:], strict=False):
            assert after in (apply("@", a, digit), wrong.get((a, digit)))
            if (a, digit) in wrong:
                mistakes.append(after == wrong[a, digit])
    assert 0.4 < np.mean(mistakes) < 0.6
    with pytest.raises(ConfigError, match=r"share=1\.5"):
        Confusions(share=1.5)


def test_pairs_lie_in_a_row_as_the_loader_lays_them():
    pair = Row.pair([1, 2], [3, 4, 9], [5, 9])
    batch = batch_of([pair], 12)
    assert batch.tokens[0].tolist() == [1, 2, 3, 4, 9, 1, 2, 5, 0, 0, 0]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 0, 0]
    assert batch.segment_ids[0].tolist() == [1, 1, 1, 1, 1, 2, 2, 2, 0, 0, 0]
    assert batch.weights[0].tolist() == [0, 1, 1, 1, 0, 0, -1, -1, 0, 0, 0]
    assert batch.example_id.tolist() == [[0, 0]] and batch.group == 2
    with pytest.raises(DataError, match="not both"):
        batch_of([pair, Row.answer([1], [2])], 12)
    with pytest.raises(DataError, match="more than width=8"):
        batch_of([pair], 8)


def test_a_store_of_rows_is_what_methods_read(tmp_path):
    rows = [Row.pair([1, 2], [3, 4, 9], [5, 4, 9]), Row.pair([1], [3, 9], [9])]
    store = store_of(rows, tmp_path / "store", vocab_size=10, end=9)
    assert store.has_pairs and [store.cut(i) for i in range(2)] == [5, 3]
    found = [w.tolist() for w in figa_weights(store)]
    assert found == [[0, 0, 1, 0, 1, 0, 0, 0.5, 0, 0], [0, 1, 1, 0, 0]]
    assert rows[0].times(found[0]).weights == [0, 0, 1, 0, 1, 0, 0, -0.5, 0, 0]


def test_training_learns_and_is_kept(tmp_path):
    config = ModelConfig(vocab_size=16, d_model=32, n_layers=2, n_heads=2, max_positions=16)
    model = Transformer(config)
    start = model.init(jax.random.key(0))
    rows = [Row.answer([1, n], [n, n, 15]) for n in range(2, 10)]
    rng = np.random.default_rng(0)
    seen = []
    params, metrics = fitted(
        model,
        NextToken(),
        start,
        epochs(rows, 6, size=4, count=20, rng=rng),
        3e-3,
        after_step=lambda step, _: seen.append(step),
    )
    assert seen == list(range(1, 41)) and metrics["loss"][-1] < metrics["loss"][0] / 2
    made = []

    def make():
        made.append(1)
        return params

    for _ in range(2):
        again = kept(tmp_path / "x/params.npz", model, make)
        jax.tree.map(np.testing.assert_array_equal, again, params)
    assert made == [1]
    with pytest.raises(DataError, match="do not fill"):
        list(epochs(rows, 6, size=9, count=1, rng=rng))


def test_random_edits_are_as_many_on_either_side():
    plan = runpy.run_path(str(PLANS / "figa.py"))
    row = Row.pair([1, 2], [3, 4, 5, 9], [6, 4, 5, 7, 9])
    factors = np.array([0, 0, 1, 0, 0, 1, 0, 0, 0.5, 0, 0, 0.5, 0])
    rng = np.random.default_rng(0)
    drawn = [plan["permuted"](row, factors, rng) for _ in range(50)]
    for own in drawn:
        assert sorted(own[2:6]) == [0, 0, 1, 1] and sorted(own[8:]) == [0, 0, 0, 0.5, 0.5]
        assert not own[:2].any() and not own[6:8].any()
    assert len({tuple(own) for own in drawn}) > 10


def test_permuted_targets_stay_within_their_answer(tmp_path):
    plan = runpy.run_path(str(PLANS / "one_token_rollout.py"))
    settings = dict(plan["get_plan"]("smoke").settings)
    materials = plan["Materials"](tmp_path, settings, 0)
    for plain, mixed in zip(
        materials.batches(False, False), materials.batches(False, True), strict=True
    ):
        np.testing.assert_array_equal(plain.tokens, mixed.tokens)
        np.testing.assert_array_equal(jnp.sort(plain.targets), jnp.sort(mixed.targets))
        assert (plain.targets[:, :-8] == mixed.targets[:, :-8]).all()
        assert (plain.targets != mixed.targets).any()
