"""Small runs of flow objectives, and the catalogues that these tests share."""

import json
import sys
from pathlib import Path

import jax
import pytest

from tokjax.config import resolve
from tokjax.training.config import TrainConfig
from tokjax.training.run import build_run

sys.path.insert(0, str(Path(__file__).parent))  # makes catalogues_for_tests importable

TITLES = {"aa": 6.0, "ab": 3.0, "c": 1.0, "a": 2.0}


@pytest.fixture(scope="session")
def flow_files(tmp_path_factory):
    """A folder with catalogue.jsonl, interactions.jsonl and preferences.jsonl."""
    folder = tmp_path_factory.mktemp("flows")

    def write(name, records):
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in records))

    write("catalogue.jsonl", [{"title": t, "weight": w} for t, w in TITLES.items()])
    users = ["1:", "2:", "3:", "4:"]
    titles = [t for t, w in TITLES.items() for _ in range(int(w))]
    write(
        "interactions.jsonl",
        [{"prompt": users[i % 4], "response": title} for i, title in enumerate(titles)],
    )
    write("preferences.jsonl", [{"prompt": u, "scores": [0.5, 0.3, 0.15, 0.05]} for u in users])
    return folder


@pytest.fixture
def flow_run(flow_files, tmp_path_factory):
    """A function building a run over the four titles, with changes as those of `tiny_tree`."""

    def run(devices=1, **changes):
        source = {
            "name": "jsonl",
            "files": [str(flow_files / "interactions.jsonl")],
            "kind": "response",
        }
        base = {
            "title": "tiny",
            "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_positions": 32},
            "data": {
                "tokenizer": {"name": "bytes", "add_eos": True},
                "train": [{"source": source}],
                "evals": {},
                "seq_len": 8,
                "batch_size": 8,
                "cache_dir": str(tmp_path_factory.getbasetemp() / "flow-cache"),
            },
            "objective": {
                "name": "flower",
                "catalogue": str(flow_files / "catalogue.jsonl"),
                "theta": 0.0,
                "rollouts": {"group": 1, "minibatches": 2, "max_new_tokens": 3},
            },
            "steps": 4,
            "optimizer": {"name": "adamw", "peak_lr": 1e-2, "weight_decay": 0.0},
            "schedule": {"name": "constant"},
            "evaluation": {"every_steps": 1000},
            "checkpoints": {"every_steps": 1000},
            "log_every": 1,
        }
        for key, value in changes.items():
            node = base
            *parents, last = key.split("__")
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        config = resolve(TrainConfig, base)
        return build_run(config, devices=jax.devices()[:devices], show_progress=False)

    return run
