"""The scorer by values, and searches that it guides."""

import dataclasses
import itertools
from collections import Counter
from dataclasses import dataclass

import jax
import numpy as np
import pytest

from tokjax.decoding import Prompts, on_tokens, temperature
from tokjax.decoding.search import (
    Cost,
    Drawn,
    Generator,
    best_of_n,
    rebase,
    self_consistency,
    step_beam,
    token_values,
    value_scorer,
    vote,
)
from tokjax.errors import ConfigError
from tokjax.models.scalar_head import init_scalar_head

END, DEPTH, CHILDREN = 3, 3, 3


@pytest.fixture(scope="module")
def head(lm):
    return init_scalar_head(jax.random.key(2), lm.model.config.d_model)


def by_hand(lm, head, ids, kind="mse"):
    """The value of the last token of one sequence, from a pass of its own."""
    weight = np.asarray(head["weight"], np.float64)[:, 0]
    f = lm.run(ids)[1][-1] @ weight + float(head["bias"][0])
    return 1 / (1 + np.exp(-f)) if kind == "bce" else f


# ---- the scorer


@pytest.mark.parametrize("kind", ["mse", "bce"])
def test_the_value_of_a_text_is_that_of_its_last_token(lm, head, rows, kind):
    continuations = [[4, 4, 17], [], [9] * 20, [60]]
    found = value_scorer(lm.model, lm.params, head, kind=kind)(rows, continuations)
    expected = [by_hand(lm, head, [*p, *c], kind) for p, c in zip(rows, continuations, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_every_prefix_has_a_value_and_later_tokens_change_none(lm, head, rows):
    ids = np.array([[*rows[2], *rows[2]]], np.int32)
    found = np.asarray(token_values(lm.model, lm.params, head, ids))
    other = ids.copy()
    other[:, 12:] = (other[:, 12:] + 7) % 61
    moved = np.asarray(token_values(lm.model, lm.params, head, other))
    np.testing.assert_allclose(found[:, :12], moved[:, :12], rtol=1e-5)
    assert (np.abs(found - moved)[:, 12:] > 1e-3).all()
    one_by_one = [by_hand(lm, head, ids[0, : n + 1].tolist()) for n in range(22)]
    np.testing.assert_allclose(found[0], one_by_one, rtol=1e-4, atol=1e-5)


def test_values_depend_on_no_other_text_and_on_no_batch_size(lm, head, rows):
    continuations = [[4, 4, 17], [8], [9] * 5, [60]]
    whole = value_scorer(lm.model, lm.params, head)(rows, continuations)
    parts = value_scorer(lm.model, lm.params, head, batch_tokens=40)(rows, continuations)
    np.testing.assert_allclose(whole, parts, rtol=1e-5)
    score = value_scorer(lm.model, lm.params, head)
    alone = [score([p], [c])[0] for p, c in zip(rows, continuations, strict=True)]
    np.testing.assert_allclose(whole, alone, rtol=1e-5)


def test_other_parameters_and_numbers_of_texts_compile_nothing_again(lm, head):
    score = value_scorer(lm.model, lm.params, head)
    score([[1, 2]] * 4, [[3]] * 4)
    compiled = token_values._cache_size()
    score([[1, 2]] * 3, [[3] * n for n in (1, 5, 9)])
    other = jax.tree.map(lambda a: 2 * a, head)
    value_scorer(lm.model, lm.params, other)([[1, 2]] * 4, [[5]] * 4)
    assert token_values._cache_size() == compiled


def test_values_for_votes_are_cut_to_probabilities(lm, head):
    wide = jax.tree.map(lambda a: 5 * a, head)
    rows, none = [[i] for i in range(30)], [[]] * 30
    raw = np.array(value_scorer(lm.model, lm.params, wide)(rows, none))
    cut = np.array(value_scorer(lm.model, lm.params, wide, clip=True)(rows, none))
    assert raw.min() < 0 and raw.max() > 1
    np.testing.assert_allclose(cut, np.clip(raw, 0, 1))


def test_what_cannot_be_scored_is_refused(lm, head):
    with pytest.raises(ConfigError, match="kind='mea'"):
        value_scorer(lm.model, lm.params, head, kind="mea")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"\(32, 2\) must be \(32, 1\)"):
        value_scorer(lm.model, lm.params, init_scalar_head(jax.random.key(0), 32, 2))
    with pytest.raises(ConfigError, match="batch_tokens=0"):
        value_scorer(lm.model, lm.params, head, batch_tokens=0)
    with pytest.raises(ConfigError, match=r"97 tokens, .* max_positions=96"):
        value_scorer(lm.model, lm.params, head)([[1]], [[2] * 96])


# ---- searches


def test_best_of_n_and_votes_go_by_the_final_value(lm, head, prompts, rows):
    draws = Generator(lm.model, lm.params, 6, transform=temperature(1.5))
    score = value_scorer(lm.model, lm.params, head, kind="bce")
    best = best_of_n(draws, prompts, score, n=4)
    for row, own, index, scores in zip(rows, best.candidates, best.index, best.scores, strict=True):
        expected = [by_hand(lm, head, [*row, *ids], "bce") for ids in own]
        np.testing.assert_allclose(scores, expected, rtol=1e-4)
        assert index == np.argmax(expected)
    votes = self_consistency(draws, prompts, lambda ids: ids[-1] % 2, n=4, weigh=score)
    for own, found, scores in zip(votes.candidates, votes.votes, best.scores, strict=True):
        totals = Counter()
        for ids, value in zip(own, scores, strict=True):
            totals[ids[-1] % 2] += value
        assert found.answer == max(totals, key=totals.__getitem__)


def test_step_searches_take_the_value_of_a_steps_last_token(lm, head, prompts, rows):
    steps = Generator(lm.model, lm.params, 3, transform=temperature(1.5), stop=on_tokens([13]))
    score = value_scorer(lm.model, lm.params, head)
    searches = (
        step_beam(steps, prompts, score, beams=2, expand=2, max_steps=3, ends=[0]),
        rebase(steps, prompts, score, budget=4, max_steps=3, ends=[0]),
    )
    for found in searches:
        for row, paths in zip(rows, found.paths, strict=True):
            assert [path.value for path in paths] == sorted((p.value for p in paths), reverse=True)
            for path in paths:
                expected = [by_hand(lm, head, [*row, *path.tokens[:n]]) for n in path.steps]
                np.testing.assert_allclose(path.rewards, expected, rtol=1e-4, atol=1e-5)
                assert path.value == path.rewards[-1]


# ---- a tree that is known


@dataclass(frozen=True, eq=False)
class AllChildren(Generator):
    """Continues the j-th of equal rows by child j, and by the end at the leaves."""

    def __call__(self, rows, seeds, *, samples=1):
        seen = Counter()
        tokens = []
        for row in rows:
            depth = len(row) - 1
            tokens.append([END] if depth == DEPTH else [seen[tuple(row)] % CHILDREN])
            seen[tuple(row)] += 1
        count = len(tokens)
        return Drawn(tokens, np.ones(count, bool), np.zeros(count), Cost(count, 1))


def exact_values(right):
    """Value of each prefix of leaves when every child is as likely as its siblings."""
    leaves = list(itertools.product(range(CHILDREN), repeat=DEPTH))
    outcome = dict(zip(leaves, right, strict=True))
    return lambda path: np.mean(
        [outcome[leaf] for leaf in leaves if leaf[: len(path)] == tuple(path)]
    )


def searched(generator, value, beams, expand, seed=0):
    def score(prompts, continuations):
        return [value([i for i in ids if i != END][:DEPTH]) for ids in continuations]

    return step_beam(
        generator,
        Prompts.of([[5]]),
        score,
        beams=beams,
        expand=expand,
        max_steps=DEPTH + 1,
        ends=[END],
        seed=seed,
    )


@pytest.fixture(scope="module")
def uniform(table):
    """A generator of children at random, and of ends for ever."""
    p = np.zeros((6, 6))
    p[:, :CHILDREN] = 1 / CHILDREN
    return Generator(*table(p), max_new_tokens=1)


@pytest.mark.parametrize("seed", range(12))
def test_a_beam_of_one_over_all_children_ends_right_where_it_can(uniform, seed):
    rng = np.random.default_rng(seed)
    right = rng.random(CHILDREN**DEPTH) < (0.0 if seed == 0 else 0.05)
    right[rng.integers(len(right))] |= seed > 0  # the root's value is above 0
    value = exact_values(right)
    everything = AllChildren(uniform.model, uniform.params, 1)
    found = searched(everything, value, beams=1, expand=CHILDREN)
    (path,) = found.finished
    assert path is not None and len(path.tokens) == DEPTH + 1
    assert path.value == (1.0 if seed else 0.0)
    assert found.paths[0] == [path]


def test_with_sampled_children_it_may_not(uniform):
    """One right leaf among 27; ends are drawn no more than children, so that all are cut."""
    value = exact_values(np.arange(CHILDREN**DEPTH) == 13)
    ended = [
        searched(uniform, value, beams=1, expand=CHILDREN, seed=seed).paths[0][0].tokens[:DEPTH]
        for seed in range(20)
    ]
    right = [tokens == (1, 1, 1) for tokens in ended]
    assert any(right) and not all(right)


def test_unfinished_paths_are_told_apart_from_the_best_finished_one(uniform):
    value = exact_values(np.ones(CHILDREN**DEPTH))
    found = searched(uniform, value, beams=2, expand=2)
    assert found.finished == [None]
    everything = AllChildren(uniform.model, uniform.params, 1)
    found = searched(everything, value, beams=3, expand=CHILDREN)
    best = found.finished[0]
    assert best is found.paths[0][0]
    low = dataclasses.replace(best, finished=False, value=2.0)
    assert dataclasses.replace(found, paths=[[low, best]]).finished == [best]
    ended = [path for path in found.paths[0] if path.finished]
    answer = vote([path.tokens[0] for path in ended], [path.value for path in ended]).answer
    assert answer == best.tokens[0]
