"""Flower as a run: it fits the target, its parts are means of their own, and it resumes."""

import dataclasses
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.config import resolve
from tokjax.errors import ConfigError, DataError
from tokjax.evaluation.recommendations import js
from tokjax.gflownet.balance import subtb_loss
from tokjax.gflownet.catalogue import read_catalogue, read_preferences
from tokjax.gflownet.exact import item_logprobs
from tokjax.gflownet.flower import Flower
from tokjax.gflownet.ramp import Ramp
from tokjax.training.config import TrainConfig
from tokjax.training.loop import train
from tokjax.training.metrics import read_metrics

LONG = {"steps": 400, "data__batch_size": 16, "log_every": 10}


def started(run):
    """A run's first state and the collector of its first stage."""
    state = jax.jit(lambda: run.init_state(run.stages[0]))()
    folder = Path(tempfile.mkdtemp(dir=run.config.data.cache_dir))
    return state, run.config.objective.collector(run, run.stages[0], folder)


def divergence(run, params, collector):
    prompt = collector.questions[0].prompt
    found = np.exp(item_logprobs(run.model, params, prompt, collector.trie))
    return js(found, collector.trie.shares)


def loss_of(run, state, batch, objective=None):
    objective = objective or run.config.objective
    return objective.loss(run.model, state.params, state.aux, batch, jax.random.key(0))


@pytest.mark.parametrize("power", [1.0, 0.5], ids=["counts", "tempered"])
def test_it_samples_in_proportion_to_the_weights(flow_run, tmp_path, power):
    free = {"explore": "free", "buffer": {"start": 0.5, "end": 0.5}, "power": power}
    run = flow_run(**LONG, **{f"objective__{k}": v for k, v in free.items()})
    state, collector = started(run)
    before = divergence(run, state.params, collector)
    trained = train(run, tmp_path).state
    assert divergence(run, trained.params, collector) < before / 10
    table = read_metrics(tmp_path)
    leaks = [v for v in table["flow/off_trie"] if v is not None]
    assert leaks[-1] < leaks[0] / 5
    assert table["flow_loss"][-1] < table["flow_loss"][0] / 10


def test_everything_is_told(flow_run, tmp_path):
    train(flow_run(objective__theta=0.5), tmp_path)
    table = read_metrics(tmp_path)
    for name in (
        *("reward/mean", "flow/buffer", "flow/length", "flow/off_trie"),
        *("flow/out_of_catalogue", "flow/distinct_items"),
    ):
        assert [v is not None for v in table[name]] == [True, False, True, False], name
    for name in ("flow_loss", "imitation_nll", "loss"):
        assert None not in table[name], name
    assert table["flow/out_of_catalogue"][0] == 0
    told = [json.loads(line) for line in (tmp_path / "flows.jsonl").read_text().splitlines()]
    assert [each["kind"] for each in told[:4]] == ["reference", "drawn", "reference", "drawn"]
    for each in told[1::2]:
        share = {"aa": 6, "ab": 3, "c": 1, "a": 2}[each["path"]] / 12
        np.testing.assert_allclose(each["log_r"], np.log(share), rtol=1e-5)


def test_the_loss_is_theta_sft_plus_the_rest_of_balance(flow_run):
    run = flow_run(objective__theta=0.25, objective__rollouts__minibatches=1)
    state, collector = started(run)
    batch = collector.batch(state, 0)[0]
    found = loss_of(run, state, batch)
    logits = run.model.unembed(
        state.params,
        run.model.backbone(state.params, run.model.embed(state.params, batch.tokens)).x,
    )
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))
    taken = np.asarray(jnp.take_along_axis(logp, batch.targets[..., None], -1))[..., 0]
    ends = np.asarray(logp[..., collector.end])
    imitated = np.asarray(batch.channels["imitate"]) != 0
    states = np.asarray(batch.channels["state"]) != 0
    assert imitated.any(1).sum() == states.any(1).sum() == 4
    assert not (imitated & states).any()
    sft = -taken[imitated].mean()
    flow = subtb_loss(
        *(jnp.asarray(a) for a in (taken, ends, batch.channels["log_reward"], states))
    )
    np.testing.assert_allclose(found.total / found.weight, 0.25 * sft + 0.75 * flow, rtol=1e-4)


def test_all_imitation_is_supervised_fine_tuning(flow_run):
    run = flow_run(objective__theta=1.0)
    state, collector = started(run)
    batch = collector.batch(state, 0)[0]
    slope = jax.grad(lambda p: loss_of(run, state.replace(params=p), batch).total)(state.params)
    from tokjax.finetuning.sft import SFT

    plain = dataclasses.replace(
        batch, weights=(batch.channels["imitate"] != 0).astype(jnp.float32), channels={}
    )

    def sft(params):
        found = SFT().loss(run.model, params, (), plain, jax.random.key(0))
        return found.total / found.weight * batch.tokens.shape[0]

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), slope, jax.grad(sft)(state.params)
    )


def test_micro_batches_give_the_same_sums(flow_run):
    run = flow_run(objective__theta=0.25)
    state, collector = started(run)
    batch = collector.batch(state, 0)[0]
    whole = loss_of(run, state, batch)
    parts = [
        loss_of(run, state, jax.tree.map(lambda a, i=i: a[i : i + 2], batch)) for i in (0, 2, 4, 6)
    ]
    np.testing.assert_allclose(sum(p.total for p in parts), whole.total, rtol=1e-5)
    assert sum(p.weight for p in parts) == whole.weight


def test_what_lies_behind_a_path_and_the_rows_order_change_nothing(flow_run):
    run = flow_run(objective__theta=0.25)
    state, collector = started(run)
    batch = collector.batch(state, 0)[0]
    whole = loss_of(run, state, batch).total
    filling = batch.segment_ids == 0
    junk = dataclasses.replace(
        batch,
        tokens=jnp.where(filling, 7, batch.tokens),
        targets=jnp.where(filling, 9, batch.targets),
    )
    np.testing.assert_array_equal(loss_of(run, state, junk).total, whole)
    mixed = jax.tree.map(lambda a: a[jnp.arange(8)[::-1]], batch)
    np.testing.assert_allclose(loss_of(run, state, mixed).total, whole, rtol=1e-6)


@pytest.mark.parametrize("balance", ["db", "tb"])
def test_other_balances(flow_run, tmp_path, balance):
    run = flow_run(objective__balance=balance)
    assert train(run, tmp_path).finished
    assert all(np.isfinite(v) for v in read_metrics(tmp_path)["flow_loss"])
    pairs = Flower(catalogue="x", balance=balance).pairs(np.array([0, 1, 4]))
    assert pairs.tolist() == ([0, 0, 3] if balance == "db" else [0, 1, 1])
    assert Flower(catalogue="x").pairs(np.array([0, 1, 4])).tolist() == [0, 0, 6]


def test_it_resumes_exactly(flow_run, tmp_path):
    changes = {
        "objective__theta": 0.3,
        "objective__buffer": {"start": 1.0, "end": 0.0, "steps": 4},
        "checkpoints": {"every_steps": 2, "keep": 10},
        "steps": 6,
    }
    whole = train(flow_run(**changes), tmp_path / "whole").state
    import shutil

    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"part/checkpoints/step-{step:08d}")
    again = train(flow_run(**changes), tmp_path / "part").state
    jax.tree.map(np.testing.assert_array_equal, whole.params, again.params)


def test_several_devices_compute_the_same(flow_run):
    losses = []
    for devices in (1, 4):
        run = flow_run(devices, objective__theta=0.3, mesh={"data": devices})
        state, collector = started(run)
        batch = collector.batch(state, 0)[0]
        losses.append(float(jax.jit(lambda s, b, run=run: loss_of(run, s, b).total)(state, batch)))
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_the_buffer_forces_titles_by_their_length(flow_run):
    run = flow_run(
        objective__buffer={"start": 1.0, "end": 1.0},
        objective__rollouts={"group": 64, "minibatches": 8, "max_new_tokens": 3},
        data__batch_size=64,
    )
    state, collector = started(run)
    paths, metrics = collector.found(state, 0, collector.asked(0), 5)
    items = np.array([collector.trie.item_of(t) for t in paths.tokens])
    shares = np.bincount(items, minlength=4) / len(items)
    np.testing.assert_allclose(shares, [2 / 6, 2 / 6, 1 / 6, 1 / 6], atol=0.06)
    assert "flow/out_of_catalogue" not in metrics  # nothing was drawn
    ramp = Ramp(1.0, 0.15, 10)
    assert [ramp.at(s) for s in (0, 5, 10, 40)] == [1.0, 0.575, 0.15, 0.15]


def test_paths_drawn_freely_are_cut_and_ended(flow_run):
    run = flow_run(objective__explore="free", data__batch_size=32)
    state, collector = started(run)
    paths, metrics = collector.found(state, 0, collector.asked(0), 5)
    assert metrics["flow/out_of_catalogue"] > 0.9
    assert all(t[-1] == collector.end and len(t) <= 4 for t in paths.tokens)
    assert paths.states.sum(1).tolist() == [len(t) for t in paths.tokens]
    # At the horizon a path can but end: its flow there is its reward.
    np.testing.assert_array_equal(paths.forced.sum(1), [len(t) == 4 for t in paths.tokens])
    rows = collector.rows_of_paths(paths)
    assert (np.asarray(rows.channels["state"]) == 2).sum() == paths.forced.sum() > 0


def test_the_flow_of_a_cut_path_is_its_reward(flow_run):
    run = flow_run(objective__explore="free", objective__rollouts__minibatches=1)
    state, collector = started(run)
    batch = collector.batch(state, 0)[0]
    kinds = np.asarray(batch.channels["state"])
    assert (kinds == 2).any()
    logits = run.model.unembed(
        state.params,
        run.model.backbone(state.params, run.model.embed(state.params, batch.tokens)).x,
    )
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))
    taken = jnp.take_along_axis(logp, batch.targets[..., None], -1)[..., 0]
    ends = jnp.where(kinds == 2, 0.0, logp[..., collector.end])
    expected = subtb_loss(taken, ends, batch.channels["log_reward"], jnp.asarray(kinds != 0))
    found = loss_of(run, state, batch)
    np.testing.assert_allclose(found.total / found.weight, expected, rtol=1e-4)


def test_paths_within_the_tree_are_titles(flow_run):
    state, collector = started(flow_run())
    paths, _ = collector.found(state, 0, collector.asked(0), 5)
    assert all(collector.trie.item_of(t) >= 0 for t in paths.tokens)


def test_granularity_of_whole_titles(flow_run):
    state, collector = started(flow_run(objective__granularity=150))
    batch = collector.batch(state, 0)[0]
    assert set((np.asarray(batch.channels["state"]) != 0).sum(1)) == {2}
    assert np.isfinite(loss_of(collector.run, state, batch).total)


def test_personal_rewards(flow_run, flow_files):
    personal = {"objective__preferences": str(flow_files / "preferences.jsonl")}
    plain, div_s, add_logs = (
        started(flow_run(objective__personal=name, **(personal if name != "none" else {})))
        for name in ("none", "div_s", "add_logs")
    )
    paths = [c.found(s, 0, c.asked(0), 5)[0] for s, c in (plain, div_s, add_logs)]
    items = [told["item"] for told in paths[0].told]
    final = [np.array([told["log_r"] for told in each.told]) for each in paths]
    s = np.array([1.5556, 1.1111, 0.7778, 0.5556])[items]
    np.testing.assert_allclose(final[1], final[0] / s, rtol=1e-4)
    scaled = np.array([1.0, 0.25 / 0.45, 0.1 / 0.45, 0.0])[items]
    edges = np.array([3, 3, 2, 2])[items]
    np.testing.assert_allclose(final[2], final[0] + edges * np.log(scaled + 1e-20), rtol=1e-4)


def test_another_end_token(flow_run):
    state, collector = started(flow_run(objective__end="\n", objective__theta=0.5))
    assert collector.end == 10
    paths, _ = collector.found(state, 0, collector.asked(0), 5)
    eos = collector.run.tokenizer.eos_id
    assert all(t[-2:] == (10, eos) for t in paths.tokens[::2])  # title, end, EOS
    assert all(t[-1] == 10 for t in paths.tokens[1::2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"theta": 1.5}, "theta=1.5"),
        ({"balance": "flow"}, "expected 'subtb'"),
        ({"explore": "tree"}, "Did you mean 'trie'"),
        ({"personal": "div_s"}, "belong together"),
        ({"granularity": 0}, "granularity=0"),
        ({"floor": 0.0}, "floor=0.0"),
        ({"buffer": {"start": 2.0}}, "probability"),
        ({"lam": -1.0}, "lam=-1.0"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    tree = {"objective": {"name": "flower", "catalogue": "x", **changes}, "steps": 1}
    with pytest.raises(ConfigError, match=message):
        resolve(TrainConfig, tree)


def test_impossible_data_are_refused(flow_run, flow_files, tmp_path):
    with pytest.raises(ConfigError, match="longest title has 2 tokens"):
        started(flow_run(objective__rollouts__max_new_tokens=1))
    with pytest.raises(DataError, match="one token"):
        started(flow_run(objective__end="ab"))
    other = tmp_path / "other.jsonl"
    other.write_text('{"title": " aa"}\n')
    with pytest.raises(DataError, match="is a title of"):
        started(flow_run(objective__catalogue=str(other), objective__theta=0.5))
    with pytest.raises(DataError, match="cannot be read"):
        started(flow_run(objective__catalogue=str(tmp_path / "none.jsonl")))
    preferences = tmp_path / "preferences.jsonl"
    preferences.write_text('{"prompt": "9:", "scores": [0.1, 0.2, 0.3, 0.4]}\n')
    state, collector = started(
        flow_run(objective__personal="div_s", objective__preferences=str(preferences))
    )
    with pytest.raises(DataError, match="no scores for the prompt"):
        collector.batch(state, 0)


def test_catalogues_are_read_from_lines_and_tables(tmp_path):
    lines = tmp_path / "c.jsonl"
    lines.write_text('{"t": "x", "n": 2}\n{"t": "y"}\n{"t": "x", "n": 0.5}\n')
    found = read_catalogue(lines, "t", "n")
    assert found.titles == ("x", "y")
    assert found.weights.tolist() == [2.5, 1.0]
    table = tmp_path / "c.csv"
    table.write_text('title,weight\n"x, the",2\n')
    assert read_catalogue(table).titles == ("x, the",)
    for text, message in (
        ("title,weight\n,2\n", "no 'title'"),
        ("title,weight\nx,many\n", "no number"),
    ):
        table.write_text(text)
        with pytest.raises(DataError, match=message):
            read_catalogue(table)
    lines.write_text('{"prompt": "u", "scores": [1]}\n')
    with pytest.raises(DataError, match="2 scores"):
        read_preferences(lines, 2)
