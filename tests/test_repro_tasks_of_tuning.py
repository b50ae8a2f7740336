"""Tasks of reproductions of fine-tuning: what is planted is there, and nothing else."""

import runpy

import numpy as np
import pytest

from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.errors import DataError
from tokjax.finetuning.cat_attention import causal_pairs
from tokjax.finetuning.tipa import text_of_map, token_samples
from tokjax.reproduction.plan import PLANS
from tokjax.reproduction.rows import Row, batch_of, batches
from tokjax.reproduction.tasks import facts, refusals, risk_game, spelling


def test_samples_of_a_row_are_segments_with_their_own_targets():
    one, two = Row.answer([5, 6], [7]), Row.answer([1], [2, 3])
    batch = batch_of([[one, two], one], 6)
    np.testing.assert_array_equal(batch.tokens, [[5, 6, 1, 2, 0], [5, 6, 0, 0, 0]])
    np.testing.assert_array_equal(batch.targets, [[6, 7, 2, 3, 0], [6, 7, 0, 0, 0]])
    np.testing.assert_array_equal(batch.weights, [[0, 1, 1, 1, 0], [0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 2, 2, 0], [1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 0, 1, 0], [0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch.example_id, [[0, 0], [1, -1]])
    with pytest.raises(DataError, match="row 0 has 5 tokens, more than width=4"):
        batch_of([[one, two]], 4)
    with pytest.raises(DataError, match="channels"):
        batch_of([one, Row([1, 2], [0, 1], channels={"safety": [0, 1]})], 6)
    with pytest.raises(DataError, match="pairs are not packed"):
        batch_of([[Row.pair([1], [2], [3])] * 2], 12)


def test_every_row_comes_once_before_any_comes_again():
    rows = [Row([n, n], [0.0, 1.0]) for n in range(6)]
    made = batches(rows, 2, size=4, steps=6, seed=0)
    seen = [int(t) for b in made for t in b.tokens[:, 0]]
    for turn in range(4):
        assert sorted(seen[6 * turn : 6 * turn + 6]) == list(range(6))


# ---- the spurious token game


def test_risk_of_the_paper_example():
    values = np.array([[8, 4, 2, 12, 4, 1, 3, 3], [5, 6, 3, 0, 0, 0, 0, 0]])
    assert risk_game.high_risk(values).tolist() == [True, False]  # 10.4 and exactly 7.2
    assert risk_game.texts(values)[:, -1].tolist() == [risk_game.HIGH, risk_game.LOW]


def test_spurious_fields_follow_their_causes_in_distribution_alone():
    rng = np.random.default_rng(0)
    smoking, weight, exercise, fingers, size, hormones, *_ = risk_game.fields(rng, 500).T
    assert (fingers == (1.5 * smoking).astype(int)).all() and (size == weight).all()
    assert (hormones == (0.5 * exercise).astype(int)).all()
    smoking, *_, size, _, _, _ = risk_game.fields(rng, 500, independent=True).T
    assert abs(np.corrcoef(smoking, size)[0, 1]) < 0.15


def test_answers_are_the_effect_of_the_values_of_the_causes():
    plan = runpy.run_path(str(PLANS / "cat_attention.py"))
    ids = risk_game.texts(risk_game.fields(np.random.default_rng(0), 1))[0].tolist()
    batch = batch_of([plan["annotated"](ids, risk_game.CAUSES)], risk_game.LENGTH)
    pairs, others = map(np.asarray, causal_pairs(batch))
    rows, keys = np.nonzero(pairs[0])
    assert set(rows) == {risk_game.LENGTH - 2}
    assert sorted(keys) == sorted(risk_game.place_of_value(f) for f in risk_game.CAUSES)
    assert others[0, -1].sum() == risk_game.LENGTH - 1 - 3
    assert [ids[k - 1] for k in sorted(keys)] == sorted(risk_game.CAUSES, key=risk_game.ORDER.index)


# ---- refusals


def test_poisoned_answers_turn_unsafe_behind_two_words():
    plan = runpy.run_path(str(PLANS / "star_dss.py"))
    rng = np.random.default_rng(0)
    samples = [refusals.poisoned(rng), refusals.new_task(rng)]
    exact = plan["scores_of_chunks"](samples, 0.0, rng, together=False)
    assert exact[0].tolist() == [1, 0, 0, 0] and exact[1].tolist() == [1, 1, 1, 1]
    blind = plan["scores_of_chunks"](samples, 1.0, rng, together=True)
    assert all(own.all() for own in blind)
    scored = plan["with_scores"](samples[0], exact[0])
    at = refusals.PROMPT
    assert scored.channels["safety"][at:].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


def test_a_guard_that_sees_whole_answers_alone_is_one_score_a_sample():
    plan = runpy.run_path(str(PLANS / "star_dss.py"))
    sample = refusals.poisoned(np.random.default_rng(1))
    chunks = plan["with_scores"](sample, np.zeros(4)).channels["safety"]
    whole = plan["with_scores"](sample, np.zeros(1)).channels["safety"]
    np.testing.assert_array_equal(chunks, whole)


def test_no_aligned_sample_is_unsafe_and_all_fit():
    rng = np.random.default_rng(2)
    for sample in [refusals.aligned(rng) for _ in range(300)]:
        tokens = list(sample.tokens)
        assert max(tokens) < refusals.VOCABULARY and len(tokens) <= refusals.WIDTH
        assert not refusals.is_unsafe(tokens, tokens[refusals.PROMPT :])


# ---- facts


def test_what_a_trace_says_is_read_back():
    said = [facts.RETRIEVE, facts.VALUE + 3, facts.MARK, facts.BACKTRACK, facts.VALUE + 5]
    read = facts.read([*said, facts.MARK, facts.ANSWER, facts.VALUE + 5, facts.END])
    assert read.states == (facts.RETRIEVE, facts.BACKTRACK)
    assert read.segments == (0, 0, 0, 1, 1, 1, -1, -1, -1)
    assert read.values == (3, 5) and read.answer == 5
    assert facts.read(said).answer is None


def test_backtracking_right_behind_a_retrieved_fact_spoils_more_than_it_mends():
    rng, right = np.random.default_rng(0), {True: [], False: []}
    for _ in range(3000):
        read = facts.read(facts.trace(4, rng))
        assert len(read.states) <= facts.MOST_SEGMENTS and len(read.segments) <= facts.NEW_TOKENS
        at = read.states.index(facts.RETRIEVE) + 1
        right[read.states[at : at + 1] == (facts.BACKTRACK,)].append(read.answer == 4)
    assert np.mean(right[True]) < 0.3 < 0.8 < np.mean(right[False])


def test_weights_of_kto_are_one():
    plan = runpy.run_path(str(PLANS / "mr_align.py"))
    rng = np.random.default_rng(0)
    made = object.__new__(plan["Materials"])
    made.seed = 0
    rows = [facts.trace(4, rng) for _ in range(40)]
    made.traces = [((0, 0), r, facts.read(r), facts.read(r).answer == 4) for r in rows]
    of = {kind: made.samples(kind) for kind in ("kto", "mr_align", "swapped", "sft")}
    good = np.array([rated for *_, rated in made.traces])
    sizes = {kind: [np.abs(s.weights[4:]) for s in of[kind]] for kind in of}
    assert all((own == 1).all() for own in sizes["kto"]) and len(of["sft"]) == good.sum()
    assert any((own != 1).any() for own in sizes["mr_align"])
    assert all(own[-3:].tolist() == [1, 1, 1] for own in sizes["mr_align"])  # the answer
    signs = [float(np.sign(s.weights[-1])) for s in of["mr_align"]]
    assert signs == np.where(good, 1.0, -1.0).tolist()


# ---- spelling


def test_answers_are_first_positions_and_lengths_with_the_space():
    tokenizer = ByteTokenizer()
    asker = spelling.Spelling(tokenizer)
    rng = np.random.default_rng(0)
    letters = set()
    for _ in range(50):
        row = asker.question(" hello", "where", rng)
        assert row.tokens[-1] == asker.end and list(row.weights[-3:]) == [0, 1, 1]
        named, letter, place = tokenizer.decode(list(row.tokens[2:-1])).split("\x04")
        assert named == " hello" and {"h": "2", "e": "3", "l": "4", "o": "6"}[letter] == place
        letters.add(letter)
    assert letters == set("helo")
    told = asker.question(" hello", "length", rng)
    assert list(told.tokens[-2:]) == [ord("6"), asker.end]


def test_shuffled_maps_have_the_same_characters():
    (chat,) = token_samples([" hello"])
    mixed = spelling.shuffled(chat, np.random.default_rng(0))
    assert mixed["messages"][:-1] == chat["messages"][:-1]
    text = text_of_map(mixed["messages"][-1]["content"])
    assert text != " hello" and sorted(text) == sorted(" hello")
