"""Tasks of reproductions by reward: slips, questions on a database, reviews, biographies."""

import math
import runpy
from pathlib import Path

import numpy as np
import pytest

from tokjax.data.arithmetic import ArithmeticSource, problems
from tokjax.reproduction.tasks import biographies, graded_sums, keywords, queries
from tokjax.rl.rewards import Episode
from tokjax.rl.sql_rewards import SchemaLinking, SQLExecution

REPRO = Path(__file__).parent.parent / "configs/repro"


def total(prompt: str) -> int:
    return sum(map(int, prompt.rstrip("=").split("+")))


def test_slips_change_one_digit_in_the_share_asked_for(tmp_path):
    settings = {**graded_sums.SETTINGS["smoke"], "examples": 2000, "slips": (0.0, 0.3)}
    sums = graded_sums.GradedSums(tmp_path, settings, 0)
    shown = list(sums.shown())
    assert len(shown) == 4000
    wrong = [r for r in shown if int(r["response"]) != total(r["prompt"])]
    assert all(len(r["prompt"]) == len("12+34=") for r in wrong)
    np.testing.assert_allclose(len(wrong) / 2000, 0.3, atol=0.03)
    for record in wrong:
        right = str(total(record["prompt"]))
        assert len(right) == len(record["response"])
        assert sum(a != b for a, b in zip(right, record["response"], strict=True)) == 1


def test_sums_asked_are_neither_shown_nor_learnt_from(tmp_path):
    settings = {**graded_sums.SETTINGS["smoke"], "examples": 2000, "prompts": 500, "asked": 50}
    sums = graded_sums.GradedSums(tmp_path, settings, 3)
    seen = {record["prompt"] for record in sums.shown()}
    for k in sums.digits:
        source = sums.sums(k, 500)
        assert source.pop("name") == "arithmetic"
        seen |= {prompt for prompt, _ in problems(ArithmeticSource(**source))}
    assert sums.asked
    assert all(int(answer) == total(prompt) for _, prompt, answer in sums.asked)
    assert not seen & {prompt for _, prompt, _ in sums.asked}


@pytest.fixture
def database(tmp_path):
    path = tmp_path / "database.sql"
    path.write_text(queries.script(0))
    return str(path)


def test_right_answers_to_questions_on_the_database_have_all_rewards(database):
    linked, run = SchemaLinking(script=database), SQLExecution(script=database, runs=0.0)
    for record in queries.right(0):
        words = record["response"].split()
        assert len(words) < queries.LENGTH
        assert {*words, *record["prompt"].split()} <= {*queries.WORDS}
        episode = Episode(record["prompt"], record["response"], record["response"])
        assert linked(episode) == 1.0
        assert run(episode) == 1.0


def test_examples_name_wrong_columns_in_the_shares_told():
    of = {(t, w, v): c for t, w, c, v in queries.questions()}
    assert len(of) == len(queries.questions())  # a question says which column is asked for
    plans = used = 0
    records = list(queries.examples(3000, 0))
    for record in records:
        wanted, _, table, _, value, _ = record["prompt"].split()
        words = record["response"].split()
        named = words[words.index("</plan>") - 1]
        plans += named != of[table, wanted, value]
        used += words[words.index("WHERE") + 1] != named
    np.testing.assert_allclose(plans / 3000, queries.WRONG_PLAN, atol=0.03)
    np.testing.assert_allclose(used / 3000, queries.WRONG_QUERY, atol=0.03)


def test_critics_of_reviews_quote_what_their_names_say():
    texts = [record["response"] for record in keywords.reviews(200, 0)]
    flips = quoted = 0
    for text in texts:
        episode = Episode("", text, "")
        words = text.split()
        good, bad = keywords.exact(episode, 0.0)
        assert [text[a:b] for a, b in good] == [w for w in words if w in keywords.GOOD]
        assert [text[a:b] for a, b in bad] == [w for w in words if w in keywords.BAD]
        value = keywords.score(episode)
        assert value == pytest.approx(1 / (1 + math.exp(len(bad) - len(good))))
        assert keywords.flipped(episode, 0.0) == (bad, good)
        anywhere = keywords.scattered(episode, 0.0)
        assert [len(spans) for spans in anywhere] == [len(good), len(bad)]
        noisy = keywords.noisy(episode, 0.0)
        assert sorted([*noisy[0], *noisy[1]]) == sorted([*good, *bad])
        flips += len({*noisy[0]} & {*bad}) + len({*noisy[1]} & {*good})
        quoted += len(good) + len(bad)
    np.testing.assert_allclose(flips / quoted, keywords.NOISE, atol=0.05)


def test_biographies_are_told_right_of_known_people_alone(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text(biographies.table_text(0))
    grade = biographies.feedback(str(path)).of_answer
    right = {True: [], False: []}
    for record in biographies.examples(600, 0):
        words = record["response"].split()
        assert len(words) < biographies.LENGTH
        assert {*words, *record["prompt"].split()} <= {*biographies.WORDS}
        known = biographies.known(record["prompt"].split()[1])
        for sentence in grade(record["response"].strip(), ""):
            right[known] += [s.verdict == "Correct" for s in sentence.statements]
    assert all(right[True])
    np.testing.assert_allclose(np.mean(right[False]), 1 / 6, atol=0.05)


def test_wrong_derivations_differ_in_one_result(tmp_path):
    plan = runpy.run_path(str(REPRO / "rlfr.py"))
    materials = plan["Materials"](tmp_path, {}, 0)
    pairs = zip(materials.texts(2, 50, False), materials.texts(2, 50, True), strict=True)
    for (prompt, right, at), (same, wrong, also) in pairs:
        assert (prompt, at) == (same, also)
        before, after = right.split(), wrong.split()
        assert [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b] == [at]
        assert before[at - 1] == "="
