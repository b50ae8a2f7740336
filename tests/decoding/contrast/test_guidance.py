import numpy as np
import pytest

from tokjax.decoding import ModelPredictor, Prompts, categorical, decode
from tokjax.decoding.contrast import guided
from tokjax.errors import ConfigError, DataError
from tokjax.training.compiles import CompileWatch

NEGATIVE = [[8, 8, 1, 30], [2, 9], [4], [6, 5, 4, 3, 2, 1, 0]]
NEW = 14


def test_guidance_equals_two_separate_models_without_a_cache(lm, rows, check_recomputed):
    generation = decode(
        *guided(lm.model, lm.params, weight=1.8, negative=Prompts.of(NEGATIVE)),
        Prompts.of(rows),
        max_new_tokens=NEW,
    )
    for b, (row, negative) in enumerate(zip(rows, NEGATIVE, strict=True)):

        def scores(ids, row=row, negative=negative):
            unconditional = lm.logp(negative + ids[len(row) :])[-1]
            return unconditional + 1.8 * (lm.logp(ids)[-1] - unconditional)

        check_recomputed(generation, b, row, scores)


def test_weight_one_is_the_prompts_own_text_and_zero_the_negative_prompts(
    lm, rows, check_recomputed
):
    plain = lambda ids: lm.logp(ids)[-1]  # noqa: E731
    for weight, prompts in ((1.0, rows), (0.0, NEGATIVE)):
        given = guided(lm.model, lm.params, weight=weight, negative=Prompts.of(NEGATIVE))
        generation = decode(*given, Prompts.of(rows), max_new_tokens=NEW)
        for b, prompt in enumerate(prompts):
            check_recomputed(generation, b, prompt, plain)


def test_without_a_negative_prompt_the_last_token_stands_alone(small, rows, check_recomputed):
    # Each row with a weight of its own.
    weights = [1.0, 2.5, 0.5, -1.0]
    given = guided(small.model, small.params, weight=weights)
    generation = decode(*given, Prompts.of(rows), max_new_tokens=NEW)
    for b, (row, weight) in enumerate(zip(rows, weights, strict=True)):

        def scores(ids, row=row, weight=weight):
            unconditional = small.logp(ids[len(row) - 1 :])[-1]
            return unconditional + weight * (small.logp(ids)[-1] - unconditional)

        check_recomputed(generation, b, row, scores)


def test_one_negative_prompt_serves_all_rows(small, rows, check_recomputed):
    given = guided(small.model, small.params, weight=0.0, negative=Prompts.of(NEGATIVE[:1]))
    generation = decode(*given, Prompts.of(rows), max_new_tokens=NEW)
    for b in range(len(rows)):
        check_recomputed(generation, b, NEGATIVE[0], lambda ids: small.logp(ids)[-1])


def test_samples_of_a_prompt_have_its_negative_prompt_and_weight(small, rows):
    def run(rows, negative, weight, samples):
        given = guided(small.model, small.params, weight=weight, negative=Prompts.of(negative))
        return decode(
            *given,
            Prompts.of(rows),
            max_new_tokens=NEW,
            samples=samples,
            sampler=categorical(),
            seeds=[1, 2, 3, 4],
        ).rows()

    several = run(rows[:2], NEGATIVE[:2], [2.0, 0.5], 2)
    repeated = [[each for each in two for _ in range(2)] for two in (rows[:2], NEGATIVE[:2])]
    assert several == run(*repeated, [2.0, 2.0, 0.5, 0.5], 1)


def test_a_row_alone_says_the_same_as_among_others(lm, rows):
    settings = {"weight": 1.8, "plausibility": 0.05}
    together = decode(
        *guided(lm.model, lm.params, negative=Prompts.of(NEGATIVE), **settings),
        Prompts.of(rows),
        max_new_tokens=NEW,
    )
    for b in (1, 2):
        alone = decode(
            *guided(lm.model, lm.params, negative=Prompts.of([NEGATIVE[b]] * 4), **settings),
            Prompts.of([rows[b]] * 4),
            max_new_tokens=NEW,
        )
        assert alone.rows() == together.rows()[b : b + 1] * 4
        np.testing.assert_allclose(alone.logprobs[0], together.logprobs[b], atol=2e-5)


def test_new_values_compile_nothing(lm, rows):
    def run(weight, negative, plausibility):
        given = guided(
            lm.model,
            lm.params,
            weight=weight,
            negative=Prompts.of(negative),
            plausibility=plausibility,
        )
        decode(*given, Prompts.of(rows), max_new_tokens=NEW).tokens.block_until_ready()

    run(1.5, NEGATIVE, 0.0)
    with CompileWatch() as watch:
        run(2, NEGATIVE[::-1], 0.3)
        run(np.float64(-1), [[4] * 9] * 4, 1)
        assert watch.count == 0


def test_what_cannot_be_meant_is_refused(lm, rows):
    def run(negative=None, **settings):
        given = guided(lm.model, lm.params, negative=negative, **settings)
        decode(*given, Prompts.of(rows), max_new_tokens=NEW)

    with CompileWatch() as watch:
        with pytest.raises(ConfigError, match="2 other prompts for 4 prompts: give one, or 4"):
            run(Prompts.of(NEGATIVE[:2]))
        with pytest.raises(DataError, match="of the other prompts: prompt 0 has id 61"):
            run(Prompts.of([[61]]))
        with pytest.raises(ConfigError, match="of the other prompts: prompt 0 has 90 tokens"):
            run(Prompts.of([[1] * 90]))
        with pytest.raises(ConfigError, match="weight=nan must be a finite number"):
            run(weight=float("nan"))
        with pytest.raises(ConfigError, match=r"plausibility=1.5 must be between 0 and 1"):
            run(plausibility=1.5)
        assert watch.count == 0


def test_the_limit_of_positions_is_the_models(lm):
    assert guided(ModelPredictor(lm.model), lm.params)[0].max_positions == 96
