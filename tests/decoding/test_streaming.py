import threading

import jax
import numpy as np
import pytest

from tokjax.decoding import ModelPredictor, Prompts, categorical, chain, decode, on_tokens
from tokjax.decoding.engine import _run
from tokjax.decoding.streaming import _RECEIVERS, Streamed
from tokjax.models import ModelConfig, Transformer, parameters
from tokjax.parallel.mesh import MeshConfig, build_mesh
from tokjax.parallel.rules import parameter_shardings

MODEL = Transformer(ModelConfig(vocab_size=64, d_model=32, n_layers=1, n_heads=4, max_positions=64))
PROMPTS = Prompts.of([[1, 2, 3], [7]])
SETTINGS = {
    "max_new_tokens": np.array([12, 7]),
    "samples": 2,
    "sampler": categorical(),
    "seeds": range(4),
    "stop": on_tokens([9, 11, 13]),
}


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(1))


def test_steps_are_the_generation(params):
    steps: list[Streamed] = []
    found = decode(MODEL, params, PROMPTS, **SETTINGS, stream=steps.append)
    plain = decode(MODEL, params, PROMPTS, **SETTINGS)
    jax.tree.map(np.testing.assert_array_equal, found, plain)
    assert [s.step for s in steps] == list(range(int(found.lengths.max())))
    rows = [[int(s.tokens[b]) for s in steps if s.written[b]] for b in range(4)]
    assert rows == found.rows()
    for b, n in enumerate(np.asarray(found.lengths)):
        assert [bool(s.done[b]) for s in steps] == [i >= n - 1 for i in range(len(steps))]


def test_another_callback_compiles_nothing_and_none_is_kept(params):
    decode(MODEL, params, PROMPTS, **SETTINGS, stream=lambda step: None)
    before = _run._cache_size()
    counts = []
    decode(MODEL, params, PROMPTS, **SETTINGS, stream=lambda step: counts.append(step.step))
    assert _run._cache_size() == before and counts
    assert not _RECEIVERS


def test_without_a_callback_the_program_has_none(params):
    def text(number):
        keys, limits = jax.vmap(jax.random.key)(np.arange(2)), np.array([4, 4], np.int32)
        parts = (chain(), categorical(), on_tokens([9]), keys, limits, {}, number)
        return _run.lower(ModelPredictor(MODEL), 16, 1, params, PROMPTS, *parts).as_text()

    assert "callback" not in text(None)
    assert "callback" in text(np.int32(0))


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_what_the_callback_raises_ends_the_decode_and_is_raised(params, error):
    seen = []

    def stream(step):
        seen.append(step.step)
        if step.step == 2:
            raise error

    with pytest.raises(type(error)):
        decode(MODEL, params, PROMPTS, **SETTINGS, stream=stream)
    assert seen == [0, 1, 2]
    assert not _RECEIVERS
    # And the next decode is whole again.
    steps = []
    found = decode(MODEL, params, PROMPTS, **SETTINGS, stream=steps.append)
    assert len(steps) == int(found.lengths.max()) > 3


def test_decodes_side_by_side_do_not_mix(params):
    expected = [decode(MODEL, params, Prompts.of([[i]]), max_new_tokens=8).rows() for i in (1, 5)]
    steps = [[], []]

    def run(i, token):
        decode(MODEL, params, Prompts.of([[token]]), max_new_tokens=8, stream=steps[i].append)

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate((1, 5))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[[int(s.tokens[0]) for s in own]] for own in steps] == expected


def test_parameters_on_a_mesh_stream_too(params):
    mesh = build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    steps = []
    with jax.set_mesh(mesh):
        axes = parameters.logical_axes(MODEL.config)
        spread = jax.device_put(params, parameter_shardings(axes, MODEL.abstract_params(), mesh))
        found = decode(MODEL, spread, PROMPTS, max_new_tokens=6, stream=steps.append)
    assert found.rows() == decode(MODEL, params, PROMPTS, max_new_tokens=6).rows()
    assert [s.step for s in steps] == list(range(6))
