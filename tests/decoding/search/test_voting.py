import numpy as np
import pytest

from tokjax.decoding import Prompts
from tokjax.decoding.search import Generator, self_consistency, vote
from tokjax.errors import DataError


def test_weights_decide_and_equal_answers_go_to_the_earliest():
    answers = ["A", "A", "B", "B", "C"]
    weighted = vote(answers, [0.2, 0.2, 0.45, 0.3, 0.9])
    assert weighted.answer == "C" and weighted.index == 4
    assert weighted.totals == pytest.approx({"A": 0.4, "B": 0.75, "C": 0.9})
    plain = vote(answers)
    assert plain.answer == "A" and plain.index == 0
    assert plain.totals == {"A": 2, "B": 2, "C": 1}
    assert vote(answers[::-1]).answer == "B"


def test_candidates_without_an_answer_have_no_vote_and_are_counted():
    found = vote([None, 7, None, 8, 8])
    assert (found.answer, found.index, found.unparsed) == (8, 3, 2)
    nothing = vote([None, None])
    assert (nothing.answer, nothing.index, nothing.unparsed) == (None, -1, 2)
    # 0, "" and False are answers.
    assert vote([0, None]).answer == 0 and vote(["", None]).answer == ""


def test_weights_of_no_use_are_refused():
    for weights in ([1.0], [1.0, np.nan], [1.0, np.inf]):
        with pytest.raises(DataError, match="must be 2 finite numbers"):
            vote(["A", "B"], weights)


def test_the_most_frequent_answer_wins_over_the_likeliest_text(table):
    # Token 1 is the likeliest single text; the answer "even" has more mass: .3 + .3.
    generator = Generator(*table([[0.3, 0.4, 0.3]] * 3), max_new_tokens=1)
    prompts = Prompts.of([[0], [1], [2]])
    even = lambda ids: ids[0] % 2 == 0  # noqa: E731
    found = self_consistency(generator, prompts, even, n=200)
    assert [each.answer for each in found.votes] == [True] * 3
    for b in range(3):
        assert sum(found.votes[b].totals.values()) == 200
        assert even(found.candidates[b][found.index[b]])
        assert found.answers[b] == [even(ids) for ids in found.candidates[b]]
    assert found.cost.tokens == 600
    # A verifier that trusts token 1 alone turns the vote.
    weighed = self_consistency(
        generator, prompts, even, n=200, weigh=lambda p, c: [float(ids == [1]) for ids in c]
    )
    assert [each.answer for each in weighed.votes] == [False] * 3
    assert weighed.candidates == found.candidates


def test_a_prompt_whose_texts_all_lack_an_answer_has_none(table):
    generator = Generator(*table([[0.5, 0.5]] * 2), max_new_tokens=2)
    found = self_consistency(generator, Prompts.of([[0]]), lambda ids: None, n=3)
    assert found.votes[0].answer is None and found.index.tolist() == [-1]
    assert found.votes[0].unparsed == 3
