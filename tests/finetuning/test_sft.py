import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tokjax.data.batch import Batch
from tokjax.errors import ConfigError
from tokjax.finetuning.rft import RFT, grouped_loss
from tokjax.finetuning.sft import SFT
from tokjax.models import ModelConfig, Transformer
from tokjax.pretraining.next_token import NextToken
from tokjax.training.optimizers import Constant
from tokjax.training.state import init_state
from tokjax.training.step import StepConfig, make_train_step

MODEL = Transformer(ModelConfig(vocab_size=24, d_model=16, n_layers=2, n_heads=2, max_positions=32))
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


def rows(seed=0, channels=True):
    """Four rows of up to three samples; weights are any real numbers, some 0."""
    rng = np.random.default_rng(seed)
    shape = (4, 20)
    segments, places = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    examples = np.full((4, 3), -1, np.int32)
    for b, lengths in enumerate([[7, 6, 5], [12, 8], [20], [3, 4, 13]]):
        at = 0
        for s, n in enumerate(lengths):
            segments[b, at : at + n], places[b, at : at + n] = s + 1, np.arange(n)
            examples[b, s] = 5 * b + s
            at += n
    weights = rng.choice([0.0, 0.5, 1.0, 2.0], shape) * (segments > 0) * (places > 1)
    return Batch(
        rng.integers(0, 24, shape).astype(np.int32),
        rng.integers(0, 24, shape).astype(np.int32),
        places,
        segments,
        weights.astype(np.float32),
        examples,
        {"reasoning": rng.integers(0, 2, shape).astype(np.float32)} if channels else {},
    )


def of(objective, params, batch):
    """The loss as a mean, and its gradient."""

    def mean(params):
        loss = objective.loss(MODEL, params, (), batch, KEY)
        return loss.total / loss.weight

    return jax.jit(jax.value_and_grad(mean))(params)


def per_sample(params, batch, value):
    """value(nll, weights, reasoning) of each sample, from one pass over the batch."""
    logits, _ = MODEL(params, batch.tokens, positions=batch.positions, segments=batch.segment_ids)
    logp = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(logp, batch.targets[..., None], 2)[..., 0]
    found = []
    for b, s in zip(*np.nonzero(batch.example_id >= 0), strict=True):
        own = np.flatnonzero((batch.segment_ids[b] == s + 1) & (batch.weights[b] != 0))
        if own.size:
            reasoning = batch.channels["reasoning"][b, own] != 0
            found.append(value(nll[b, own], batch.weights[b, own], reasoning))
    return found


def test_plain_sft_is_next_token_prediction_of_the_data(params):
    batch = rows()
    (a, ga), (b, gb) = of(SFT(), params, batch), of(NextToken(), params, batch)
    assert a == b
    jax.tree.map(np.testing.assert_array_equal, ga, gb)


def test_the_norms_differ_only_in_what_is_divided_by(params):
    batch = rows()
    means = per_sample(params, batch, lambda nll, w, r: (nll * w).sum() / w.sum())
    found, _ = of(SFT(norm="sequence"), params, batch)
    np.testing.assert_allclose(found, np.mean(means), rtol=1e-5)
    total = sum(per_sample(params, batch, lambda nll, w, r: (nll * w).sum()))
    for norm in ("token", "kept"):
        found, _ = of(SFT(norm=norm), params, batch)
        np.testing.assert_allclose(found, total / batch.weights.sum(), rtol=1e-5)


@pytest.mark.parametrize("norm", ["token", "kept", "sequence"])
def test_micro_batches_equal_the_large_batch(params, norm):
    batch, optimizer = rows(), optax.sgd(1.0)
    states = []
    for k in (1, 2, 4):
        state = init_state(MODEL, SFT(norm=norm), optimizer, 0, False)
        config = StepConfig(0.5, Constant(), 0, 10, micro_batches=k)
        step = jax.jit(make_train_step(MODEL, SFT(norm=norm), optimizer, config))
        states.append(step(state, batch)[0].params)
    for other in states[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), states[0], other)


# ---- RFT

NLL = jnp.array([0.2, 0.1, 1.5, 0.3, 1.3])
REASONING = jnp.array([False, False, True, False, True])


@pytest.mark.parametrize(("tau", "expected"), [(1.0, 1.122230), (2.5, 0.941297), (5.0, 0.871656)])
def test_rft_numbers(tau, expected):
    np.testing.assert_allclose(grouped_loss(NLL, REASONING, tau), expected, atol=1e-6)
    weight = (expected - 0.2) / 1.2  # w_r, for L_b = .2 and L_r = 1.4
    known = {1.0: 0.768525, 2.5: 0.617748, 5.0: 0.559714}[tau]
    np.testing.assert_allclose(weight, known, atol=2e-6)


def test_rft_lies_between_the_mean_of_groups_and_the_harder_group():
    np.testing.assert_allclose(grouped_loss(NLL, REASONING, 1e6), 0.8, rtol=1e-5)
    np.testing.assert_allclose(grouped_loss(NLL, REASONING, 1e-3), 1.4, rtol=1e-5)


def test_a_group_alone_weighs_one():
    none = jnp.zeros(5, bool)
    for mask in (none, ~none):
        np.testing.assert_allclose(grouped_loss(NLL, mask, 2.5), NLL.mean(), rtol=1e-6)


def test_a_constant_added_to_both_groups_moves_no_weight():
    shifted = grouped_loss(NLL + 3, REASONING, 2.5) - 3
    np.testing.assert_allclose(shifted, grouped_loss(NLL, REASONING, 2.5), rtol=1e-5)


def test_the_gradient_is_that_of_frozen_weights():
    gradient = jax.grad(grouped_loss)(NLL, REASONING, 2.5)
    w = 0.617748
    expected = np.where(REASONING, w / 2, (1 - w) / 3)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize("tau", [2.5, 0.5])
def test_packed_rft_equals_samples_one_by_one(params, tau):
    batch = rows()
    batch = batch.replace(weights=(batch.weights != 0).astype(np.float32))
    objective = SFT(weigher=RFT(tau=tau), norm="sequence")
    expected = np.mean(per_sample(params, batch, lambda nll, w, r: grouped_loss(nll, r, tau)))
    np.testing.assert_allclose(of(objective, params, batch)[0], expected, rtol=1e-5)


def test_without_reasoning_rft_is_sft_by_samples(params):
    batch = rows()
    batch = batch.replace(channels={"reasoning": np.zeros((4, 20), np.float32)})
    (a, ga) = of(SFT(weigher=RFT(), norm="sequence"), params, batch)
    (b, gb) = of(SFT(norm="sequence"), params, batch)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), ga, gb)


def test_pooled_weights_are_those_of_the_whole_batch(params):
    batch = rows()
    objective = SFT(weigher=RFT(per="batch"), norm="token")
    found = objective.loss(MODEL, params, (), batch, KEY).metrics["reasoning_weight"]
    alone = per_sample(params, batch, lambda nll, w, r: (nll, w, r))
    nll, w, r = (np.concatenate([np.asarray(each[i]) for each in alone]) for i in range(3))
    easy, hard = (np.average(nll[m], weights=w[m]) for m in (~r, r))
    expected = 1 / (1 + np.exp((easy - hard) / 2.5))
    np.testing.assert_allclose(found[0] / found[1], expected, rtol=1e-5)
    loss, _ = of(objective, params, batch)
    np.testing.assert_allclose(loss, (1 - expected) * easy + expected * hard, rtol=1e-5)


def test_a_missing_channel_is_named_with_the_command_that_makes_it(params):
    with pytest.raises(ConfigError, match=r"channel 'reasoning'.*--method=shad"):
        of(SFT(weigher=RFT()), params, rows(channels=False))


def test_impossible_temperatures_are_refused():
    with pytest.raises(ConfigError, match="tau=0"):
        RFT(tau=0)
