"""What an evaluation by the run's own objective tells."""

import json
import math

import jax

from tokjax.config import resolve
from tokjax.training.config import TrainConfig
from tokjax.training.evaluation import evaluate
from tokjax.training.run import build_run


def rated(path, labels):
    records = [
        {"prompt": f"{n} and 1 is", "response": f" {n + 1}", "label": label}
        for n, label in enumerate(labels)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {"name": "jsonl", "files": (str(path),), "kind": "rated"}


def test_a_metric_of_answers_that_a_set_does_not_have_is_left_out(tmp_path):
    both = rated(tmp_path / "both.jsonl", [True, False, True])
    good = rated(tmp_path / "good.jsonl", [True, True])
    tree = {
        "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_positions": 32},
        "data": {
            "tokenizer": {"name": "bytes"},
            "train": [{"source": both}],
            "evals": {"both": both, "good": good},
            "seq_len": 32,
            "batch_size": 8,
            "cache_dir": str(tmp_path / "cache"),
        },
        "objective": {"name": "kto"},
        "steps": 1,
    }
    run = build_run(resolve(TrainConfig, tree))
    params = run.model.init(jax.random.key(0))
    objective = run.stages[-1].objective
    aux = objective.init(jax.random.key(1), run.model, params)
    found = evaluate(run, params, None, aux)
    told = {"loss", "kl", "good_reward"}
    assert set(found) == {
        *(f"eval/good/{name}" for name in told),
        *(f"eval/both/{name}" for name in {*told, "bad_reward"}),
    }
    assert all(math.isfinite(value) for value in found.values())
