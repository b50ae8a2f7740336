"""Policy and detector of a learnt watermark: rewards, pairs, both losses, and runs."""

import dataclasses
import itertools
import json
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.config import resolve
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError, DataError
from tokjax.rl.advantages import GeneralisedAdvantage
from tokjax.rl.policy_loss import policy_loss
from tokjax.rl.rl_watermark import RLWatermark
from tokjax.rl.watermark_detection import (
    WatermarkDetector,
    detection,
    load_detector,
    with_substitutions,
)
from tokjax.rl.watermark_detector import detector_scores, pair_losses, substituted
from tokjax.training.loop import train
from tokjax.training.metrics import read_metrics
from tokjax.training.trained import load_trained

SMALL = {"model": {"d_model": 16, "n_layers": 1, "n_heads": 2}}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    yield
    sys.modules.pop("rewards_for_tests", None)


def objective_of(**changes):
    rollouts = {"group": 1, "max_new_tokens": 3}
    return {"name": "rl_watermark", "rollouts": rollouts, "detector": SMALL, **changes}


@pytest.fixture
def watermark_run(rl_run):
    """A function building a run of the objective with changes to it and to the run."""

    def run(run_changes=None, **changes):
        whole = {"optimizer__weight_decay": 0.0, **(run_changes or {})}
        whole.setdefault("objective", objective_of(**changes))
        return rl_run(**whole)

    return run


def collector_of(run):
    """The collector of a run's first stage."""
    folder = Path(tempfile.mkdtemp(dir=run.config.data.cache_dir))
    return run.stages[0].objective.collector(run, run.stages[0], folder)


def started(run):
    """A run's first state and the collector of its first stage."""
    return jax.jit(lambda: run.init_state(run.stages[0]))(), collector_of(run)


def collected(collector, state, monkeypatch, answers=None, score=None):
    """What a collection makes of given answers and a given score: rows, and what was told."""
    if answers is not None:
        real = collector.sample

        def sample(*args, **options):
            found = real(*args, **options)
            stopped = np.array([a[-1] == 256 for a in answers])
            zeros = [[0.0] * len(a) for a in answers]
            return dataclasses.replace(found, tokens=answers, logprobs=zeros, stopped=stopped)

        monkeypatch.setattr(collector, "sample", sample)
    if score is not None:
        plain = collector.scores
        monkeypatch.setattr(
            collector,
            "scores",
            lambda *args: (s := plain(*args)) | {"detector": np.full_like(s["detector"], score)},
        )
    metrics, _ = collector.collect(state, 0)
    lines = (collector.workdir / "episodes.jsonl").read_text().splitlines()
    return collector.batches[0][0], [json.loads(line) for line in lines], metrics


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ---------------------------------------------------------------- numbers


def test_the_loss_of_a_pair():
    found = pair_losses(jnp.array([1.2]), jnp.array([0.2]), l2=0.0)
    np.testing.assert_allclose(found, [0.31326], atol=1e-5)
    whole = pair_losses(jnp.array([1.2]), jnp.array([0.2]))
    np.testing.assert_allclose(whole - found, [1e-4 * (1.44 + 0.04)], rtol=1e-3)


def test_swapping_a_pair_turns_its_margin_around():
    high, low = jnp.array([1.2, -0.3]), jnp.array([0.2, 0.5])
    there, back = (pair_losses(a, b, 0.0) for a, b in ((high, low), (low, high)))
    np.testing.assert_allclose(back - there, high - low, rtol=1e-6)


def test_rewards_advantages_and_returns_of_three_actions(rollout_of):
    place = lambda values: jnp.zeros((1, 5)).at[0, 1:4].set(jnp.array(values))  # noqa: E731
    ratio, values = [0.1, -0.2, 0.3], [0.5, 0.6, 0.7]
    rollout = rollout_of([2.0], [3], 1, logprobs=place(ratio))
    scores = {"reference": jnp.zeros((1, 5)), "value": place(values)}
    rollout = dataclasses.replace(rollout, scores=scores)
    advantage = RLWatermark().advantage
    assert advantage == GeneralisedAdvantage(gamma=1.0, lam=0.95, kl_coef=0.1, whiten=False)
    found = advantage(rollout)[0]
    np.testing.assert_allclose(found[0, 1:4], [1.35017, 1.32650, 1.27], atol=1e-5)
    returns = advantage.unscaled(rollout) + scores["value"]
    np.testing.assert_allclose(returns[0, 1:4], [1.85017, 1.92650, 1.97], atol=1e-5)
    # Without values and decay what is left of an advantage are the rewards themselves.
    plain = dataclasses.replace(rollout, scores=scores | {"value": jnp.zeros((1, 5))})
    rewards = dataclasses.replace(advantage, gamma=0.0)(plain)[0]
    np.testing.assert_allclose(rewards[0, 1:4], [-0.01, 0.02, 1.97], atol=1e-6)


def test_defaults_are_those_of_the_code():
    objective = RLWatermark()
    assert (objective.clip_low, objective.clip_high, objective.value_clip) == (0.2, 0.2, 0.2)
    assert (objective.value_coef, objective.l2, objective.reward_clip) == (0.5, 1e-4, 5.0)
    assert objective.rollouts.group == objective.rollouts.minibatches == 1
    assert objective.distill_coef == objective.substitution == 0.0
    assert objective.share == 1.0
    assert resolve(RLWatermark, {"rewards": [{"name": "format"}]}).share == 0.5


@pytest.mark.parametrize("gone", [False, True])
def test_a_constant_score_leaves_the_gradient_of_the_divergence(rollout_of, gone):
    """Of all answers of two tokens out of three, each weighed by its probability."""
    V, beta, lam = 3, 7.0, 0.95 if not gone else 1.0
    answers = jnp.array(list(itertools.product(range(V), repeat=2)))
    start = {"first": jnp.array([0.3, -0.2, 0.1]), "then": jnp.arange(9.0).reshape(V, V) / 5}
    theta = jax.tree.map(lambda p: p + 0.4 * jnp.cos(1 + 3 * p) * gone, start)

    def logprobs(theta):
        first = jax.nn.log_softmax(theta["first"])[answers[:, 0]]
        then = jax.nn.log_softmax(theta["then"])[answers[:, 0], answers[:, 1]]
        return jnp.pad(jnp.stack([first, then], axis=1), ((0, 0), (1, 1)))

    old, fixed = logprobs(theta), logprobs(start)
    rollout = rollout_of([4.0] * 9, [2] * 9, 1, logprobs=old)
    scores = {"reference": fixed, "value": jnp.zeros_like(old)}
    rollout = dataclasses.replace(rollout, scores=scores)
    advantage = GeneralisedAdvantage(kl_coef=beta, whiten=False, lam=lam)(rollout)[0]
    p = jnp.exp(old.sum(1, keepdims=True))

    def loss(theta):
        return policy_loss(logprobs(theta), old, advantage, rollout.mask, weights=p + 0 * old)[0]

    def divergence(theta):
        own = logprobs(theta).sum(1)
        return (jnp.exp(own) * (own - fixed.sum(1))).sum()

    expected = jax.tree.map(lambda g: beta * g, jax.grad(divergence)(theta))
    found = jax.grad(loss)(theta)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert any(np.abs(g).max() > 0.1 for g in jax.tree.leaves(expected)) == gone


def test_scores_that_are_the_same_cannot_be_told_apart():
    scores = np.array([0.1, 0.5, 0.5, 2.0])
    assert detection(scores, scores).auc == 0.5
    assert detection(scores + 10, scores) == (1.0, 0.0, 0.0)
    assert detection(scores, scores + 10) == (0.0, 1.0, 1.0)
    found = detection(np.arange(10.0), np.array([0.5, -1.0, -2.0, -3.0]))
    assert found == (39 / 40, 0.0, 0.25)  # at 9 of 10 none of the four lies above


# ---------------------------------------------------------------- corruptions


def test_a_share_of_each_texts_tokens_is_random():
    tokens = jnp.full((3, 20), 500)
    mask = jnp.arange(20)[None] < jnp.array([20, 10, 0])[:, None]
    found = substituted(tokens, mask, 0.2, 100, jax.random.key(0))
    assert (found != tokens).sum(-1).tolist() == [4, 2, 0]
    assert not ((found != tokens) & ~mask).any()
    assert_equal(substituted(tokens, mask, 0.0, 100, jax.random.key(0)), tokens)
    every = substituted(tokens, mask, 1.0, 100, jax.random.key(0))
    assert_equal(every != tokens, mask)
    rows = [[500] * 10, [500] * 5]
    again = with_substitutions(rows, 0.4, 100, seed=1)
    assert [sum(t != 500 for t in row) for row in again] == [4, 2]
    assert [len(row) for row in again] == [10, 5]
    assert again == with_substitutions(rows, 0.4, 100, seed=1)
    assert again != with_substitutions(rows, 0.4, 100, seed=2)


# ---------------------------------------------------------------- collections


def test_scores_beyond_the_clip_are_rewards_of_the_clip(watermark_run, monkeypatch):
    state, collector = started(watermark_run())
    for score, reward in ((9.0, 5.0), (-9.0, -5.0), (1.5, 1.5)):
        with monkeypatch.context() as patch:
            _, told, metrics = collected(collector, state, patch, [[1, 2, 3]] * 8, score)
        assert [each["reward"] for each in told] == [reward] * 8
        assert metrics["reward/mean"] == reward
        assert metrics["reward/detector"] == score
        assert metrics["reward/clipped"] == float(abs(score) > 5)


def test_other_rewards_have_their_share(watermark_run, monkeypatch):
    rewards = [{"name": "function", "path": "rewards_for_tests:first_token"}]
    run = watermark_run(rewards=rewards, watermark_share=0.25)
    state, collector = started(run)
    answers = [[2, 2, 3]] * 4 + [[1, 2, 3]] * 4
    with collector:
        _, told, _ = collected(collector, state, monkeypatch, answers, 2.0)
    assert [each["reward"] for each in told] == [0.25 * 2 + 0.75] * 4 + [0.25 * 2] * 4


def test_pairs_are_scored_behind_as_many_tokens_and_ends_are_no_text(watermark_run, monkeypatch):
    run = watermark_run(trains_policy=False)
    state, collector = started(run)
    answers = [[65, 66, 67], [65, 66, 256], [65, 256], [256]] * 2
    rows, _, metrics = collected(collector, state, monkeypatch, answers)
    assert metrics["rollout/dropped"] == 0.5
    batch = jax.tree.map(jnp.asarray, rows)
    asked = collector.asked(0)
    scores = run.config.objective.score(run.model, state.whole, state.aux, batch)["detector"]
    pairs = run.config.objective.pairs(run.model, state.params, batch, jax.random.key(0))
    assert len(pairs) == 1
    detector = state.params["heads"]["detector"]
    trunk = run.config.objective.detector.trunk(run.model)
    for r, (question, answer) in enumerate(zip(asked, answers, strict=True)):
        own = [t for t in answer if t != 256]
        human = [t for t in question.reference if t != 256][:3]
        n, before = min(len(own), len(human)), len(question.prompt)
        valid = len(own) > 1
        assert pairs[0][2][r] == valid
        assert np.flatnonzero(rows.channels["human_end"][r]).tolist() == (
            [before + n - 2] if valid else []
        )
        if not valid:
            assert not rows.channels["weight"][r].any()
            continue
        for text, score in ((own, pairs[0][0][r]), (human, pairs[0][1][r])):
            tokens = jnp.array([[*question.prompt, *text[:n]]])
            alone = detector_scores(trunk, detector, tokens, jnp.ones(tokens.shape, bool))
            np.testing.assert_allclose(score, alone[0, -1], atol=1e-5)
        np.testing.assert_allclose(scores[r, before + n - 2], pairs[0][0][r], atol=1e-6)


def test_filling_changes_no_score_and_no_loss(watermark_run, monkeypatch):
    run = watermark_run(trains_policy=False)
    state, collector = started(run)
    answers = [[65, 66, 67], [65, 66, 256]] * 4
    rows, _, _ = collected(collector, state, monkeypatch, answers)
    batch = jax.tree.map(jnp.asarray, rows)

    def longer(a):
        return a if a.shape[1] == 1 else jnp.pad(a, ((0, 0), (0, 5)))

    wide = jax.tree.map(longer, batch)
    full = lambda a: a.at[:, 12:].set(77)  # noqa: E731 (ids of filling mean nothing)
    wide = dataclasses.replace(wide, tokens=full(wide.tokens), targets=full(wide.targets))
    loss = jax.jit(run.config.objective.loss, static_argnums=0)
    key = jax.random.key(0)
    short, long = (loss(run.model, state.params, state.aux, b, key) for b in (batch, wide))
    np.testing.assert_allclose(short.total, long.total, rtol=1e-5)
    assert short.weight == long.weight == 8
    # Halves of a batch add up to it.
    parts = [jax.tree.map(lambda a, h=h: a[h::2], batch) for h in range(2)]
    halves = [loss(run.model, state.params, state.aux, b, key) for b in parts]
    np.testing.assert_allclose(sum(h.total for h in halves), short.total, rtol=1e-5)


def test_plain_texts_are_cut_into_prompts_with_continuations(watermark_run, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("abcdefghijklmnopqrstuvwxyz")
    source = {"name": "text", "files": [str(file)]}
    changes = {}
    for bos in (True, False):
        tokenizer = {"name": "bytes", "add_bos": bos, "add_eos": False}
        changes = {"data__train": [{"source": source}], "data__tokenizer": tokenizer}
        collector = collector_of(watermark_run(changes, prompt_tokens=4))
        found = [(q.prompt[bos:], q.reference) for q in collector.questions]
        texts = [(bytes(a).decode(), bytes(b).decode()) for a, b in found]
        assert texts == [("abcd", "efg"), ("hijk", "lmn"), ("opqr", "stu")]
        assert all(q.prompt[0] == 256 for q in collector.questions) == bos
    with pytest.raises(ConfigError, match="prompt_tokens=11"):
        collector_of(watermark_run(changes, prompt_tokens=11))
    file.write_text("abcde")
    with pytest.raises(DataError, match="prompt_tokens=4"):
        collector_of(watermark_run(changes, prompt_tokens=4))


def test_more_pairs_are_asked_for(watermark_run, monkeypatch):
    more = {"substitution": 1.0, "paraphrase": "builtins:list", "other_texts": "builtins:list"}
    run = watermark_run(**more, l2=0.0)
    state, collector = started(run)
    answers = [[65, 66, 67], [65, 66, 256]] * 4
    rows, _, _ = collected(collector, state, monkeypatch, answers)
    batch = jax.tree.map(jnp.asarray, rows)
    objective = run.config.objective
    pairs = objective.pairs(run.model, state.params, batch, jax.random.key(0))
    plain, changed, paraphrase, other = pairs
    for a, b in zip((*paraphrase, *changed[1:]), (*plain, *plain[1:]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)  # paraphrases are the answers' own texts
    assert (changed[0] != plain[0]).all()
    assert_equal(other[2], jnp.ones(8))
    for r, question in enumerate(collector.asked(0)):
        text = [t for t in question.prompt if t != 256]
        expected = [*question.prompt, *text[: collector.config.max_new_tokens]]
        found = rows.channels["other"][r]
        assert (found[found > 0] - 1).astype(int).tolist() == expected[1:]
    loss = objective.loss(run.model, state.params, state.aux, batch, jax.random.key(0))
    alone = dataclasses.replace(objective, substitution=0.0, paraphrase="", other_texts="")
    base = alone.loss(run.model, state.params, state.aux, batch, jax.random.key(0))
    gain = sum((pair_losses(a, b, 0.0) * w).sum() for a, b, w in pairs[1:])
    np.testing.assert_allclose(loss.total - base.total, 3 * gain, rtol=1e-4)
    with pytest.raises(DataError, match="returned 1 texts for 2"):
        collector.written("builtins:set", ["a", "a"])


def test_the_cross_entropy_to_the_reference_has_the_gradient_of_the_divergence(watermark_run):
    run = watermark_run(distill_coef=0.5)
    state, collector = started(run)
    collector.collect(state, 0)
    batch = jax.tree.map(jnp.asarray, collector.batches[0][0])
    objective = run.config.objective

    def value(params):
        return objective.distilled(run.model, params, state.aux, batch)

    found, gradient = jax.value_and_grad(value)(state.params)
    np.testing.assert_allclose(found, 0.0, atol=1e-5)
    assert max(jnp.abs(g).max() for g in jax.tree.leaves(gradient)) < 1e-5
    moved = jax.tree.map(lambda p: 1.3 * p, state.params)
    own, fixed = (
        jax.nn.log_softmax(run.model(p, batch.tokens, segments=batch.segment_ids)[0])
        for p in ({n: v for n, v in moved.items() if n != "heads"}, state.aux)
    )
    mask = (batch.weights != 0) & (batch.channels["weight"] != 0)
    by_hand = jnp.where(mask, (jnp.exp(fixed) * (fixed - own)).sum(-1), 0.0).sum()
    np.testing.assert_allclose(value(moved), by_hand, rtol=1e-4)
    assert by_hand > 0.01


# ---------------------------------------------------------------- runs


def test_without_the_policy_only_the_detector_learns(watermark_run, tmp_path):
    run = watermark_run({"steps": 40, "data__batch_size": 32}, trains_policy=False)
    before = jax.jit(lambda: run.init_state(run.stages[0]))().params
    after = train(run, tmp_path).state.params
    for name in before:
        if name != "heads":
            assert_equal(before[name], after[name])
    assert_equal(before["heads"]["value"], after["heads"]["value"])
    table = read_metrics(tmp_path)
    assert np.mean(table["detector_loss"][:3]) > 0.5
    assert np.mean(table["detector_loss"][-3:]) < 0.2  # random bytes against digits
    assert np.mean(table["detector_right"][-3:]) > 0.95
    detector = load_detector(tmp_path)
    assert detector.limit == 3
    sums = [(3, 4), (12, 9), (40, 2), (7, 7)]
    human = detector([f"{a}+{b}=" for a, b in sums], [str(a + b) for a, b in sums])
    odd = detector([f"{a}+{b}=" for a, b in sums], ["\x90\x91", "é", "\x01~", "Zz"])
    assert detection(odd, human).auc == 1.0


def test_together_they_move_and_stopped_and_continued_it_is_the_same(watermark_run, tmp_path):
    changes = {"steps": 30, "data__batch_size": 32, "log_every": 1}
    run = watermark_run(changes, substitution=0.3)
    state = train(run, tmp_path / "whole").state
    table = read_metrics(tmp_path / "whole")
    loss, kl, reward = (
        [v for v in table[name] if v is not None]
        for name in ("loss", "kl_reference", "reward/detector")
    )
    assert len(loss) == 30
    assert all(np.isfinite(v) for v in loss)
    assert kl[0] == pytest.approx(0.0, abs=1e-6)
    assert kl[-1] > 1e-3
    assert np.mean(reward[-5:]) > np.mean(reward[:5])
    assert_equal(load_trained(tmp_path / "whole").heads, state.params["heads"])
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part/checkpoints/step-00000030")
    assert_equal(train(run, tmp_path / "part").state.params, state.params)


def test_rates_are_each_heads_own(watermark_run, tmp_path):
    run = watermark_run({"steps": 2}, detector_rate=0.0, critic_rate=2.0)
    before = jax.jit(lambda: run.init_state(run.stages[0]))().params["heads"]
    after = train(run, tmp_path).state.params["heads"]
    assert_equal(before["detector"], after["detector"])
    change = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), before["value"], after["value"])
    # Adam's first steps are the learning rate: 0.01 here, times 2.
    assert 0.015 < max(jax.tree.leaves(change)) < 0.045


def test_the_second_stage_takes_the_detector_on(watermark_run, tmp_path):
    stages = [
        {"objective": objective_of(trains_policy=False), "share": 0.5},
        {"objective": objective_of(detector_rate=0.0), "share": 0.5},
    ]
    both = watermark_run({"objective": {"name": "next_token"}, "stages": stages})
    before = jax.jit(lambda: both.init_state(both.stages[0]))().params
    last = train(both, tmp_path).state.params
    for step in (6, 8):
        shutil.rmtree(tmp_path / f"checkpoints/step-{step:08d}")
    first = load_trained(tmp_path)
    assert first.step == 4
    assert_equal(first.heads["detector"], last["heads"]["detector"])
    moved = jnp.abs(first.heads["detector"]["score"] - before["heads"]["detector"]["score"])
    assert moved.max() > 1e-3
    assert_equal(first.params["embedding"], before["embedding"])
    assert jnp.abs(first.params["embedding"] - last["embedding"]).max() > 1e-3


def test_a_checkpoint_is_where_the_detector_begins(watermark_run, rl_run, tmp_path):
    base = rl_run(objective={"name": "next_token"}, steps=2)
    params = train(base, tmp_path / "base").state.params
    detector = {"checkpoint": str(tmp_path / "base")}
    run = watermark_run({"steps": 2}, detector=detector, trains_policy=False)
    heads = jax.jit(lambda: run.init_state(run.stages[0]))().params["heads"]["detector"]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(heads["trunk"]))
    tokens = jnp.array([[256, 49, 43, 50, 61, 51]])
    trunk = run.config.objective.detector.trunk(run.model)
    whole = run.config.objective.detector.whole(heads, params)
    found = detector_scores(trunk, whole, tokens, jnp.ones(tokens.shape, bool))
    x = base.model.backbone(params, base.model.embed(params, tokens)).x
    np.testing.assert_allclose(found, (x @ heads["score"])[..., 0], atol=1e-5)
    state = train(run, tmp_path / "w").state
    trained = load_detector(tmp_path / "w")
    assert set(state.params["heads"]["detector"]["trunk"]) == set(params)
    ours = run.config.objective.detector.whole(state.params["heads"]["detector"], params)
    expected = detector_scores(trunk, ours, tokens, jnp.ones(tokens.shape, bool))[0, -1]
    np.testing.assert_allclose(trained(["1+2="], ["3"]), [expected], atol=1e-5)
    assert abs(float(expected - found[0, -1])) > 1e-4


# ---------------------------------------------------------------- texts of users


def test_texts_are_scored_row_by_row_and_to_a_limit(watermark_run):
    run = watermark_run()
    config = run.config.objective.detector
    params = jax.jit(lambda: config.init(jax.random.key(2), run.model))()
    detector = WatermarkDetector(config.trunk(run.model), params, run.tokenizer, True, 3)
    prompts, texts = [[49, 43], [50], [51, 43, 52]] * 3, [[61, 49, 50, 51], [61], [61, 50]] * 3
    together = detector.of_ids(prompts, texts, batch_size=4)
    alone = [detector.of_ids([p], [t])[0] for p, t in zip(prompts, texts, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    cut = detector.of_ids(prompts, [t[:3] for t in texts])
    np.testing.assert_allclose(together, cut, atol=1e-6)
    assert (detector.of_ids(prompts, texts, limit=4) != together).any()
    told = detector(["1+"], ["=1"])
    np.testing.assert_allclose(told, detector.of_ids([[256, 49, 43]], [[61, 49]]), atol=1e-6)
    with pytest.raises(ConfigError, match="text 1 is empty"):
        detector(["1", "2"], ["1", ""])
    with pytest.raises(ConfigError, match="2 prompts and 1 texts"):
        detector(["1", "2"], ["1"])
    with pytest.raises(ConfigError, match="positions"):
        detector(["1" * 40], ["1"])


def test_a_run_without_detector_is_refused(rl_run, tmp_path):
    train(rl_run(objective={"name": "next_token"}, steps=1), tmp_path)
    with pytest.raises(ConfigError, match="has no detector"):
        load_detector(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_clip": 0.0}, "reward_clip"),
        ({"detector_rate": -1.0}, "detector_rate"),
        ({"substitution": 1.5}, "substitution"),
        ({"prompt_tokens": 0}, "prompt_tokens"),
        ({"watermark_share": 0.5}, "leaves a part to rewards"),
        ({"watermark_share": 2.0}, "watermark_share=2"),
        ({"watermark_share": 1.0, "rewards": [{"name": "format"}]}, "leaves nothing to rewards"),
        ({"advantage": {"name": "group"}}, "gae"),
        ({"paraphrase": "nowhere:none"}, "names no function"),
        ({"detector": {"model": {"causal": False, "tie_embeddings": True}}}, "causal"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve(RLWatermark, changes)


def test_channels_hold_ids_of_the_largest_vocabularies(watermark_run):
    run = watermark_run()
    _, collector = started(run)
    zeros = np.zeros((1, 4), np.int32)
    batch = Batch(zeros, zeros, zeros, zeros, zeros + 1.0, zeros[:, :1])  # type: ignore[arg-type]
    ids = [2**24 - 2, 3, 262_143]
    found = collector.channel(batch, [[1]], [ids])
    assert (found[0, :3].astype(np.int64) - 1).tolist() == ids
