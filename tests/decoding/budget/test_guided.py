import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tokjax.decoding import Prompts, categorical, chain, decode, temperature
from tokjax.decoding.budget import (
    LengthPredictor,
    Reliability,
    budget_guided,
    raw_at_guided_steps,
)
from tokjax.errors import ConfigError
from tokjax.training.compiles import CompileWatch

V, NEW = 48, 16
NEVER = 46  # an id that none of the runs below writes
KINDS = {
    "linear": LengthPredictor(32, V, "linear"),
    "encoder": LengthPredictor(32, V, "encoder", width=16, n_layers=2, n_heads=2),
}
BREAKS = np.arange(V) % 2 == 0
PAPER, LOOSE = Reliability(), Reliability(rate=0.3, alpha=0.2, length=-1.0)
SAMPLED = {"sampler": categorical(), "seeds": [3, 1, 4, 5]}
SIGNALS = {
    "guided": lambda context: context.signals["guided"],
    "budget": lambda context: context.signals["budget"],
    "reliable": lambda context: context.signals["reliable"],
}


def weights_of(kind):
    weights = KINDS[kind].init(jax.random.key(5))
    return {**weights, "alpha": 3 * weights["alpha"], "rate": 2 * weights["rate"]}


def given(
    lm, budget, kind="linear", think_end=NEVER, breaks=BREAKS, reliability=LOOSE, weights=None
):
    return budget_guided(
        lm.model,
        lm.params,
        KINDS[kind],
        weights_of(kind) if weights is None else weights,
        budget=budget,
        think_end=think_end,
        breaks=breaks,
        reliability=reliability,
    )


def run(lm, rows, budget, *, options=None, **settings):
    """Decodes with a budget for each row; the same program whatever the settings."""
    return decode(
        *given(lm, np.broadcast_to(budget, len(rows)), **settings),
        Prompts.of(rows),
        max_new_tokens=NEW,
        record=SIGNALS,
        **(options or {}),
    )


def plain(lm, rows, **options):
    return decode(lm.model, lm.params, Prompts.of(rows), max_new_tokens=NEW, **options)


@pytest.fixture(scope="module")
def think_end(lm, rows):
    """A token that guided rows write, but not first."""
    return run(lm, rows, 40).rows()[0][7]


def expected_logits(lm, kind, ids, budget, reliability):
    """Guided logits in NumPy, from a pass over the whole text, and how many tokens are kept."""
    logits, states = lm.run(ids)
    read = states if kind == "encoder" else states[-1:]
    alpha, rate = (np.asarray(a[0], np.float64) for a in KINDS[kind](weights_of(kind), read[None]))
    weights = scipy.special.gammainc(alpha, rate * np.log(budget + 1))
    kept = (rate >= reliability.rate) & (alpha > reliability.alpha)
    assert 0 < kept.sum() < V  # shapes and rates alone: every length is above -1
    with np.errstate(divide="ignore"):
        return logits + np.log(np.where(kept, weights, 0.0)), kept.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_equals_recomputation(lm, rows, kind, think_end):
    budgets = np.array([40, 3, 0, 9])
    generation = run(lm, rows, budgets, kind=kind, think_end=think_end)
    steps = 0
    for b, row in enumerate(rows):
        ids, left, thinking = list(row), budgets[b], True
        for n, token in enumerate(generation.rows()[b]):
            guided = bool(thinking and (n == 0 or BREAKS[ids[-1]]) and budgets[b] > 0)
            assert generation.recorded["guided"][b, n] == guided
            assert generation.recorded["budget"][b, n] == left
            logits, kept = lm.run(ids)[0], 0
            if guided:
                logits, kept = expected_logits(lm, kind, ids, left, LOOSE)
            assert generation.recorded["reliable"][b, n] == kept
            assert logits[token] > logits.max() - 1e-4
            logprob = logits[token] - scipy.special.logsumexp(logits)
            np.testing.assert_allclose(generation.logprobs[b, n], logprob, atol=1e-3)
            ids.append(token)
            left = max(left - 1, 1) if left > 0 else left
            thinking = thinking and token != think_end
            steps += guided
    assert steps > 8


def test_guidance_ends_with_thinking(lm, rows, think_end):
    generation = run(lm, rows, 40, think_end=think_end)
    first, guided = generation.rows()[0], np.asarray(generation.recorded["guided"])[0]
    at = first.index(think_end)
    assert 0 < at < NEW - 2
    assert guided[: at + 1].any()
    assert not guided[at + 1 :].any()
    assert BREAKS[first[at:]].any()
    # What follows is what the plain model says behind the same text.
    behind = plain(lm, [rows[0] + first[: at + 1]] * 4).rows()[0]
    assert behind[: NEW - at - 1] == first[at + 1 :]


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("budget", "reliability"),
    [(0, LOOSE), (-5, LOOSE), (np.inf, None)],
    ids=["none", "negative", "infinite"],
)
def test_without_a_budget_it_is_the_plain_model_bit_for_bit(lm, rows, options, budget, reliability):
    expected = plain(lm, rows, **options)
    found = run(lm, rows, budget, reliability=reliability, options=options)
    for name in ("tokens", "logprobs", "sampling_logprobs", "entropies"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.recorded["guided"].any() == (budget > 0)


def test_a_row_without_budget_is_plain_beside_rows_with_one(lm, rows):
    found = run(lm, rows, [8, 0, 8, -1], options=SAMPLED)
    expected = plain(lm, rows, **SAMPLED)
    for b in (1, 3):
        np.testing.assert_array_equal(found.logprobs[b], expected.logprobs[b])
        np.testing.assert_array_equal(found.tokens[b], expected.tokens[b])
    assert found.rows()[0] != expected.rows()[0]


def test_without_breaks_the_first_step_alone_is_guided(lm, rows):
    found = run(lm, rows, 8, breaks=np.zeros(V, bool))
    np.testing.assert_array_equal(
        found.recorded["guided"], np.broadcast_to(np.arange(NEW) == 0, (4, NEW))
    )


def test_a_filter_that_nothing_passes_takes_the_likeliest_token(lm, rows):
    settings = {"breaks": np.ones(V, bool), "reliability": Reliability(rate=np.inf)}
    found = run(lm, rows, 30, options=SAMPLED, **settings)
    assert found.rows() == plain(lm, rows).rows()
    np.testing.assert_array_equal(found.sampling_logprobs, 0)


def test_new_settings_compile_nothing(lm, rows, think_end):
    first = run(lm, rows, 9).rows()
    with CompileWatch() as watch:
        assert run(lm, rows, 500).rows() != first
        run(lm, rows, [9, 3, 0, 1], think_end=think_end, breaks=~BREAKS, reliability=None)
        assert watch.count == 0


def test_rows_are_independent_and_samples_share_their_prompts_budget(lm, rows):
    together = run(lm, rows, [40, 3, 0, 9]).rows()
    assert run(lm, [rows[3]] * 4, 9).rows() == [together[3]] * 4
    twice = decode(
        *given(lm, [40, 3]), Prompts.of(rows[:2]), max_new_tokens=NEW, samples=2, record=SIGNALS
    )
    assert twice.rows() == [together[0], together[0], together[1], together[1]]
    assert np.asarray(twice.recorded["budget"])[:, 0].tolist() == [40, 40, 3, 3]


def test_guided_steps_can_be_kept_from_the_transforms_before(lm, rows):
    transform = chain(temperature(0.7), raw_at_guided_steps())
    found = run(lm, rows, 30, options={**SAMPLED, "transform": transform})
    changed = np.abs(np.asarray(found.sampling_logprobs) - np.asarray(found.logprobs))
    guided = np.asarray(found.recorded["guided"])
    assert 0 < guided.sum() < guided.size
    assert changed[guided].max() < 1e-6
    assert changed[~guided].min() > 1e-3


def test_a_tighter_budget_prefers_tokens_with_less_thinking_left(lm, rows):
    # Two tokens share the first step: one is followed by little thinking, the other by much.
    logits, states = lm.run(rows[0])
    z = np.asarray(states[-1])
    alpha = np.zeros((V, 32), np.float32)
    alpha[:] = 60 * z / (z @ z)
    short = int(np.argsort(logits)[-2])  # the second likeliest
    alpha[short] *= 0.5
    rate = np.broadcast_to(12 * z / (z @ z), (V, 32)).astype(np.float32)
    weights = {"alpha": jnp.array(alpha), "rate": jnp.array(rate)}

    def first(budget):
        return run(lm, [rows[0]] * 4, budget, weights=weights, reliability=PAPER).rows()[0][0]

    assert first(10_000) == int(np.argmax(logits))
    assert first(20) == short


def test_what_cannot_be_meant_is_refused(lm, rows):
    for wrong in (np.nan, 2.5, [[1]]):
        with pytest.raises(ConfigError, match="must be a whole number of tokens"):
            given(lm, wrong)
    with pytest.raises(ConfigError, match="2 budgets for 4 prompts"):
        decode(*given(lm, [5, 5]), Prompts.of(rows), max_new_tokens=NEW)
    for wrong in (-1, V):
        with pytest.raises(ConfigError, match=f"think_end={wrong}"):
            given(lm, 5, think_end=wrong)
    for wrong in (BREAKS[:5], np.zeros(V)):
        with pytest.raises(ConfigError, match="breaks must be 48 booleans"):
            given(lm, 5, breaks=wrong)
    with pytest.raises(ConfigError, match="made for vocab_size=50"):
        budget_guided(
            lm.model,
            lm.params,
            LengthPredictor(32, 50, "linear"),
            {},
            budget=5,
            think_end=1,
            breaks=BREAKS,
        )
    with pytest.raises(ConfigError, match="give decode that predictor"):
        plain(lm, rows, transform=raw_at_guided_steps())
