"""Reproductions: the machinery runs, resumes and refuses; records agree with plans and table."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax import methods, reproduce
from tokjax.config import resolve
from tokjax.errors import PREEMPTED_EXIT_CODE, ConfigError, DataError
from tokjax.reproduction import (
    Arm,
    ArmResult,
    Panel,
    Plan,
    Results,
    Series,
    Verdict,
    running,
    training_arms,
)
from tokjax.reproduction.flops import matmul_flops
from tokjax.reproduction.plan import load_plan, plan_files
from tokjax.reproduction.record import machine_notes, read_record
from tokjax.reproduction.results import StageCost, mean_series
from tokjax.reproduction.running import plan_jobs, run_plan
from tokjax.reproduction.same_data import with_data_of
from tokjax.training.config import TrainConfig
from tokjax.training.run import build_run

RECORDS = sorted(reproduce.RECORDS.glob("*.json"))
LOSS = "eval/validation/loss"
STAGES = (
    {"objective": {"name": "patch", "k": 4}, "share": 2 / 3},
    {"objective": {"name": "next_token"}, "share": 1 / 3},
)


def one_device():
    return jax.devices()[:1]


def run_of(tree):
    return build_run(resolve(TrainConfig, tree), devices=one_device(), show_progress=False)


# ---------------------------------------------------------------- the records and the table


def test_states_in_the_table_of_methods_are_those_of_the_records():
    recorded = {path.stem: read_record(path)["verdict"] for path in RECORDS}
    verdicts = ("reproduced", "did not reproduce")
    assert recorded == {m.slug: m.state for m in methods.METHODS if m.state in verdicts}


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_is_of_the_plan_as_it_stands(path):
    record, plan = read_record(path), load_plan(path.stem)
    assert record["scale"] == "full"
    assert record["claim"] == plan.claim
    assert set(record["seeds"]) >= set(plan.seeds)
    found = {
        (arm, int(seed)): run["config"]
        for arm, entry in record["arms"].items()
        for seed, run in entry["seeds"].items()
    }
    assert found == reproduce.kind_of(plan).digests(plan, record["seeds"]), (
        f"the plan has changed since: run python -m tokjax.reproduce {path.stem}"
    )
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("slug", plan_files())
@pytest.mark.parametrize("scale", ["full", "smoke"])
def test_every_plan_is_of_a_method_and_its_arms_resolve(slug, scale):
    plan = load_plan(slug, scale)
    digests = reproduce.kind_of(plan).digests(plan, plan.seeds)
    assert methods.find(slug)
    assert len(set(digests.values())) == len(plan.arms) * len(plan.seeds)


# ---------------------------------------------------------------- counting operations


def test_products_in_loops_branches_and_gradients_are_counted():
    a, b = jnp.ones((4, 5)), jnp.ones((5, 5))
    one = 2.0 * 4 * 5 * 5

    def repeated(a, b):
        return jax.lax.scan(lambda x, _: (x @ b, None), a, length=7)[0]

    def branch(a, b):
        return jax.lax.cond(a[0, 0] > 0, lambda: (a @ b) @ b, lambda: a @ b)

    assert matmul_flops(jnp.dot, a, b) == one
    assert matmul_flops(jax.jit(jnp.dot), a, b) == one
    assert matmul_flops(lambda a, b: (a + 1) * 2, a, b) == 0
    assert matmul_flops(repeated, a, b) == 7 * one
    assert matmul_flops(branch, a, b) == 2 * one
    # Forward, and one product for the gradient of each factor.
    assert matmul_flops(jax.grad(lambda a, b: (a @ b).sum(), (0, 1)), a, b) == 3 * one
    assert matmul_flops(lambda a: jnp.einsum("bij,bjk->bik", a, a), jnp.ones((3, 2, 2))) == 48


def test_products_in_a_loop_of_unknown_length_are_refused():
    def loop(a):
        return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, a)

    with pytest.raises(ValueError, match="how often"):
        matmul_flops(loop, jnp.ones((2, 2)))


def test_a_training_step_counts_what_the_formula_says_whatever_the_depth(tiny_tree):
    for layers in (2, 4):
        run = run_of(tiny_tree(model__n_layers=layers))
        stage = run.stages[0]
        state = run.abstract_state(stage)
        # The program does a little more: attention scores are computed again on the way back.
        counted = matmul_flops(run.train_step(stage), state, run.loader.batch(0))
        assert counted == pytest.approx(running.stage_flops(run, stage), rel=0.05)


# ---------------------------------------------------------------- arms that share data


def test_the_token_stage_from_scratch_reads_the_batches_of_that_stage(tiny_tree):
    patched = run_of(tiny_tree(steps=24, stages=STAGES))
    scratch = with_data_of(run_of(tiny_tree(steps=8)), patched, from_stage=1)
    assert scratch.total_steps == patched.stages[1].steps
    first = patched.stages[1].first_step
    for step in range(scratch.total_steps):
        assert scratch.loader.shape(step) == patched.loader.shape(first + step)
        one, other = scratch.loader.batch(step), patched.loader.batch(first + step)
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(x, y)
    plain = run_of(tiny_tree(steps=8)).loader.batch(0)
    assert not np.array_equal(plain.tokens, scratch.loader.batch(0).tokens)


def test_tokens_and_patches_read_the_same_data_once(tiny_tree):
    patched = run_of(tiny_tree(steps=24, stages=STAGES))
    tokens = with_data_of(run_of(tiny_tree(steps=24)), patched)

    def targets(run):
        found = Counter()
        for step in range(run.total_steps):
            batch = run.loader.batch(step)
            found.update(batch.targets[batch.weights > 0].tolist())
        return found

    assert targets(tokens) == targets(patched)
    assert targets(tokens) != targets(run_of(tiny_tree(steps=24)))


def test_sharing_other_data_or_a_stage_that_is_not_there_is_refused(tiny_tree):
    patched = run_of(tiny_tree(steps=24, stages=STAGES))
    with pytest.raises(ConfigError, match="equal `data` sections"):
        with_data_of(run_of(tiny_tree(data__seed=3)), patched)
    with pytest.raises(ConfigError, match="from_stage=2 of an arm with 2"):
        with_data_of(run_of(tiny_tree()), patched, from_stage=2)


# ---------------------------------------------------------------- plans


def tiny_plan(tiny_tree, **changes):
    def judge(results):
        gain = results.mean_final("none", LOSS) - results.mean_final("learns", LOSS)
        return Verdict.of([(gain > 0, f"gain {gain:.3f}"), (None, "for information")])

    def arm(role, rate, **more):
        tree = tiny_tree(steps=4, optimizer__peak_lr=rate, evaluation__every_steps=2)
        tree["samples"] = {"prompts": []}
        return Arm(role, role, tree, **more)

    plan = Plan(
        claim="A learning rate above zero learns.",
        arms={
            "learns": arm("method", 1e-2),
            "none": arm("baseline", 0.0),
            "little": arm("control", 1e-6, data_of="learns"),
        },
        judge=judge,
        metric=LOSS,
        panels=tuple(
            Panel(x, LOSS, "nats", "loss", ("learns", "none"))
            for x in ("flops", "tokens", "step", "last_stage")
        ),
    )
    return dataclasses.replace(plan, **changes)


def test_impossible_plans_are_refused(tiny_tree):
    plan = tiny_plan(tiny_tree)
    without = {name: arm for name, arm in plan.arms.items() if arm.role != "control"}
    with pytest.raises(ConfigError, match="no arm has the role 'control'"):
        dataclasses.replace(plan, arms=without)
    stray = dataclasses.replace(plan.arms["little"], data_of="lerns")
    with pytest.raises(ConfigError, match="Did you mean 'learns'"):
        dataclasses.replace(plan, arms={**plan.arms, "little": stray})
    with pytest.raises(ConfigError, match="draws the arm 'nobody'"):
        dataclasses.replace(plan, panels=(Panel("step", LOSS, "", "", ("nobody",)),))
    with pytest.raises(ConfigError, match="at least one panel"):
        dataclasses.replace(plan, panels=())


def test_plan_files_that_fail_say_where(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'patch_training'"):
        load_plan("patch_trainin")
    for text, message in (
        ("x = 1\n", "define get_plan"),
        ("def get_plan(scale):\n    return 3\n", "define get_plan"),
        ("def get_plan(scale):\n    return missing\n", "NameError"),
        ("def get_plan(\n", "SyntaxError"),
    ):
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(ConfigError, match=f"bad.py: {message}"):
            load_plan("bad", folder=tmp_path)


def test_a_verdict_needs_every_demanded_finding():
    assert Verdict.of([(True, "a"), (None, "b")]) == Verdict(True, ("holds: a", "b"))
    assert Verdict.of([(True, "a"), (False, "b")]) == Verdict(False, ("holds: a", "fails: b"))
    assert Verdict.of([(False, "b")]).state == "did not reproduce"
    with pytest.raises(ConfigError, match="that can fail"):
        Verdict.of([(None, "b")])


# ---------------------------------------------------------------- running


def quiet(text):
    del text


_FINISHED = {}


@pytest.fixture
def finished(tiny_tree, tmp_path_factory, tmp_path):
    """The tiny plan, a copy of its finished runs of seed 3, their results and what was said."""
    plan = tiny_plan(tiny_tree)
    if not _FINISHED:
        workdir, said = tmp_path_factory.mktemp("finished"), []
        results = run_plan(plan, workdir, [3], say=said.append, devices=one_device())
        _FINISHED.update(workdir=workdir, results=results, said=said)
    work = tmp_path / "work"
    shutil.copytree(_FINISHED["workdir"], work)
    return plan, work, _FINISHED["results"], _FINISHED["said"]


def test_finished_arms_are_kept_and_changed_ones_refused(finished, monkeypatch):
    plan, work, first, said = finished
    assert isinstance(first, Results)
    assert [(r.arm, r.seed) for r in first.runs] == [("learns", 3), ("none", 3), ("little", 3)]
    assert plan.judge(first).reproduced
    assert first.of("learns")[0].curves[LOSS].steps == (2, 4)
    assert first.of("learns")[0].tokens == 4 * 4 * 64
    assert first.of("learns")[0].step_seconds > 0
    assert (work / "learns/seed-3/report.html").exists()
    assert "3 runs (3 arms x 1 seeds), 3 to do" in said[0]
    assert any("about" in line and "left" in line for line in said)

    trained = []
    monkeypatch.setattr(running, "train", lambda run, workdir: trained.append(workdir))
    assert run_plan(plan, work, [3], say=quiet, devices=one_device()) == first
    assert trained == []

    def changed(**changes):
        arms = {name: dataclasses.replace(arm) for name, arm in plan.arms.items()}
        arms["learns"] = dataclasses.replace(
            arms["learns"], config={**arms["learns"].config, **changes}
        )
        return dataclasses.replace(plan, arms=arms)

    with pytest.raises(ConfigError, match=r"'learns' of another(.|\n)*clip_norm: 1.0 -> 2.0"):
        run_plan(changed(clip_norm=2.0), work, [3], say=quiet)
    with pytest.raises(ConfigError, match="log_every"):
        run_plan(changed(log_every=2), work, [3], say=quiet)
    # How the arm is called changes no number; that of the arm whose length another reads does.
    assert run_plan(changed(title="other"), work, [3], say=quiet) == first
    (work / "learns/seed-3/arm.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        run_plan(plan, work, [3], say=quiet)


def test_the_layout_of_the_arm_whose_data_is_read_counts(tiny_tree, tmp_path):
    plan = tiny_plan(tiny_tree)
    job = next(job for job in plan_jobs(plan, tmp_path, [0]) if job.arm == "little")
    job.write(None)
    assert job.finished_result() is None
    longer = dataclasses.replace(
        plan.arms["learns"], config={**plan.arms["learns"].config, "steps": 6}
    )
    changed = dataclasses.replace(plan, arms={**plan.arms, "learns": longer})
    job = next(job for job in plan_jobs(changed, tmp_path, [0]) if job.arm == "little")
    with pytest.raises(ConfigError, match=r"data_of\.config\.steps: 4 -> 6"):
        job.finished_result()


def test_a_killed_arm_continues_from_its_checkpoint(finished, tmp_path, monkeypatch):
    plan, work, whole, _ = finished
    shutil.rmtree(work / "none")
    shutil.rmtree(work / "little")

    class Killed(Exception):
        pass

    train = running.train
    steps = []

    def dies_in_the_first_left(run, workdir):
        read = run.loader.batch

        def batch(step, rows=None):
            if workdir.parent.name == "none":
                steps.append(step)
                if step == 3:
                    raise Killed
            return read(step, rows)

        object.__setattr__(run.loader, "batch", batch)
        return train(run, workdir)

    for arm in plan.arms.values():
        arm.config["checkpoints"] = {"every_steps": 1}
    monkeypatch.setattr(running, "train", dies_in_the_first_left)
    with pytest.raises(Killed):
        run_plan(plan, work, [3], say=quiet, devices=one_device())
    assert 0 in steps
    assert not (work / "little").exists()
    steps.clear()

    resumed = []

    def again(run, workdir):
        resumed.append(workdir.parent.name)
        outcome = train(run, workdir)
        entries = json.loads((workdir / "ledger.json").read_text())["entries"]
        assert [e["first_step"] for e in entries] == ([0, 3] if len(resumed) == 1 else [0])
        return outcome

    monkeypatch.setattr(running, "train", again)
    parts = run_plan(plan, work, [3], say=quiet, devices=one_device())
    assert resumed == ["none", "little"], "the finished arm is not run again"
    for a, b in zip(whole.runs, parts.runs, strict=True):
        assert a.curves == b.curves


@pytest.fixture
def tree_of_plans(finished, tmp_path, monkeypatch):
    """Plans and records in temporary folders; the plan of `layercake` is the tiny one."""
    plan = dataclasses.replace(finished[0], seeds=(3,))
    plans, records = tmp_path / "plans", tmp_path / "records"
    plans.mkdir()
    (plans / "layercake.py").write_text("")
    monkeypatch.setattr(reproduce, "PLANS", plans)
    monkeypatch.setattr(reproduce, "RECORDS", records)
    monkeypatch.setattr(reproduce, "load_plan", lambda slug, scale="full", folder=None: plan)
    return records


def test_several_at_once_are_processes_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    codes, seen = [0, 0], []

    def run_commands(commands, jobs, outcome):
        seen.append((jobs, [command.words[3:] for command in commands]))
        for command in commands:
            command.log.parent.mkdir(parents=True, exist_ok=True)
            command.log.write_text("reproduced\nmore\ndid not reproduce\nrecord: x\n")
        said = [outcome(command) for command in commands]
        assert said == ["did not reproduce"] * 2
        return codes

    monkeypatch.setattr(reproduce, "run_commands", run_commands)
    words = ["layercake", "sh2", "--jobs=2", "--scale=smoke", "--seeds=1"]
    assert reproduce.main(words) == 0
    own = ["--scale=smoke", "--seeds=1"]
    assert seen == [(2, [["tokjax.reproduce", s, *own] for s in ("layercake", "sh2")])]
    assert (tmp_path / "runs/reproduce/sh2-smoke/log.txt").exists()
    codes[:] = [PREEMPTED_EXIT_CODE, 0]
    assert reproduce.main(words) == PREEMPTED_EXIT_CODE
    assert "the same command continues" in capsys.readouterr().out
    codes[:] = [PREEMPTED_EXIT_CODE, 3]
    assert reproduce.main(words) == 3, "a failure is told before a stop"
    with pytest.raises(ConfigError, match="--jobs=0 must be at least 1"):
        reproduce.main(["layercake", "--jobs=0"])


def test_the_command_line_records_a_verdict(tree_of_plans, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    work = f"--workdir={tmp_path / 'work'}"
    assert reproduce.main(["layercake", work, "--scale=smoke"]) == 0
    assert not tree_of_plans.exists(), "a smoke run is never a result"
    assert "no result" in capsys.readouterr().out
    assert json.loads((tmp_path / "work/layercake.json").read_text())["scale"] == "smoke"

    assert reproduce.main(["layercake", work]) == 0
    out = capsys.readouterr().out
    assert "holds: gain" in out
    assert "A learning rate above zero learns." in out
    assert "Set the state of layercake in tokjax/methods_table.py to 'reproduced'" in out
    record = read_record(tree_of_plans / "layercake.json")
    assert record["verdict"] == "reproduced"
    assert record["seeds"] == [3]
    measured = record["arms"]["learns"]["seeds"]["3"]
    assert measured["final"][LOSS] == pytest.approx(
        measured["curves"][LOSS]["values"][-1], abs=1e-4
    )
    assert measured["model_flops"] > 0
    assert measured["seconds"]["step"] > 0
    assert str(tmp_path) not in json.dumps(record)
    assert (tree_of_plans / "layercake.png").stat().st_size > 10_000

    assert reproduce.main(["--list"]) == 0
    assert record["date"] in capsys.readouterr().out


def test_without_all_seeds_nothing_is_recorded(tree_of_plans, tmp_path, capsys, monkeypatch):
    plan = dataclasses.replace(reproduce.load_plan("layercake"), seeds=(3, 4))
    monkeypatch.setattr(reproduce, "load_plan", lambda slug, scale, folder: plan)
    work = f"--workdir={tmp_path / 'work'}"
    assert reproduce.main(["layercake", work, "--seeds=3"]) == 0
    assert not tree_of_plans.exists()
    assert "Without the seeds (3, 4)" in capsys.readouterr().out
    assert (tmp_path / "work/layercake.json").exists()


def test_after_a_stop_no_further_arm_is_begun(tree_of_plans, tmp_path, capsys, monkeypatch):
    stopped = []

    def stop(run, workdir):
        stopped.append(workdir.parent.name)
        return type("Outcome", (), {"finished": False, "stopped_by": 15})

    shutil.rmtree(tmp_path / "work/none")
    shutil.rmtree(tmp_path / "work/little")
    build = running.build_run
    monkeypatch.setattr(
        running, "build_run", lambda config, devices: build(config, devices=one_device())
    )
    monkeypatch.setattr(running, "train", stop)
    assert reproduce.main(["layercake", f"--workdir={tmp_path / 'work'}"]) == 75
    assert stopped == ["none"]
    assert "the same command continues" in capsys.readouterr().out
    assert not tree_of_plans.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "There are: .*patch_training"),
        (["patch_trainin"], "Did you mean 'patch_training'"),
        (["xar"], "no reproduction of 'xar'"),
        (["patch_training", "xar"], "no reproduction of 'xar'"),
        (["patch_training", "wavelet_gpt", "--workdir=x"], "one reproduction"),
        (["patch_training", "--list"], "not both"),
        (["patch_training", "--scale=small"], "scale"),
        (["patch_training", "--seeds=0,0"], "different numbers"),
        (["patch_training", "--seeds=-1"], "different numbers"),
        (["--family=pretraining", "--workdir=x"], "one reproduction"),
        (["--family=series"], "no reproduction of the family"),
    ],
)
def test_wrong_command_lines_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        reproduce.main(words)


def test_help_imports_nothing_heavy():
    program = (
        "import sys, runpy\n"
        "sys.argv = ['tokjax.reproduce', '--help']\n"
        "try: runpy.run_module('tokjax.reproduce', run_name='__main__')\n"
        "except SystemExit as e: assert e.code in (0, None)\n"
        "assert not {'tensorflow', 'matplotlib', 'rich'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--scale" in done.stdout


# ---------------------------------------------------------------- results


def result(arm, seed, values, *, stages=None, seconds=10.0, data="same", steps=None):
    stages = stages or (StageCost("next_token", 0, 400, 2048, 1e9, 1e9),)
    steps = steps or tuple(40 * (i + 1) for i in range(len(values)))
    return ArmResult(
        arm=arm,
        seed=seed,
        parameters=7,
        stages=stages,
        curves={LOSS: Series(steps, tuple(values))},
        seconds={"step": seconds},
        eval_data={"validation": data},
    )


def test_results_survive_json_and_add_up_costs():
    stages = (
        StageCost("patch", 0, 10, 400, 2.0, 3.0),
        StageCost("next_token", 10, 20, 100, 2.0, 3.0, 0.5),
    )
    one = result("a", 0, [3.0, 2.0], stages=stages, steps=(10, 30))
    assert ArmResult.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert one.steps == 30
    assert [one.cost_at(step, "tokens") for step in (0, 5, 10, 20, 30, 99)] == [
        *(0, 2000, 4000, 5000, 6000, 6000)
    ]
    assert (one.tokens, one.model_flops, one.counted_flops) == (6000, 60, 90)


def test_results_that_cannot_be_compared_are_refused():
    with pytest.raises(ConfigError, match="different data"):
        Results((result("a", 0, [1.0]), result("b", 0, [1.0], data="other")), (0,))
    with pytest.raises(ConfigError, match="lacks the run of seed 1"):
        Results((result("a", 0, [1.0]), result("b", 0, [1.0])), (0, 1))
    results = Results((result("abc", 0, [1.0]),), (0,))
    with pytest.raises(ConfigError, match="no arm 'abd'"):
        results.of("abd")
    with pytest.raises(ConfigError, match="no metric 'eval/validation/los'"):
        results.curves("abc", "eval/validation/los")


def test_series_are_cut_thinned_and_averaged():
    series = Series(tuple(range(100)), tuple(float(i) for i in range(100)))
    thin = series.thinned(10)
    assert len(thin.steps) == 10
    assert (thin.steps[0], thin.steps[-1], thin.last) == (0, 99, 99.0)
    assert series.thinned(100) == series
    assert series.from_step(98) == Series((0, 1), (98.0, 99.0))
    assert mean_series([Series((1, 2), (1.0, 2.0)), Series((2, 3), (4.0, 5.0))]) == Series(
        (2,), (3.0,)
    )
    with pytest.raises(ConfigError, match="nothing was measured at step 7"):
        Series((1,), (1.0,)).at(7)


def test_a_busy_machine_is_told_of():
    quiet_run, busy_run = (
        Results((dataclasses.replace(result("a", 0, [1.0]), load_average=load),), (0,))
        for load in (1.9, 6.24)
    )
    for unknown_or_low in (None, 1.5):
        host = {"cores": 2, "load_average_15_min": unknown_or_low}
        assert machine_notes(host, training_arms.loads(quiet_run)) == []
        assert "6.2 on 2 cores" in machine_notes(host, training_arms.loads(busy_run))[0]
    assert (
        "3.0 on"
        in machine_notes({"cores": 2, "load_average_15_min": 3.0}, training_arms.loads(quiet_run))[
            0
        ]
    )


def test_a_file_that_is_no_record_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(DataError, match=r"x\.json is no record"):
        read_record(tmp_path / "x.json")


# ---------------------------------------------------------------- the judge of patch_training

BASE = {
    "tokens": [3.0, 2.0],
    "patches": [6.0, 3.5, 2.5],
    "scratch": [4.0, 3.0],
    "half": [4.0, 2.6],
    "shuffled": [6.5, 4.1, 3.0],
    "first_token": [6.0, 3.6, 2.6],
}


def judged(seconds_seed=None, **changes):
    """The verdict on two seeds with the curves above, those of seed 1 changed."""
    two = (
        StageCost("patch", 0, 40, 8192, 1e9, 1e9),
        StageCost("next_token", 40, 80, 2048, 1e9, 1e9),
    )
    runs = []
    for seed in (0, 1):
        for arm, values in {**BASE, **(changes if seed else seconds_seed or {})}.items():
            stages = two if len(values) == 3 else None
            if arm == "tokens":
                stages = (StageCost("next_token", 0, 240, 2048, 1e9, 1e9),)
            runs.append(result(arm, seed, values, stages=stages))
    return load_plan("patch_training").judge(Results(tuple(runs), (0, 1)))


def failing(verdict):
    return [s for s in verdict.sentences if s.startswith("fails")]


def test_patch_training_is_judged_as_reproduced_when_everything_comes_out():
    verdict = judged()
    assert verdict.reproduced, verdict.sentences
    assert any("2.5000 against 3.0000" in s for s in verdict.sentences)
    assert any("0.500 by formula" in s for s in verdict.sentences)


@pytest.mark.parametrize(
    ("changes", "fails"),
    [
        ({"patches": [3.4, 2.9, 2.5]}, "at the switch"),
        ({"patches": [6.0, 2.9, 3.1]}, "for good"),
        ({"patches": [6.0, 3.5, 3.1]}, "ends below scratch"),
        ({"half": [4.0, 2.3]}, "equal compute"),
        ({"shuffled": [6.5, 4.0, 2.6]}, "shuffled targets keep"),
    ],
)
def test_patch_training_is_judged_as_not_reproduced_when_a_part_is_missing(changes, fails):
    verdict = judged(**changes)
    assert not verdict.reproduced
    assert any(fails in s for s in failing(verdict)), verdict.sentences


def test_patches_need_not_reach_tokens_on_all_the_data():
    assert judged(tokens=[2.0, 1.0]).reproduced
