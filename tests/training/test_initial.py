"""Runs that start from a checkpoint: what is adopted, adapters, resuming, export."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import tokjax
from tokjax.config import resolve
from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.errors import CheckpointError, ConfigError
from tokjax.export import main as export
from tokjax.language_model import LanguageModel
from tokjax.models import ModelConfig, Transformer, lora
from tokjax.training.answers import evaluate_answers
from tokjax.training.config import TrainConfig
from tokjax.training.loop import train
from tokjax.training.run import build_run

MODEL = ModelConfig(
    vocab_size=258, d_model=32, n_layers=2, n_heads=2, max_positions=64, tie_embeddings=True
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model with a byte tokenizer in Hugging Face's form."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    model = Transformer(MODEL)
    LanguageModel(model, model.init(jax.random.key(3)), ByteTokenizer(), True).save(folder)
    return folder


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Prompts and responses; the responses are what is trained on."""
    path = tmp_path_factory.mktemp("records") / "r.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a in range(6) for b in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def tree(checkpoint, records, tmp_path):
    """A function giving the configuration of a short run from the checkpoint, with changes."""
    source = {"name": "jsonl", "files": (str(records),), "kind": "response"}

    def make(**changes):
        base = {
            "init_from": str(checkpoint),
            "data": {
                "train": [{"source": source}],
                "evals": {"held": source},
                "seq_len": 32,
                "batch_size": 8,
                "cache_dir": str(tmp_path / "cache"),
            },
            "objective": {"name": "sft"},
            "steps": 4,
            "optimizer": {"name": "adamw", "peak_lr": 1e-2},
            "schedule": {"name": "constant"},
            "checkpoints": {"every_steps": 2},
        }
        for key, value in changes.items():
            *path, last = key.split("__")
            at = base
            for part in path:
                at = at.setdefault(part, {})
            at[last] = value
        return base

    return make


def built(tree):
    return build_run(resolve(TrainConfig, tree), show_progress=False)


def test_model_tokenizer_and_parameters_are_the_checkpoints(tree, checkpoint):
    run = built(tree())
    lm = tokjax.load(checkpoint)
    assert run.model.config == lm.model.config
    assert run.tokenizer.fingerprint == lm.tokenizer.fingerprint
    state = run.init_state(run.stages[0], run.initial_params())
    jax.tree.map(np.testing.assert_array_equal, state.params, lm.params)
    assert state.frozen == ()


def test_what_the_run_chooses_and_what_it_cannot(tree):
    run = built(tree(model__remat="none", model__dtype="bfloat16"))
    assert (run.model.config.remat, run.model.config.dtype) == ("none", "bfloat16")
    with pytest.raises(ConfigError, match=r"model\.d_model=64 contradicts init_from"):
        built(tree(model__d_model=64))
    with pytest.raises(ConfigError, match=r"data\.seq_len=65 is longer than.*=64"):
        built(tree(data__seq_len=65))
    with pytest.raises(CheckpointError, match="does not exist"):
        built(tree(init_from="nowhere"))


def test_adapters_need_a_checkpoint_to_be_beside(tree):
    with pytest.raises(ConfigError, match="init_from"):
        built(tree(init_from=None, model__lora={"rank": 2}))


def test_only_adapters_are_trained_and_kept(tree, tmp_path, checkpoint):
    run = built(tree(model__lora={"rank": 2}))
    result = train(run, tmp_path / "w")
    base = tokjax.load(checkpoint)
    jax.tree.map(np.testing.assert_array_equal, result.state.frozen, base.params)
    moved = jax.tree.leaves(jax.tree.map(lambda a: np.abs(a).sum(), result.state.params))
    assert all(m > 0 for m in moved)
    assert len(moved) == 4  # A and B of query and value
    assert jax.tree.structure(result.state.opt_state[0].mu) == jax.tree.structure(
        result.state.params
    )
    saved = sum(f.stat().st_size for f in (tmp_path / "w/checkpoints").rglob("*") if f.is_file())
    assert saved < 200_000  # two checkpoints; the model alone has 150 kB in each copy

    lm = tokjax.load(tmp_path / "w")
    ids = np.arange(8, dtype=np.int32)[None]
    np.testing.assert_array_equal(
        lm.model(lm.params, ids)[0], run.model(result.state.whole, ids)[0]
    )


def test_adapters_start_as_the_checkpoint(tree, checkpoint):
    run = built(tree(model__lora={"rank": 2}))
    state = run.init_state(run.stages[0], run.initial_params())
    lm, ids = tokjax.load(checkpoint), np.arange(8, dtype=np.int32)[None]
    np.testing.assert_array_equal(run.model(state.whole, ids)[0], lm.model(lm.params, ids)[0])


@pytest.mark.parametrize("changes", [{}, {"model__lora": {"rank": 2}}], ids=["full", "adapters"])
def test_a_stopped_run_continues_to_the_same_numbers(tree, tmp_path, changes, monkeypatch):
    whole = train(built(tree(**changes)), tmp_path / "whole")
    first = built(tree(**changes))
    stopping = tmp_path / "parts"
    import signal

    from tokjax.training import loop

    after = loop._Training.after_step

    def stop_at_two(self, state, step, stopping, stage):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return after(self, state, step, stopping or step == 2, stage)

    with monkeypatch.context() as patched:
        patched.setattr(loop._Training, "after_step", stop_at_two)
        assert not train(first, stopping).finished
    result = train(built(tree(**changes)), stopping)
    assert result.finished
    jax.tree.map(np.testing.assert_array_equal, whole.state.params, result.state.params)


def test_adapters_do_not_go_beside_another_checkpoint(tree, tmp_path, checkpoint):
    own = tmp_path / "own"
    lm = tokjax.load(checkpoint)
    lm.save(own)
    settings = tree(init_from=str(own), model__lora={"rank": 2})
    train(built(settings), tmp_path / "w")
    other = jax.tree.map(lambda p: 2 * p, lm.params)
    dataclasses.replace(lm, params=other).save(own, overwrite=True)
    with pytest.raises(CheckpointError, match="has changed since"):
        tokjax.load(tmp_path / "w")
    with pytest.raises(CheckpointError, match="another configuration"):
        train(built(settings), tmp_path / "w")


def test_a_run_can_start_from_a_run(tree, tmp_path):
    first = train(built(tree(model__lora={"rank": 2})), tmp_path / "first")
    run = built(tree(init_from=str(tmp_path / "first")))
    assert run.model.config.lora is None
    merged = lora.merge(built(tree(model__lora={"rank": 2})).model, first.state.whole)[1]
    state = run.init_state(run.stages[0], run.initial_params())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, merged)


def test_answers_are_written_and_judged(tree, tmp_path):
    run = built(
        tree(
            evaluation={
                "answers": {"verifier": {"name": "numeric"}, "max_new_tokens": 4},
                "every_steps": 2,
            },
            steps=120,
            data__batch_size=8,
            evaluation__max_batches=1,
        )
    )
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, log_every=40))
    result = train(run, tmp_path / "w")
    accuracy = result.metrics["eval/held/accuracy"]
    lines = [json.loads(x) for x in (tmp_path / "w/answers.jsonl").read_text().splitlines()]
    assert len(lines) == 36
    assert {"answer", "reference", "score", "example", "step", "set"} == set(lines[0])
    assert np.mean([x["score"] for x in lines]) == pytest.approx(accuracy)
    right = [x for x in lines if x["answer"].strip() == x["reference"]]
    assert len(right) == sum(x["score"] for x in lines) > 3


def test_only_sets_with_prompts_are_asked(tree, records):
    held = {"name": "jsonl", "files": (str(records),), "kind": "response"}
    texts = {"name": "text", "files": (str(records),), "per": "line"}
    settings = {"answers": {"max_examples": 3, "max_new_tokens": 4}}
    run = built(tree(evaluation=settings, data__evals={"held": held, "texts": texts}))
    found, told = evaluate_answers(run, run.model, run.initial_params())
    assert list(found) == ["eval/held/accuracy"]
    assert [a.reference for a in told["held"]] == ["0", "1", "2"]


def test_exported_adapters_are_merged(tree, tmp_path):
    result = train(built(tree(model__lora={"rank": 2})), tmp_path / "w")
    assert export([str(tmp_path / "w"), f"--to={tmp_path / 'out'}"]) == 0
    found = tokjax.load(tmp_path / "out")
    assert found.model.config.lora is None
    ids = np.arange(8, dtype=np.int32)[None]
    adapted = tokjax.load(tmp_path / "w")
    np.testing.assert_allclose(
        found.model(found.params, ids)[0], adapted.model(adapted.params, ids)[0], atol=1e-5
    )
    assert export([str(tmp_path / "w"), f"--to={tmp_path / 'a'}", "--adapters"]) == 0
    base = tokjax.load(result and tree()["init_from"])
    model, params = lora.load(tmp_path / "a", base.model, base.params)
    np.testing.assert_allclose(
        model(params, ids)[0], adapted.model(adapted.params, ids)[0], atol=1e-6
    )
