"""Runs whose model has a mixer: trained, saved, loaded, decoded, and beside other methods."""

import dataclasses

import jax
import numpy as np
import pytest
from mixers_for_tests import config_with, random_params, some_tokens

import tokjax
from tokjax.config import load, resolve
from tokjax.decoding import Prompts, decode
from tokjax.models import Transformer
from tokjax.pretraining.patch_training import patch_embeddings
from tokjax.pretraining.signal_processing_llm import FilterBank
from tokjax.pretraining.wavelet_gpt import Wavelet
from tokjax.training.config import TrainConfig
from tokjax.training.loop import train
from tokjax.training.run import build_run


@pytest.mark.parametrize(
    "mixer",
    [
        {"name": "wavelet", "context": 8, "kernel": "learned"},
        {"name": "filters", "filters": 4, "length": 5},
    ],
)
def test_a_trained_run_is_loaded_with_its_mixer_and_decodes(tiny_tree, tmp_path, mixer):
    tree = tiny_tree(steps=4, model__mixer=mixer, evaluation__every_steps=4)
    run = build_run(resolve(TrainConfig, tree), devices=jax.devices()[:1], show_progress=False)
    assert train(run, tmp_path / "run").finished
    lm = tokjax.load(tmp_path / "run")
    assert lm.model.config.mixer == run.config.model.mixer
    trained = jax.tree.leaves(lm.params["layers"]["mixer"])
    started = jax.tree.leaves(lm.model.init(jax.random.key(0))["layers"]["mixer"])
    assert any(
        (np.asarray(a) != np.asarray(b)).any() for a, b in zip(trained, started, strict=True)
    )
    ids = lm.encode("12 tokens and")
    row = decode(lm.model, lm.params, Prompts.of([ids]), max_new_tokens=4).rows()[0]
    for _ in range(4):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(lm.logits(padded)[0, len(ids) - 1].argmax()))
    assert ids[-4:] == row[:4]


@pytest.mark.parametrize("mixer", ["wavelet", "filters", "none"])
def test_the_config_of_the_mixers_takes_each(mixer):
    found = resolve(TrainConfig, load(f"configs/wavelet_gpt.py:mixer={mixer}"))
    kinds = {"wavelet": Wavelet, "filters": FilterBank, "none": type(None)}
    assert type(found.model.mixer) is kinds[mixer]


def test_patches_are_mixed_with_earlier_patches_only():
    model = Transformer(config_with(Wavelet(8)))
    params, tokens = random_params(model), some_tokens()
    whole = np.ones(tokens.shape, np.float32)

    @jax.jit
    def states(tokens):
        return model.backbone(params, patch_embeddings(model.embed(params, tokens), whole, 4)).x

    changed = tokens.copy()
    changed[:, 12:] = (changed[:, 12:] + 9) % 61
    one, two = states(tokens), states(changed)
    np.testing.assert_array_equal(one[:, :3], two[:, :3])
    assert (one[:, 3:] != two[:, 3:]).any()


def test_a_mixer_is_part_of_the_identity_of_a_model():
    plain = config_with(None)
    ones = [dataclasses.replace(plain, mixer=m) for m in (Wavelet(8), Wavelet(16), FilterBank(8))]
    assert len({plain, *ones}) == 4
