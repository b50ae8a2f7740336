"""The loss of a run by frequency."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.analysis.fair_lm_paradox import (
    by_frequency,
    decay_exposure,
    loss_by_type,
    training_counts,
)
from tokjax.config import resolve
from tokjax.errors import ConfigError
from tokjax.signals.type_learning import fairness
from tokjax.signals.type_statistics import frequency_bins
from tokjax.training.config import TrainConfig
from tokjax.training.evaluation import evaluate
from tokjax.training.loop import train
from tokjax.training.optimizers import Constant, Cosine
from tokjax.training.run import build_run
from tokjax.training.trained import load_trained


@pytest.fixture(scope="module")
def run_and_workdir(tiny_corpus, tmp_path_factory):
    source = lambda name: {  # noqa: E731
        "name": "text",
        "files": [str(tiny_corpus / f"{name}.txt")],
        "per": "line",
    }
    tree = {
        "model": {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_positions": 64},
        "data": {
            "tokenizer": {"name": "bytes"},
            "train": [{"source": source("train")}],
            "evals": {"validation": source("validation")},
            "seq_len": 64,
            "batch_size": 4,
            "cache_dir": str(tiny_corpus / "cache"),
        },
        "objective": {"name": "class_balanced"},
        "steps": 4,
        "evaluation": {"every_steps": 4, "max_batches": 1},
        "checkpoints": {"every_steps": 4},
    }
    run = build_run(resolve(TrainConfig, tree), devices=jax.devices()[:1], show_progress=False)
    workdir = tmp_path_factory.mktemp("fair") / "run"
    assert train(run, workdir).finished
    return run, workdir


def test_the_losses_of_types_add_up_to_that_of_an_ordinary_evaluation(run_and_workdir):
    run, workdir = run_and_workdir
    params = load_trained(workdir).params
    loader = run.eval_loaders["validation"]
    batches = [loader.batch(i) for i in range(len(loader))]
    stats = loss_by_type(run.model, params, batches)
    total = (np.asarray(stats.count, np.float64) * np.asarray(stats.mean, np.float64)).sum()
    ordinary = evaluate(run, params, None)["eval/validation/loss"]
    targets = sum(int((b.weights != 0).sum()) for b in batches)
    assert int(stats.count.sum()) == targets
    np.testing.assert_allclose(total / targets, ordinary, rtol=1e-5)
    counts = training_counts(run.stores, run.model.config.vocabulary)
    for num, by in ((5, "types"), (3, "mass")):
        bins = np.where(counts > 0, frequency_bins(counts, num, by), 0)  # every type in one
        found = fairness(stats, bins, num).bins
        binned = (np.asarray(found.micro, float) * np.asarray(found.count, float)).sum()
        np.testing.assert_allclose(binned, total, rtol=1e-5)


def test_a_run_is_read_back_by_frequency(run_and_workdir):
    run, workdir = run_and_workdir
    found = by_frequency(workdir, num=3, max_batches=2)
    assert list(found) == ["validation", "train"]
    for each in found.values():
        assert each.counts.sum() == sum(s.unigram_counts.sum() for s in run.stores)
        assert set(each.bins) == {-1, 0, 1, 2}
        assert each.averages.macro > each.averages.micro  # frequent bytes are learned first
        lines = each.table.splitlines()
        assert len(lines) == 5 and lines[-1].startswith("by token")


def test_options_out_of_range_are_refused(run_and_workdir):
    with pytest.raises(ConfigError, match="by='mas'"):
        by_frequency(run_and_workdir[1], by="mas")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="num=0"):
        by_frequency(run_and_workdir[1], num=0)


def test_exposure_is_the_integral_of_the_rate():
    assert decay_exposure(1e-3, Constant(), 500, 2.0) == pytest.approx(1.0)
    half = decay_exposure(1e-3, Cosine(warmup_steps=0, final_factor=0.0), 500, 2.0)
    assert half == pytest.approx(0.5, rel=0.01)
    shrunk = jnp.prod(1 - 1e-3 * 2.0 * jnp.ones(500))
    assert float(shrunk) == pytest.approx(np.exp(-1.0), rel=2e-3)
