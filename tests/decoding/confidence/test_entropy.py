import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.decoding import Context, Prompts, categorical, chain, decode, temperature
from tokjax.decoding.confidence import (
    renormalised_entropy,
    sequence_entropy,
    top_entropy,
)
from tokjax.errors import ConfigError
from tokjax.models import ModelConfig, Transformer

TOP = jnp.log(jnp.array([0.6, 0.2, 0.1, 0.05]))


def of_logits(logits, k=20, **options):
    nothing = jnp.zeros((len(logits), 1), jnp.int32)
    prompts = Prompts(nothing, nothing[:, 0] + 1)
    rows = jnp.zeros(len(logits), bool)
    context = Context(jnp.int32(0), nothing[:, 0], nothing, rows, prompts, logits=logits)
    return top_entropy(k, **options)(context)


def test_entropies_are_the_papers():
    np.testing.assert_allclose(renormalised_entropy(TOP), 1.01021, atol=5e-6)
    np.testing.assert_allclose(renormalised_entropy(TOP) / np.log(2), 1.45742, atol=5e-6)
    np.testing.assert_allclose(renormalised_entropy(TOP, renormalise=False), 1.00843, atol=5e-6)


def test_the_most_is_the_logarithm_of_k_and_the_least_is_0():
    np.testing.assert_allclose(renormalised_entropy(jnp.zeros(20)), 2.99573, atol=5e-6)
    np.testing.assert_allclose(renormalised_entropy(jnp.zeros(20)) / np.log(2), 4.32193, atol=5e-6)
    uniform = of_logits(jnp.zeros((2, 1000)))
    np.testing.assert_allclose(uniform, 2.99573, atol=5e-6)
    sure = jnp.full(20, -jnp.inf).at[3].set(0.0)
    for renormalise in (True, False):
        assert renormalised_entropy(sure, renormalise=renormalise) == 0
    assert of_logits(jnp.full((1, 30), -jnp.inf).at[0, 3].set(7.0)) == 0


def test_the_recorder_takes_the_k_likeliest_of_the_vocabulary():
    rest = jnp.log(jnp.full(5, 0.01))
    logits = jnp.concatenate([rest, TOP])[None]
    np.testing.assert_allclose(of_logits(logits, 4), 1.01021, atol=5e-6)
    np.testing.assert_allclose(of_logits(logits, 4, renormalise=False), 1.00843, atol=5e-6)
    p = np.exp(np.asarray(logits[0]))
    for k in (9, 20):  # above the vocabulary: all of it
        np.testing.assert_allclose(of_logits(logits, k), -(p * np.log(p)).sum(), atol=1e-5)


def test_constants_and_order_change_nothing_but_temperature_does():
    logits = 3 * jax.random.normal(jax.random.key(0), (3, 50))
    found = of_logits(logits)
    np.testing.assert_allclose(of_logits(logits + 11), found, atol=1e-5)
    shuffled = logits[:, jax.random.permutation(jax.random.key(1), 50)]
    np.testing.assert_allclose(of_logits(shuffled), found, atol=1e-5)
    assert (jnp.abs(of_logits(logits / 0.5) - found) > 0.05).all()


def test_the_sampling_temperature_does_not_rescale_what_is_recorded():
    model = Transformer(ModelConfig(vocab_size=40, d_model=32, n_layers=1, n_heads=2))
    params = model.init(jax.random.key(1))
    params = {**params, "embedding": 50 * params["embedding"]}
    prompts = Prompts.of([[5, 9, 2], [7]])
    found = decode(
        model,
        params,
        prompts,
        max_new_tokens=[6, 3],
        transform=chain(temperature(0.3)),
        sampler=categorical(),
        seeds=[1, 2],
        record={"h": top_entropy(4)},
    )
    for b, (row, new) in enumerate(zip(([5, 9, 2], [7]), found.rows(), strict=True)):
        logits, _ = model(params, jnp.array([row + new]))
        top = jax.lax.top_k(logits[0, len(row) - 1 : -1], 4)[0]
        recorded = found.recorded["h"][b, : len(new)]
        np.testing.assert_allclose(recorded, renormalised_entropy(top), atol=1e-4)


def test_padding_and_empty_attempts():
    entropies = np.array([[1.0, 2.0, np.nan], [4.0, 9.0, 9.0], [1.0, 1.0, 1.0]])
    mask = np.array([[True, True, False], [True, False, False], [False, False, False]])
    assert sequence_entropy(entropies, mask).tolist() == [1.5, 4.0, np.inf]


def test_impossible_k_are_refused():
    for k in (0, -1, 2.5, True):
        with pytest.raises(ConfigError, match="must be a whole number"):
            top_entropy(k)
