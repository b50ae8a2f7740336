"""Numbers of the usual ways to combine several distributions, by what they are here."""

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.decoding import Context, Prompts, repetition_penalty
from tokjax.decoding.contrast.combine import contrast
from tokjax.decoding.contrast.reasoners import guided_logits


def near(logits, expected):
    np.testing.assert_allclose(jax.nn.softmax(logits), expected, atol=6e-5)


def logp(*probabilities):
    return jnp.log(jnp.array(probabilities))


def test_guidance_moves_away_from_the_unconditional_distribution():
    conditional, unconditional = logp(0.6, 0.3, 0.1), logp(0.4, 0.4, 0.2)
    near(contrast(conditional, unconditional, 1.5 - 1), [0.6898, 0.2439, 0.0664])


def test_experts_are_added_and_anti_experts_taken_off():
    base, expert, anti = logp(0.5, 0.3, 0.2), logp(0.6, 0.3, 0.1), logp(0.2, 0.5, 0.3)
    near(guided_logits(base, [expert, anti], [1.0, -1.0]), [0.8588, 0.1031, 0.0382])


def test_an_attributes_probability_multiplies():
    near(guided_logits(logp(0.5, 0.3, 0.2), [logp(0.1, 0.6, 0.5)], [1.0]), [0.1515, 0.5455, 0.3030])


def test_a_small_models_tuning_is_added_to_a_large_one():
    large, tuned, small = jnp.array([[1.0, 0, 0], [0, 1, 0], [0.5, 0, 0]])
    near(guided_logits(large, [tuned, small], [1.0, -1.0]), [0.3072, 0.5065, 0.1863])


def test_used_tokens_are_penalised():
    transform, prompts = repetition_penalty(1.2), Prompts.of([[0, 1]])
    context = Context(jnp.int32(0), jnp.array([1]), jnp.zeros((1, 4), int), jnp.zeros(1), prompts)
    logits, _ = transform.update(jnp.array([[2.0, -1, 0.5]]), transform.init(prompts, 3), context)
    near(logits[0], [0.7308, 0.0416, 0.2276])
