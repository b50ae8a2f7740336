"""SHAD: worked numbers, what is shuffled, and what identical copies say."""

import doctest
import json
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokjax import cli, select
from tokjax.data.annotated import annotate
from tokjax.data.artifact import read_artifact
from tokjax.data.batch import Batch
from tokjax.data.store import TokenStore
from tokjax.data.tokenizers import TokenizerConfig, build_tokenizer
from tokjax.errors import ConfigError, DataError
from tokjax.finetuning.rft import RFT
from tokjax.finetuning.sft import SFT
from tokjax.language_model import LanguageModel
from tokjax.models import ModelConfig, Transformer
from tokjax.selection import shad
from tokjax.selection.methods import selector
from tokjax.selection.scoring import Target, score
from tokjax.selection.shad import Shad, Shuffled, derangement, drawn, labels, shuffled_answers

SMALL = {"batch_tokens": 512}


def of_pool(pool, max_tokens=64):
    return Target(pool, 512, max_tokens)


def test_docs():
    assert doctest.testmod(shad).failed == 0


def test_labels_of_the_specification():
    after, before = [0.05, 0.10, 2.5, 0.02, 3.0], [0.30, 0.10, 1.9, 0.40, 2.0]
    difference, reasoning = labels(np.array(before), np.array(after))
    np.testing.assert_allclose(difference, [-0.25, 0, 0.6, -0.38, 1.0], atol=1e-12)
    assert np.flatnonzero(reasoning).tolist() == [2, 4]  # the tie at 1 is boilerplate
    assert np.flatnonzero(labels(np.array(before), np.array(after), 0.7)[1]).tolist() == [4]


@given(st.lists(st.integers(0, 6), min_size=2, max_size=30), st.integers(0, 2**32))
def test_no_answer_stays_and_equal_ones_meet_as_rarely_as_possible(values, seed):
    found = derangement(values, np.random.default_rng(seed))
    assert sorted(found.tolist()) == list(range(len(values)))
    assert (found != np.arange(len(values))).all()
    met = sum(values[i] == values[j] for i, j in enumerate(found))
    most = max(Counter(values).values())
    assert met == max(0, 2 * most - len(values))


def test_answers_are_handed_to_other_prompts_and_alone_have_weight(pool):
    found = shuffled_answers(of_pool(pool), 1.0, seed=0)
    able = [i for i, (ids, prompt) in enumerate(pool.examples) if 1 < prompt < len(ids)]
    assert 19 not in able and sorted(found.indices) == able  # the others lack prompt or answer
    assert sorted(found.answers) == sorted(found.indices)
    assert (found.answers != found.indices).all()
    for b, (i, j) in enumerate(zip(found.indices, found.answers, strict=True)):
        (prompt, start), (other, cut) = pool.examples[i], pool.examples[j]
        expected = [*prompt[:start], *other[cut:]][:64]
        assert found.tokens[b, : found.lengths[b]].tolist() == expected
        assert np.flatnonzero(found.weights[b]).tolist() == list(range(start, len(expected)))
    batch = found.batch(np.array([3, 1]), 4)
    n = found.lengths[3]
    assert batch.tokens[0, : n - 1].tolist() == found.tokens[3, : n - 1].tolist()
    assert batch.targets[0, : n - 1].tolist() == found.tokens[3, 1:n].tolist()
    assert batch.segment_ids.sum(1).tolist() == [n - 1, found.lengths[1] - 1, 0, 0]
    np.testing.assert_array_equal(batch.weights[0], found.weights[3, 1:])
    assert batch.example_id.ravel().tolist() == [3, 1, -1, -1] and not batch.weights[2:].any()


def test_the_draw_is_a_share_two_at_least_and_that_of_the_seed(pool):
    assert len(drawn(of_pool(pool), 0.01, 0)) == 2 and len(drawn(of_pool(pool), 0.2, 0)) == 4
    assert (drawn(of_pool(pool), 0.2, 0) == drawn(of_pool(pool), 0.2, 0)).all()
    assert set(drawn(of_pool(pool), 0.5, 0)) != set(drawn(of_pool(pool), 0.5, 1))
    # Where answers lie behind what is read, there is nothing to hand over.
    assert len(drawn(of_pool(pool, 8), 1.0, 0)) < len(drawn(of_pool(pool), 1.0, 0))


def test_pools_without_prompts_are_refused(store):
    plain = store([([1, 5, 6, 7], 0), ([1, 8, 9], 0), ([1, 4, 2, 6], 2)])
    with pytest.raises(DataError, match="1 of the pool's 3 examples have a prompt"):
        drawn(of_pool(plain), 0.5, 0)


@pytest.mark.parametrize("rank", [4, None])
def test_a_copy_that_learned_nothing_calls_all_boilerplate_and_rft_is_sft(lm, pool, rank):
    options = Shad(learning_rate=0.0, rank=rank, epochs=1, share=0.2)
    found = score(options, lm.model, lm.params, pool, channels=True, **SMALL)
    for name in ("reasoning", "loss_difference"):
        assert not any(own.any() for own in found.channels[name])
    assert (found.scores[:-1] == 0).all() and found.scores[-1] == -np.inf

    def loss(objective):
        ids, prompt = pool.examples[0]
        n = len(ids) - 1
        batch = Batch(
            tokens=jnp.array([ids[:-1]]),
            targets=jnp.array([ids[1:]]),
            positions=jnp.arange(n)[None],
            segment_ids=jnp.ones((1, n), jnp.int32),
            weights=jnp.array([[float(t >= prompt) for t in range(1, n + 1)]]),
            example_id=jnp.zeros((1, 1), jnp.int32),
            channels={"reasoning": jnp.asarray(found.channels["reasoning"][0][None, 1:])},
        )
        out = objective.loss(lm.model, lm.params, (), batch, jax.random.key(0))
        return float(out.total / out.weight)

    plain = loss(SFT(norm="sequence"))
    np.testing.assert_allclose(loss(SFT(weigher=RFT(), norm="sequence")), plain, rtol=1e-6)
    answer = found.channels["nll"][0][pool.examples[0][1] :]
    np.testing.assert_allclose(answer.mean(), plain, rtol=1e-5)


@pytest.mark.parametrize("rank", [4, None])
def test_labels_are_of_answers_alone_and_do_not_depend_on_which_are_scored(lm, pool, rank):
    options = Shad(share=0.5, epochs=2, rank=rank, learning_rate=3e-3)
    told = []
    found = score(
        options,
        lm.model,
        lm.params,
        pool,
        channels=True,
        on_step=lambda done, all: told.append((done, all)),
        **SMALL,
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    difference, reasoning = found.channels["loss_difference"], found.channels["reasoning"]
    for i, (ids, prompt) in enumerate(pool.examples):
        assert all(len(own[i]) == len(ids) for own in found.channels.values())
        assert not difference[i][:prompt].any() and not reasoning[i][:prompt].any()
        np.testing.assert_array_equal(reasoning[i], difference[i] > 0)
        if prompt < len(ids):
            np.testing.assert_allclose(found.scores[i], reasoning[i][prompt:].mean(), rtol=1e-6)
    assert 0 < np.mean(np.concatenate(reasoning)) < 1

    some = score(options, lm.model, lm.params, pool, indices=[2, 11], channels=True, **SMALL)
    np.testing.assert_array_equal(some.scores[[2, 11]], found.scores[[2, 11]])
    np.testing.assert_array_equal(some.channels["reasoning"][11], reasoning[11])


def test_what_does_not_depend_on_the_prompt_is_found(store):
    """A model that copies the prompt's token, between words that never change."""
    from tokjax.training.optimizers import AdamW, Constant
    from tokjax.training.state import init_state
    from tokjax.training.step import StepConfig, make_train_step

    def examples(count, seed, words):
        rng = np.random.default_rng(seed)
        drawn = rng.integers(10, 30, count)
        rest = rng.integers(30, 40, (count, 3)) if words is None else np.tile(words, (count, 1))
        return store(
            [
                ([1, int(d), 2, *own[:2], int(d), own[2]], 3)
                for d, own in zip(drawn, rest.tolist(), strict=True)
            ]
        )

    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_positions": 16, "remat": "none"}
    model = Transformer(ModelConfig(vocab_size=40, **sizes))
    optimizer = AdamW(weight_decay=0.0).build(model.config)
    config = StepConfig(5e-3, Constant(), 0, 300, clip_norm=1.0)
    step = jax.jit(make_train_step(model, SFT(), optimizer, config))
    state = init_state(model, SFT(), optimizer, 0, False)
    own, every = examples(4000, 0, None), np.arange(4000)
    tokens = np.array([ids for ids, _ in own.examples], np.int32)
    weights = np.tile(np.float32([0, 0, 0, 1, 1, 1, 1]), (4000, 1))
    learned = Shuffled(every, every, tokens, weights, np.full(4000, 7, np.int32))
    for number in range(300):
        state, _ = step(state, learned.batch(np.arange(number * 64, number * 64 + 64) % 4000, 64))

    pool = examples(200, 1, [31, 35, 38])
    options = Shad(share=0.2, epochs=6, learning_rate=3e-3)
    target = of_pool(pool, 16)
    found = score(options, model, state.params, pool, channels=True, max_tokens=16)
    kept = np.setdiff1d(np.arange(200), drawn(target, 0.2, 0))
    reasoning = np.array([found.channels["reasoning"][i] for i in kept])
    assert reasoning[:, 5].mean() > 0.85  # the copied token
    assert reasoning[:, [3, 4, 6]].mean() < 0.03 and not reasoning[:, :3].any()
    told = options.summary(target, found.channels)
    assert (told["tuned_on"], told["answer_tokens"], "note" in told) == (40, 800, False)
    assert 0.2 < told["reasoning_share"] < 0.29
    assert told["reasoning_nll"] < 0.7 < 2 < told["boilerplate_nll"]

    untrained = model.init(jax.random.key(3))
    nothing = score(options, model, untrained, pool, channels=True, max_tokens=16)
    told = options.summary(target, nothing.channels)
    assert told["reasoning_share"] < 0.15 and told["boilerplate_nll"] > 3


def test_the_summary_counts_what_is_not_read_and_says_when_labels_are_useless(store):
    pool = store([([1, 5, 6, 7, 8], 2), ([1, 9, 4], 2)])
    none = [np.zeros(5, np.float32), np.zeros(3, np.float32)]
    nll = [np.array([0, 0, 1, 2, 0], np.float32), np.array([0, 0, 3], np.float32)]
    told = Shad().summary(of_pool(pool, 4), {"reasoning": none, "nll": nll})
    assert (told["unread_answer_tokens"], told["answer_tokens"]) == (1, 3)
    assert (told["reasoning_nll"], told["boilerplate_nll"]) == (None, 2.0)
    assert "no token" in told["note"]
    every = [np.ones_like(own) for own in none]
    told = Shad().summary(of_pool(pool, 4), {"reasoning": every, "nll": nll})
    assert "every token" in told["note"] and told["reasoning_share"] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0}, "share=0"),
        ({"share": 1.5}, "share=1.5"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"rank": 0}, "rank=0"),
        ({"threshold": -0.1}, r"threshold=-0\.1"),
        ({"seed": -1}, "seed=-1"),
        ({"epoch": 1}, "Did you mean 'epochs'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        selector("shad", options)


def test_a_tuning_that_diverges_is_named(lm, pool):
    broken = {**lm.params, "embedding": lm.params["embedding"].at[7].set(np.nan)}
    with pytest.raises(ConfigError, match=r"learning_rate=0\.001 makes the loss"):
        score(Shad(share=1.0, epochs=1), lm.model, broken, pool, **SMALL)


# ---- the command


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A saved model and a pool of 24 questions whose answers share all but a word."""
    folder = tmp_path_factory.mktemp("shad")
    words = ["cat", "dog", "log", "mat"]
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(f"The answer is {w}, as you know." for w in words) * 40)
    tokenizer = build_tokenizer(TokenizerConfig(vocab_size=280, corpus=str(corpus)), folder / "bpe")
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_positions": 64}
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, **sizes))
    params = model.init(jax.random.key(0))
    LanguageModel(model, params, tokenizer).save(folder / "model")
    rows = [
        {"prompt": f"{i}. {words[i % 4]}?", "response": f"The answer is {words[i % 4]}."}
        for i in range(24)
    ]
    (folder / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SimpleNamespace(folder=folder, tokenizer=tokenizer)


def run(capsys, place, out, *more):
    given = [
        *("--method=shad", f"--model={place.folder / 'model'}", "--budget=100%", f"--out={out}"),
        *(f"--pool={place.folder / 'pool.jsonl'}", "--batch_tokens=256", *more),
    ]
    with pytest.raises(SystemExit) as ended:
        cli.run(select.main, given)
    return ended.value.code, capsys.readouterr()


def test_one_command_writes_channels_and_goes_on_consistently(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TOKJAX_CACHE", str(place.folder / "cache"))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tuned = ("--set.share=0.3", "--set.learning_rate=3e-3")
    code, shown = run(capsys, place, whole, *tuned)
    assert code == 0, shown.err
    found = read_artifact(whole / "selection.parquet")
    assert set(found.channels) == {"reasoning", "loss_difference", "nll"} and found.keep.all()
    assert found.meta["found"]["tuned_on"] == 8 and found.meta["options"]["rank"] == 8
    share = found.meta["found"]["reasoning_share"]
    assert f"reasoning share: {share}" in shown.out and "reasoning nll:" in shown.out
    lines = (whole / "scores.jsonl").read_text().splitlines(keepends=True)
    parts.mkdir()
    (parts / "scores.jsonl").write_text("".join(lines[:9]) + lines[9][:12])
    assert run(capsys, place, parts, *tuned)[0] == 0
    again = read_artifact(parts / "selection.parquet")
    for name in found.channels:
        np.testing.assert_allclose(found.channel(name), again.channel(name), atol=1e-6)
    assert again.meta["found"] == found.meta["found"]
    code, shown = run(capsys, place, parts, "--set.share=0.2")
    assert (code, "choose another --out" in shown.err) == (2, True)

    store = TokenStore.open(next((place.folder / "cache/stores").glob("jsonl-*")))
    joined = annotate(store, str(whole / "selection.parquet"))
    weights = np.concatenate([joined.weights(i) for i in range(24)])
    reasoning = np.concatenate([joined.channel("reasoning", i) for i in range(24)])
    assert not reasoning[weights == 0].any() and set(reasoning) <= {0.0, 1.0}


def test_text_without_prompts_is_refused_with_the_kinds_that_have_some(
    place, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("TOKJAX_CACHE", str(place.folder / "cache"))
    text = ("--kind=text", "--source.text=response")
    code, shown = run(capsys, place, tmp_path / "out", *text)
    assert (code, "kind='response'" in shown.err) == (3, True), shown.err
