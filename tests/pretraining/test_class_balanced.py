"""Weights by how rare a type is."""

import jax
import numpy as np
import pytest
from mixers_for_tests import V, config_with, random_params, some_tokens

from tokjax.data.batch import Batch
from tokjax.errors import ConfigError
from tokjax.models import Transformer
from tokjax.pretraining.class_balanced import ClassBalanced, balanced_weights
from tokjax.pretraining.next_token import NextToken

COUNTS = np.arange(V) ** 2


@pytest.fixture
def counts_file(tmp_path):
    np.save(tmp_path / "counts.npy", COUNTS)
    return str(tmp_path / "counts.npy")


def batch():
    tokens = some_tokens()
    ones = np.ones_like(tokens)
    targets = np.roll(tokens, -1, axis=1)
    weights = ones.astype(np.float32)
    return Batch(tokens, targets, np.cumsum(ones, 1) - 1, ones, weights, ones[:, :1])


def test_power_zero_is_the_next_token_loss_and_one_weighs_types(counts_file):
    model = Transformer(config_with(None))
    params, rows = random_params(model), batch()

    @jax.jit
    def losses(params, rows):
        plain = NextToken().loss(model, params, (), rows, jax.random.key(0))
        nll = NextToken().predictions(model, params, rows, jax.random.key(0))
        logits = model.unembed(params, nll.x)
        found = []
        for power in (0.0, 1.0):
            objective = ClassBalanced(power=power, largest=1e9, counts=counts_file)
            aux = objective.init(jax.random.key(0), model, params)
            found.append(objective.loss(model, params, aux, rows, jax.random.key(0)))
        return plain, jax.nn.log_softmax(logits), *found

    plain, logprobs, tokens, types = losses(params, rows)
    np.testing.assert_allclose(tokens.total, plain.total, rtol=1e-6)
    np.testing.assert_allclose(types.metrics["nll"][0], plain.total, rtol=1e-6)
    nll = -np.take_along_axis(np.asarray(logprobs), rows.targets[..., None], -1)[..., 0]
    weights = balanced_weights(COUNTS, 1.0, 1e9)
    np.testing.assert_allclose(types.total, (weights[rows.targets] * nll).sum(), rtol=1e-5)
    assert float(types.weight) == rows.weights.sum()


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_mean_weight_of_a_token_is_one(power):
    weights = balanced_weights(COUNTS, power, 20.0)
    assert (COUNTS * weights).sum() / COUNTS.sum() == pytest.approx(1.0)
    assert (np.diff(weights[1:]) <= 1e-12).all()
    if power == 1.0:
        assert weights.max() < 25.0  # bounded
        by_type = COUNTS * balanced_weights(COUNTS, power, 1e9)
        np.testing.assert_allclose(by_type[1:], by_type[1])


def test_counts_that_do_not_fit_are_refused(tmp_path, counts_file):
    with pytest.raises(ConfigError, match="no counts yet"):
        ClassBalanced().type_counts  # noqa: B018
    np.save(tmp_path / "odd.npy", np.ones((2, 2)))
    with pytest.raises(ConfigError, match="one integer"):
        ClassBalanced(counts=str(tmp_path / "odd.npy")).type_counts  # noqa: B018
    model = Transformer(config_with(None, vocab_size=9))
    with pytest.raises(ConfigError, match="the model has 9"):
        ClassBalanced(counts=counts_file).init(jax.random.key(0), model, {})
    with pytest.raises(ConfigError, match=r"largest=0\.5"):
        ClassBalanced(largest=0.5)
    with pytest.raises(ConfigError, match="no token was counted"):
        balanced_weights(np.zeros(3, int), 1.0, 10.0)
