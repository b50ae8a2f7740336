"""TS-GRPO: token ratios at the plan, one ratio for the answer, a reward for each (2510.00186)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.config import resolve
from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.errors import ConfigError
from tokjax.rl.advantages import GroupAdvantage
from tokjax.rl.policy import Policy
from tokjax.rl.policy_loss import importance_ratios
from tokjax.rl.rewards import Episode
from tokjax.rl.sql_rewards import Database, SchemaLinking, SQLExecution
from tokjax.rl.ts_grpo import ANSWER, FORMAT, PLAN, TSGRPO, SpanAdvantage, SpanTags
from tokjax.training.config import TrainConfig
from tokjax.training.loop import train
from tokjax.training.metrics import read_metrics

WORKED = np.array([0.1, -0.2, 0.05, 0.3, -0.1], np.float32)
CARD_SPANS = [PLAN, PLAN, ANSWER, ANSWER, ANSWER]
WIDE = {"answer_clip_low": 0.2, "answer_clip_high": 0.2}


def batch_of(rollout, objective):
    channels = objective.shape(rollout)
    return dataclasses.replace(rollout.batch, channels=channels)


@pytest.fixture
def tagged(rollout_of):
    """Answers whose actions have the given spans, and their rewards."""
    return functools.partial(_tagged, rollout_of)


def _tagged(rollout_of, spans, plan, answer, group=1):
    lengths = [len(row) for row in spans]
    rollout = rollout_of([0.0] * len(spans), lengths, group)
    ids = np.full(rollout.mask.shape, -1, np.int32)
    for row, own in enumerate(spans):
        ids[row, 1 : 1 + len(own)] = own
    extra = {"spans": jnp.asarray(ids), "tagged": jnp.ones(len(spans), bool)}
    rewards = {"schema_linking": jnp.asarray(plan), "sql": jnp.asarray(answer)}
    return rollout.replace(extra=extra, rewards=rewards)


def moved(rollout, differences):
    """Log-probabilities that differ from the old ones (0) at the actions."""
    logprobs = np.zeros(rollout.mask.shape, np.float32)
    for row, own in enumerate(differences):
        logprobs[row, 1 : 1 + len(own)] = own
    return jnp.asarray(logprobs)


def value(objective, rollout, logprobs):
    loss = objective.loss_of(logprobs, jnp.zeros_like(logprobs), batch_of(rollout, objective))
    return -loss.total / loss.weight


# ---------------------------------------------------------------- the objective


def test_ratios_of_the_worked_example():
    mask = jnp.ones((1, 5), bool)
    answer = jnp.asarray([[s == ANSWER for s in CARD_SPANS]])
    found = importance_ratios(jnp.asarray([WORKED]), jnp.zeros((1, 5)), mask, "mixed", answer)
    np.testing.assert_allclose(found[0], [1.10517, 0.81873, 1.08690, 1.08690, 1.08690], atol=1e-5)


def test_objective_of_the_worked_example(tagged):
    """A plan advantage of 1.2 and one of -.5: terms 1.32621, .98248 and -.54345, sum .61089."""
    rollout = tagged([CARD_SPANS], [1.2], [-0.5])
    objective = TSGRPO(**WIDE)
    logprobs = moved(rollout, [WORKED])
    assert float(value(objective, rollout, logprobs)) == pytest.approx(0.61089, abs=1e-5)
    assert float(
        value(TSGRPO(advantage=SpanAdvantage(answer_weight=0.0), **WIDE), rollout, logprobs)
    ) == pytest.approx((1.32621 + 0.98248) / 2, abs=1e-5)
    only = SpanAdvantage(plan_weight=0.0)
    assert float(value(TSGRPO(advantage=only, **WIDE), rollout, logprobs)) == pytest.approx(
        -0.54345, abs=1e-5
    )
    # Minimum of the two: the clip at 1.0004 would give -.50020.
    assert float(value(TSGRPO(advantage=only), rollout, logprobs)) == pytest.approx(
        -0.54345, abs=1e-5
    )
    better = tagged([CARD_SPANS], [0.0], [0.5])
    assert float(value(TSGRPO(advantage=only), better, logprobs)) == pytest.approx(
        0.5 * 1.0004, abs=1e-6
    )


RAGGED = [[PLAN] * 3, [PLAN] * 5, [PLAN] * 2, [PLAN] * 4]


def test_where_all_is_plan_it_is_grpo(tagged):
    rng = np.random.default_rng(0)
    rewards = np.array([1.0, 0.0, 0.5, 3.0], np.float32)
    rollout = tagged(RAGGED, rewards, np.zeros(4, np.float32), group=2)
    rollout = rollout.replace(reward=jnp.asarray(rewards))
    logprobs = moved(rollout, [rng.normal(0, 0.3, len(row)) for row in RAGGED])
    grpo = Policy(advantage=GroupAdvantage(), norm="response")
    found, slopes = jax.value_and_grad(lambda x: value(TSGRPO(), rollout, x))(logprobs)
    wanted, others = jax.value_and_grad(lambda x: value(grpo, rollout, x))(logprobs)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    np.testing.assert_allclose(slopes, others, atol=1e-7)


def test_where_all_is_answer_it_is_gspo(tagged):
    rng = np.random.default_rng(1)
    spans = [[ANSWER] * len(row) for row in RAGGED]
    rewards = np.array([1.0, 0.0, 0.5, 3.0], np.float32)
    rollout = tagged(spans, np.zeros(4, np.float32), rewards, group=2)
    rollout = rollout.replace(reward=jnp.asarray(rewards))
    logprobs = moved(rollout, [rng.normal(0, 3e-4, len(row)) for row in RAGGED])
    gspo = Policy(
        advantage=GroupAdvantage(),
        norm="response",
        ratio="sequence_geo",
        clip_low=3e-4,
        clip_high=4e-4,
    )
    found, slopes = jax.value_and_grad(lambda x: value(TSGRPO(), rollout, x))(logprobs)
    wanted, others = jax.value_and_grad(lambda x: value(gspo, rollout, x))(logprobs)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(slopes, others, atol=1e-7)


def test_an_answer_of_one_token_has_the_ratio_of_that_token(tagged):
    rollout = tagged([[PLAN, ANSWER]], [1.0], [1.0])
    logprobs = moved(rollout, [[0.1, 0.15]])
    objective = TSGRPO(**WIDE)
    found = objective.ratios(logprobs, batch_of(rollout, objective))
    np.testing.assert_allclose(found[0, 1:3], np.exp([0.1, 0.15]), rtol=1e-6)


def test_on_policy_gradients_are_spread_evenly_over_each_span(tagged):
    spans = [[PLAN, PLAN, FORMAT, ANSWER, ANSWER, ANSWER], [PLAN, FORMAT, ANSWER]]
    rollout = tagged(spans, [1.2, 0.3], [-0.5, 0.8])
    slopes = jax.grad(lambda x: value(TSGRPO(), rollout, x))(moved(rollout, [[], []]))
    expected = np.zeros(rollout.mask.shape)
    expected[0, 1:7] = [0.6, 0.6, 0, -0.5 / 3, -0.5 / 3, -0.5 / 3]
    expected[1, 1:4] = [0.3, 0, 0.8]
    np.testing.assert_allclose(slopes, expected / 2, atol=1e-6)


def test_neither_term_depends_on_the_other_span(tagged):
    rollout = tagged([CARD_SPANS], [1.2], [-0.5])
    for weights, own in (((1.0, 0.0), PLAN), ((0.0, 1.0), ANSWER)):
        advantage = SpanAdvantage(plan_weight=weights[0], answer_weight=weights[1])
        objective = TSGRPO(advantage=advantage, **WIDE)
        slopes = jax.grad(lambda x, o=objective: value(o, rollout, x))(moved(rollout, [WORKED]))
        inside = np.asarray(rollout.extra["spans"]) == own
        assert np.all((np.asarray(slopes) != 0) == inside)


def test_terms_are_averaged_over_the_answers_that_have_the_span(tagged):
    spans = [[PLAN, PLAN, ANSWER], [FORMAT, ANSWER], [PLAN, FORMAT], [FORMAT]]
    rollout = tagged(spans, [1.0, 5.0, 3.0, 7.0], [2.0, 4.0, 6.0, 8.0])
    found = value(TSGRPO(), rollout, moved(rollout, [[]] * 4))
    assert float(found) == pytest.approx((1.0 + 3.0) / 2 + (2.0 + 4.0) / 2, abs=1e-5)


def test_equal_rewards_of_answers_leave_the_plan_to_learn(tagged):
    rollout = tagged([CARD_SPANS] * 2, [1.0, 0.0], [1.0, 1.0], group=2)
    advantages, weights = SpanAdvantage()(rollout)
    spans = np.asarray(rollout.extra["spans"])
    assert not np.asarray(advantages)[spans == ANSWER].any()
    assert np.all(np.asarray(advantages)[spans == PLAN] != 0)
    assert np.all((np.asarray(weights) != 0) == np.asarray(rollout.mask))


def test_the_plan_can_be_paid_for_the_answer(tagged):
    rollout = tagged([CARD_SPANS] * 2, [0.0, 0.0], [1.0, 0.0], group=2)
    plan = np.asarray(rollout.extra["spans"]) == PLAN
    assert not np.asarray(SpanAdvantage()(rollout)[0])[plan].any()
    paid = np.asarray(SpanAdvantage(answer_share=1.0)(rollout)[0])
    np.testing.assert_allclose(paid[plan], [0.70701, 0.70701, -0.70701, -0.70701], atol=1e-4)


def test_missing_tags_are_fined_and_cut_answers_earn_nothing(tagged):
    rollout = tagged([CARD_SPANS] * 4, [1.0] * 4, [1.0] * 4, group=4)
    rollout = rollout.replace(
        extra={**rollout.extra, "tagged": jnp.array([True, True, False, True])},
        stopped=jnp.array([True, False, True, True]),
    )
    found = np.asarray(SpanAdvantage(ddof=0, eps=0.0)(rollout)[0])
    plan = np.array([1, 1, 0.5, 1])
    np.testing.assert_allclose(found[:, 1], (plan - plan.mean()) / plan.std(), atol=1e-5)
    answer = np.array([1, 0, 0, 1])
    np.testing.assert_allclose(found[:, 3], (answer - 0.5) / answer.std(), atol=1e-5)


def test_padding_and_the_order_of_a_group_change_nothing(tagged):
    rng = np.random.default_rng(2)
    spans = [CARD_SPANS, [PLAN, ANSWER], [PLAN, FORMAT, ANSWER, ANSWER], CARD_SPANS]
    plan, answer = rng.normal(size=(2, 4)).astype(np.float32)
    moves = [rng.normal(0, 0.1, len(row)) for row in spans]
    rollout = tagged(spans, plan, answer, group=4)
    found = float(value(TSGRPO(**WIDE), rollout, moved(rollout, moves)))
    order = [2, 0, 3, 1]
    other = tagged([spans[i] for i in order], plan[order], answer[order], group=4)
    mixed = value(TSGRPO(**WIDE), other, moved(other, [moves[i] for i in order]))
    assert float(mixed) == pytest.approx(found, abs=1e-6)
    padded = jax.tree.map(
        lambda a: jnp.pad(a, ((0, 0), (0, 3))) if a.ndim == 2 and a.shape[1] > 1 else a, rollout
    )
    padded.extra["spans"] = jnp.where(padded.mask, padded.extra["spans"], -1)
    wider = value(TSGRPO(**WIDE), padded, moved(padded, moves))
    assert float(wider) == pytest.approx(found, abs=1e-6)


# ---------------------------------------------------------------- spans


def letters(text, tags=None):
    ids, complete = (tags or SpanTags()).spans(text, [(i, i + 1) for i in range(len(text))])
    return "".join(".PA"[i] for i in ids), complete


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("<plan>ab</plan><sql>cd</sql>", "......PP............AA......"),
        ("x<plan>a</plan>y<sql></sql>z", ".......P...................."),
        ("<plan></plan><sql>c</sql>", "..................A......"),
        # the last of several answers
        ("<plan>a</plan><sql>b</sql><sql>c</sql>", "......P........................A......"),
    ],
)
def test_spans_lie_within_their_tags(text, spans):
    assert letters(text) == (spans[: len(text)], True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ab",
        "<plan>ab<sql>cd</sql>",
        "<plan>ab</plan>",
        "<plan>ab</plan><sql>cd",
        "ab</plan><sql>cd</sql>",
        "<sql>cd</sql><plan>ab</plan>",
    ],
)
def test_without_its_tags_all_of_a_text_is_plan(text):
    assert letters(text) == ("P" * len(text), False)


def test_tags_can_belong_to_their_spans():
    text = "<plan>a</plan> <sql>b</sql>"
    offsets = [*((i, i + 1) for i in range(len(text))), (len(text), len(text))]
    ids, complete = SpanTags(tags="span").spans(text, offsets)
    assert complete
    assert "".join(".PA"[i] for i in ids) == "P" * 14 + "." + "A" * 12 + "A"


def test_a_token_that_holds_a_part_of_a_tag_is_format():
    text = "<plan> a b</plan><sql>c</sql>"
    offsets = [(0, 6), (6, 8), (8, 12), (12, 17), (17, 22), (22, 23), (23, 29), (29, 29)]
    ids, _ = SpanTags().spans(text, offsets)
    assert ids.tolist() == [FORMAT, PLAN, FORMAT, FORMAT, FORMAT, ANSWER, FORMAT, FORMAT]


def test_spans_of_ids_lie_at_their_actions(rollout_of):
    tokenizer = ByteTokenizer()
    texts = ["<plan>é</plan><sql>c</sql>", "no"]
    ids = [[*tokenizer.encode(text), 256] for text in texts]
    rollout = rollout_of([0.0, 0.0], [len(row) for row in ids], 1)
    found = SpanAdvantage().tagged(rollout, ids, tokenizer)
    assert found["tagged"].tolist() == [True, False]
    assert np.flatnonzero(found["spans"][0] == PLAN).tolist() == [7, 8]
    assert np.flatnonzero(found["spans"][0] == ANSWER).tolist() == [21]
    assert np.all((found["spans"] >= 0) == np.asarray(rollout.mask))
    assert np.flatnonzero(found["spans"][1] == PLAN).tolist() == [1, 2, 3]


# ---------------------------------------------------------------- rewards of queries

SCRIPT = """
CREATE TABLE pets (name TEXT, kind TEXT, age INTEGER);
CREATE TABLE homes (street TEXT, pet TEXT);
INSERT INTO pets VALUES ('Rex', 'dog', 3), ('Tom', 'cat', 5), ('Mia', 'cat', 2);
INSERT INTO homes VALUES ('Elm', 'Rex'), ('Oak', 'Tom');
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("sql") / "pets.sql"
    path.write_text(SCRIPT)
    return str(path)


def asked(answer, gold="SELECT name FROM pets WHERE kind = 'cat'"):
    return Episode("", answer, gold)


@pytest.mark.parametrize(
    ("query", "reward"),
    [
        ("SELECT name FROM pets WHERE age <> 3", 2.0),
        ("SELECT name FROM pets WHERE age <> 3 ORDER BY age", 2.0),
        ("SELECT name FROM pets", 1.0),
        ("SELECT kind FROM pets WHERE age <> 3", 1.0),
        ("SELECT DISTINCT 'Tom' FROM pets", 1.0),
        ("SELECT nothing FROM pets", 0.0),
        ("SELECT", 0.0),
        ("", 0.0),
        ("-- nothing", 0.0),
        ("DROP TABLE pets", 0.0),
        ("DELETE FROM pets", 0.0),
        ("ATTACH DATABASE 'x.db' AS x", 0.0),
        ("PRAGMA table_info(pets)", 0.0),
        ("SELECT 1; SELECT 2", 0.0),
        ("SELECT \x00", 0.0),
    ],
)
def test_queries_are_paid_for_running_and_for_their_rows(script, query, reward):
    assert SQLExecution(script=script)(asked(f"<plan></plan><sql>{query}</sql>")) == reward
    # What was forbidden was not done.
    good = asked("<sql>bad</sql><sql>SELECT name FROM pets WHERE kind = 'cat'</sql>")
    assert SQLExecution(script=script)(good) == 2.0


def test_rows_are_counted_and_ordered_where_the_reference_is(script):
    reward = SQLExecution(script=script, runs=0.25)
    gold = "<plan>x</plan><sql>SELECT name FROM pets ORDER BY age</sql>"
    for order, expected in (("age", 1.25), ("age DESC", 0.25)):
        answer = f"<sql>SELECT name FROM pets ORDER BY {order}</sql>"
        assert reward(asked(answer, gold)) == expected
    twice = "SELECT kind FROM pets"
    assert reward(asked("<sql>SELECT DISTINCT kind FROM pets</sql>", twice)) == 0.25
    assert reward(asked("no query")) == 0.0
    with pytest.raises(ValueError, match="does not run"):
        reward(asked("<sql>SELECT 1</sql>", "SELECT x"))


def test_a_query_that_does_not_end_is_stopped(script):
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT {} FROM n"
    found = Database(SCRIPT, instructions=100_000)
    assert not found(endless.format("count(*)")).ok
    assert "rows" in Database(SCRIPT, rows=10)(endless.format("i")).error
    assert found("SELECT 1").rows == ((1,),)


def test_plans_are_paid_for_naming_what_the_query_needs(script):
    reward = SchemaLinking(script=script)
    gold = "<sql>SELECT name FROM pets WHERE age = 3</sql>"  # name, pets, age
    for plan, expected in (
        ("pets: name, age", 1.0),
        ("PETS name", 0.8),
        ("pets name kind age", 6 / 7),
        ("homes", 0.0),
        ("petsname", 0.0),
    ):
        answer = f"<plan>{plan}</plan><sql>x</sql>"
        assert reward(asked(answer, gold)) == pytest.approx(expected), plan
    assert reward(asked("pets name age", gold)) == 0.0


def test_a_script_that_is_not_there_or_does_not_run_is_told(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        SQLExecution(script=str(tmp_path / "none"))(asked("<sql>SELECT 1</sql>"))
    with pytest.raises(ConfigError, match="does not run"):
        Database("CREATE nothing")


# ---------------------------------------------------------------- runs


def test_it_runs_and_pays_the_plan(rl_run, tmp_path, script):
    """No answer of an untrained model has tags: all is plan, and the plan's reward is learnt."""
    objective = {
        "name": "ts_grpo",
        "rewards": [
            {"name": "format", "pattern": "[ -~]*"},
            {"name": "overlong", "weight": 0.0},
        ],
        "advantage": {"name": "ts_grpo", "plan": "format", "answer": "overlong"},
        "rollouts": {"group": 4, "minibatches": 2, "max_new_tokens": 3},
    }
    run = rl_run(objective=objective, steps=60, data__batch_size=32, optimizer__peak_lr=2e-2)
    assert train(run, tmp_path).finished
    rewards = [v for v in read_metrics(tmp_path)["reward/format"] if v is not None]
    assert np.mean(rewards[:3]) < 0.5
    assert np.mean(rewards[-3:]) > 0.9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": "token"}, "mixed"),
        ({"norm": "token"}, "response"),
        ({"advantage": {"name": "group"}}, "advantage 'ts_grpo'"),
        ({"answer_clip_low": -1.0}, "answer_clip_low"),
        ({"advantage": {"name": "ts_grpo", "ddof": 2}}, "ddof"),
        ({"advantage": {"name": "ts_grpo", "tags": {"tags": "neiter"}}}, "neither"),
        ({"advantage": {"name": "ts_grpo", "tags": {"plan": ("", "x")}}}, "empty"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve(TrainConfig, {"steps": 1, "objective": {"name": "ts_grpo"} | changes})


def test_a_reward_that_is_not_there_is_named(tagged):
    rollout = tagged([CARD_SPANS], [1.2], [-0.5])
    with pytest.raises(ConfigError, match=r"'sqll'.*sql"):
        SpanAdvantage(answer="sqll")(rollout)


def test_every_field_is_explained():
    from tokjax.config.testing import undocumented

    assert not undocumented(resolve(TrainConfig, {"steps": 1, "objective": {"name": "ts_grpo"}}))
