"""DRLC: a critic's quotations become rewards of the tokens they lie at (arXiv 2401.07382)."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.config import resolve
from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.data.offsets import offsets_of_ids
from tokjax.errors import ConfigError
from tokjax.rl.advantages import GeneralisedAdvantage, merged
from tokjax.rl.critics import (
    Critique,
    Lexicon,
    ModelCritic,
    read_critique,
    spans_of_scores,
)
from tokjax.rl.drlc import DRLC
from tokjax.rl.rewards import Episode
from tokjax.rl.span_rewards import at_actions, bag_mask, find_spans, span_rewards, token_at
from tokjax.training.config import TrainConfig
from tokjax.training.loop import train
from tokjax.training.metrics import read_metrics

BORING = "I did n't enjoy it , quite boring"
BAD = "bad film , not bad at all"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    yield
    sys.modules.pop("rewards_for_tests", None)


def words(text):
    """An answer of one token a word, each with the space before it."""
    pieces = [w if not k else " " + w for k, w in enumerate(text.split(" "))]
    ends = np.cumsum([len(p) for p in pieces]).tolist()
    offsets = tuple(zip([0, *ends], ends, strict=False))
    return Episode("", text, "", tokens=tuple(range(len(pieces))), pieces=tuple(pieces),
                   offsets=offsets)  # fmt: skip


def of(text, positive=(), negative=(), values=(0.8, -0.8), match="offset"):
    e = words(text)
    return span_rewards(text, e.offsets, e.pieces, positive, negative, values, match).tolist()


def near(values):
    return pytest.approx(values, abs=1e-6)


def test_spans_pay_the_tokens_at_their_characters():
    spans = ["n't enjoy", "quite boring"]
    assert of(BORING, negative=spans) == near([0, 0, -0.8, -0.8, 0, 0, -0.8, -0.8])


def test_the_bag_also_takes_words_inside_the_quotations():
    spans = ["n't enjoy", "quite boring"]
    found = of(BORING, negative=spans, match="bag")
    assert found == near([0, 0, -0.8, -0.8, -0.8, 0, -0.8, -0.8])
    capital = BORING.replace("it", "It")  # case counts
    assert of(capital, negative=spans, match="bag")[4] == 0


@pytest.mark.parametrize(
    ("text", "match", "marked"),
    [
        (BAD, "offset", [0, 1]),
        (BAD, "bag", [0, 1, 4]),
        (BAD + " a", "offset", [0, 1]),
        (BAD + " a", "bag", [0, 1, 4, 7]),
    ],
)
def test_the_bag_marks_repeats_and_letters_and_offsets_do_not(text, match, marked):
    found = of(text, negative=["bad film"], match=match)
    assert np.flatnonzero(found).tolist() == marked


def test_blank_tokens_are_never_in_the_bag():
    assert bag_mask([" ", "\n", "a"], ["a b"]).tolist() == [False, False, True]


def test_a_token_in_two_spans_is_paid_once_and_both_signs_add():
    assert of("very good film", positive=["very good", "good film"]) == near([0.8] * 3)
    both = of("very good film", ["very good"], ["good film"], values=(0.8, -0.5))
    assert both == near([0.8, 0.3, -0.5])


def test_equal_quotations_take_one_occurrence_each():
    assert of(BAD, negative=["bad"]) == near([-0.8, 0, 0, 0, 0, 0, 0])
    assert of(BAD, negative=["bad", "bad", "bad"]) == near([-0.8, 0, 0, 0, -0.8, 0, 0])


@pytest.mark.parametrize("span", ["not there", "", "  ", (3, 3), (20, 99)])
def test_spans_that_are_not_there_pay_nothing(span):
    assert find_spans(BAD, [span]) == [None]
    assert not any(of(BAD, negative=[span]))


def test_a_space_before_a_token_is_not_its_text():
    # The quotation "film " ends before the comma, whose token begins with that space.
    assert of("bad film , not", negative=["film "]) == near([0, -0.8, 0, 0])


def test_the_score_joins_at_the_end_and_everything_adds_up(rollout_of):
    critic = Lexicon(negative=("n't enjoy", "quite boring"))
    objective = DRLC(critic=critic, reference=True)
    episode = words(BORING)
    rng = np.random.default_rng(0)
    ratio = jnp.asarray(rng.normal(size=(1, 10)), jnp.float32)
    scores = {"reference": -ratio, "value": jnp.zeros((1, 10))}
    rollout = rollout_of([-2.0], [8], 1, scores=scores)
    dense = objective.token_rewards(rollout, [episode])
    rollout = rollout.replace(token_rewards=dense)
    plain = np.asarray(merged(rollout, rollout.reward))[0, 1:9]
    assert plain.tolist() == near([0, 0, -0.8, -0.8, 0, 0, -0.8, -2.8])
    whole = np.asarray(merged(rollout, rollout.reward, 0.1))
    expected = -2.0 - 0.8 * 4 - 0.1 * float(ratio[0, 1:9].sum())
    assert whole.sum() == near(expected)
    assert not whole[0, [0, 9]].any()
    # gamma 1, lambda 1 and values of 0: suffix sums
    found = GeneralisedAdvantage(lam=1.0, kl_coef=0.1).unscaled(rollout)
    np.testing.assert_allclose(found[0, 1:9], np.cumsum(whole[0, 1:9][::-1])[::-1], atol=1e-5)


def test_only_poor_answers_are_criticised(rollout_of):
    objective = DRLC(critic=Lexicon(negative=("bad",)), threshold=0.5)
    found = objective.token_rewards(rollout_of([0.5, 0.6], [7, 7], 2), [words(BAD)] * 2)
    assert np.flatnonzero(found[0]).tolist() == [1, 5]
    assert not found[1].any()


def test_answers_are_placed_at_their_actions():
    mask = np.array([[False, True, True, False], [True, False, False, False]])
    found = at_actions(mask, [np.array([1.0, 2.0]), np.array([3.0])])
    np.testing.assert_array_equal(found, [[0, 1, 2, 0], [3, 0, 0, 0]])
    with pytest.raises(ValueError, match="1 values for 2 actions"):
        at_actions(mask, [np.array([1.0]), np.array([3.0])])


# ---------------------------------------------------------------- critics


def test_a_lexicon_quotes_words_that_stand_by_themselves():
    critic = Lexicon(positive=("good",), negative=("bad", "bad film"))
    told = critic([Episode("", "bad film, goodness, bad, Good good", "")], [0.0])[0]
    assert told == Critique(((30, 34),), ((0, 8), (20, 23)))
    assert Lexicon()([Episode("", "bad", "")], [0.0]) == [Critique()]
    wide = Lexicon(positive=("good",), ignore_case=True)
    assert wide([Episode("", "Good", "")], [0.0])[0].positive == ((0, 4),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'Positive spans:\n[Span 1]: great cast\n[Span 2]: "moving"\nNegative spans:\n'
            "[Span 1]: too long.",
            Critique(("great cast", "moving"), ("too long.",)),
        ),
        ("**Negative:**\nSpan 1: dull\n", Critique((), ("dull",))),
        ("Positive:\nNone identified.\nNegative:\n[Span 1]: None identified", Critique()),
        ("I liked it a lot.", Critique()),
        ("[Span 1]: no heading", Critique()),
        ("", Critique()),
    ],
)
def test_critiques_are_read_and_what_cannot_be_read_quotes_nothing(text, expected):
    assert read_critique(text) == expected


def test_a_classifier_of_tokens_is_a_critic():
    offsets = [(0, 2), (2, 4), (4, 4), (4, 6), (6, 8)]
    found = spans_of_scores(offsets, [0.9, 0.6, 0.0, 0.7, -0.9], 0.5)
    assert found == Critique(((0, 4), (4, 6)), ((6, 8),))
    assert spans_of_scores(offsets, [0.5] * 5, 0.5) == Critique()


def test_a_model_is_asked_and_its_words_are_read(monkeypatch):
    asked = []

    class Model:
        def generate(self, prompts, max_new_tokens):
            asked.extend(prompts)
            texts = ["[Span 1]: good\nNegative:\n[Span 1]: dull" for _ in prompts]
            return type("G", (), {"texts": texts})

    critic = ModelCritic(checkpoint="any", prompt="{prompt}|{answer}|{reward}", rows=2)
    object.__setattr__(critic, "_model", Model())
    episodes = [Episode("q", f"a {i}", "") for i in range(3)]
    assert critic(episodes, [0.5, 1.0, 2.0]) == [Critique(("good",), ("dull",))] * 3
    assert asked[:3] == ["q|a 0|0.5", "q|a 1|1", "q|a 2|2"]


# ---------------------------------------------------------------- characters of tokens


@pytest.mark.parametrize("text", ["plain", "é and 漢字", ""])
def test_characters_of_ids_are_those_of_the_text(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert offsets_of_ids(tokenizer, ids) == tokenizer.encode_with_offsets(text)[1]


def test_broken_bytes_and_end_tokens_have_characters_too():
    tokenizer = ByteTokenizer()
    ids = [*b"a\xe6b"]
    text = tokenizer.decode(ids)
    assert text == "a\ufffdb"
    ranges = offsets_of_ids(tokenizer, ids)
    # That the second byte is broken shows at the third, which both characters come with.
    assert ranges == [(0, 1), (1, 2), (1, 3)]
    assert offsets_of_ids(tokenizer, [*ids, tokenizer.eos_id])[-1] == (3, 3)


def test_a_character_lies_in_the_last_token_that_holds_it():
    offsets = [(0, 2), (2, 3), (2, 3), (3, 3), (4, 6)]
    assert [token_at(offsets, c) for c in (0, 1, 2, 3, 4, 5, 9)] == [0, 0, 2, 3, 4, 4, 4]


# ---------------------------------------------------------------- runs


PPO_TREE = {
    "rewards": [{"name": "function", "path": "rewards_for_tests:first_token"}],
    "rollouts": {"group": 4, "minibatches": 2, "max_new_tokens": 3},
}


def test_without_values_or_spans_it_is_ppo_bit_for_bit(rl_run, tmp_path):
    letters = [chr(i) for i in range(32, 127)]
    trees = {
        "ppo": PPO_TREE | {"name": "ppo"},
        "no_values": PPO_TREE
        | {"name": "drlc", "positive": 0.0, "negative": 0.0}
        | {"critic": {"name": "lexicon", "positive": letters}},
        "no_spans": PPO_TREE | {"name": "drlc"},
    }
    found = {
        name: train(rl_run(objective=tree, steps=4), tmp_path / name).state.params
        for name, tree in trees.items()
    }
    for name in ("no_values", "no_spans"):
        jax.tree.map(np.testing.assert_array_equal, found["ppo"], found[name])


def test_it_learns_from_spans_alone(rl_run, tmp_path):
    objective = PPO_TREE | {
        "name": "drlc",
        "rewards": [{"name": "format", "weight": 0.0}],
        "critic": {"name": "function", "path": "rewards_for_tests:even_characters"},
        "value_coef": 0.1,
    }
    run = rl_run(objective=objective, steps=60, data__batch_size=32, optimizer__peak_lr=2e-2)
    assert train(run, tmp_path).finished
    told = [v for v in read_metrics(tmp_path)["reward/token_mean"] if v is not None]
    assert np.mean(told[:3]) < 0.2
    assert np.mean(told[-3:]) > 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"match": "ofset"}, "offset"),
        ({"positive": float("nan")}, "positive"),
        ({"threshold": float("nan")}, "threshold"),
        ({"critic": {"name": "function", "path": "nowhere:nothing"}}, "critic.path"),
        ({"critic": {"name": "model"}}, "checkpoint"),
        ({"critic": {"name": "model", "checkpoint": "x", "prompt": "y"}}, "answer"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve(TrainConfig, {"steps": 1, "objective": {"name": "drlc"} | changes})


def test_every_field_is_explained():
    from tokjax.config.testing import undocumented

    assert not undocumented(resolve(TrainConfig, {"steps": 1, "objective": {"name": "drlc"}}))
