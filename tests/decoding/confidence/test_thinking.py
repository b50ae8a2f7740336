import jax
import numpy as np
import pytest

from tokjax.decoding import Prompts, categorical, chain, decode, on_tokens, temperature
from tokjax.decoding.confidence import (
    MeanEntropy,
    Thoughts,
    again,
    majority,
    savings,
    stop_below,
    think,
    with_attempt,
)
from tokjax.errors import ConfigError, DataError
from tokjax.models import ModelConfig, Transformer
from tokjax.training.compiles import CompileWatch

V, NEW = 40, 8
MODEL = Transformer(ModelConfig(vocab_size=V, d_model=32, n_layers=2, n_heads=4, max_positions=64))
ROWS = [[5, 9, 2], [7], [3, 1, 4, 1, 5], [39, 0, 39, 0, 11]]
SAMPLED = {"transform": chain(temperature(0.8)), "sampler": categorical(), "stop": on_tokens([4])}
NEVER, ALWAYS = stop_below(-np.inf), stop_below(np.inf)
BEHIND = [8, 9]


@pytest.fixture(scope="module")
def params():
    params = MODEL.init(jax.random.key(1))
    return {**params, "embedding": 12 * params["embedding"]}


def run(params, policy, rows=ROWS, **changes):
    settings = {"max_new_tokens": NEW, "refine": with_attempt(behind=BEHIND, end=[4]), "seed": 3}
    return think(MODEL, params, rows, policy, batch_size=4, **{**settings, **SAMPLED, **changes})


@pytest.fixture(scope="module")
def fixed(params):
    return run(params, NEVER)


def test_minus_infinity_makes_every_step_and_plus_infinity_one(params, fixed):
    assert fixed.used.tolist() == [4] * 4
    assert fixed.steps_saved == 0
    first = run(params, ALWAYS)
    assert first.used.tolist() == [1] * 4
    assert first.steps_saved == 0.75
    assert [own[0] for own in fixed.attempts] == first.last
    assert [own[:1] for own in fixed.signals] == first.signals
    assert savings(fixed, fixed) == 0
    assert savings(first, fixed) == 1 - first.tokens.sum() / fixed.tokens.sum()


def test_each_step_reads_the_question_and_the_attempt_before(params, fixed):
    for b, row in enumerate(ROWS):
        for step, attempt in enumerate(fixed.attempts[b]):
            prompt = row
            if step:
                before = [i for i in fixed.attempts[b][step - 1] if i != 4]
                prompt = [*row, *before, *BEHIND]
            assert fixed.prompt_tokens[b][step] == len(prompt)
            seed = np.random.SeedSequence([3, step + 1, b]).generate_state(1)[0]
            alone = decode(
                MODEL,
                params,
                Prompts.of([prompt] * 4),
                max_new_tokens=NEW,
                seeds=[int(seed)] * 4,
                record=MeanEntropy().record,
                **SAMPLED,
            )
            assert alone.rows()[0] == attempt
            assert MeanEntropy()(alone)[0] == pytest.approx(fixed.signals[b][step], abs=1e-5)


def test_a_threshold_changes_only_how_many_steps_are_made(params, fixed):
    firsts = sorted(own[0] for own in fixed.signals)
    assert firsts[1] < firsts[2]
    tau = (firsts[1] + firsts[2]) / 2
    for after in ("each", "first"):
        policy = stop_below(tau, after=after)
        found, expected = run(params, policy), fixed.replayed(policy)
        assert found.attempts == expected.attempts
        assert found.prompt_tokens == expected.prompt_tokens
        np.testing.assert_allclose(
            np.concatenate(found.signals), np.concatenate(expected.signals), atol=1e-5
        )
        assert (found.used == 1).sum() == 2
        assert 0 < savings(found, fixed) < 1
    assert sorted(found.used.tolist()) == [1, 1, 4, 4]
    assert found.steps_saved == 0.375


def test_half_stopped_behind_the_first_of_four_equal_steps_saves_three_eighths():
    attempt = [1, 2, 3]
    fixed = Thoughts([[attempt] * 4] * 4, [[0.1] * 4] * 2 + [[0.9] * 4] * 2, [[5] * 4] * 4, 4)
    found = fixed.replayed(stop_below(0.5))
    assert found.used.tolist() == [1, 1, 4, 4]
    assert found.tokens.tolist() == [3, 3, 12, 12]
    assert found.steps_saved == savings(found, fixed) == 0.375
    assert fixed.replayed(NEVER).attempts == fixed.attempts
    # The threshold itself stops.
    assert fixed.replayed(stop_below(0.1)).used.tolist() == [1, 1, 4, 4]
    with pytest.raises(DataError, match="prompt 0 stopped behind step 1"):
        found.replayed(NEVER)
    with pytest.raises(DataError, match="4 prompts against 0"):
        savings(found, Thoughts([], [], [], 4))


def test_the_number_of_rows_still_going_compiles_nothing(params, fixed):
    taus = sorted(own[0] for own in fixed.signals)
    with CompileWatch() as watch:
        for tau in taus:
            run(params, stop_below(tau, after="first"))
        run(params, NEVER, rows=ROWS[:1])
        run(params, NEVER, rows=ROWS + ROWS[:2])
        assert watch.count == 0


def test_more_prompts_than_a_batch_holds(params, fixed):
    found = run(params, NEVER, rows=ROWS + ROWS[:1])
    assert found.attempts[:4] == fixed.attempts
    assert found.used.tolist() == [4] * 5
    assert found.attempts[4] != found.attempts[0]  # another row, another seed


def test_independent_samples_are_voted_on(params):
    found = run(params, stop_below(-np.inf, after="first"), refine=again)
    assert found.prompt_tokens == [[len(row)] * 4 for row in ROWS]
    assert len({tuple(attempt) for attempt in found.attempts[0]}) > 1
    voted = found.voted(lambda attempt: attempt[0])
    for own, winner in zip(found.attempts, voted, strict=True):
        firsts = [attempt[0] for attempt in own]
        assert firsts.count(winner[0]) == max(firsts.count(f) for f in firsts)
    assert found.voted(lambda attempt: None) == found.last


def test_votes():
    assert majority(["a", "b", "b"]) == 1
    assert majority(["a", "b", "b", "a"]) == 0
    assert majority([None, None, "c"]) == 2
    assert majority([None, None]) is None
    assert majority([]) is None


def test_other_signals_plug_in(params):
    class Length:
        record = {}  # noqa: RUF012

        def __call__(self, generation):
            return np.asarray(generation.lengths)

    found = run(params, stop_below(NEW - 1), signal=Length())
    for own, signals in zip(found.attempts, found.signals, strict=True):
        assert signals == [len(attempt) for attempt in own]
        assert all(s == NEW for s in signals[:-1])
        assert signals[-1] < NEW or len(signals) == 4


def test_what_cannot_be_meant_is_refused(params):
    for wrong in ({"steps": 0}, {"rows": []}):
        with pytest.raises(ConfigError, match="must all be at least 1"):
            run(params, NEVER, **wrong)
    with pytest.raises(ConfigError, match="seeds is set by `think` itself"):
        run(params, NEVER, seeds=[1])
    with pytest.raises(ConfigError, match=r"in step 2 .* has max_positions=64"):
        run(params, NEVER, refine=lambda prompt, attempts: prompt * 30)
    with pytest.raises(DataError, match=r"in step 1 .*id 40"):
        run(params, NEVER, rows=[[V]])
    with pytest.raises(ConfigError, match="must be a number"):
        stop_below(np.nan)
    with pytest.raises(ConfigError, match="after='last'"):
        stop_below(0.5, after="last")  # type: ignore[arg-type]
