import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.errors import ConfigError
from tokjax.models import ModelConfig, Transformer
from tokjax.steering import attribute_tokens, integrated_gradients
from tokjax.steering.integrated_gradients import answer_logprob, quadrature

V = 61
TOKENS = np.zeros((3, 32), np.int32)
TOKENS[0, :9] = [1, 5, 9, 2, 30, 31, 8, 8, 4]
TOKENS[1, :5] = [1, 7, 60, 3, 12]
TOKENS[2, :2] = [1, 6]
LENGTHS, STARTS = np.array([9, 5, 2], np.int32), np.array([6, 4, 1], np.int32)


def tiny(**changes):
    model = Transformer(
        ModelConfig(
            vocab_size=V, d_model=32, n_layers=2, n_heads=4, tie_embeddings=False, **changes
        )
    )
    params = model.init(jax.random.key(1))
    return model, {**params, "embedding": 50 * params["embedding"]}


@pytest.fixture(scope="module")
def lm():
    return tiny()


def attributed(model, params, **settings):
    run = jax.jit(lambda p: attribute_tokens(model, p, TOKENS, LENGTHS, STARTS, **settings))
    return run(params)


def error(found):
    return float(np.abs(found.scores.sum(-1) - found.change)[:2].max())


def product(x):
    return x[0] * x[1] + 2 * x[2]


def test_a_product_gives_the_cards_numbers():
    x = jnp.array([1.0, 2.0, -1.0])
    for rule in ("gauss", "midpoint"):
        found = integrated_gradients(product, x, rule=rule)
        np.testing.assert_allclose(found, [1, 1, -2], atol=1e-6)
        assert float(found.sum()) == pytest.approx(0, abs=1e-6)
    found = integrated_gradients(product, x, rule="right", steps=20)
    np.testing.assert_allclose(found, [1.05, 1.05, -2], atol=1e-6)


def test_of_a_linear_function_it_is_gradient_times_input():
    weights = jnp.array([[2.0, -1.0, 0.5], [1.0, 1.0, 3.0]])
    x = jnp.array([[3.0, 1.0, -4.0], [0.0, 2.0, 1.0]])
    for rule in ("gauss", "midpoint", "right"):
        # Several values at once, each of its own row.
        found = integrated_gradients(lambda x: (weights * x).sum(-1), x, rule=rule, steps=3)
        np.testing.assert_allclose(found, weights * x, rtol=1e-6)
    away = integrated_gradients(lambda x: (weights * x).sum(-1), x, jnp.ones_like(x))
    np.testing.assert_allclose(away, weights * (x - 1), rtol=1e-5)


def test_scores_add_up_to_the_change_from_a_pad_baseline(lm):
    found = {n: attributed(*lm, baseline_id=0, steps=n) for n in (2, 20)}
    assert error(found[2]) > 0.1
    assert error(found[20]) < 1e-4
    assert np.abs(found[20].change).max() > 0.5
    whole = attributed(*lm, baseline_id=0, target="response")
    assert error(whole) < 1e-4
    assert abs(whole.change[0] - found[20].change[0]) > 0.1
    # A response of one token is its last token.
    np.testing.assert_allclose(whole.scores[1:], found[20].scores[1:], atol=1e-5)


def test_learned_positions_let_the_integration_begin_at_zeros():
    model, params = tiny(positions="learned", norm="layer")
    params = {**params, "position_embedding": 50 * params["position_embedding"]}
    errors = [error(attributed(model, params, steps=n)) for n in (2, 20)]
    assert errors[1] < 1e-3 < errors[0]


def test_without_positions_at_zeros_more_steps_do_not_help(lm):
    # Of 20 steps and of 80: with a PAD baseline 20 leave less than 1e-4.
    assert min(error(attributed(*lm, steps=n)) for n in (20, 80)) > 0.1


def test_the_log_probability_is_read_one_position_before_its_token(lm):
    model, params = lm
    logp = jax.nn.log_softmax(model(params, TOKENS)[0])
    x = model.embed(params, TOKENS)

    def of(target):
        return answer_logprob(model, params, x, TOKENS, LENGTHS, STARTS, target)

    last = [logp[b, n - 2, TOKENS[b, n - 1]] for b, n in enumerate(LENGTHS)]
    np.testing.assert_allclose(of("last"), last, atol=1e-5)
    whole = [
        sum(logp[b, t - 1, TOKENS[b, t]] for t in range(start, n))
        for b, (start, n) in enumerate(zip(STARTS, LENGTHS, strict=True))
    ]
    np.testing.assert_allclose(of("response"), whole, atol=1e-5)


def test_rows_and_padding_do_not_matter(lm):
    model, params = lm
    found = attributed(model, params, baseline_id=0)
    # The last token is predicted, not read; nothing is said of padding.
    for scores, n in zip(found.scores, LENGTHS, strict=True):
        assert not scores[n - 1 :].any() and (scores[: n - 1] != 0).all()
    filled = np.where(np.arange(32) < LENGTHS[:, None], TOKENS, 44)[1:2]
    alone = attribute_tokens(model, params, filled, LENGTHS[1:2], STARTS[1:2], baseline_id=0)
    np.testing.assert_allclose(alone.scores[0], found.scores[1], atol=1e-5)


def test_a_right_end_of_one_step_is_gradient_times_input(lm):
    model, params = lm
    x = model.embed(params, TOKENS)
    slope = jax.grad(
        lambda x: answer_logprob(model, params, x, TOKENS, LENGTHS, STARTS).sum(),
    )(x)
    found = attributed(model, params, steps=1, rule="right")
    np.testing.assert_allclose(found.scores, (x * slope).sum(-1), atol=1e-5)


def test_impossible_rules_are_refused():
    with pytest.raises(ConfigError, match="steps=0"):
        quadrature(0)
    with pytest.raises(ConfigError, match="rule='left'"):
        quadrature(3, "left")
