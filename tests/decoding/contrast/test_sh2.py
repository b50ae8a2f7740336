import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.decoding import Prompts, decode
from tokjax.decoding.contrast import sh2
from tokjax.decoding.contrast.combine import contrast, log_probabilities
from tokjax.decoding.contrast.sh2 import (
    hesitation_prompt,
    key_counts,
    key_positions,
    multiple_choice,
    sh2_scores,
)
from tokjax.errors import ConfigError
from tokjax.training.compiles import CompileWatch

HESITATED = jnp.log(jnp.array([0.50, 0.25, 0.20, 0.04, 0.01]))
ORIGINAL = jnp.log(jnp.array([0.30, 0.40, 0.20, 0.05, 0.05]))
NEW = 14


@pytest.mark.parametrize(
    ("length", "percent", "pool", "keys"),
    [
        (201, 4, 12, 8),
        (201, 8, 24, 16),
        (201, 10, 30, 20),
        (12, 4, 1, 1),
        (12, 8, 1, 1),
        (12, 10, 1, 1),
        (361, 5, 26, 18),
        (1, 10, 0, 0),
        (2, 1, 1, 1),
    ],
)
def test_keys_are_counted_as_the_reference_code_counts(length, percent, pool, keys):
    assert key_counts(length, percent) == (pool, keys)


def test_keys_are_the_least_likely_tokens_and_never_the_first():
    logprobs = np.random.default_rng(0).normal(size=200)
    lowest = key_positions(logprobs, 8, pool_factor=1.0)
    np.testing.assert_array_equal(lowest, np.sort(np.argsort(logprobs)[:16]) + 1)
    drawn = key_positions(logprobs, 8, seed=1)
    assert len(set(drawn)) == 16
    assert set(drawn) <= set(np.argsort(logprobs)[:24] + 1)
    assert (np.diff(drawn) > 0).all()
    assert drawn.min() >= 1
    np.testing.assert_array_equal(drawn, key_positions(logprobs, 8, seed=1))
    assert set(drawn) != set(key_positions(logprobs, 8, seed=2))
    assert key_positions([], 8).tolist() == []
    for wrong in ({"percent": 0}, {"percent": 5, "pool_factor": 0.5}):
        with pytest.raises(ConfigError, match="must be positive"):
            key_positions(logprobs, **wrong)


def test_prompts_repeat_their_keys():
    context = [1, 50, 51, 52]
    assert hesitation_prompt(context, [1, 3], before=[7, 8], behind=[9]) == [
        *(7, 8, 50, 52, 9),
        *context,
    ]
    assert hesitation_prompt(context, [1, 3], before=[7], start=1) == [1, 7, 50, 52, 50, 51, 52]
    assert hesitation_prompt(context, [2], before=[7], where="behind") == [*context, 7, 51]
    assert hesitation_prompt(context, [], before=[7]) == context


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.0, [0.50, 0.25, 0.20, 0.04, 0.01]),
        (0.1, [0.5198, 0.2356, 0.1976, 0.0386, 0.0084]),
        (1.6, [0.7656, 0.0797, 0.1352, 0.0189, 0.0005]),
        (6.0, [0.9794, 0.0014, 0.0183, 0.0010, 0.0000]),
    ],
)
def test_contrasts_are_the_papers(alpha, expected):
    found = jax.nn.softmax(contrast(HESITATED, ORIGINAL, alpha))
    np.testing.assert_allclose(found, expected, atol=5.1e-5)
    # The other name of the same thing: guidance of weight 1 + alpha.
    guidance = ORIGINAL + (1 + alpha) * (HESITATED - ORIGINAL)
    np.testing.assert_allclose(contrast(HESITATED, ORIGINAL, alpha), guidance, atol=2e-5)


def test_answers_are_scored_as_the_paper_does():
    np.testing.assert_allclose(
        sh2_scores(HESITATED, ORIGINAL, 1.6), [-0.2671, -2.5295, -2.0007, -1000, -1000], atol=5e-5
    )
    # No difference between the branches, no contrast.
    for alpha in (0.0, 0.1, 6.0):
        np.testing.assert_allclose(
            sh2_scores(HESITATED, HESITATED, alpha, 0.0), HESITATED, atol=1e-6
        )


def test_constants_of_either_branchs_logits_change_nothing():
    def scores(a, b):
        return sh2_scores(log_probabilities(HESITATED + a), log_probabilities(ORIGINAL + b), 1.6)

    np.testing.assert_allclose(scores(5.0, -7.0), scores(0.0, 0.0), atol=1e-5)


def hesitate(rows):
    return [hesitation_prompt(row, range(1, len(row)), before=[40], behind=[41]) for row in rows]


def test_decoding_equals_recomputation_of_both_prompts(lm, rows, check_recomputed, masked):
    hesitated = hesitate(rows)
    generation = decode(
        *sh2(lm.model, lm.params, Prompts.of(hesitated), alpha=0.8),
        Prompts.of(rows),
        max_new_tokens=NEW,
    )
    for b, (row, longer) in enumerate(zip(rows, hesitated, strict=True)):

        def scores(ids, row=row, longer=longer):
            expert = lm.logp(longer + ids[len(row) :])[-1]
            return masked(1.8 * expert - 0.8 * lm.logp(ids)[-1], expert)

        check_recomputed(generation, b, row, scores)


def test_limits_and_new_values(lm, rows, check_recomputed):
    hesitated = hesitate(rows)

    def check(others, expected, alpha):
        given = sh2(lm.model, lm.params, Prompts.of(others), alpha=alpha, plausibility=0.0)
        generation = decode(*given, Prompts.of(rows), max_new_tokens=NEW)
        for b, prompt in enumerate(expected):
            check_recomputed(generation, b, prompt, lambda ids: lm.logp(ids)[-1])

    check(hesitated, hesitated, 0.0)
    with CompileWatch() as watch:
        given = sh2(lm.model, lm.params, Prompts.of([[40] * 20] * 4), alpha=6, plausibility=0.2)
        decode(*given, Prompts.of(rows), max_new_tokens=NEW)
        assert watch.count == 0
    # Without keys nor template both branches are the plain model, whatever alpha is.
    check(rows, rows, 6.0)


def test_multiple_choice_is_judged_as_in_the_benchmarks():
    found = multiple_choice([-2.0, -3.0, -2.0, -5.0], [True, True, False, False])
    assert found["mc1"] == 0.0
    assert found["factor"] == 1.0  # as high is enough there
    assert found["mc3"] == 0.0
    p = np.exp([-2.0, -3.0, -2.0, -5.0])
    assert found["mc2"] == pytest.approx((p[0] + p[1]) / p.sum())
    # Masked answers (-1000 a token) stay comparable.
    assert multiple_choice([-2000.0, -3000.0], [True, False])["mc2"] == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="a correct and an incorrect"):
        multiple_choice([-1.0], [True])
