"""Parameters of an objective's own: trained, kept, averaged and given back like the model's."""

import shutil
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.config import register, resolve
from tokjax.errors import ConfigError
from tokjax.models.scalar_head import init_scalar_head, scalar_head
from tokjax.training.config import TrainConfig
from tokjax.training.loop import train
from tokjax.training.objective import Loss, PerToken, WithoutState
from tokjax.training.passes import forward
from tokjax.training.run import build_run
from tokjax.training.trained import load_trained


@register("objective", "test_parity")
@dataclass(frozen=True)
class Parity(PerToken, WithoutState):
    """Reads from each hidden state whether its token's id is odd."""

    def init_heads(self, key, model):
        return {"parity": init_scalar_head(key, model.config.d_model)}

    def loss(self, model, params, aux, batch, key):
        read = scalar_head(params["heads"]["parity"], forward(model, params, batch).x)[..., 0]
        counted = (batch.segment_ids > 0).astype(jnp.float32)
        error = counted * jnp.square(read - batch.tokens % 2)
        return Loss(error.sum(), counted.sum())


def run_of(tree):
    return build_run(resolve(TrainConfig, tree), devices=jax.devices()[:1], show_progress=False)


def parity_tree(tiny_tree, **changes):
    return tiny_tree(**{"objective": {"name": "test_parity"}, "steps": 12, **changes})


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor", "muon"])
def test_a_head_is_trained_beside_the_model(tiny_tree, tmp_path, optimizer):
    run = run_of(parity_tree(tiny_tree, optimizer={"name": optimizer, "peak_lr": 0.01}))
    before = jax.jit(lambda: run.init_state(run.stages[0]))()
    after = train(run, tmp_path / "w").state
    head, body = before.params["heads"]["parity"], before.params["norm"]
    assert head["weight"].shape == (run.model.config.d_model, 1)
    assert not np.array_equal(head["weight"], after.params["heads"]["parity"]["weight"])
    assert not np.array_equal(head["bias"], after.params["heads"]["parity"]["bias"])
    assert not np.array_equal(body, after.params["norm"])


def test_it_resumes_and_is_given_back_bit_for_bit(tiny_tree, tmp_path):
    tree = parity_tree(tiny_tree, ema_decay=0.9, checkpoints__every_steps=6)
    whole = train(run_of(tree), tmp_path / "whole").state
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/checkpoints/step-00000012")
    parts = train(run_of(tree), tmp_path / "parts").state
    assert_equal(whole.params, parts.params)
    found = load_trained(tmp_path / "whole")
    assert_equal(found.heads, whole.ema["heads"])
    assert "heads" not in found.params
    assert_equal(found.params, {k: v for k, v in whole.ema.items() if k != "heads"})


def test_each_stage_has_heads_of_its_own(tiny_tree, tmp_path):
    stages = [
        {"objective": {"name": name}, "share": 1 / 3}
        for name in ("test_parity", "next_token", "test_parity")
    ]
    tree = tiny_tree(steps=12, stages=stages, ema_decay=0.5, checkpoints__every_steps=4)
    run = run_of(tree)
    result = train(run, tmp_path / "w")
    assert result.finished
    assert "heads" in result.state.params
    between = run.abstract_state(run.stages[1])
    assert "heads" not in between.params
    assert "heads" not in between.ema
    # The same from the checkpoint at the border of the last two stages.
    shutil.rmtree(tmp_path / "w/checkpoints/step-00000012")
    assert_equal(train(run_of(tree), tmp_path / "w").state.params, result.state.params)


def test_moments_are_not_kept_over_a_change_of_heads(tiny_tree):
    stages = [
        {"objective": {"name": "next_token"}, "share": 0.5},
        {"objective": {"name": "test_parity"}, "share": 0.5, "keep_optimizer": True},
    ]
    with pytest.raises(ConfigError, match="cannot keep the optimiser's moments of 'next_token'"):
        run_of(tiny_tree(steps=12, stages=stages))


def test_adapters_and_head_are_trained_alone(tiny_tree, tmp_path):
    train(run_of(tiny_tree(steps=4)), tmp_path / "base")
    tree = parity_tree(tiny_tree, init_from=str(tmp_path / "base"))
    del tree["model"]
    tree["model"] = {"lora": {"rank": 2}}
    run = run_of(tree)
    state = train(run, tmp_path / "w").state
    assert set(state.params) == {"layers", "heads"}
    assert_equal(state.frozen["norm"], load_trained(tmp_path / "base").params["norm"])
    found = load_trained(tmp_path / "w")
    assert_equal(found.heads, state.params["heads"])


def test_a_mesh_gives_the_same_head(tiny_tree, tmp_path):
    tree = parity_tree(tiny_tree, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    config = resolve(TrainConfig, tree)
    sharded = train(build_run(config, show_progress=False), tmp_path / "sharded").state
    single = train(run_of(parity_tree(tiny_tree)), tmp_path / "single").state
    np.testing.assert_allclose(
        sharded.params["heads"]["parity"]["weight"],
        single.params["heads"]["parity"]["weight"],
        rtol=1e-4,
        atol=1e-5,
    )
