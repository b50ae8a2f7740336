"""Reinforcement learning as a run: it learns, resumes bit for bit, and computes one policy."""

import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.config import resolve
from tokjax.decoding.engine import decode
from tokjax.decoding.prompts import Prompts
from tokjax.errors import ConfigError, DataError
from tokjax.rl import presets
from tokjax.rl.collector import Collector
from tokjax.training.config import TrainConfig
from tokjax.training.loop import train
from tokjax.training.metrics import read_metrics


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    yield
    sys.modules.pop("rewards_for_tests", None)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def started(run):
    """A run's first state and the collector of its first stage."""
    state = jax.jit(lambda: run.init_state(run.stages[0]))()
    folder = Path(tempfile.mkdtemp(dir=run.config.data.cache_dir))
    return state, Collector(run.config.objective, run, run.stages[0], folder)


def test_it_learns_what_is_rewarded(rl_run, tmp_path):
    run = rl_run(steps=60, data__batch_size=32, optimizer__peak_lr=2e-2)
    assert train(run, tmp_path).finished
    rewards = [r for r in read_metrics(tmp_path)["reward/mean"] if r is not None]
    assert len(rewards) == 30
    assert np.mean(rewards[:3]) < 0.7
    assert np.mean(rewards[-3:]) > 0.95


def test_everything_is_told(rl_run, tmp_path):
    train(rl_run(steps=4), tmp_path)
    table = read_metrics(tmp_path)
    for name in (
        *("reward/mean", "reward/function", "reward/group_std", "reward/constant_groups"),
        *("reward/errors", "reward/timeouts", "rollout/length", "rollout/cut", "rollout/entropy"),
        *("rollout/distinct", "mismatch/mean", "mismatch/max"),
    ):
        assert [v is not None for v in table[name]] == [True, False, True, False], name
    for name in ("entropy", "clip_fraction", "ratio", "kl_old", "loss"):
        assert None not in table[name], name
    told = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    assert len(told) == 16
    assert told[0]["prompt"].endswith("=")
    for each in told:
        even = bool(each["answer"]) and ord(each["answer"][0]) < 128
        assert each["reward"] in (0.0, 1.0)
        if even:
            assert each["reward"] == float(ord(each["answer"][0]) % 2 == 0) or not each["answer"]


def test_the_first_update_of_a_collection_is_on_policy(rl_run, tmp_path):
    train(rl_run(steps=4), tmp_path)
    table = read_metrics(tmp_path)
    for step in (0, 2):
        np.testing.assert_allclose(table["ratio"][step], 1.0, atol=1e-5)
        np.testing.assert_allclose(table["kl_old"][step], 0.0, atol=1e-6)
    assert max(table["mismatch/max"][0], table["mismatch/max"][2]) < 1e-4
    assert table["kl_old"][1] > 0


def test_a_temperature_is_that_of_the_policy_in_training(rl_run):
    for temperature in (0.5, 2.0):
        run = rl_run(objective__rollouts__temperature=temperature)
        state, collector = started(run)
        answers = collector.sample(state, [q.prompt for q in collector.asked(0)], seed=3)
        batch = collector.rows_of(answers)
        scores = collector.scores(state, batch)
        mask = np.asarray(batch.weights) != 0
        np.testing.assert_allclose(scores["logprob"][mask], scores["decoded"][mask], atol=1e-5)


def test_from_any_checkpoint_it_ends_with_the_same_parameters(rl_run, tmp_path):
    checkpoints = {"every_steps": 2, "keep": 10}
    whole = train(rl_run(checkpoints=checkpoints), tmp_path / "whole").state
    for kept in (2, 6):
        folder = tmp_path / f"from{kept}"
        shutil.copytree(tmp_path / "whole", folder)
        for step in (2, 4, 6, 8):
            if step > kept:
                shutil.rmtree(folder / f"checkpoints/step-{step:08d}", ignore_errors=True)
        again = train(rl_run(checkpoints=checkpoints), folder).state
        assert_equal(whole.params, again.params)
        rewards = [read_metrics(w)["reward/mean"] for w in (tmp_path / "whole", folder)]
        assert rewards[0] == rewards[1]


@pytest.mark.parametrize("step", [2, 3])
def test_a_crash_between_answers_and_updates_costs_nothing(rl_run, tmp_path, monkeypatch, step):
    whole = train(rl_run(steps=6), tmp_path / "whole").state
    real = Collector.batch

    def failing(self, state, at):
        found = real(self, state, at)  # behind the collection, before its update
        if at == step:
            raise OSError("the power is gone")
        return found

    monkeypatch.setattr(Collector, "batch", failing)
    with pytest.raises(OSError, match="the power is gone"):
        train(rl_run(steps=6), tmp_path / "parts")
    monkeypatch.setattr(Collector, "batch", real)
    assert_equal(whole.params, train(rl_run(steps=6), tmp_path / "parts").state.params)


def test_it_saves_only_where_a_collection_is_used_up(rl_run, tmp_path):
    run = rl_run(steps=9, checkpoints={"every_steps": 3, "keep": 10})
    assert train(run, tmp_path).finished
    saved = sorted(int(p.name.split("-")[1]) for p in (tmp_path / "checkpoints").glob("step-*"))
    assert saved == [4, 6, 9]  # due at 3, 6 and 9; a collection serves two steps


@pytest.mark.parametrize("place", ["collect", "update"])
def test_asked_to_stop_it_ends_between_collections_and_goes_on_exactly(
    rl_run, tmp_path, monkeypatch, place
):
    whole = train(rl_run(), tmp_path / "whole").state
    real = Collector.batch
    calls = []

    def stopping(self, state, step):
        calls.append(step)
        if step == (4 if place == "collect" else 5):
            signal.raise_signal(signal.SIGTERM)
        return real(self, state, step)

    monkeypatch.setattr(Collector, "batch", stopping)
    stopped = train(rl_run(), tmp_path / "parts")
    assert not stopped.finished
    # While answers are collected they are given up; within a collection its updates are made.
    assert stopped.step == (4 if place == "collect" else 6)
    monkeypatch.setattr(Collector, "batch", real)
    assert_equal(whole.params, train(rl_run(), tmp_path / "parts").state.params)


def test_a_reward_that_fails_is_counted_and_told_and_the_run_goes_on(rl_run, tmp_path):
    run = rl_run(
        objective__rewards=[{"name": "function", "path": "rewards_for_tests:failing"}], steps=2
    )
    assert train(run, tmp_path).finished
    assert read_metrics(tmp_path)["reward/errors"][0] > 0
    warnings = json.loads((tmp_path / "run.json").read_text())["warnings"]
    assert any("an even token" in warning for warning in warnings)


def test_each_epoch_asks_every_prompt_once(rl_run):
    _, collector = started(rl_run())
    names = [q.name for i in range(10) for q in collector.asked(i)]
    assert len(names) == 40
    assert sorted(names) == sorted({q.name for q in collector.questions})
    assert [q.name for q in collector.asked(10)] != names[:4]


def test_rows_without_weight_give_way_where_more_prompts_are_asked(rl_run, tmp_path):
    advantage = {"name": "group", "drop_constant": True}
    run = rl_run(
        objective__advantage=advantage,
        objective__rollouts__prompts=6,
        objective__rollouts__minibatches=1,
        steps=1,
    )
    state, collector = started(run)
    with collector:
        metrics, _ = collector.collect(state, 0)
        rows, chosen = collector.batches[0]
    assert metrics["rollout/rows_left_out"] == 16
    useful = (rows.channels["weight"] != 0).any(-1)
    assert useful[chosen].sum() == min(8, useful.sum())


def test_a_row_holds_its_prompt_and_answer_and_nothing_else(rl_run):
    run = rl_run()
    state, collector = started(run)
    asked = collector.asked(0)
    answers = collector.sample(state, [q.prompt for q in asked], seed=1)
    batch = collector.rows_of(answers)
    for r, (prompt, answer) in enumerate(zip(answers.prompts, answers.tokens, strict=True)):
        row = [*prompt, *answer]
        n = len(row) - 1
        assert batch.tokens[r, :n].tolist() == row[:-1]
        assert batch.targets[r, :n].tolist() == row[1:]
        actions = np.flatnonzero(batch.weights[r])
        assert batch.targets[r][actions].tolist() == answer
        assert not batch.segment_ids[r, n:].any()
    ended = [a[-1] == run.tokenizer.eos_id for a in answers.tokens]
    assert ended == answers.stopped.tolist()


def test_answers_are_drawn_from_the_model(rl_run):
    """The share of each first token, against its probability."""
    wide = {"group": 512, "rows": 512, "max_new_tokens": 3}
    run = rl_run(objective__rollouts=wide, data__batch_size=512)
    state, collector = started(run)
    prompt = collector.asked(0)[0].prompt
    tokens = [t[0] for t in collector.sample(state, [prompt], seed=5).tokens]
    out = decode(
        run.model,
        state.params,
        Prompts.of([list(prompt)]),
        max_new_tokens=1,
        record={"p": lambda context: jax.nn.softmax(context.logits)},
    )
    p = np.asarray(out.recorded["p"][0, 0])
    counts = np.bincount(tokens, minlength=len(p))
    chi = ((counts - 512 * p) ** 2 / (512 * p)).sum()
    # The statistic has as many degrees of freedom as tokens; six deviations never happen.
    assert chi < len(p) + 6 * np.sqrt(2 * len(p))


@pytest.mark.parametrize("method", sorted(presets.PRESETS))
def test_every_preset_runs(rl_run, tmp_path, method):
    changes = {
        "rewards": [{"name": "function", "path": "rewards_for_tests:first_token"}],
        "rollouts": {"group": 4, "minibatches": 2, "epochs": 2, "max_new_tokens": 3},
    }
    run = rl_run(objective=presets.PRESETS[method] | changes, steps=4)
    result = train(run, tmp_path)
    assert result.finished
    table = read_metrics(tmp_path)
    assert all(np.isfinite(v) for v in table["loss"])
    if method == "ppo":
        assert all(v > 0 for v in table["value_loss"])
        assert "heads" in result.state.params


def test_adapters_are_trained_against_the_model_without_them(rl_run, tmp_path):
    train(rl_run(objective={"name": "next_token"}, steps=2), tmp_path / "base")
    objective = presets.PRESETS["grpo"] | {
        "rewards": [{"name": "function", "path": "rewards_for_tests:first_token"}],
        "rollouts": {"group": 4, "max_new_tokens": 3},
    }
    run = rl_run(
        objective=objective,
        init_from=str(tmp_path / "base"),
        model={"lora": {"rank": 2}},
        steps=3,
    )
    state = train(run, tmp_path / "w").state
    assert set(state.params) == {"layers"}
    table = read_metrics(tmp_path / "w")
    assert abs(table["kl_reference"][0]) < 1e-6
    assert table["kl_reference"][2] > 0


def test_a_mesh_gives_the_same_rewards(rl_run, tmp_path):
    train(rl_run(steps=2), tmp_path / "single")
    train(rl_run(8, steps=2, mesh={"data": 2, "fsdp": 2, "tensor": 2}), tmp_path / "mesh")
    single, mesh = (read_metrics(tmp_path / w) for w in ("single", "mesh"))
    assert single["reward/mean"] == mesh["reward/mean"]
    np.testing.assert_allclose(single["loss"], mesh["loss"], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"objective__rollouts__group": 5}, ConfigError, "whole groups"),
        ({"objective__rollouts__prompts": 1}, ConfigError, "no more than"),
        ({"objective__rollouts__max_new_tokens": 12}, DataError, "leaves room"),
        ({"objective__rewards": []}, ConfigError, "rewards is empty"),
        ({"objective__ratio": "sequence"}, ConfigError, "sequence_geo"),
        ({"objective__rollouts__temperature": 0}, ConfigError, "temperature=0"),
        ({"objective__clip_low": -1}, ConfigError, "clip_low"),
    ],
)
def test_impossible_settings_are_refused(rl_run, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        train(rl_run(**changes), tmp_path)


def test_prompts_without_room_are_left_out_and_told(rl_run, tmp_path):
    # "99+99=" has six bytes and "9+9=" four: only the short ones leave room for eight.
    run = rl_run(objective__rollouts__max_new_tokens=8, steps=1)
    train(run, tmp_path)
    warnings = json.loads((tmp_path / "run.json").read_text())["warnings"]
    assert any("prompts leave no room" in warning for warning in warnings)


def test_the_loss_has_no_gradient_through_what_was_measured(rl_run):
    run = rl_run()
    state, collector = started(run)
    with collector:
        collector.collect(state, 0)
        rows, chosen = collector.batches[0]
    batch = jax.tree.map(lambda a: jnp.asarray(a[chosen]), rows)
    objective = run.config.objective

    def of_channels(channels):
        other = batch.replace(channels=channels)
        return objective.loss(run.model, state.params, (), other, jax.random.key(0)).total

    slopes = jax.grad(of_channels)(dict(batch.channels))
    assert not np.any(slopes["advantage"])


def test_every_field_is_explained():
    from tokjax.config.testing import undocumented

    assert not undocumented(resolve(TrainConfig, {"steps": 1, "objective": {"name": "ppo"}}))
