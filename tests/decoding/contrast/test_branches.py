import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.decoding import ModelPredictor, Prompts
from tokjax.decoding.contrast import Branches
from tokjax.errors import ConfigError
from tokjax.models import Edits, ModelConfig, Transformer, parameters

COUNT, STEPS = 3, 4
# The second branch skips the first layer, the third the last one.
GATES = np.ones((2, 1, COUNT), np.float32)
GATES[0, :, 1] = GATES[1, :, 2] = 0.0


@pytest.fixture(scope="module", params=["plain", "windowed", "learned"])
def model(request, lm, make):
    if request.param == "plain":
        return lm
    if request.param == "learned":
        return make(positions="learned", seed=8)
    return make(sliding_window=4, window_pattern=(True, False), seed=7)


def test_branches_equal_separate_passes_and_only_the_intact_key_stays(model, rows):
    branches, plain = Branches(model.model, COUNT), ModelPredictor(model.model)
    params = parameters.unstack(model.params)
    prompts = Prompts.of(rows)
    new = np.array([[4, 8, 15, 16], [23, 42, 1, 2], [3, 5, 8, 13], [7, 7, 0, 9]], np.int32)
    capacity = prompts.tokens.shape[1] + STEPS

    @jax.jit
    def together(cache, tokens):
        return branches.step(params, cache, tokens, Edits(layer_gate=jnp.asarray(GATES)))

    @jax.jit
    def apart(cache, tokens, gates):
        embedded = model.model.embed(params, tokens[:, None])
        edits = Edits(layer_gate=gates)
        out = model.model.backbone(params, embedded, cache=cache, edits=edits)
        return out.cache, model.model.unembed(params, out.x)[:, 0]

    before = Prompts(prompts.tokens, prompts.lengths - 1)
    ours, tokens = jax.jit(lambda: branches.prefill(params, prompts, capacity))()
    intact, _ = jax.jit(lambda: plain.prefill(params, before, capacity))()
    assert tokens.tolist() == [row[-1] for row in rows]
    for t in range(STEPS):
        ours, found = together(ours, tokens)
        # The intact cache alone is carried on; every pass begins from it.
        passes = [apart(intact, tokens, GATES[:, :, i : i + 1]) for i in range(COUNT)]
        intact = passes[0][0]
        expected = np.stack([logits for _, logits in passes])
        np.testing.assert_allclose(found, expected, atol=2e-4)
        assert np.abs(found[0] - found[1]).max() > 0.1
        tokens = new[:, t]
    assert ours.lengths.tolist() == intact.lengths.tolist()
    for layer, window in enumerate(model.model.config.windows):
        if window is None:  # a ring's slots are elsewhere
            for b, n in enumerate(ours.lengths):
                np.testing.assert_allclose(
                    ours.keys[layer][b, :, :n], intact.keys[layer][b, :, :n], atol=1e-5
                )


def test_models_whose_steps_depend_on_the_place_in_a_pass_are_refused():
    model = Transformer(ModelConfig(61, d_model=32, positions="relative"))
    with pytest.raises(ConfigError, match="cannot run a model with relative positions"):
        Branches(model, 2)
