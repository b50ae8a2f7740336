import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.decoding import (
    Prompts,
    categorical,
    chain,
    greedy,
    min_p,
    on_tokens,
    repetition_penalty,
    temperature,
    top_k,
    top_p,
)
from tokjax.decoding.context import Context
from tokjax.decoding.stops import any_of
from tokjax.errors import ConfigError

PROMPTS = Prompts.of([[1, 2, 3], [4], [5, 5, 6], [0, 0, 7]])


def _context(last=(3, 4, 6, 7), step=0):
    generated = jnp.zeros((len(last), 4), jnp.int32)
    done = jnp.zeros(len(last), bool)
    return Context(jnp.int32(step), jnp.array(last), generated, done, PROMPTS)


def _apply(transform, logits):
    state = transform.init(PROMPTS, logits.shape[-1])
    return np.asarray(transform.update(jnp.asarray(logits), state, _context())[0])


@pytest.fixture(scope="module")
def logits():
    # Sharp and flat rows; the last has tokens that are excluded already.
    rows = np.random.default_rng(0).normal(size=(4, 500)).astype(np.float32)
    rows *= np.array([[0.3], [2.0], [6.0], [3.0]], np.float32)
    rows[3, 100:200] = -np.inf
    return rows


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("transformers.generation.logits_process")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p"])
def test_equal_to_the_processors_of_transformers(name, logits, theirs):
    import torch

    ours, processor, values = {
        "temperature": (temperature, theirs.TemperatureLogitsWarper, (0.1, 0.7, 1.0, 3.0)),
        "top_k": (top_k, theirs.TopKLogitsWarper, (1, 2, 37, 499, 500)),
        "top_p": (top_p, theirs.TopPLogitsWarper, (0.01, 0.3, 0.5, 0.9, 0.99, 0.9999)),
        "min_p": (min_p, theirs.MinPLogitsWarper, (0.001, 0.1, 0.5, 0.9)),
    }[name]
    for value in values:
        expected = processor(value)(None, torch.tensor(logits)).numpy()
        np.testing.assert_allclose(_apply(ours(value), logits), expected, rtol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("value", [0.8, 1.0, 1.3])
def test_repetition_penalty_equals_that_of_transformers(value, logits, theirs):
    import torch

    penalty = repetition_penalty(value)
    state = penalty.init(PROMPTS, logits.shape[-1])
    texts = [list(row[:n]) for row, n in zip(PROMPTS.tokens, PROMPTS.lengths, strict=True)]
    for step, last in enumerate([[3, 4, 6, 7], [8, 9, 10, 11], [8, 499, 0, 1]]):
        if step:
            for text, token in zip(texts, last, strict=True):
                text.append(token)
        found, state = penalty.update(jnp.asarray(logits), state, _context(last, step))
        for b, text in enumerate(texts):
            expected = theirs.RepetitionPenaltyLogitsProcessor(value)(
                torch.tensor([text]), torch.tensor(logits[b : b + 1])
            )
            np.testing.assert_allclose(found[b : b + 1], expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    "transform",
    [
        temperature(1),
        top_k(0),
        top_k(500),
        top_k(10**6),
        top_p(1.0),
        min_p(0),
        repetition_penalty(1),
        chain(),
    ],
)
def test_neutral_values_change_nothing(transform, logits):
    np.testing.assert_array_equal(_apply(transform, logits), logits)


def test_equally_likely_tokens_are_kept_together():
    rows = np.log(np.array([[0.1, 0.3, 0.3, 0.2, 0.1]] * 4, np.float32))
    kept = [True, True]
    for transform in (top_k(1), top_k(2), top_p(0.2), top_p(0.5)):
        assert np.isfinite(_apply(transform, rows))[0, 1:3].tolist() == kept
        assert np.isfinite(_apply(transform, rows))[0].sum() == 2
    assert np.isfinite(_apply(top_p(0.7), rows))[0].tolist() == [False, True, True, True, False]


def test_the_likeliest_token_survives_the_tightest_settings(logits):
    for transform in (top_k(1), top_p(1e-30), min_p(1), temperature(0)):
        changed = _apply(transform, logits)
        np.testing.assert_array_equal(np.isfinite(changed).sum(-1), 1)
        np.testing.assert_array_equal(changed.argmax(-1), logits.argmax(-1))


def test_temperature_zero_takes_the_first_of_equals_with_certainty():
    changed = jnp.asarray(_apply(temperature(0), np.array([[1.0, 4.0, 4.0]] * 4, np.float32)))
    keys = jax.vmap(jax.random.key)(jnp.arange(4))
    for sampler in (greedy(), categorical()):
        tokens, logprobs = sampler(keys, changed)
        assert tokens.tolist() == [1, 1, 1, 1]
        assert logprobs.tolist() == [0, 0, 0, 0]


def test_a_chain_applies_from_left_to_right(logits):
    # A high temperature flattens the distribution, so top-p keeps more behind it than before it.
    heat, cut = temperature(3.0), top_p(0.5)
    by_hand = _apply(cut, _apply(heat, logits))
    np.testing.assert_array_equal(_apply(chain(heat, cut), logits), by_hand)
    assert np.isfinite(_apply(chain(cut, heat), logits)).sum() < np.isfinite(by_hand).sum()


@pytest.mark.parametrize("sampled", [chain(), chain(temperature(0.5), top_p(0.9))])
def test_samples_follow_the_distribution(sampled):
    probabilities = np.array([0.3, 0.05, 0.25, 0.1, 0.2, 0.1])
    n = 20_000
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities, jnp.float32)), (n, 6))
    changed, _ = sampled.update(logits, sampled.init(PROMPTS, 6), _context())
    tokens, logprobs = categorical()(jax.vmap(jax.random.key)(jnp.arange(n)), changed)

    expected = probabilities
    if sampled.transforms:
        # By hand: squared and normalised; 0.09, 0.0625, 0.04 of 0.215 make 0.895, one 0.01 more
        # passes 0.9, and its equal is kept with it.
        expected = probabilities**2
        expected[1] = 0
        expected /= expected.sum()
    counts = np.bincount(tokens, minlength=6)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    wanted = n * expected[possible]
    chi_square = ((counts[possible] - wanted) ** 2 / wanted).sum()
    assert chi_square < 18.5  # one of a thousand right samplers would fail (4 degrees of freedom)
    np.testing.assert_allclose(logprobs, np.log(expected[np.asarray(tokens)]), atol=1e-5)


@pytest.mark.parametrize(
    ("build", "value"),
    [
        (temperature, -0.1),
        (temperature, float("nan")),
        (temperature, float("inf")),
        (top_k, -1),
        (top_k, 2.5),
        (top_p, 0),
        (top_p, 1.01),
        (top_p, [0.5, 2]),
        (min_p, -0.1),
        (min_p, 1.1),
        (repetition_penalty, 0),
        (temperature, [[1.0]]),
    ],
)
def test_impossible_values_are_refused(build, value):
    with pytest.raises(ConfigError, match=f"{build.__name__}="):
        build(value)


def test_transforms_can_be_built_inside_a_compiled_function(logits):
    found = jax.jit(lambda t: temperature(t).update(jnp.asarray(logits), (), _context())[0])(2.0)
    np.testing.assert_allclose(found, logits / 2)


def test_stops_combine():
    stop = any_of(on_tokens([3, 9]), on_tokens(range(6, 7)), on_tokens([]))
    assert stop(_context()).tolist() == [True, False, True, False]
    assert on_tokens(range(100))(_context((3, 4, 99, 100))).tolist() == [True, True, True, False]
    with pytest.raises(ConfigError, match="negative"):
        on_tokens([-1])
