"""Beams that go where the model is confident: scores, limits, votes (arXiv 2505.20325)."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from tokjax.decoding import Prompts, on_tokens, temperature
from tokjax.decoding.search import Drawn, Generator, confident_vote, gut_search, row_seed
from tokjax.decoding.search.drawing import Cost
from tokjax.decoding.search.guided_by_gut import novelty, repeats_word
from tokjax.decoding.stops import not_before
from tokjax.errors import ConfigError, DataError

# Tokens 0 and 1 are content, 2 ends a step, 3 ends the text.
P = np.array([[0.3, 0.3, 0.3, 0.1], [0.2, 0.2, 0.5, 0.1], [0.4, 0.4, 0.0, 0.2], [0.25] * 4])
STEP, END = 2, 3
STARTS = [[0], [1], [2, 1]]


@pytest.fixture(scope="module")
def generator(table):
    return Generator(*table(P), max_new_tokens=3, stop=on_tokens([STEP]))


@pytest.fixture(scope="module")
def prompts():
    return Prompts.of(STARTS)


def probabilities(path, start):
    tokens = (start, *path.tokens)
    return [P[a, b] for a, b in itertools.pairwise(tokens)]


def last_step(path):
    starts = (0, *path.steps)[:-1]
    return path.tokens[starts[-1] :]


def test_confidence_is_the_arithmetic_mean_and_novelty_counts_repeats():
    p = [0.9, 0.5, 0.8]
    assert np.mean(p) == pytest.approx(0.73333, abs=1e-5)
    assert math.exp(np.mean(np.log(p))) == pytest.approx(0.71138, abs=1e-5)  # is not meant
    assert np.mean(p) + 0.5 * novelty([7, 1, 2], {1, 2}) == pytest.approx(0.90, abs=1e-9)
    assert novelty([7, 7, 1], {1}) == pytest.approx(2 / 3)
    assert novelty([], {1}) == 0


def test_a_generator_tells_confidences(generator):
    drawn = generator([[0]] * 4, [1, 2, 3, 4])
    for tokens, confidence in zip(drawn.tokens, drawn.confidences, strict=True):
        chain = (0, *tokens)
        p = [P[a, b] for a, b in itertools.pairwise(chain)]
        assert confidence == pytest.approx(np.mean(p), abs=1e-5)


def test_beams_keep_the_best_of_their_own_candidates(generator, prompts):
    found = gut_search(
        generator, prompts, candidates=6, width=3, max_steps=4, ends=[END], weight=0.25, seed=5
    )
    for start, all_candidates, kept in zip(STARTS, found.candidates, found.kept, strict=True):
        assert len(all_candidates) == 6
        assert len(kept) == 2
        for beam in range(2):
            group = all_candidates[3 * beam : 3 * beam + 3]
            before = {path.tokens[: len(path.tokens) - len(last_step(path))] for path in group}
            assert len(before) == 1  # one prefix a beam
            (before,) = before
            scores = []
            for path in group:
                p = probabilities(path, start[-1])[len(before) :]
                assert path.value == path.confidences[-1] or path.value == -1
                assert path.confidences[-1] == pytest.approx(np.mean(p), abs=1e-5)
                new = novelty(last_step(path), {*start, *before})
                scores.append(path.confidences[-1] + 0.25 * new)
            assert kept[beam] == group[int(np.argmax(scores))]
            assert kept[beam].finished or len(kept[beam].steps) == 4


def test_one_candidate_a_beam_is_plain_sampling(generator, prompts):
    found = gut_search(generator, prompts, candidates=2, width=1, max_steps=3, ends=[END], seed=3)
    whole = dataclasses.replace(generator, stop=on_tokens([STEP, END]))
    for b, start in enumerate(STARTS):
        for j, path in enumerate(found.kept[b]):
            tokens, place, live = [], j, [0, 1]
            for turn in range(3):
                if j not in live:
                    break
                place = live.index(j)
                step = whole([[*start, *tokens]], [row_seed(3, b, turn, place)]).tokens[0]
                tokens += step
                others = found.kept[b][1 - j]
                live = [i for i in live if i == j or len(others.steps) > turn + 1]
                if step[-1] == END:
                    break
            assert path.tokens == tuple(tokens)


def test_a_single_beam_goes_up_with_more_candidates(generator):
    many = Prompts.of([[0]] * 60)

    def mean(width):
        options = {"max_steps": 3, "ends": [END], "weight": 0.0}
        found = gut_search(generator, many, candidates=width, width=width, **options)
        return np.mean([np.mean(own[0].confidences) for own in found.kept])

    assert mean(8) > mean(1) + 0.05


def test_of_identical_candidates_the_first_wins(table, prompts):
    certain = np.eye(4)[[1, 2, 3, 3]]
    generator = Generator(*table(certain), max_new_tokens=3, stop=on_tokens([STEP]))
    found = gut_search(
        generator, prompts, candidates=4, width=2, max_steps=3, ends=[END], weight=0.0
    )
    for candidates, kept in zip(found.candidates, found.kept, strict=True):
        assert kept[0] is candidates[0]
        assert kept[1] is candidates[2]


def test_turns_have_generators_of_their_own(table, prompts):
    likely = np.array(
        [[0.1, 0.6, 0.2, 0.1], [0.1, 0.2, 0.6, 0.1], [0.5, 0.2, 0.1, 0.2], [0.25] * 4]
    )
    cold = Generator(
        *table(likely), max_new_tokens=3, stop=on_tokens([STEP]), transform=temperature(1e-4)
    )
    hot = dataclasses.replace(cold, transform=temperature(1.0))
    last = dataclasses.replace(cold, stop=None, max_new_tokens=6)
    options = {"candidates": 4, "width": 2, "max_steps": 3, "ends": [END]}
    one = gut_search(hot, prompts, later=cold, first_turns=0, seed=1, **options)
    two = gut_search(cold, prompts, seed=2, **options)
    assert [[p.tokens for p in own] for own in one.kept] == [
        [p.tokens for p in own] for own in two.kept
    ]
    found = gut_search(hot, prompts, last=last, closing=[1, 1], **options)
    for own in found.kept:
        for path in own:
            if len(path.steps) == 3:
                at = path.steps[1]
                assert path.tokens[at : at + 2] == (1, 1)
                assert path.finished or len(path.tokens) == at + 8


def test_solved_and_circling_beams_end(generator, table, prompts):
    found = gut_search(
        generator,
        prompts,
        candidates=2,
        width=2,
        max_steps=5,
        ends=[END],
        solved=lambda ids: STEP in ids,
    )
    for own in found.kept:
        assert len(own[0].steps) == 1 or STEP not in own[0].tokens[: own[0].steps[-2]]
    endless = np.array([[0.5, 0.5, 0, 0]] * 4)
    generator = Generator(*table(endless), max_new_tokens=1)
    for circling, steps in ((lambda ids: True, 51), (lambda ids: False, 55)):
        found = gut_search(
            generator,
            Prompts.of([[0]]),
            candidates=2,
            width=2,
            max_steps=55,
            ends=[END],
            circling=circling,
        )
        assert len(found.kept[0][0].steps) == steps
    found = gut_search(
        generator,
        Prompts.of([[0]]),
        candidates=2,
        width=2,
        max_steps=52,  # turn 50 is one of the last three
        ends=[END],
        circling=lambda ids: True,
    )
    assert len(found.kept[0][0].steps) == 52


def test_a_word_that_repeats_is_noticed():
    circling = repeats_word(lambda ids: "".join(map(chr, ids)))
    ids = lambda text: [ord(c) for c in text]  # noqa: E731
    assert circling(ids("Wait, wait, no wait. wait"))
    assert not circling(ids("wait wait wait"))
    assert not circling(ids("wait wait wait wait" + "." * 150))


@pytest.mark.parametrize(("how", "answer"), [("majority", "B"), ("sum", "A"), ("mean", "A")])
def test_votes(how, answer):
    found = confident_vote(["A", "B", "B"], [0.9, 0.3, 0.4], how)
    assert found.answer == answer
    totals = {"majority": (1, 2), "sum": (0.9, 0.7), "mean": (0.9, 0.35)}[how]
    assert tuple(found.totals.values()) == pytest.approx(totals)


def test_candidates_without_confidence_do_not_vote():
    assert confident_vote(["B", "B", "A"], [0.05, -1.0, 0.2], "majority").answer == "A"
    assert confident_vote(["B", "B", "A"], [0.05, 0.05, 0.02], "majority").answer == "B"
    assert confident_vote([None, None], [0.5, 0.5]).answer is None
    with pytest.raises(ConfigError, match="'majority'"):
        confident_vote(["A"], [1.0], "majorty")
    with pytest.raises(DataError, match="2 scores for 1"):
        confident_vote(["A"], [1.0, 1.0])


def test_a_stop_may_have_to_wait(generator):
    longer = dataclasses.replace(generator, stop=not_before(on_tokens([STEP]), 3), max_new_tokens=6)
    lengths = [len(t) for t in longer([[1]] * 40, list(range(40))).tokens]
    assert min(lengths) == 3
    assert max(lengths) > 3
    with pytest.raises(ConfigError, match="tokens=-1"):
        not_before(on_tokens([STEP]), -1)


def test_what_cannot_be_is_refused(generator, prompts):
    options = {"max_steps": 3, "ends": [END]}
    with pytest.raises(ConfigError, match="a multiple of width=2"):
        gut_search(generator, prompts, candidates=3, width=2, **options)
    with pytest.raises(ConfigError, match="width=0"):
        gut_search(generator, prompts, candidates=3, width=0, **options)
    with pytest.raises(ConfigError, match="exceeds max_positions"):
        gut_search(generator, prompts, candidates=2, width=2, max_steps=30, ends=[END])

    class Silent(Generator):
        def __call__(self, rows, seeds, *, samples=1):
            return Drawn([[0]] * len(rows), np.ones(len(rows), bool), np.zeros(len(rows)), Cost())

    silent = Silent(generator.model, generator.params, 3)
    with pytest.raises(DataError, match="does not tell"):
        gut_search(silent, prompts, candidates=2, width=2, **options)
