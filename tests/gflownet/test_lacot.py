"""LaCoT: rewards of prefixes, the filter, the frozen copy, and runs."""

import json
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.config import resolve
from tokjax.decoding.prompts import Prompts
from tokjax.errors import ConfigError, DataError
from tokjax.gflownet.balance import subtb_loss
from tokjax.gflownet.lacot import anchors, interpolated, kept
from tokjax.gflownet.marginal import answer_by_marginal, pooled
from tokjax.gflownet.prefix_rewards import prefix_rewards
from tokjax.models import ModelConfig, Transformer
from tokjax.training.config import TrainConfig
from tokjax.training.loop import train
from tokjax.training.metrics import read_metrics

MODEL = Transformer(
    ModelConfig(vocab_size=300, d_model=16, n_layers=2, n_heads=2, max_positions=64)
)
PARAMS = MODEL.init(jax.random.key(0))


@partial(jax.jit, static_argnums=0)
def _logprobs(model, params, tokens):
    logits = model.unembed(params, model.backbone(params, model.embed(params, tokens)).x)
    logp = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    return jnp.take_along_axis(logp, tokens[:, 1:, None], -1)[..., 0]


def logprobs(model, params, text, start):
    """Log-probabilities of a text's tokens from one on, by a pass of its own."""
    tokens = np.zeros((1, 32), np.int32)
    tokens[0, : len(text)] = text
    return np.asarray(_logprobs(model, params, tokens))[0, start - 1 : len(text) - 1]


def test_rewards_between_anchors_are_linear():
    found = interpolated(4, [0, 4], [-120.0, -100.0])
    np.testing.assert_array_equal(found, [-120, -115, -110, -105, -100])
    # The last stretch is shorter, and the whole has its own reward.
    np.testing.assert_allclose(
        interpolated(6, [0, 4, 6], [-8.0, -4.0, -1.0]), [-8, -7, -6, -5, -4, -2.5, -1]
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 20), st.integers(1, 9), st.integers(0, 6))
def test_every_anchor_keeps_its_own_reward(length, every, first):
    at = anchors(length, every, first)
    assert at[-1] == length
    assert np.diff(at).max(initial=0) <= every
    values = np.random.default_rng(length).normal(-9, 1, len(at))
    found = interpolated(length, at, values, first=first)
    np.testing.assert_allclose(found[at], values)
    assert (found[: min(first, length)] == -99).all()
    if every == 1:
        assert at == list(range(min(first, length), length + 1))  # exact throughout


def test_the_filter_of_the_example():
    r = np.array([-2.0, -1.9, -2.5])
    for delta, expected in (
        (1.5, [1, 1, 1]),
        (1.2, [1, 1, 0]),
        (1.0, [1, 1, 0]),
        (None, [1] * 3),
    ):
        assert kept(r, np.array(-2.0), delta).tolist() == [bool(e) for e in expected]


def test_pools_of_the_example():
    scores = np.array([[-1.0, -3.0], [-2.0, -2.1]])
    np.testing.assert_allclose(pooled(scores), [-2, -2.05])
    scores[0, 1] = -3.2
    np.testing.assert_allclose(pooled(scores), [-2.1, -2.05])
    np.testing.assert_allclose(pooled(scores, "logmeanexp"), [-1.58806, -2.04875], atol=5e-6)
    assert [int(pooled(scores, p).argmax()) for p in ("log", "logmeanexp")] == [1, 0]
    assert pooled(np.array([[-7.0]])).tolist() == pooled(np.array([[-7.0]]), "logmeanexp").tolist()


def test_prefixes_share_one_pass_and_give_what_whole_passes_give():
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 300, n).tolist() for n in (9, 14, 6)]
    starts, endings = [2, 5, 6], [[7, 8, 9], [7, 250], [7]]
    at = np.array([[0, 3, 7], [0, 4, 9], [0, 0, 0]], np.int32)
    suffix = np.zeros((3, 16), np.int32)
    for b, ending in enumerate(endings):
        suffix[b, : len(ending)] = ending
    lengths = np.array([3, 2, 1], np.int32)
    found = jax.jit(lambda *a: prefix_rewards(MODEL, PARAMS, *a))(
        Prompts.of(texts), jnp.array(starts), jnp.asarray(at), jnp.asarray(suffix), lengths
    )
    for b in range(3):
        for a in range(3):
            whole = [*texts[b][: starts[b] + at[b, a]], *endings[b]]
            alone = logprobs(MODEL, PARAMS, whole, starts[b]).sum()
            np.testing.assert_allclose(found[b, a], alone, rtol=1e-4)


@pytest.fixture(scope="module")
def lacot_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("lacot") / "chains.jsonl"
    lines = [
        {"prompt": f"{a}{b}=", "response": f"{a}+{b};{'y' if (a + b) % 2 else 'n'}"}
        for a in range(4)
        for b in range(4)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def lacot_run(flow_run, lacot_file):
    def run(devices=1, **changes):
        objective = {
            "name": "lacot",
            "marker": ";",
            "rollouts": {"group": 3, "minibatches": 2, "max_new_tokens": 6},
            "every": 2,
            "min_tokens": 1,
        }
        for name in [n for n in changes if n.startswith("objective__")]:
            objective[name.removeprefix("objective__")] = changes.pop(name)
        source = {"name": "jsonl", "files": [str(lacot_file)], "kind": "response"}
        given = {"data__train": [{"source": source}], "data__seq_len": 16, "objective": objective}
        return flow_run(devices, **{**given, **changes})

    return run


def started(run):
    """A run's first state and the collector of its first stage."""
    state = jax.jit(lambda: run.init_state(run.stages[0]))()
    folder = Path(tempfile.mkdtemp(dir=run.config.data.cache_dir))
    return state, run.config.objective.collector(run, run.stages[0], folder)


def exact_rewards(run, state, prompt, rationale, answer, tau=1.0):
    """Log-rewards of all prefixes, a whole pass each."""
    texts = [[*prompt, *rationale[:t], ord(";"), *answer] for t in range(len(rationale) + 1)]
    start = len(prompt)
    return np.array([logprobs(run.model, state.aux, t, start).sum() / tau for t in texts])


@pytest.mark.parametrize("every", [1, 3])
def test_rewards_are_exact_at_anchors(lacot_run, every):
    run = lacot_run(
        objective__every=every,
        objective__min_tokens=0,
        objective__tau={"start": 0.7, "end": 0.7},
        objective__delta=None,
    )
    state, collector = started(run)
    asked = collector.asked(0)
    paths, metrics = collector.found(state, 0, asked, 5)
    assert metrics["flow/kept"] == 1.0
    for r in range(0, len(paths.tokens), 3):
        question = asked[r // 4]
        rationale = paths.tokens[r][:-1]
        exact = exact_rewards(
            run, state, question.prompt, rationale, collector.split(question)[1], 0.7
        )
        at = anchors(len(rationale), every)
        found = paths.log_r[r, : len(rationale) + 1]
        np.testing.assert_allclose(found[at], exact[at], rtol=1e-4)
        if every == 1:
            np.testing.assert_allclose(found, exact, rtol=1e-4)
        else:
            np.testing.assert_allclose(
                found, interpolated(len(rationale), at, exact[at]), rtol=1e-4
            )


def test_references_come_first_and_stay(lacot_run):
    run = lacot_run(objective__delta={"start": 1.0, "end": 1.0})
    state, collector = started(run)
    asked = collector.asked(0)
    paths, metrics = collector.found(state, 0, asked, 5)
    assert [told["kind"] for told in paths.told[:5]] == ["reference", *["drawn"] * 3, "reference"]
    assert all(told["kept"] for told in paths.told[::4])
    assert 0 < metrics["flow/kept"] < 1
    for r, told in enumerate(paths.told):
        assert paths.states[r].any() == told["kept"]
    own = collector.split(asked[0])[0]
    assert tuple(paths.tokens[0]) == (*own, ord(";"))
    assert len(own) == 3  # "a+b"


def test_no_rationale_ends_early(lacot_run):
    state, collector = started(lacot_run(objective__min_tokens=4))
    paths, _ = collector.found(state, 0, collector.asked(0), 5)
    for r, tokens in enumerate(paths.tokens):
        if r % 4:
            assert 4 <= len(tokens) - 1 <= 6
            assert (paths.log_r[r, :4] == -99).all()
            assert collector.run.tokenizer.eos_id not in tokens


def test_only_what_is_kept_enters_the_loss(lacot_run):
    run = lacot_run(
        objective__delta={"start": 1.0, "end": 1.0},
        objective__rollouts={"group": 3, "minibatches": 1, "max_new_tokens": 6},
    )
    state, collector = started(run)
    batch = collector.batch(state, 0)[0]
    loss = run.config.objective.loss(run.model, state.params, state.aux, batch, jax.random.key(0))
    states = np.asarray(batch.channels["state"]) != 0
    assert 2 <= states.any(1).sum() < 8
    logits = run.model.unembed(
        state.params,
        run.model.backbone(state.params, run.model.embed(state.params, batch.tokens)).x,
    )
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))
    taken = jnp.take_along_axis(logp, batch.targets[..., None], -1)[..., 0]
    ends = jnp.where(batch.channels["state"] == 2, 0.0, logp[..., collector.end])
    expected = subtb_loss(taken, ends, batch.channels["log_reward"], states)
    np.testing.assert_allclose(loss.total / loss.weight, expected, rtol=1e-4)


def test_the_reward_model_has_no_gradient_and_stays(lacot_run, tmp_path):
    run = lacot_run()
    state, collector = started(run)
    batch = collector.batch(state, 0)[0]

    def loss(aux):
        return run.config.objective.loss(
            run.model, state.params, aux, batch, jax.random.key(0)
        ).total

    assert all(not np.any(g) for g in jax.tree.leaves(jax.grad(loss)(state.aux)))
    slope = jax.grad(
        lambda p: prefix_rewards(
            MODEL,
            p,
            Prompts.of([[1, 2, 3]]),
            jnp.array([1]),
            jnp.array([[0, 2]]),
            jnp.array([[4, 5]]),
            jnp.array([2]),
        ).sum()
    )(PARAMS)
    assert all(not np.any(g) for g in jax.tree.leaves(slope))
    trained = train(run, tmp_path).state
    jax.tree.map(np.testing.assert_array_equal, trained.aux, state.aux)
    assert any(
        np.any(a != b)
        for a, b in zip(jax.tree.leaves(trained.params), jax.tree.leaves(state.params), strict=True)
    )


def test_with_adapters_the_frozen_model_is_the_one_without_them(lacot_run, tmp_path):
    base = tmp_path / "base"
    train(lacot_run(), base)
    run = lacot_run(model={"lora": {"rank": 2}}, init_from=str(base))
    state = train(run, tmp_path / "adapted").state
    _, collector = started(run)
    assert state.aux == ()
    asked = collector.asked(0)
    paths = collector.found(state, 0, asked, 5)[0]
    other = state.replace(params=jax.tree.map(lambda a: 3 * a + 0.1, state.params))
    # The same rationales are worth the same wherever the adapters go.
    rationales = [tuple(t[:-1]) for t in paths.tokens]
    answers = [collector.split(q)[1] for q in asked for _ in range(4)]
    worth = [collector.rewards(s, paths.prompts, rationales, answers)[1] for s in (state, other)]
    np.testing.assert_array_equal(*worth)
    text = jnp.asarray([paths.prompts[0]])
    drawn = [run.model.backbone(s.whole, run.model.embed(s.whole, text)).x for s in (state, other)]
    assert np.any(drawn[0] != drawn[1])


def test_it_trains_and_tells(lacot_run, tmp_path):
    run = lacot_run(
        objective__tau={"start": 1.0, "end": 0.7, "steps": 2},
        objective__delta={"start": 1.5, "end": 1.0, "steps": 4},
    )
    assert train(run, tmp_path).finished
    table = read_metrics(tmp_path)
    assert table["flow/tau"][::2] == [1.0, 0.7]
    assert table["flow/delta"][::2] == [1.5, 1.25]
    assert all(np.isfinite(v) for v in table["flow_loss"])
    told = [json.loads(line) for line in (tmp_path / "flows.jsonl").read_text().splitlines()]
    assert len(told) == 16


def test_answers_by_marginal_likelihood():
    prompts = [[1, 2, 3], [4, 5]]
    found = answer_by_marginal(
        MODEL, PARAMS, prompts, [7, 8], 0, samples=3, max_rationale=4, max_answer=3, seed=1
    )
    for prompt, each in zip(prompts, found, strict=True):
        assert each.scores.shape == (3, 3)
        for j in range(3):
            for i in range(3):
                text = [*each.rationales[i], 7, 8, *each.answers[j]]
                alone = logprobs(MODEL, PARAMS, [*prompt, *text], len(prompt)).mean()
                np.testing.assert_allclose(each.scores[j, i], alone, rtol=1e-4)
        np.testing.assert_array_equal(each.pooled, each.scores.mean(1))
    alone = answer_by_marginal(
        MODEL,
        PARAMS,
        prompts,
        [7, 8],
        0,
        samples=1,
        max_rationale=4,
        max_answer=3,
        pool="logmeanexp",
    )
    assert [a.best for a in alone] == [0, 0]
    with pytest.raises(ConfigError, match="unknown pool"):
        answer_by_marginal(MODEL, PARAMS, prompts, [7], 0, pool="mean")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no ids"):
        answer_by_marginal(MODEL, PARAMS, prompts, [], 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"marker": ""}, "marker is empty"),
        ({"every": 0}, "every=0"),
        ({"min_tokens": 2000}, "min_tokens=2000"),
        ({"tau": {"start": 0.0}}, "tau goes from 0.0"),
        ({"delta": {"end": -1.0}}, "delta goes"),
        ({"hot": 2.0}, "hot=2.0"),
        ({"hot_low": 2.0}, "hot_low=2.0"),
        ({"tau": {"steps": -1}}, "steps=-1"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    tree = {"objective": {"name": "lacot", "marker": ";", **changes}, "steps": 1}
    with pytest.raises(ConfigError, match=message):
        resolve(TrainConfig, tree)


def test_answers_without_the_marker_are_refused(lacot_run):
    with pytest.raises(DataError, match="holds the marker '#'"):
        started(lacot_run(objective__marker="#"))
