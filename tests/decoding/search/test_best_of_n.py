import itertools
import math

import jax
import numpy as np
import pytest

from tokjax.decoding import Prompts, greedy, on_tokens, temperature
from tokjax.decoding.search import (
    Generator,
    best_of_n,
    best_of_n_kl_bound,
    best_of_n_law,
    each,
    pass_at_k,
    rejection_sampling,
)
from tokjax.decoding.search.drawing import lists
from tokjax.errors import ConfigError, DataError
from tokjax.training.compiles import CompileWatch

P = np.array([0.5, 0.3, 0.2])


@pytest.fixture(scope="module")
def coin(table):
    """Draws one token of three."""
    return Generator(*table([P] * 3), max_new_tokens=1)


@pytest.fixture(scope="module")
def generator(lm):
    return Generator(
        lm.model, lm.params, 8, transform=temperature(1.5), stop=on_tokens(range(0, 61, 7))
    )


def mean_of_ids(prompts, continuations):
    return [np.mean(ids) for ids in continuations]


def test_the_law_of_the_best_of_n_is_exact():
    law = best_of_n_law(P, np.array([1.0, 2.0, 3.0]), 3)
    np.testing.assert_allclose(law, [0.125, 0.387, 0.488], atol=1e-9)
    kl = (law * np.log(law / P)).sum()
    assert kl == pytest.approx(0.3606, abs=5e-5)
    assert best_of_n_kl_bound(3) == pytest.approx(0.4319, abs=5e-5)
    assert kl <= best_of_n_kl_bound(3)


@pytest.mark.parametrize("scores", [[0, 1, 2], [2, 0, 1], [1, 1, 0], [5, 5, 5]])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_law_equals_enumeration_with_ties_to_the_earliest(scores, n):
    expected = np.zeros(3)
    for draws in itertools.product(range(3), repeat=n):
        best = max(draws, key=lambda x: scores[x])  # the first of equals
        expected[best] += np.prod(P[list(draws)])
    law = best_of_n_law(P, np.array(scores), n)
    np.testing.assert_allclose(law, expected, atol=1e-12)
    assert (law * np.log(law / P)).sum() <= best_of_n_kl_bound(n) + 1e-12
    if n == 1 or scores == [5, 5, 5]:
        np.testing.assert_allclose(law, P)  # a verifier that knows nothing changes nothing


def test_the_best_of_n_is_drawn_by_its_law(coin):
    many = 4000
    found = best_of_n(coin, Prompts.of([[0]] * many), each(lambda ids: ids[0]), n=3)
    counts = np.bincount([ids[0] for ids in found.tokens], minlength=3) / many
    np.testing.assert_allclose(counts, [0.125, 0.387, 0.488], atol=5 * math.sqrt(0.25 / many))


def test_the_best_has_the_largest_score_and_the_first_of_equals_wins(generator, rows, prompts):
    found = best_of_n(generator, prompts, mean_of_ids, n=5)
    for b, candidates in enumerate(found.candidates):
        scores = mean_of_ids(None, candidates)
        np.testing.assert_allclose(found.scores[b], scores)
        assert found.tokens[b] == candidates[found.index[b]]
        assert found.index[b] == int(np.argmax(scores))
    lengths = [len(ids) for candidates in found.candidates for ids in candidates]
    assert found.cost.tokens == sum(lengths) and found.cost.forwards == max(lengths)
    assert min(lengths) < max(lengths)
    flat = best_of_n(generator, prompts, each(lambda ids: 0.0), n=5)
    assert flat.index.tolist() == [0] * 4
    assert flat.candidates == found.candidates
    # Impossible candidates are never chosen while there is another.
    last = best_of_n(generator, prompts, lambda p, c: [-np.inf] * 19 + [0.0], n=5)
    assert last.index.tolist() == [0, 0, 0, 4]


def test_the_scorer_sees_each_candidates_own_prompt(generator, rows, prompts):
    seen = []

    def score(prompts, continuations):
        seen.extend(prompts)
        return [0.0] * len(continuations)

    best_of_n(generator, prompts, score, n=2)
    assert seen == [row for row in rows for _ in range(2)]


def test_fewer_candidates_are_the_first_of_more(generator, prompts):
    few, more = (best_of_n(generator, prompts, mean_of_ids, n=n, seed=3) for n in (2, 5))
    assert [found[:2] for found in more.candidates] == few.candidates
    other = best_of_n(generator, prompts, mean_of_ids, n=2, seed=4)
    assert other.candidates != few.candidates


def test_candidates_logprobs_are_the_models(lm, generator, rows, prompts):
    found = best_of_n(generator, prompts, mean_of_ids, n=2)
    for row, candidates, logprobs in zip(rows, found.candidates, found.logprobs, strict=True):
        for ids, logprob in zip(candidates, logprobs, strict=True):
            logits = lm.run([*row, *ids])[0][len(row) - 1 : -1]
            logp = np.asarray(jax.nn.log_softmax(logits, axis=-1))
            np.testing.assert_allclose(logp[np.arange(len(ids)), ids].sum(), logprob, atol=1e-3)


def test_scores_that_are_none_are_refused(coin):
    prompts = Prompts.of([[0]])
    with pytest.raises(DataError, match=r"shape \(1,\) for 2 continuations"):
        best_of_n(coin, prompts, lambda p, c: [1.0], n=2)
    with pytest.raises(DataError, match="NaN for continuation 1"):
        best_of_n(coin, prompts, lambda p, c: [1.0, np.nan], n=2)
    with pytest.raises(ConfigError, match="n=0 must be at least 1"):
        best_of_n(coin, prompts, each(len), n=0)


def test_rejection_sampling_is_a_draw_given_that_it_is_acceptable(coin):
    many = 3000
    found = rejection_sampling(
        coin, Prompts.of([[0]] * many), lambda p, c: [ids[0] > 0 for ids in c], max_tries=40
    )
    assert found.accepted.all()
    counts = np.bincount([ids[0] for ids in found.tokens], minlength=3) / many
    np.testing.assert_allclose(counts, [0, 0.6, 0.4], atol=5 * math.sqrt(0.25 / many))
    # The number of tries is geometric with mean 1 / .5.
    assert abs(found.tries.mean() - 2) < 5 * math.sqrt(2 / many)


def test_which_try_is_accepted_does_not_depend_on_how_many_run_at_a_time(table):
    generator = Generator(*table([P] * 3), max_new_tokens=3)
    prompts = Prompts.of([[0], [1], [2], [0]])
    accept = lambda p, c: [ids[1:] == [1, 2] for ids in c]  # noqa: E731
    runs = [
        rejection_sampling(generator, prompts, accept, max_tries=11, rows=rows, seed=1)
        for rows in (None, 1, 7)
    ]
    for found in runs[1:]:
        assert found.tokens == runs[0].tokens
        assert found.tries.tolist() == runs[0].tries.tolist()
    assert runs[1].cost.tokens <= runs[0].cost.tokens
    assert runs[0].tries.max() > 1


def test_tries_end_and_prompts_without_a_text_have_none(coin):
    calls = []

    def accept(prompts, continuations):
        calls.append(len(continuations))
        return [prompt == [1] for prompt in prompts]

    found = rejection_sampling(coin, Prompts.of([[0], [1]]), accept, max_tries=3, rows=2)
    assert found.tokens[0] is None and found.tokens[1] is not None
    assert found.tries.tolist() == [3, 1]
    assert found.accepted.tolist() == [False, True]
    assert calls == [2, 2]  # one try of each, then both rows for the one that is left
    with pytest.raises(ConfigError, match="max_tries=0 must be at least 1"):
        rejection_sampling(coin, Prompts.of([[0]]), accept, max_tries=0)


def test_coverage_is_unbiased():
    assert pass_at_k(10, 3, 5) == pytest.approx(0.91667, abs=5e-6)
    assert pass_at_k(10, 0, 5) == 0 and pass_at_k(10, 6, 5) == 1
    correct = [1, 1, 0, 0, 0, 0]
    for k in (1, 2, 3):
        subsets = list(itertools.combinations(correct, k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(6, 2, k) == pytest.approx(expected)
    for wrong in ((3, 1, 4), (3, 4, 1), (3, -1, 1), (3, 1, 0)):
        with pytest.raises(ConfigError, match="must be 1 to n=3"):
            pass_at_k(*wrong)


def test_a_second_search_compiles_nothing(generator, prompts):
    best_of_n(generator, prompts, mean_of_ids, n=2)
    with CompileWatch() as watch:
        best_of_n(generator, prompts, mean_of_ids, n=2, seed=9)
        assert watch.count == 0


def test_prompts_come_back_as_lists_and_a_generator_may_be_greedy(table, rows, prompts):
    assert lists(prompts) == rows
    always = Generator(*table([P] * 3), max_new_tokens=2, sampler=greedy())
    found = best_of_n(always, Prompts.of([[2]]), each(len), n=3)
    assert found.candidates == [[[0, 0]] * 3]
