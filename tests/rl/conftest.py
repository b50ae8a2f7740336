"""A run of reinforcement learning that takes seconds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.config import resolve
from tokjax.data.batch import Batch
from tokjax.rl.rollout import Rollout
from tokjax.training.config import TrainConfig
from tokjax.training.run import build_run


@pytest.fixture
def rl_tree(tmp_path_factory):
    """A function giving a configuration tree, with changes as those of `tiny_tree`.

    Answers are three bytes at most; the reward is 1 where the first one is even.
    """

    def tree(**changes):
        base = {
            "title": "tiny",
            "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_positions": 32},
            "data": {
                "tokenizer": {"name": "bytes", "add_eos": True},
                "train": [{"source": {"name": "arithmetic", "examples": 40}}],
                "evals": {},
                "seq_len": 12,
                "batch_size": 8,
                "cache_dir": str(tmp_path_factory.getbasetemp() / "rl-cache"),
            },
            "objective": {
                "name": "policy",
                "rewards": [{"name": "function", "path": "rewards_for_tests:first_token"}],
                "rollouts": {"group": 4, "minibatches": 2, "max_new_tokens": 3},
            },
            "steps": 8,
            "optimizer": {"name": "adamw", "peak_lr": 1e-2},
            "schedule": {"name": "constant"},
            "evaluation": {"every_steps": 100},
            "checkpoints": {"every_steps": 2},
            "log_every": 1,
        }
        for key, value in changes.items():
            node = base
            *parents, last = key.split("__")
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        return base

    return tree


@pytest.fixture
def rl_run(rl_tree):
    """A function building the run of `rl_tree` with changes."""

    def run(devices=1, **changes):
        config = resolve(TrainConfig, rl_tree(**changes))
        return build_run(config, devices=jax.devices()[:devices], show_progress=False)

    return run


@pytest.fixture(scope="session")
def rollout_of():
    """A function making a rollout; answers begin at place 1 of their rows."""
    return _rollout_of


def _rollout_of(reward, lengths, group, **more):
    lengths = np.asarray(lengths)
    T = int(lengths.max()) + 2
    places = np.arange(T)
    mask = (places >= 1) & (places < 1 + lengths[:, None])
    zeros = jnp.zeros(mask.shape, jnp.int32)
    batch = Batch(
        zeros, zeros, zeros, zeros, jnp.asarray(mask, jnp.float32), jnp.arange(len(mask))[:, None]
    )
    zero = jnp.zeros(mask.shape)
    values = {"logprobs": zero, "entropies": zero, **more}
    return Rollout(
        batch=batch,
        reward=jnp.asarray(reward, jnp.float32),
        stopped=jnp.ones(len(mask), bool),
        progress=jnp.float32(0),
        group=group,
        **values,
    )
