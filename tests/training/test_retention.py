import math

import pytest

from tokjax.errors import ConfigError
from tokjax.training.manifest import Manifest
from tokjax.training.retention import CheckpointConfig, best_step, kept_steps


def history(*steps, **metrics):
    """Manifests of these steps, committed in the order given."""
    losses = metrics.get("loss", [None] * len(steps))
    return [
        Manifest(step, serial, "", {}, metrics={} if loss is None else {"loss": loss})
        for serial, (step, loss) in enumerate(zip(steps, losses, strict=True), 1)
    ]


def test_the_newest_are_kept():
    assert kept_steps(history(1, 2, 3, 4), CheckpointConfig(keep=2)) == {3, 4}
    assert kept_steps(history(1), CheckpointConfig(keep=2)) == {1}
    assert kept_steps([], CheckpointConfig()) == set()


def test_multiples_are_kept_for_ever():
    config = CheckpointConfig(keep=1, keep_every=10)
    assert kept_steps(history(5, 10, 15, 20, 25), config) == {10, 20, 25}


def test_after_a_rewind_newest_means_committed_last():
    assert kept_steps(history(10, 20, 30, 15, 16), CheckpointConfig(keep=2)) == {15, 16}


def test_the_best_is_kept_the_earliest_of_equals_and_never_a_nan():
    run = history(1, 2, 3, 4, 5, loss=[math.nan, 2.0, 2.0, None, 3.0])
    smallest = CheckpointConfig(keep=1, best_metric="loss")
    assert best_step(run, smallest) == 2
    assert kept_steps(run, smallest) == {2, 5}
    largest = CheckpointConfig(keep=1, best_metric="loss", best_mode="max")
    assert best_step(run, largest) == 5
    assert best_step(run, CheckpointConfig(best_metric="accuracy")) is None
    assert best_step(run, CheckpointConfig()) is None


@pytest.mark.parametrize("wrong", [{"keep": 0}, {"every_steps": 0}, {"keep_every": -1}])
def test_numbers_below_one_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        CheckpointConfig(**wrong)


def test_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match="'least'"):
        CheckpointConfig(best_mode="least")  # type: ignore[arg-type]
