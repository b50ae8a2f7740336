import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax import struct
from tokjax.decoding import Prompts, StepOutput, categorical, decode, temperature
from tokjax.decoding.contrast import with_reasoners
from tokjax.decoding.contrast.combine import log_probabilities
from tokjax.decoding.contrast.reasoners import guided_logits
from tokjax.errors import ConfigError
from tokjax.training.compiles import CompileWatch

BACKBONE, REASONER = jnp.array([2.0, 1.0, 0.0, -1.0]), jnp.array([0.0, 1.5, -0.5, 0.5])
NEW = 12


def test_guided_distributions_are_the_papers():
    softmax = jax.nn.softmax
    near = lambda a, b: np.testing.assert_allclose(a, b, atol=6e-6)  # noqa: E731
    near(softmax(BACKBONE), [0.64391, 0.23688, 0.08714, 0.03206])
    near(softmax(REASONER), [0.12925, 0.57926, 0.07839, 0.21310])
    guided = [0.35551, 0.58613, 0.02918, 0.02918]
    near(softmax(guided_logits(BACKBONE, [REASONER], [1.0])), guided)
    of_logprobs = guided_logits(log_probabilities(BACKBONE), [log_probabilities(REASONER)], [1.0])
    near(softmax(of_logprobs), guided)
    near(softmax(guided_logits(BACKBONE, [REASONER], [0.5])), [0.51331, 0.39977, 0.05410, 0.03282])
    near(
        softmax(guided_logits(BACKBONE, [REASONER], [1.0]) / 0.7),
        [0.32269, 0.65917, 0.00907, 0.00907],
    )


def test_gradients_are_those_of_the_guided_distribution():
    def logp(reasoner):
        return jax.nn.log_softmax(guided_logits(BACKBONE, [reasoner], [1.0]))[1]

    np.testing.assert_allclose(
        jax.grad(logp)(REASONER), [-0.35551, 0.41387, -0.02918, -0.02918], atol=6e-6
    )
    # That of the reasoner alone is another.
    np.testing.assert_allclose(
        jax.grad(lambda z: jax.nn.log_softmax(z)[1])(REASONER),
        [-0.12925, 0.42074, -0.07839, -0.21310],
        atol=6e-6,
    )


def test_the_optimal_policy_is_the_backbone_plus_the_reward():
    reward = jnp.array([1.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(
        jax.nn.softmax(guided_logits(BACKBONE, [reward], [1 / 0.5])),
        [0.93037, 0.04632, 0.01704, 0.00627],
        atol=6e-6,
    )


def test_composition_commutes_and_twice_a_half_is_one():
    third = jnp.array([0.3, -0.2, 0.9, 0.0])
    one, two = (
        guided_logits(BACKBONE, pair, weights)
        for pair, weights in (
            ([REASONER, third], [1.0, 0.7]),
            ([third, REASONER], [0.7, 1.0]),
        )
    )
    np.testing.assert_allclose(one, two, atol=1e-6)
    np.testing.assert_allclose(
        guided_logits(BACKBONE, [REASONER] * 2, [0.5, 0.5]),
        guided_logits(BACKBONE, [REASONER], [1.0]),
        atol=1e-6,
    )


def sample(given, rows):
    return decode(
        *given,
        Prompts.of(rows),
        max_new_tokens=NEW,
        transform=temperature(0.9),
        sampler=categorical(),
        seeds=[4, 3, 2, 1],
    )


def test_decoding_equals_recomputation_without_caches(lm, small, rows, check_recomputed):
    half = jax.tree.map(lambda a: a / 2, small.params)
    reasoners = [(small.model, small.params), (small.model, half)]
    weights = [0.6, -0.4]
    generation = decode(
        *with_reasoners((lm.model, lm.params), reasoners, weights=weights),
        Prompts.of(rows),
        max_new_tokens=NEW,
    )

    @jax.jit
    def last(params, padded, length):
        return small.model(params, padded)[0][0, length - 1]

    def scores(ids):
        padded = np.zeros((1, 48), np.int32)
        padded[0, : len(ids)] = ids
        third = np.asarray(last(half, padded, len(ids)))
        return lm.run(ids)[0][-1] + 0.6 * small.run(ids)[0][-1] - 0.4 * third

    for b, row in enumerate(rows):
        check_recomputed(generation, b, row, scores)


def test_weight_zero_samples_bitwise_as_the_backbone(small, rows):
    other = jax.tree.map(lambda a: 1.5 * a, small.params)
    plain = sample((small.model, other), rows)
    pair = (small.model, other), [(small.model, small.params)]
    zero = sample(with_reasoners(*pair, weights=[0.0]), rows)
    np.testing.assert_array_equal(zero.tokens, plain.tokens)
    np.testing.assert_array_equal(zero.logprobs, plain.logprobs)
    with CompileWatch() as watch:
        two = sample(with_reasoners(*pair, weights=[2]), rows)
        assert watch.count == 0
    assert two.rows()[0] != plain.rows()[0]


@struct.dataclass
class Constant:
    """A predictor that says the same of every token."""

    vocab_size: int = struct.field(pytree_node=False, default=61)
    max_positions: int = struct.field(pytree_node=False, default=96)

    def prepare(self, params):
        return params

    def init(self, prepared, prompts, capacity):
        return (), StepOutput(jnp.full((prompts.tokens.shape[0], 61), prepared))

    def step(self, prepared, state, tokens):
        return (), StepOutput(jnp.full((tokens.shape[0], 61), prepared))


def test_a_constant_reasoner_changes_no_token(small, rows, check_recomputed):
    constant = [(Constant(), jnp.float32(3.0))]
    given = with_reasoners((small.model, small.params), constant)
    generation = decode(*given, Prompts.of(rows), max_new_tokens=NEW)
    for b, row in enumerate(rows):
        check_recomputed(generation, b, row, lambda ids: small.logp(ids)[-1])


def test_what_cannot_be_meant_is_refused(lm, small, make):
    backbone = lm.model, lm.params
    with pytest.raises(ConfigError, match="2 weights for 1 reasoners"):
        with_reasoners(backbone, [(small.model, small.params)], weights=[1, 2])
    other = make(vocab_size=64, n_layers=1)
    with pytest.raises(ConfigError, match="backbone 61, reasoner 0 64"):
        with_reasoners(backbone, [(other.model, other.params)])
