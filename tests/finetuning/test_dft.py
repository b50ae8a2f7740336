import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.config import registered_name
from tokjax.data.batch import Batch
from tokjax.finetuning.dft import DFT
from tokjax.finetuning.one_token_rollout import OneTokenRollout
from tokjax.finetuning.sft import SFT
from tokjax.models import ModelConfig, Transformer

MODEL = Transformer(ModelConfig(vocab_size=24, d_model=16, n_layers=1, n_heads=2, max_positions=32))
OBJECTIVE = SFT(weigher=DFT())


@pytest.fixture(scope="module")
def params():
    # Larger than at the start, so that probabilities differ.
    return jax.tree.map(lambda a: 3 * a, MODEL.init(jax.random.key(0)))


def rows():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 24, (2, 2, 12)).astype(np.int32)
    segments = np.array([[1] * 7 + [2] * 5, [1] * 10 + [0] * 2], np.int32)
    places = np.array([[*range(7), *range(5)], [*range(10), 0, 0]], np.int32)
    weights = rng.choice([0.0, 0.5, 1.0, 2.0], (2, 12)) * (segments > 0)
    examples = np.array([[0, 1], [2, -1]], np.int32)
    return Batch(ids[0], ids[1], places, segments, weights.astype(np.float32), examples)


def graded(objective):
    def total(params, batch):
        loss = objective.loss(MODEL, params, (), batch, jax.random.key(0))
        return loss.total, loss

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def close(found, expected):
    """Every leaf, relative to its norm."""

    def near(a, b):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)

    jax.tree.map(near, jax.device_get(found), jax.device_get(expected))


def test_the_weights_are_probabilities_held_constant(params):
    batch = rows()

    def plain(params, batch):
        at = {"positions": batch.positions, "segments": batch.segment_ids}
        logp = jax.nn.log_softmax(MODEL(params, batch.tokens, **at)[0])
        logp = jnp.take_along_axis(logp, batch.targets[..., None], 2)[..., 0]
        held = jax.lax.stop_gradient(jnp.exp(logp))
        return -(batch.weights * held * logp).sum(), held

    (total, loss), gradient = graded(OBJECTIVE)(params, batch)
    (expected, held), other = jax.jit(jax.value_and_grad(plain, has_aux=True))(params, batch)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    close(gradient, other)
    probability, size = loss.metrics["probability"]
    np.testing.assert_allclose(probability, (held * batch.weights).sum(), rtol=1e-5)
    assert loss.weight == size == batch.weights.sum()


def test_its_gradient_is_that_of_one_draw_that_pays_only_for_the_target(params):
    batch = rows()
    exact = OneTokenRollout(mode="exact", kappa=1.0, beta=-0.25, norm="token")
    (_, ours), gradient = graded(OBJECTIVE)(params, batch)
    (_, theirs), other = graded(exact)(params, batch)
    assert ours.weight == theirs.weight
    close(jax.tree.map(lambda g: 1.25 * g, gradient), other)
    np.testing.assert_allclose(
        ours.metrics["probability"][0], theirs.metrics["hit_rate"][0], rtol=1e-5
    )


def test_a_batch_without_weights_adds_nothing(params):
    batch = rows().replace(weights=np.zeros((2, 12), np.float32))
    loss = OBJECTIVE.loss(MODEL, params, (), batch, jax.random.key(0))
    assert loss.total == 0 and loss.weight == 0
    assert loss.metrics["probability"][0] == 0


def test_the_weigher_is_found_by_name():
    assert registered_name(DFT) == "dft"
