"""RLFH: grades of statements and sentences become rewards of their tokens (arXiv 2406.12221)."""

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.config import resolve
from tokjax.errors import ConfigError, DataError
from tokjax.rl.bm25 import BM25, sections
from tokjax.rl.feedback import (
    FactFeedback,
    FeedbackFunction,
    Sentence,
    Statement,
    graded,
    informative,
)
from tokjax.rl.lcs import common_subsequence, common_substring
from tokjax.rl.model_feedback import ModelFeedback, read_statements, read_usefulness, read_verdict
from tokjax.rl.rewards import Episode
from tokjax.rl.rlfh import RLFH, Grading, answer_rewards, placed
from tokjax.signals.divergences import kl_estimate
from tokjax.training.config import TrainConfig
from tokjax.training.loop import train
from tokjax.training.metrics import read_metrics

ANSWER = "Paris is big. Lyon is in Peru."
WORDS = ["Paris", " is", " big", ".", " Lyon", " is", " in", " Peru", "."]
LABELS = {
    "Paris is big.": {"Paris is big.": ("Correct", "2")},
    "Lyon is in Peru.": {"Lyon is in Peru.": ("Wrong", "4")},
}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    yield
    sys.modules.pop("rewards_for_tests", None)


def ranges(pieces):
    ends = np.cumsum([len(p) for p in pieces]).tolist()
    return tuple(zip([0, *ends], ends, strict=False))


def of(labels, answer=ANSWER, pieces=WORDS, grading=None, **options):
    found = answer_rewards(answer, ranges(pieces), graded(labels), grading or Grading(), **options)
    return found.tolist()


def near(values):
    return pytest.approx(values, abs=1e-5)


def sentence(*grades, text="It is so."):
    return Sentence(text, tuple(Statement(text, v, u) for v, u in grades))


# ---------------------------------------------------------------- rewards


def test_one_sentence_with_a_right_and_a_wrong_statement():
    found, grading = sentence(("Correct", "2"), ("Wrong", "4")), Grading()
    assert grading.information_of(found) == near(1.16315)
    assert [grading.truth_of(s) for s in found.statements] == near([1.0, -2.4])
    total = sum(reward for _, _, reward in placed("It is so.", [found], grading))
    assert total == near(-0.23685)


def test_trivial_facts_do_not_pay_however_many():
    grading = Grading()
    assert grading.information_of(sentence(("Correct", "1"))) == near(-0.10536)
    assert grading.information_of(sentence(*[("Correct", "1")] * 20)) == near(-2.30259)


def test_truth_lies_at_last_words_and_information_at_stops():
    assert of(LABELS) == near([0, 0, 1, 0.69315, 0, 0, 0, -2.4, 0.78846])


def test_coarser_grains_pay_the_same_later():
    by_sentence = of(LABELS, granularity="sentence")
    assert by_sentence == near([0, 0, 0, 1.69315, 0, 0, 0, 0, 0.78846 - 2.4])
    paragraph = of(LABELS, granularity="paragraph")
    assert paragraph == near([0] * 8 + [sum(by_sentence)])
    assert sum(of(LABELS)) == near(sum(paragraph))


def test_the_order_of_statements_does_not_matter():
    several = {"a is b.": {"a": ("Correct", "5"), "is b": ("Wrong", "3"), "b": ("Vague", "1")}}
    turned = {"a is b.": dict(reversed(several["a is b."].items()))}
    pieces = ["a", " is", " b", "."]
    found = of(several, "a is b.", pieces)
    assert found == near(of(turned, "a is b.", pieces))
    assert found[0] == near(1.3)


def test_equal_sentences_lie_at_the_first_place():
    answer, pieces = "It is. It is.", ["It", " is", ".", " It", " is", "."]
    twice = [*graded({"It is.": {"It is": ("Correct", "2")}})] * 2
    found = answer_rewards(answer, ranges(pieces), twice, Grading())
    assert found.tolist() == near([0, 2.0, 2 * 0.69315, 0, 0, 0])


def test_a_statement_in_other_words_lies_at_its_last_common_character():
    labels = {"Lyon, a city, is in Peru.": {"Lyon is in Peru": ("Wrong", "4")}}
    answer = "Lyon, a city, is in Peru."
    pieces = ["Lyon", ",", " a", " city", ",", " is", " in", " Peru", "."]
    assert np.flatnonzero(of(labels, answer, pieces)).tolist() == [7, 8]


def test_a_sentence_in_other_words_lies_at_what_the_answer_has_of_it():
    labels = {"Well, Lyon is in Peru": {"Lyon is in Peru": ("Wrong", "4")}}
    assert of(labels) == near([0] * 7 + [0.78846 - 2.4, 0])


def test_sentences_that_are_not_there_pay_nothing():
    other = {"Quito, by way of contrast, is high up.": {"Quito is high": ("Correct", "5")}}
    assert not any(of(other))
    assert not any(of(other, answer="", pieces=[]))
    assert of(other, least_match=0.0) != near([0] * 9)
    assert not any(of({"zzz": {"zzz": ("Correct", "5")}}, least_match=0.0))


def test_a_statement_without_a_common_character_lies_at_the_end():
    labels = {"Paris is big.": {"zzz": ("Correct", "2")}}
    assert of(labels) == near([0, 0, 0, 1.69315, 0, 0, 0, 0, 0])


def test_weights_of_nothing_pay_nothing():
    assert not any(of(LABELS, grading=Grading(truth_weight=0.0, information_weight=0.0)))


def test_the_settings_of_the_published_run():
    truth, useful = (0.45, 0.35, -1, -1.5, -1.7), (-0.2, 0.1, 0.75, 1, 1.25)
    grading = Grading(truth=truth, useful=useful, information_weight=1.2)
    found = sentence(("Correct", "5"), ("Hedged wrong", "1"))
    assert grading.information_of(found) == near(1.2 * np.log(2.05))
    assert [grading.truth_of(s) for s in found.statements] == near([0.5625, -0.3])


# ---------------------------------------------------------------- the objective


def episode(stopped=True, pieces=(*WORDS, "")):
    return Episode("", ANSWER, "", stopped=stopped, pieces=tuple(pieces), offsets=ranges(pieces))


@dataclasses.dataclass(frozen=True)
class Always:
    """Says the same of every answer."""

    said: tuple[Sentence, ...] = tuple(graded(LABELS))

    def __call__(self, episodes):
        return [list(self.said)] * len(episodes)


def test_cut_answers_are_fined_rewards_clipped_and_the_divergence_taken_off(rollout_of):
    rng = np.random.default_rng(0)
    reference = jnp.asarray(rng.normal(size=(2, 12)), jnp.float32)
    rollout = rollout_of([0, 0], [10, 10], 1, scores={"reference": reference})
    plain = RLFH(feedback=Always(), divergence=0.0)
    episodes = [episode(), episode(stopped=False)]
    found = plain.token_rewards(rollout, episodes)
    np.testing.assert_allclose(found[0, 1:10], of(LABELS), atol=1e-5)
    assert found[0, 10] == 0
    assert found[1, 10] == -1
    assert not found[:, [0, 11]].any()
    held = dataclasses.replace(plain, limit=0.75).token_rewards(rollout, episodes)
    np.testing.assert_allclose(held, np.clip(found, -0.75, 0.75))
    with_kl = dataclasses.replace(plain, divergence=0.1).token_rewards(rollout, episodes)
    kl = np.asarray(kl_estimate(-reference, "k3")) * np.asarray(rollout.mask)
    np.testing.assert_allclose(with_kl, found - 0.1 * kl, atol=1e-5)


def test_without_weights_only_the_divergence_is_paid(rollout_of):
    rollout = rollout_of([0], [10], 1, scores={"reference": jnp.full((1, 12), -0.3)})
    nothing = Grading(truth_weight=0.0, information_weight=0.0)
    objective = RLFH(feedback=Always(), grading=nothing, divergence=0.5)
    found = objective.token_rewards(rollout, [episode()])
    k3 = float(kl_estimate(jnp.float32(0.3), "k3"))
    np.testing.assert_allclose(found, np.where(rollout.mask, -0.5 * k3, 0.0), atol=1e-6)


def test_without_weights_and_divergence_it_is_ppo_without_reward_bit_for_bit(rl_run, tmp_path):
    rollouts = {"rollouts": {"group": 4, "minibatches": 2, "max_new_tokens": 3}}
    nothing = [{"name": "verifier", "weight": 0.0}]
    feedback = {"name": "function", "path": "rewards_for_tests:everything_is_wrong"}
    grading = {"truth_weight": 0.0, "information_weight": 0.0}
    trees = {
        "ppo": rollouts | {"name": "ppo", "rewards": nothing},
        "rlfh": rollouts
        | {"name": "rlfh", "feedback": feedback, "grading": grading}
        | {"divergence": 0.0, "unstopped": 0.0},
    }
    found = [
        train(rl_run(objective=tree, steps=4), tmp_path / name).state.params
        for name, tree in trees.items()
    ]
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_a_run_unlearns_what_is_wrong(rl_run, tmp_path):
    objective = {
        "name": "rlfh",
        "feedback": {"name": "function", "path": "rewards_for_tests:odd_characters_are_wrong"},
        "rollouts": {"group": 4, "minibatches": 2, "max_new_tokens": 3},
        "unstopped": 0.0,
        "value_coef": 0.1,
    }
    run = rl_run(objective=objective, steps=60, data__batch_size=32, optimizer__peak_lr=2e-2)
    assert train(run, tmp_path).finished
    table = read_metrics(tmp_path)
    told = [v for v in table["reward/token_mean"] if v is not None]
    assert np.mean(told[-3:]) > np.mean(told[:3]) + 0.3
    assert "kl_reference" in table


# ---------------------------------------------------------------- feedback


@pytest.fixture
def facts(tmp_path):
    rows = [
        {"subject": "Ada", "relation": "born", "value": "Oslo"},
        {"subject": "Ada", "relation": "job", "value": "baker"},
        {"subject": "Bo Li", "relation": "born", "value": "Rome"},
    ]
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    forms = (("born", "{subject} was born in {value}"), ("job", "{subject} works as a {value}"))
    return FactFeedback(facts=str(path), forms=forms)


def test_sentences_of_known_forms_are_compared_with_the_facts(facts):
    answer = (
        "Ada was born in Oslo. Ada works as a poet. Bo Li was born in Rome. Cy was born in Bonn. "
        "I am not sure. Who knows? Nice day."
    )
    found = facts.of_answer(answer, "Ada was born in Oslo.")
    assert [(s.text, s.statements[0].verdict, s.statements[0].usefulness) for s in found] == [
        ("Ada was born in Oslo.", "Correct", "5"),
        ("Ada works as a poet.", "Wrong", "2"),
        ("Bo Li was born in Rome.", "Correct", "2"),
        ("Cy was born in Bonn.", "Vague", "2"),
    ]
    assert facts([Episode("", "", "")]) == [[]]


def test_stops_may_be_words_of_their_own(facts):
    answer = "Ada was born in Oslo . Ada works as a poet ."
    found = facts.of_answer(answer, "Ada was born in Oslo .")
    assert [s.statements[0].verdict for s in found] == ["Correct", "Wrong"]
    pieces = [w if not k else " " + w for k, w in enumerate(answer.split())]
    paid = answer_rewards(answer, ranges(pieces), found, Grading())
    assert np.flatnonzero(paid).tolist() == [4, 5, 10, 11]


def test_a_file_of_no_facts_is_told(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text('{"subject": "Ada"}\n')
    for name in (str(path), "nowhere"):
        with pytest.raises(ConfigError, match="facts"):
            FactFeedback(facts=name, forms=(("a", "{subject} is {value}"),)).of_answer("a is b", "")


def test_unknown_verdicts_and_grades_are_refused():
    with pytest.raises(DataError, match="Maybe"):
        Statement("x", "Maybe", "1")
    with pytest.raises(DataError, match="'6'"):
        Statement("x", "Wrong", "6")


def test_apologies_ignorance_and_questions_state_nothing():
    kept = "Oslo is cold."
    dropped = ["I'm sorry, no.", "I don't know that.", "I have no information on it.", "Is it?"]
    assert informative([kept, *dropped]) == [kept]


def test_what_a_model_writes_is_read():
    text = "Sentence: A is B.\n- A is B\n* A is\n\nsentence: C.\nnonsense\nSentence:\n- lost"
    assert read_statements(text) == {"A is B.": ["A is B", "A is"]}
    assert read_statements("nothing") is None
    assert read_verdict("Hedged wrong, I think") == "Hedged wrong"
    assert [read_verdict(t) for t in ("correct", "Incorrect", "")] == ["Correct", None, None]
    assert [read_usefulness(t) for t in ("Score: 3", "15", "7", "")] == ["3", None, None, None]


def test_a_model_is_asked_three_things_and_again_where_it_cannot_be_read(tmp_path):
    documents = tmp_path / "docs.txt"
    documents.write_text("Oslo is the capital of Norway. Bonn lies on the Rhine.")
    feedback = ModelFeedback(checkpoint="any", documents=str(documents), section_words=6)
    seen: list[tuple[str, int]] = []

    def extractor(prompts, temperature, seed):
        assert temperature == 1.0
        if seed == 0:
            return ["?"] * len(prompts)
        return ["Sentence: Oslo is warm.\n- Oslo is warm\nSentence: Sorry.\n- Sorry"] * len(prompts)

    def judge(prompts, temperature, seed):
        assert temperature == 0.3
        seen.extend((p, seed) for p in prompts)
        return ["Wrong" if "by these texts" in p else "no grade" for p in prompts]

    found = feedback.of([Episode("q {answer}", "Oslo is warm. Sorry.", "")], extractor, judge)
    assert found == [[Sentence("Oslo is warm.", (Statement("Oslo is warm", "Wrong", "1"),))]]
    assert "Oslo is the capital of Norway." in seen[0][0]
    assert [seed for p, seed in seen if "Usefulness" in p] == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------- texts


def test_bm25_is_its_formula():
    texts = ["a b b", "b c", "d"]
    found = BM25(texts, k1=1.2, b=0.75).scores("b b d")
    idf = np.log(1 + 1.5 / 2.5)
    first = idf * 2 * 2.2 / (2 + 1.2 * (0.25 + 0.75 * 3 / 2))
    second = idf * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 2 / 2))
    third = np.log(1 + 2.5 / 1.5) * 2.2 / (1 + 1.2 * (0.25 + 0.75 / 2))
    np.testing.assert_allclose(found, [2 * first, 2 * second, third], rtol=1e-9)


def test_bm25_ranks_and_leaves_out_what_shares_nothing():
    texts = ["The sea is blue.", "Oslo is in Norway.", "Norway, Norway!", "Peru"]
    assert BM25(texts)("Where is Norway?", top=2) == ["Oslo is in Norway.", "Norway, Norway!"]
    assert BM25(texts)("peru") == ["Peru"]
    assert BM25(texts)("quito") == []
    assert BM25([])("quito") == []


@given(st.text(alphabet="ab. !\n", max_size=40), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_sections_lose_no_word_and_are_short(text, words):
    found = sections(text, words)
    assert " ".join(found).split() == text.split()
    assert all(1 <= len(s.split()) <= words for s in found)


@given(st.text(alphabet="abc", max_size=8), st.text(alphabet="abc", max_size=8))
@settings(max_examples=100, deadline=None)
def test_common_substrings_are_longest(first, second):
    start, place, length = common_substring(first, second)
    assert first[start : start + length] == second[place : place + length]
    longest = max(
        (
            j - i
            for i in range(len(first))
            for j in range(i, len(first) + 1)
            if first[i:j] in second
        ),
        default=0,
    )
    assert length == longest


@given(st.text(alphabet="abc", max_size=7), st.text(alphabet="abc", max_size=7))
@settings(max_examples=100, deadline=None)
def test_common_subsequences_are_longest(first, second):
    pairs = common_subsequence(first, second)
    assert all(first[i] == second[j] for i, j in pairs)
    assert all(a < c and b < d for (a, b), (c, d) in itertools.pairwise(pairs))

    def best(i, j):
        if i == len(first) or j == len(second):
            return 0
        if first[i] == second[j]:
            return 1 + best(i + 1, j + 1)
        return max(best(i + 1, j), best(i, j + 1))

    assert len(pairs) == best(0, 0)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"granularity": "tokens"}, "token"),
        ({"least_match": 2.0}, "least_match"),
        ({"limit": 0.0}, "limit"),
        ({"divergence": -1.0}, "divergence"),
        ({"grading": {"floor": -1.0}}, "floor"),
        ({"feedback": {"name": "function", "path": "nowhere:nothing"}}, "feedback.path"),
        ({"feedback": {"name": "model"}}, "checkpoint"),
        ({"feedback": {"name": "facts", "forms": (("a", "b"),)}}, "subject"),
        ({"feedback": {"name": "facts", "asked": "9"}}, "asked"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve(TrainConfig, {"steps": 1, "objective": {"name": "rlfh"} | changes})


def test_a_function_may_grade():
    found = FeedbackFunction(path="rewards_for_tests:everything_is_wrong")([Episode("", "a", "")])
    assert found == [[Sentence("a", (Statement("a", "Wrong", "5"),))]]


def test_every_field_is_explained():
    from tokjax.config.testing import undocumented

    assert not undocumented(resolve(TrainConfig, {"steps": 1, "objective": {"name": "rlfh"}}))
