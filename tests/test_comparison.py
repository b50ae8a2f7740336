"""Reproductions by treatments of the same items: measured once, compared item by item."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from tokjax import reproduce
from tokjax.errors import ConfigError
from tokjax.reproduction import (
    Bars,
    Comparison,
    Lines,
    Measurements,
    Treatment,
    Verdict,
    comparing,
)
from tokjax.reproduction.materials import Interrupted, jsonl, trained, word_tokenizer
from tokjax.reproduction.record import read_record, stacked_png
from tokjax.reproduction.running import Stopped

N = 40


def plan_of(**changes):
    """The method adds 1 to each item's value, the control adds nothing."""

    def prepare(folder, seed):
        (folder / "prepared").write_text("")
        return np.random.default_rng(seed).normal(0, 5, N)

    def measure(items, options, seed):
        return {"score": items + options["gain"], "even": np.where(np.arange(N) % 2, np.nan, 1.0)}

    def judge(found):
        gain = found.difference("adds", "plain", "score")
        return Verdict.of([(gain.low > 0, f"gain {gain}")])

    plan = Comparison(
        claim="Adding one adds one.",
        arms={
            "adds": Treatment("method", "adds 1", {"gain": 1.0}),
            "plain": Treatment("baseline", "as it is", {"gain": 0.0}),
            "nothing": Treatment("control", "adds 0", {"gain": 0}),
        },
        prepare=prepare,
        measure=measure,
        judge=judge,
        metric="score",
        panels=(
            Bars("score", "scores", "points"),
            Lines("score", "by gain", "gain", "points", {"items": {0.0: "plain", 1.0: "adds"}}),
        ),
        settings={"items": N},
        seeds=(0, 1),
    )
    return dataclasses.replace(plan, **changes)


def run(plan, workdir, said=None):
    found = comparing.run(plan, workdir, plan.seeds, (said if said is not None else []).append)
    assert isinstance(found, Measurements)
    return found


def test_arms_are_compared_item_by_item(tmp_path):
    found = run(plan_of(), tmp_path)
    gain = found.difference("adds", "plain", "score")
    assert (gain.mean, gain.low, gain.high) == pytest.approx((1, 1, 1))
    alone = found.interval("adds", "score")
    assert alone.high - alone.low > 1  # items differ far more than the arms do
    assert found.mean("adds", "score") == pytest.approx(alone.mean)
    assert alone.low < alone.mean < alone.high
    assert str(found.difference("nothing", "plain", "score")) == "0 [0, 0]"
    assert plan_of().judge(found).reproduced


def test_the_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(200):
        values = {"a": {0: {"m": rng.exponential(1.0, 80)}, 1: {"m": rng.exponential(1.0, 80)}}}
        interval = Measurements(values, {}).interval("a", "m")
        covered += interval.low <= 1 <= interval.high
    assert 178 <= covered <= 200  # of 200 at 95 %, less the bias of the bootstrap


def test_items_without_a_value_are_left_out_and_survive_the_file(tmp_path):
    run(plan_of(), tmp_path)
    found = run(plan_of(), tmp_path)  # read back
    assert found.mean("plain", "even") == 1
    assert math.isnan(found.items("plain", "even")[0][1])
    assert comparing.arms_record(plan_of(), found)["plain"]["seeds"]["0"]["items"]["even"] == N / 2


def test_what_is_measured_is_not_measured_again_and_other_settings_are_refused(tmp_path):
    said = []
    first = run(plan_of(), tmp_path)
    (tmp_path / "seed-1" / "adds.json").unlink()
    (tmp_path / "seed-0" / "prepared").unlink()
    again = run(plan_of(), tmp_path, said)
    assert said[0] == "6 measurements (3 arms x 2 seeds), 1 to do"
    assert not (tmp_path / "seed-0" / "prepared").exists()  # no materials for what is there
    np.testing.assert_array_equal(again.items("adds", "score"), first.items("adds", "score"))
    with pytest.raises(ConfigError, match="other settings"):
        run(plan_of(settings={"items": N + 1}), tmp_path)
    (tmp_path / "seed-1" / "adds.json").write_text("{")
    with pytest.raises(ConfigError, match=r"adds\.json is damaged"):
        run(plan_of(), tmp_path)


def test_a_stop_in_the_materials_stops_and_the_same_command_continues(tmp_path):
    def stopped(folder, seed):
        raise Interrupted(15)

    plan = plan_of(prepare=stopped)
    assert comparing.run(plan, tmp_path, plan.seeds, print) == Stopped(15)
    found = run(plan_of(), tmp_path)
    assert found.mean("adds", "score") == pytest.approx(1 + found.mean("plain", "score"))


def test_measurements_that_are_none_are_refused(tmp_path):
    for values, message in (({"score": []}, "one item at least"), ({"score": 3.0}, "shape")):
        with pytest.raises(ConfigError, match=message):
            run(plan_of(measure=lambda *_, values=values: values), tmp_path)
    found = run(plan_of(), tmp_path)
    with pytest.raises(ConfigError, match="Did you mean 'score'"):
        found.interval("adds", "scores")
    with pytest.raises(ConfigError, match="there is no arm"):
        found.mean("nobody", "score")
    with pytest.raises(ConfigError, match="does not exist"):
        plan_of(panels=(Bars("score", "", "", ("nobody",)),))
    with pytest.raises(ConfigError, match="no arm has the role 'control'"):
        plan_of(arms={k: v for k, v in plan_of().arms.items() if k != "nothing"})


def test_the_command_line_records_plots_and_shows_a_comparison(tmp_path, monkeypatch, capsys):
    (tmp_path / "sh2.py").write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_comparison import plan_of\n"
        "def get_plan(scale):\n    return plan_of()\n"
    )
    monkeypatch.setattr(reproduce, "PLANS", tmp_path)
    monkeypatch.setattr(reproduce, "RECORDS", tmp_path / "records")
    assert reproduce.main(["sh2", f"--workdir={tmp_path / 'work'}"]) == 0
    record = read_record(tmp_path / "records" / "sh2.json")
    assert record["verdict"] == "reproduced"
    assert record["findings"] == ["holds: gain 1 [1, 1]"]
    assert set(record["arms"]["adds"]["metrics"]["score"]) == {"mean", "low", "high"}
    assert "values" not in json.dumps(record)
    assert (tmp_path / "records" / "sh2.png").read_bytes().startswith(b"\x89PNG")
    assert "Adding one adds one." in capsys.readouterr().out


def test_panels_leave_out_arms_without_their_metric(tmp_path):
    def measure(items, options, seed):
        return {"score": items} if options["gain"] else {"other": items}

    plan = plan_of(measure=measure, panels=(Bars("score", "scores", "points"),))
    found = run(plan, tmp_path)
    (figure,) = comparing.figures(plan, found)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["adds 1"]
    assert stacked_png([figure]).startswith(b"\x89PNG")


def test_a_model_is_trained_on_an_invented_language_once(tiny_tree, tmp_path):
    words = ["red", "green", "blue"]
    file = jsonl(tmp_path / "d.jsonl", lambda: ({"text": " ".join(words * 8)} for _ in range(40)))
    tree = tiny_tree(steps=3)
    tree["samples"] = {"prompts": []}
    tree["data"] = {
        "tokenizer": word_tokenizer(tmp_path / "words", words),
        "train": [{"source": {"name": "jsonl", "files": (str(file),)}}],
        "evals": {},
        "seq_len": 32,
        "batch_size": 8,
    }
    lm = trained(tmp_path / "run", tree)
    assert lm.encode("blue red")[-2:] == [5, 3]
    assert lm.tokenizer.decode([5, 3]) == "blue red"
    before = (tmp_path / "run" / "metrics.csv").read_bytes()
    assert trained(tmp_path / "run", tree).encode("blue") == lm.encode("blue")
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == before
