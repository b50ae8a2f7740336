"""Thinking tokens: what counts, who sees them, and that none is generated."""

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.config import load, resolve
from tokjax.data.batch import Batch
from tokjax.decoding import Prompts, categorical, decode
from tokjax.errors import ConfigError
from tokjax.models import ModelConfig, Transformer
from tokjax.pretraining.next_token import NextToken
from tokjax.pretraining.thinking_tokens import (
    Thinking,
    ThinkingTokens,
    forbidden,
    hidden_keys,
    place,
    supplied,
)
from tokjax.training.config import TrainConfig
from tokjax.training.passes import forward

V, T1, T2, WIDTH = 12, 10, 11, 12
MODEL = Transformer(
    ModelConfig(
        vocab_size=V, d_model=16, n_layers=2, n_heads=2, d_ff=24, remat="none", max_positions=32
    )
)
OBJECTIVE = ThinkingTokens(ids=(T1, T2))
KEY = jax.random.key(0)
RECORDS: list[tuple[list[int], list[int], list[int]]] = [
    ([1, 2, 3], [4, 5], [6, 0]),
    ([3, 1], [7], [8, 9, 0]),
    ([2, 2, 1], [5, 4], [5, 0]),
]


def batch_of(records: Any = RECORDS, ids=(T1,), keep_rationale=False, **thinking: Any) -> Batch:
    placed = [
        place(question, rationale, answer, Thinking(**thinking), ids, keep_rationale=keep_rationale)
        for question, rationale, answer in records
    ]
    shape = (len(records), WIDTH)
    tokens, targets, segments = (np.zeros(shape, np.int32) for _ in range(3))
    weights = np.zeros(shape, np.float32)
    for b, each in enumerate(placed):
        n = len(each.tokens) - 1
        tokens[b, :n], targets[b, :n] = each.tokens[:-1], each.tokens[1:]
        segments[b, :n], weights[b, :n] = 1, each.weights[1:]
    return Batch(
        tokens=jnp.asarray(tokens),
        targets=jnp.asarray(targets),
        positions=jnp.broadcast_to(jnp.arange(WIDTH), shape),
        segment_ids=jnp.asarray(segments),
        weights=jnp.asarray(weights),
        example_id=jnp.zeros((len(records), 1), jnp.int32),
    )


@pytest.fixture(scope="module")
def params():
    found = MODEL.init(jax.random.key(1))
    return {**found, "embedding": found["embedding"] * 20}


def compiled(objective):
    def run(params, batch):
        def total(params):
            loss = objective.loss(MODEL, params, (), batch, KEY)
            return loss.total, loss

        (_, loss), gradient = jax.value_and_grad(total, has_aux=True)(params)
        return loss, gradient

    return jax.jit(run)


@pytest.fixture(scope="module")
def learn():
    """Functions from parameters and a batch to the loss and its gradient."""
    return {
        "next": compiled(NextToken()),
        "thinking": compiled(OBJECTIVE),
        "frozen": compiled(dataclasses.replace(OBJECTIVE, freeze=True)),
    }


@pytest.fixture(scope="module")
def logits():
    """A function from parameters and a batch to all logits, with hidden keys or not."""

    def run(params, batch, hidden):
        edits = hidden_keys(batch.tokens, (T1, T2), 2) if hidden else None
        return MODEL.unembed(params, forward(MODEL, params, batch, edits=edits).x)

    run = jax.jit(run, static_argnums=2)
    return lambda params, batch, hidden=False: np.asarray(run(params, batch, hidden))


def test_without_thinking_tokens_it_is_next_token_prediction_bit_for_bit(params, learn):
    batch = batch_of(count=0)
    for record, row in zip(RECORDS, np.asarray(batch.tokens), strict=True):
        whole = [*record[0], *record[2]]
        assert row[: len(whole) - 1].tolist() == whole[:-1]
    (loss, gradient), (plain, expected) = (learn[n](params, batch) for n in ("thinking", "next"))
    assert float(loss.total) == float(plain.total) and float(loss.weight) == float(plain.weight)
    jax.tree.map(np.testing.assert_array_equal, gradient, expected)
    assert float(loss.metrics["nll"][0]) == float(plain.metrics["nll"][0])


def test_targets_that_are_thinking_tokens_weigh_nothing_whatever_the_data_say(params, learn):
    scored = []
    for count in (0, 1, 4):
        batch = batch_of(count=count)
        loss, _ = learn["thinking"](params, batch)
        scored.append(float(loss.weight))
        # The last thinking token predicts the answer, and that counts.
        first = np.asarray(batch.weights).argmax(1)
        if count:
            assert (np.asarray(batch.tokens)[np.arange(3), first] == T1).all()
            share, places = loss.metrics["thinking"]
            assert float(share) == 3 * count and float(places) == (batch.segment_ids > 0).sum()
        careless = dataclasses.replace(batch, weights=jnp.ones_like(batch.weights))
        found, _ = learn["thinking"](params, careless)
        assert float(found.weight) == 3 * WIDTH - (np.asarray(batch.targets) == T1).sum()
        careful = dataclasses.replace(
            batch, weights=jnp.where(batch.targets == T1, 0.0, 1.0).astype(jnp.float32)
        )
        assert float(found.total) == float(learn["next"](params, careful)[0].total)
    assert scored == [7.0] * 3


def test_the_answer_reads_the_question_through_thinking_tokens_and_nothing_reads_ahead(
    params, logits
):
    batch = batch_of(count=3)
    before = logits(params, batch)
    last = np.asarray(batch.weights).argmax(1)  # the last thinking token of each row
    for at, unchanged in ((0, 0), (7, 7)):  # a word of the question; behind all answers' first
        tokens = np.asarray(batch.tokens).copy()
        tokens[:, at] = (tokens[:, at] + 1) % 9
        after = logits(params, dataclasses.replace(batch, tokens=jnp.asarray(tokens)))
        np.testing.assert_array_equal(after[:, :unchanged], before[:, :unchanged])
        moved = np.abs(after - before).max(-1)[np.arange(3), last]
        assert (moved > 1e-4).all() if at == 0 else (moved[:1] == 0).all()


def test_distinct_tokens_with_one_vector_are_one_token_and_their_gradients_add_up(params, logits):
    shared = batch_of(count=4)
    distinct = batch_of(count=4, ids=(T1, T2))
    assert (np.asarray(distinct.tokens) == T2).sum() == 6
    tied = {**params, "embedding": params["embedding"].at[T2].set(params["embedding"][T1])}
    np.testing.assert_array_equal(logits(tied, shared), logits(tied, distinct))
    untied = Transformer(dataclasses.replace(MODEL.config, tie_embeddings=False))

    def gradient(batch):
        own = {**tied, "head": tied["embedding"]}
        return jax.grad(lambda p: OBJECTIVE.loss(untied, p, (), batch, KEY).total)(own)["embedding"]

    of_shared, of_distinct = (np.asarray(jax.jit(gradient)(b)) for b in (shared, distinct))
    np.testing.assert_allclose(of_shared[T1], of_distinct[T1] + of_distinct[T2], atol=1e-5)
    assert np.abs(of_shared[T1]).max() > 1e-3 and not of_shared[T2].any()
    np.testing.assert_allclose(of_shared[:T1], of_distinct[:T1], atol=1e-5)


def test_frozen_vectors_have_no_gradient_and_change_no_loss(params, learn):
    batch = batch_of(count=3)
    loss, gradient = learn["thinking"](params, batch)
    frozen, without = learn["frozen"](params, batch)
    assert float(loss.total) == pytest.approx(float(frozen.total), rel=1e-6)
    assert np.abs(gradient["embedding"][T1]).max() > 1e-3
    assert not np.asarray(without["embedding"])[[T1, T2]].any()
    np.testing.assert_allclose(without["embedding"][:T1], gradient["embedding"][:T1], atol=1e-5)
    np.testing.assert_allclose(
        without["layers"]["mlp"]["up"], gradient["layers"]["mlp"]["up"], atol=1e-5
    )


def test_hidden_keys_reach_no_other_position_and_are_no_change_without_thinking_tokens(
    params, logits
):
    batch = batch_of(count=3)
    other = {**params, "embedding": params["embedding"].at[T1].add(1.0)}
    # The head is tied: a look at ordinary ids alone.
    found = [logits(p, batch, True)[..., :T1] for p in (params, other)]
    thinking = np.asarray(batch.tokens) == T1
    moved = np.abs(found[0] - found[1]).max(-1)
    assert (moved[~thinking] == 0).all() and (moved[thinking] > 1e-3).all()
    seen = np.abs(logits(params, batch)[..., :T1] - logits(other, batch)[..., :T1]).max(-1)
    behind = np.cumsum(thinking, 1).astype(bool) & ~thinking & (np.asarray(batch.segment_ids) > 0)
    assert behind.any() and (seen[behind] > 1e-4).all()
    # Earlier thinking tokens say nothing to the last one: three are as good as the last alone.
    tokens = jnp.asarray([[1, 2, T1, T1, T1] + [0] * 7, [1, 2, 4, 5, T1] + [0] * 7])
    rows = batch_of(RECORDS[:2], count=0)
    rows = dataclasses.replace(rows, tokens=tokens.astype(jnp.int32))
    rows = dataclasses.replace(rows, segment_ids=jnp.ones_like(rows.tokens))
    alone = dataclasses.replace(
        rows,
        tokens=jnp.asarray([[1, 2, T1] + [0] * 9] * 2, jnp.int32),
        positions=jnp.asarray([[0, 1, 4, *range(5, 14)]] * 2),
    )
    np.testing.assert_allclose(
        logits(params, rows, True)[0, 4], logits(params, alone, True)[0, 2], atol=1e-4
    )
    plain = batch_of(count=0)
    np.testing.assert_allclose(logits(params, plain, True), logits(params, plain, False), atol=1e-5)


def test_thinking_tokens_have_probability_zero_where_they_are_forbidden():
    wanted = jnp.zeros((2, V)).at[:, [T1, T2]].set(80.0)
    for transform in (forbidden([T1, T2]), supplied((T1, T2), 3, (1,))):
        prompts = Prompts.of([[1, 2], [3]])
        context: Any = SimpleNamespace(last=jnp.array([2, 3]))
        found, _ = transform.update(wanted, transform.init(prompts, V), context)
        chance = np.asarray(jax.nn.softmax(found))
        assert (chance[:, [T1, T2]] == 0).all()
        np.testing.assert_allclose(chance[:, :T1], 0.1, rtol=1e-6)


def test_runs_are_supplied_behind_what_ends_a_rationale_and_none_is_generated(params):
    # A model that would write nothing else.
    eager = {**params, "embedding": params["embedding"].at[jnp.array([T1, T2])].mul(50.0)}
    prompts = [[1, 2, 3], [3, 4]]

    def written(params, count):
        found = decode(
            MODEL,
            params,
            Prompts.of(prompts),
            max_new_tokens=12,
            samples=4,
            sampler=categorical(),
            key=KEY,
            transform=supplied((T1, T2), count, (1, 3, 4)),
        )
        rows = zip(found.rows(), [p for p in prompts for _ in range(4)], strict=True)
        return [[*prompt[-1:], *map(int, row)] for row, prompt in rows]

    runs = 0
    for own, count in ((params, 3), (eager, 3), (eager, 0)):
        for text in written(own, count):
            due: list[int] = []
            for previous, token in itertools.pairwise(text):
                if previous in (1, 3, 4):
                    due = [T1, T2, T1][:count]
                    runs += bool(count)
                assert (token == due.pop(0)) if due else token not in (T1, T2)
    assert runs > 16
    for bad in ({"ids": ()}, {"ids": (-1,)}, {"after": (T1,)}, {"count": -1}):
        with pytest.raises(ConfigError, match="supplied"):
            supplied(**{"ids": (T1,), "count": 1, "after": (1,), **bad})


def test_records_of_ids_say_what_is_given_at_inference():
    def placed(keep_rationale=True, **thinking):
        return place(*RECORDS[0], Thinking(**thinking), (T1, T2), keep_rationale=keep_rationale)

    found = placed(count=3)
    assert found.tokens.tolist() == [1, 2, 3, T1, T2, T1, 4, 5, 6, 0] and found.prompt == 6
    assert found.weights.tolist() == [0] * 6 + [1] * 4
    found = placed(count=2, place="rationale")
    assert found.tokens.tolist() == [1, 2, 3, 4, 5, T1, T2, 6, 0] and found.prompt == 3
    assert found.weights.tolist() == [0] * 3 + [1, 1, 0, 0, 1, 1]
    found = placed(count=1, place="words")
    assert found.tokens.tolist() == [1, T1, 2, T1, 3, T1, 4, 5, 6, 0] and found.prompt == 6
    found = placed(count=1, place="all_words")
    assert found.tokens.tolist() == [1, T1, 2, T1, 3, T1, 4, T1, 5, T1, 6, 0]
    matched, cot = placed(False, count="matched"), placed(count=0)
    assert matched.tokens.tolist() == [1, 2, 3, T1, T2, 6, 0]
    assert len(matched.tokens) == len(cot.tokens)
    with pytest.raises(ConfigError, match="needs the rationale"):
        placed(False, count=1, place="rationale")
    with pytest.raises(ConfigError, match="needs the id"):
        place([1], [], [2], Thinking(count=1), ())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"z_loss": -1.0}, "z_loss"),
        ({"tokens": ()}, "tokens is empty"),
        ({"ids": (-1,)}, "none of them negative"),
    ],
)
def test_impossible_settings_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        ThinkingTokens(**settings)


def test_unknown_ids_are_refused(params):
    batch = batch_of(count=0)
    for objective, said in (
        (ThinkingTokens(), "not known"),
        (ThinkingTokens(ids=(V,)), "not among the model's 12"),
    ):
        with pytest.raises(ConfigError, match=said):
            objective.loss(MODEL, params, (), batch, KEY)


def test_a_run_supplies_them_with_each_question(tiny_tree):
    from tokjax.training.answers import questions
    from tokjax.training.run import build_run

    source = {"name": "arithmetic", "examples": 40, "thinking": {"count": 2}}
    tree = tiny_tree(
        objective={"name": "thinking_tokens"},
        data__tokenizer={"name": "bytes", "added": ("<T>",)},
        data__train=[{"source": source}],
        data__evals={"validation": source},
        evaluation={"every_steps": 4, "answers": {"max_new_tokens": 4}},
    )
    run = build_run(resolve(TrainConfig, tree), devices=jax.devices()[:1], show_progress=False)
    objective: Any = run.stages[0].objective
    assert objective.ids == (257,) and run.model.config.vocabulary == 258
    for question in questions(run.eval_stores["validation"], 3):
        assert question.prompt[-2:] == (257, 257) and 257 not in question.reference
    batch = run.loader.batch(0)
    thinking, targets = (np.asarray(a) == 257 for a in (batch.tokens, batch.targets))
    assert thinking.sum() == 2 * len(np.unique(batch.example_id[batch.example_id >= 0]))
    assert (np.asarray(batch.weights)[targets] == 0).all()
    assert (np.asarray(batch.weights)[thinking & ~targets] == 1).all()
    tree["objective"] = {"name": "thinking_tokens", "hide_keys": True}
    with pytest.raises(ConfigError, match=r"evaluation\.answers"):
        build_run(resolve(TrainConfig, tree), devices=jax.devices()[:1], show_progress=False)


def test_the_config_says_what_it_trains():
    found = resolve(TrainConfig, load("configs/thinking_tokens.py:distinct=2,rationale=True"))
    assert found.data.tokenizer.added == ("<T1>", "<T2>") == found.objective.tokens
    assert found.data.train[0].source.thinking == Thinking(8, tokens=("<T1>", "<T2>"))
    found = resolve(TrainConfig, load("configs/thinking_tokens.py:matched=True,data=x.jsonl"))
    assert found.data.train[0].source.kind == "reasoned"
    assert found.data.train[0].source.thinking.matched and not found.data.evals
