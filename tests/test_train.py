"""The training run as a whole: it learns, resumes bit for bit, stops when asked, refuses."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tokjax.config import resolve, to_dict
from tokjax.config.testing import check_misspellings, undocumented
from tokjax.errors import CheckpointError, ConfigError, DataError, NonFiniteError, StorageError
from tokjax.training.config import TrainConfig
from tokjax.training.loop import train
from tokjax.training.metrics import TIME_COLUMNS, read_metrics
from tokjax.training.run import build_run
from tokjax.training.run_facts import read_samples


def run_of(tree, devices=1):
    config = resolve(TrainConfig, tree)
    return build_run(config, devices=jax.devices()[:devices], show_progress=False)


def leaves(state):
    raw = jax.tree.map(
        lambda a: (
            jax.random.key_data(a) if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key) else a
        ),
        state,
    )
    return [np.asarray(a) for a in jax.tree.leaves(raw)]


def assert_same_state(a, b):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def without_times(workdir):
    table = read_metrics(workdir)
    return {k: v for k, v in table.items() if k not in TIME_COLUMNS}


CLI = [sys.executable, "-m", "tokjax.train"]


def command(tmp_path, tree, workdir, *extra):
    file = tmp_path / "config.py"
    file.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        f"    return ConfigDict({tree!r})\n"
    )
    return [*CLI, f"--config={file}", f"--workdir={workdir}", *extra]


def environment(**more):
    cache = jax.config.jax_compilation_cache_dir
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "PYTHONUNBUFFERED": "1",
        **more,
    }


def test_a_run_learns_and_leaves_everything_behind(tiny_tree, tmp_path):
    tree = tiny_tree(steps=40, samples={"prompts": ["12 tokens"], "max_new_tokens": 8})
    run = run_of(tree)
    result = train(run, tmp_path / "run")
    table = read_metrics(tmp_path / "run")
    losses = [v for v in table["loss"] if v is not None]
    assert result.finished
    assert result.step == 40
    assert losses[-1] < losses[0] - 1
    assert result.metrics["eval/validation/loss"] < run.eval_stores["validation"].unigram_entropy
    for name in ("metrics.csv", "report.html", "run.json", "ledger.json", "samples.jsonl"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["state"] == "finished"
    assert facts["config"]["steps"] == 40


@pytest.mark.filterwarnings("ignore:.*os.fork.*:RuntimeWarning")
def test_the_step_neither_transfers_nor_recompiles_nor_promotes(tiny_tree, tmp_path):
    run = run_of(tiny_tree(ema_decay=0.9, micro_batches=2))
    with (
        jax.transfer_guard("disallow"),
        jax.debug_nans(True),
        jax.numpy_dtype_promotion("strict"),
    ):
        result = train(run, tmp_path / "run")
    assert result.finished
    warnings = json.loads((tmp_path / "run" / "run.json").read_text())["warnings"]
    assert not [w for w in warnings if "compilation" in w]


def test_stopping_and_continuing_gives_the_same_numbers(tiny_tree, tmp_path):
    tree = tiny_tree(ema_decay=0.9)
    whole = train(run_of(tree), tmp_path / "whole")

    class AfterStep7(Exception):
        pass

    run = run_of(tree)
    read, loader_batch = [], run.loader.batch

    def failing(step, rows=None):
        if step == 7:
            raise AfterStep7
        return loader_batch(step, rows)

    object.__setattr__(run.loader, "batch", failing)
    with pytest.raises(AfterStep7):
        train(run, tmp_path / "parts")
    again = run_of(tree)
    original = again.loader.batch
    object.__setattr__(
        again.loader, "batch", lambda step, rows=None: read.append(step) or original(step, rows)
    )
    result = train(again, tmp_path / "parts")
    assert min(read) == 4, "it must go on from the checkpoint without replaying earlier batches"
    assert_same_state(whole.state, result.state)
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "parts")


def test_a_finished_run_is_not_trained_again(tiny_tree, tmp_path):
    tree = tiny_tree()
    first = train(run_of(tree), tmp_path / "run")
    second = train(run_of(tree), tmp_path / "run")
    assert second.step == 12
    assert_same_state(first.state, second.state)
    # One row of the training step, one of the evaluation: nothing was done twice.
    assert read_metrics(tmp_path / "run")["step"].count(12) == 2
    assert second.metrics == first.metrics


@pytest.mark.parametrize("content", [None, b"", b"\xff\x00garbage\n,,,\n"])
def test_a_run_goes_on_whatever_became_of_its_curves(tiny_tree, tmp_path, content):
    first = train(run_of(tiny_tree()), tmp_path / "run")
    curves = tmp_path / "run" / "metrics.csv"
    curves.unlink()
    if content is not None:
        curves.write_bytes(content)
    again = train(run_of(tiny_tree()), tmp_path / "run")
    assert_same_state(first.state, again.state)
    assert again.metrics == first.metrics


def test_a_sample_that_a_stop_prevented_is_made_on_resume(tiny_tree, tmp_path):
    tree = tiny_tree(samples={"prompts": ["a"], "max_new_tokens": 4, "every_steps": 5})
    run = run_of(tree)
    loader_batch = run.loader.batch

    def stopping(step, rows=None):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return loader_batch(step, rows)

    object.__setattr__(run.loader, "batch", stopping)
    object.__setattr__(run.config.data, "prefetch", 1)
    stopped = train(run, tmp_path / "run")
    assert not stopped.finished
    train(run_of(tree), tmp_path / "run")
    train(run_of(tree), tmp_path / "run")  # finished: nothing is sampled twice
    made = [s["step"] for s in read_samples(tmp_path / "run")]
    assert made == [5, 10, 12]
    lines = (tmp_path / "run" / "samples.jsonl").read_text().split()
    assert sum('"step"' in line for line in lines) == 6 // 2


def test_killed_at_random_moments_it_ends_with_the_same_parameters(tiny_tree, tmp_path):
    """SIGKILL at random times, also in the middle of saves, against a run never killed."""
    tree = tiny_tree(
        steps=60, checkpoints={"every_steps": 2, "keep": 2}, evaluation={"every_steps": 30}
    )
    whole = tmp_path / "whole"
    quiet = {"stdout": subprocess.DEVNULL, "env": environment()}
    subprocess.run(command(tmp_path, tree, whole), check=True, **quiet)
    workdir, log, kills = tmp_path / "killed", tmp_path / "log", 0
    rng = random.Random()  # any moment must do: not seeded
    curves = workdir / "metrics.csv"
    for _ in range(20):
        size = curves.stat().st_size if curves.exists() else 0
        with log.open("w") as output:
            process = subprocess.Popen(command(tmp_path, tree, workdir), stderr=output, **quiet)
        # It dies a while after training goes on, four times; then the run is left alone.
        while process.poll() is None and kills < 4:
            if curves.exists() and curves.stat().st_size != size:
                time.sleep(rng.uniform(0, 0.4))
                process.send_signal(signal.SIGKILL)
                kills += process.wait() == -signal.SIGKILL
            time.sleep(0.01)
        code = process.wait()
        assert code in (0, -signal.SIGKILL), log.read_text()
        if code == 0:
            break
    assert code == 0
    assert kills >= 1
    whole_state, killed_state = (train(run_of(tree), d).state for d in (whole, workdir))
    assert_same_state(whole_state, killed_state)
    assert without_times(whole) == without_times(workdir)


def test_sigterm_saves_within_a_step_and_exits_75(tiny_tree, tmp_path):
    tree = tiny_tree(
        steps=4000, checkpoints={"every_steps": 4000}, evaluation={"every_steps": 4000}
    )
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        command(tmp_path, tree, workdir),
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + 60
    while not (workdir / "metrics.csv").exists() or "loss" not in read_metrics(workdir):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    steps = [
        s
        for s, v in zip(*(read_metrics(workdir)[k] for k in ("step", "loss")), strict=True)
        if v is not None
    ]
    saved = [int(p.name.removeprefix("step-")) for p in (workdir / "checkpoints").glob("step-*")]
    assert saved == [max(steps)]
    assert "the same command continues" in output


def test_sigterm_before_training_has_the_same_exit_code(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(
        "import os, signal\n\n\ndef get_config():\n    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return {}\n"
    )
    words = [*CLI, f"--config={file}", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
    assert "the same command continues" in done.stderr


def test_a_checkpoint_of_another_configuration_is_refused_with_the_keys(tiny_tree, tmp_path):
    train(run_of(tiny_tree()), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"optimizer\.peak_lr"):
        train(run_of(tiny_tree(optimizer__peak_lr=0.02)), tmp_path / "run")
    # What does not change the numbers may change.
    train(run_of(tiny_tree(log_every=3, evaluation__every_steps=5)), tmp_path / "run")


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tiny_tree, tmp_path):
    tree = tiny_tree()
    whole = train(run_of(tree), tmp_path / "run")
    data = sorted((tmp_path / "run/checkpoints/step-00000012/state").glob("**/d/*"))[0]
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    result = train(run_of(tree), tmp_path / "run")
    assert_same_state(whole.state, result.state)
    warnings = json.loads((tmp_path / "run" / "run.json").read_text())["warnings"]
    assert any("12" in w and "step 8" in w for w in warnings)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_loss_that_is_not_finite(tiny_tree, tmp_path, policy):
    run = run_of(tiny_tree(on_nonfinite=policy))
    loader_batch = run.loader.batch

    def poisoned(step, rows=None):
        batch = loader_batch(step, rows)
        if step == 5:
            batch.weights[0, 0] = np.inf
        return batch

    object.__setattr__(run.loader, "batch", poisoned)
    if policy == "stop":
        with pytest.raises(NonFiniteError, match="step 6"):
            train(run, tmp_path / "run")
    else:
        result = train(run, tmp_path / "run")
        assert result.finished
        assert all(np.isfinite(a).all() for a in leaves(result.state.params))
        assert read_metrics(tmp_path / "run")["skipped_updates"][-3] == 1.0
    record = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    named = {e["key"] for e in record["examples"]}
    expected = {
        run.loader.example_key(int(i)) for i in loader_batch(5).example_id.ravel() if i >= 0
    }
    assert record["step"] == 6
    assert named == expected


def test_both_stages_of_patch_training_run_and_resume(tiny_tree, tmp_path):
    tree = tiny_tree(
        steps=24,
        stages=[
            {"objective": {"name": "patch", "k": 4}, "share": 2 / 3},
            {"objective": {"name": "next_token"}, "share": 1 / 3},
        ],
    )
    run = run_of(tree)
    assert [(s.name, s.first_step, s.steps) for s in run.stages] == [
        ("patch", 0, 4),
        ("next_token", 4, 8),
    ]
    whole = train(run, tmp_path / "whole")
    assert whole.finished
    # A checkpoint lies exactly at the border (step 4): continuing from it resets as the run did.
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for step in ("08", "12"):
        shutil.rmtree(tmp_path / f"parts/checkpoints/step-000000{step}")
    result = train(run_of(tree), tmp_path / "parts")
    assert_same_state(whole.state, result.state)
    rates = dict(
        zip(*(read_metrics(tmp_path / "whole")[k] for k in ("step", "learning_rate")), strict=True)
    )
    assert rates[5] == pytest.approx(rates[1]), "the schedule starts afresh in the second stage"


def test_meshes_give_the_same_losses(tiny_tree, tmp_path):
    single = train(run_of(tiny_tree()), tmp_path / "single")
    for name, mesh in {
        "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
        "sequence": {"data": 2, "sequence": 2, "tensor": 2},
    }.items():
        sharded = train(run_of(tiny_tree(mesh=mesh), devices=8), tmp_path / name)
        np.testing.assert_allclose(
            read_metrics(tmp_path / name)["loss"][:4],
            read_metrics(tmp_path / "single")["loss"][:4],
            rtol=1e-5,
        )
        assert sharded.finished
    # A checkpoint made on one mesh loads on another.
    again = train(run_of(tiny_tree()), tmp_path / "mixed")
    assert again.step == single.step


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__seq_len": 128}, "max_positions"),
        ({"model__n_heads": 3}, "not divisible"),
        ({"model__vocab_size": 100}, "tokenizer"),
        ({"steps": None}, "exactly one"),
        ({"epochs": 1.0}, "exactly one.*steps and epochs are set"),
        ({"steps": 2**31}, "more than the step counter holds"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"seed": 2**40}, "below 2"),
        ({"data__seed": 2**63}, "below 2"),
        ({"micro_batches": 0}, "micro_batches=0 must be at least 1"),
        ({"samples__max_new_tokens": 0}, "max_new_tokens=0"),
        ({"samples__top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"schedule__final_factor": 1.5}, "final_factor=1.5 must lie within 0 and 1"),
        ({"optimizer__peak_lr": -1e-3}, "peak_lr=-0.001 must be at least 0$"),
        ({"micro_batches": 3}, "not divisible"),
        ({"mesh": {"data": 3}}, "devices"),
        ({"stages": [{"objective": {"name": "patch"}, "share": 0.5}]}, "sum to"),
        ({"objective": {"name": "pach"}}, "patch"),
    ],
)
def test_impossible_combinations_are_refused_before_compilation(tiny_tree, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_of(tiny_tree(**changes))


@pytest.mark.parametrize("place", ["train", "evals"])
def test_data_without_any_weight_is_refused(tiny_tree, tmp_path, place):
    records = tmp_path / "zero.jsonl"
    records.write_text('{"text": "hello world", "weights": [[0, 11, 0]]}\n')
    source = {"name": "jsonl", "files": [str(records)]}
    value = [{"source": source}] if place == "train" else {"zero": source}
    with pytest.raises(DataError, match=rf"data\.{place}\..*no.* has a target with a weight"):
        run_of(tiny_tree(**{f"data__{place}": value}))


def test_a_warm_up_longer_than_the_run_is_told(tiny_tree, tmp_path):
    train(run_of(tiny_tree(steps=3, schedule__warmup_steps=100)), tmp_path / "run")
    warnings = json.loads((tmp_path / "run" / "run.json").read_text())["warnings"]
    assert any("warmup_steps=100 is more than the 3 steps" in w for w in warnings)


def test_every_misspelt_key_is_refused_and_every_field_explained(tiny_tree):
    config = resolve(TrainConfig, tiny_tree())
    assert check_misspellings(TrainConfig, to_dict(config)) > 100
    assert undocumented(TrainConfig) == []


def test_an_unwritable_workdir_is_a_clear_error(tiny_tree, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(StorageError, match="file"):
        train(run_of(tiny_tree()), tmp_path / "file" / "run")


def test_two_runs_in_one_workdir_are_refused(tiny_tree, tmp_path):
    from tokjax.training.workdir import lock_workdir

    with lock_workdir(tmp_path / "run"), pytest.raises(StorageError, match="another run"):
        train(run_of(tiny_tree()), tmp_path / "run")


def test_epochs_set_the_length(tiny_tree):
    run = run_of({k: v for k, v in tiny_tree().items() if k != "steps"} | {"epochs": 2.0})
    facts = run.loader.describe()
    assert facts["epochs"] == pytest.approx(2.0, abs=0.2)


def test_training_from_a_prepared_store_imports_no_tensorflow(tiny_tree, tmp_path):
    run_of(tiny_tree())  # prepares
    tree = tiny_tree(samples={"prompts": ["a"], "max_new_tokens": 8})
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom tokjax.config import resolve\n"
        "from tokjax.training.config import TrainConfig\nfrom tokjax.training.loop import train\n"
        "from tokjax.training.run import build_run\n"
        f"run = build_run(resolve(TrainConfig, {tree!r}))\n"
        f"train(run, Path({str(tmp_path / 'run')!r}))\n"
        "heavy = [m for m in ('tensorflow', 'seqio', 'torch') if m in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, script], check=True, env=environment(), timeout=120)


def test_import_is_light():
    probe = (
        "import time, sys; t = time.process_time(); import tokjax; t = time.process_time() - t; "
        "print(t); assert not {'tensorflow', 'seqio', 'matplotlib', 'torch'} & set(sys.modules)"
    )
    best = min(
        float(
            subprocess.run(
                [sys.executable, "-c", probe], check=True, capture_output=True, text=True
            ).stdout
        )
        for _ in range(2)
    )
    assert best < 1.5
