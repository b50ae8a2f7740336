"""Runs of both models: trained, interrupted, evaluated in bits per byte, loaded and decoded."""

import shutil

import jax
import numpy as np
import pytest

from tokjax.config import load, resolve
from tokjax.decoding import Prompts, decode
from tokjax.errors import ConfigError
from tokjax.tokenization.hat import Hat, HatPredictor
from tokjax.tokenization.runs import of_run
from tokjax.tokenization.toucan import Toucan, ToucanPredictor, expanded_rows, without_ends
from tokjax.training.config import TrainConfig
from tokjax.training.evaluation import evaluate
from tokjax.training.loop import train
from tokjax.training.run import build_run

SMALL = {"n_layers": 1, "d_model": 16, "n_heads": 2}
OBJECTIVES = {
    "hat": ("words", {"name": "hat", "encoder": SMALL, "decoder": SMALL, "room": 0.6}),
    "toucan": ("bytes", {"name": "toucan", "before": {"n_layers": 1}, "behind": {"n_layers": 1}}),
}


def run_of(tiny_tree, name, **changes):
    tokenizer, objective = OBJECTIVES[name]
    tree = tiny_tree(objective=objective, data__tokenizer={"name": tokenizer}, steps=4, **changes)
    return build_run(resolve(TrainConfig, tree), devices=jax.devices()[:1], show_progress=False)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_resumes_exactly_and_decodes(tiny_tree, tmp_path, name):
    changes = {"evaluation": {"every_steps": 4, "max_batches": 1}, "checkpoints__every_steps": 2}
    whole = train(run_of(tiny_tree, name, **changes), tmp_path / "whole")
    assert whole.finished
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/checkpoints/step-00000004")
    again = train(run_of(tiny_tree, name, **changes), tmp_path / "parts")
    same = jax.tree.map(np.array_equal, whole.state.params, again.state.params)
    assert all(jax.tree.leaves(same))

    predictor, params, tokenizer = of_run(tmp_path / "whole")
    ids = tokenizer.encode("12 tokens and")
    if name == "toucan":
        assert isinstance(predictor, ToucanPredictor)
        rows = expanded_rows(predictor, params, [ids])
        assert without_ends(predictor, rows[0]) == ids
    else:
        assert isinstance(predictor, HatPredictor)
        rows = [ids]
    assert len(decode(predictor, params, Prompts.of(rows), max_new_tokens=5).rows()[0]) == 5


@pytest.mark.parametrize("name", OBJECTIVES)
def test_held_out_text_is_scored_in_bits_per_byte(tiny_tree, name):
    run = run_of(tiny_tree, name)
    heads = run.stages[-1].objective.init_heads(jax.random.key(0), run.model)
    params = {**run.model.init(jax.random.key(0)), "heads": heads}
    found = evaluate(run, params, 1)
    # Before training a symbol costs about as much as uniform ones, and ends come on top.
    assert 7 < found["eval/validation/bits_per_byte"] < 20
    assert found["eval/validation/left_out"] < 0.5


@pytest.mark.parametrize(("name", "tokenizer"), [("hat", "bytes"), ("toucan", "words")])
def test_another_tokenizer_is_refused(tiny_tree, name, tokenizer):
    tree = tiny_tree(objective={"name": name}, data__tokenizer={"name": tokenizer})
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.name="):
        build_run(resolve(TrainConfig, tree), devices=jax.devices()[:1], show_progress=False)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_samples_of_the_backbone_alone_are_refused(tiny_tree, name):
    asked = {"prompts": ("a",), "max_new_tokens": 4}
    with pytest.raises(ConfigError, match=f"objective '{name}' writes only together with"):
        run_of(tiny_tree, name, samples=asked)


def test_the_configs_are_those_of_the_models():
    assert isinstance(resolve(TrainConfig, load("configs/hat.py")).objective, Hat)
    found = resolve(TrainConfig, load("configs/toucan.py:boundaries=whitespace")).objective
    assert isinstance(found, Toucan)
    assert found.boundaries.kind == "whitespace"
