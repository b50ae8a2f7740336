"""A run of reinforcement learning that takes seconds."""

import jax
import pytest

from tokjax.config import resolve
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
