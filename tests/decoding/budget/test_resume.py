"""Training with stored states, with given lengths, and from a checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.decoding.budget import LengthPredictor, remaining_lengths, train_predictor, training
from tokjax.errors import CheckpointError, ConfigError, DataError, StorageError
from tokjax.training import fitting

V, THINK, CLOSE = 48, 1, 2
IDS = {"think_start": THINK, "think_end": CLOSE}
LINEAR = LengthPredictor(32, V, "linear")
ENCODER = LengthPredictor(32, V, "encoder", width=16, n_layers=2, n_heads=2)
SETTINGS = {**IDS, "batch_size": 16, "peak_lr": 3e-2, "progress": False, "epochs": 3}


class Killed(Exception):
    pass


@pytest.fixture
def killed_after(monkeypatch):
    """Makes the n-th write of a checkpoint the last thing that happens."""
    write = fitting.write_state

    def arm(count):
        left = [count]

        def writing(*arguments):
            write(*arguments)
            left[0] -= 1
            if not left[0]:
                raise Killed

        monkeypatch.setattr(fitting, "write_state", writing)

    yield arm
    monkeypatch.setattr(fitting, "write_state", write)


def same(one, other):
    np.testing.assert_array_equal(one.losses, other.losses)
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


@pytest.mark.parametrize("predictor", [LINEAR, ENCODER], ids=lambda p: p.kind)
def test_stored_states_train_the_same_predictor(lm, traces, predictor):
    settings = {**SETTINGS, "peak_lr": 3e-3}
    one, stored = (
        train_predictor(
            lm.model, lm.params, predictor, traces[:40], **settings, store_states=stored
        )
        for stored in (False, True)
    )
    assert one.losses.shape == (9,)  # the last of each epoch's batches is not full
    np.testing.assert_allclose(stored.losses, one.losses, rtol=1e-4)
    assert abs(one.losses[-1] - one.losses[0]) > 0.01


@pytest.mark.parametrize("store_states", [False, True])
def test_a_killed_training_goes_on_with_the_same_numbers(
    lm, traces, tmp_path, monkeypatch, killed_after, store_states
):
    settings = {**SETTINGS, "store_states": store_states}

    def train(**more):
        rows = traces[:40]
        return train_predictor(lm.model, lm.params, LINEAR, rows, **settings, **more)

    whole = train()
    file = tmp_path / "predictor.training"
    killed_after(2)
    with pytest.raises(Killed):
        train(checkpoint=file, checkpoint_steps=2)  # 4 of 9 steps are behind it
    monkeypatch.undo()
    steps = []
    name = "_update_stored" if store_states else "_update"
    update = getattr(training, name)
    monkeypatch.setattr(training, name, lambda *a: steps.append(1) or update(*a))
    same(train(checkpoint=file, checkpoint_steps=2), whole)
    assert len(steps) == 5
    same(train(checkpoint=file, checkpoint_steps=2), whole)  # what is finished is only read
    assert len(steps) == 5


def test_a_checkpoint_of_another_training_is_refused_and_untouched(lm, traces, tmp_path):
    file = tmp_path / "predictor.training"

    def train(rows=traces[:32], predictor=LINEAR, params=lm.params, **changes):
        settings = {**SETTINGS, "checkpoint": file, **changes}
        return train_predictor(lm.model, params, predictor, rows, **settings)

    first = train()
    content = file.read_bytes()
    other = {**lm.params, "embedding": lm.params["embedding"] + 1}
    for changes, message in (
        ({"peak_lr": 1e-3}, "peak_lr=0.03, not 0.001"),
        ({"epochs": 4}, "epochs=3, not 4"),
        ({"seed": 1}, "seed=0, not 1"),
        ({"store_states": True}, "store_states=False, not True"),
        ({"rows": traces[1:33]}, "data="),
        ({"params": other}, "model="),
        ({"start": first.params}, "start=None"),
        ({"predictor": ENCODER}, "predictor="),
    ):
        with pytest.raises(ConfigError, match=message):
            train(**changes)
    assert file.read_bytes() == content
    same(train(), first)
    for damaged in (content[:-10], b""):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="remove it to begin anew"):
            train()
    with pytest.raises(StorageError):
        train(checkpoint=tmp_path / "no folder" / "file", epochs=1)
    with pytest.raises(ConfigError, match="checkpoint_steps=0"):
        train(checkpoint_steps=0)


def test_given_lengths_replace_those_counted(lm, traces):
    rows = traces[:32]
    counted = [remaining_lengths(row, **IDS) for row in rows]
    train = lambda lengths: train_predictor(  # noqa: E731
        lm.model, lm.params, LINEAR, rows, remaining=lengths, **SETTINGS
    )
    same(train(counted), train(None))
    tripled = train([3 * left for left in counted])
    assert (tripled.losses != train(None).losses).all()
    assert jnp.isfinite(tripled.params["alpha"]).all()
    with pytest.raises(DataError, match="each token of each row"):
        train([left[1:] for left in counted])
