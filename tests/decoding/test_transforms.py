import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.decoding import (
    Prompts,
    StepOutput,
    bad_words,
    categorical,
    chain,
    count_penalty,
    decode,
    epsilon,
    eta,
    forced,
    greedy,
    logit_bias,
    min_new_tokens,
    min_p,
    mirostat,
    no_repeat_ngram,
    on_tokens,
    repetition_penalty,
    sequence_bias,
    suppress,
    temperature,
    top_k,
    top_p,
    typical,
    watermark,
    watermark_score,
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
@pytest.mark.parametrize(
    "name", ["temperature", "top_k", "top_p", "min_p", "typical", "epsilon", "eta"]
)
def test_equal_to_the_processors_of_transformers(name, logits, theirs):
    import torch

    ours, processor, values = {
        "temperature": (temperature, theirs.TemperatureLogitsWarper, (0.1, 0.7, 1.0, 3.0)),
        "top_k": (top_k, theirs.TopKLogitsWarper, (1, 2, 37, 499, 500)),
        "top_p": (top_p, theirs.TopPLogitsWarper, (0.01, 0.3, 0.5, 0.9, 0.99, 0.9999)),
        "min_p": (min_p, theirs.MinPLogitsWarper, (0.001, 0.1, 0.5, 0.9)),
        "typical": (typical, theirs.TypicalLogitsWarper, (0.05, 0.5, 0.9, 0.99)),
        "epsilon": (epsilon, theirs.EpsilonLogitsWarper, (1e-4, 3e-3, 0.05, 0.9)),
        "eta": (eta, theirs.EtaLogitsWarper, (1e-4, 3e-3, 0.05, 0.9)),
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


TEXTS = [[1, 2, 3], [4], [5, 5, 6], [0, 0, 7]]  # what PROMPTS holds


def _during(transform, logits, taken, surprises=None):
    """Logits behind `transform` at every step, each row taking the tokens of `taken`."""
    B, N = len(TEXTS), len(taken[0])
    state, found = transform.init(PROMPTS, logits.shape[-1]), []
    generated = np.zeros((B, max(N, 1)), np.int32)
    for step in range(N + 1):
        last = [taken[b][step - 1] if step else TEXTS[b][-1] for b in range(B)]
        if step:
            generated[:, step - 1] = last
        logprob = None if surprises is None else jnp.asarray(surprises[max(step - 1, 0)])
        context = Context(
            jnp.int32(step),
            jnp.array(last),
            jnp.asarray(generated),
            jnp.zeros(B, bool),
            PROMPTS,
            logprob,
        )
        out, state = transform.update(jnp.asarray(logits), state, context)
        found.append(np.asarray(out))
    return found


TAKEN = [[2, 3, 2, 3], [4, 4, 9, 4], [6, 5, 5, 6], [7, 0, 0, 7]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_no_repeat_ngram_equals_that_of_transformers(size, logits, theirs):
    import torch

    processor = theirs.NoRepeatNGramLogitsProcessor(size)
    for step, found in enumerate(_during(no_repeat_ngram(size), logits, TAKEN)):
        for b, text in enumerate(TEXTS):
            ids = torch.tensor([[*text, *TAKEN[b][:step]]])
            expected = processor(ids, torch.tensor(logits[b : b + 1])).numpy()
            np.testing.assert_array_equal(found[b : b + 1], expected)


@pytest.mark.filterwarnings("ignore")
def test_sequence_bias_equals_that_of_transformers(logits, theirs):
    import torch

    biases = {
        (9,): -2.0,
        (2, 3): 1.5,
        (3, 2, 3): -np.inf,
        (4, 4, 9): 3.0,
        (5, 3): 0.5,
        (7, 0): -1.0,
    }
    processor = theirs.SequenceBiasLogitsProcessor(biases)
    found = _during(sequence_bias(biases), logits, TAKEN)
    changed = 0
    for step in range(2, 5):  # shorter texts than sequences: see the next test
        for b, text in enumerate(TEXTS):
            ids = torch.tensor([[*text, *TAKEN[b][:step]]])
            expected = processor(ids, torch.tensor(logits[b : b + 1])).numpy()
            np.testing.assert_allclose(found[step][b : b + 1], expected, rtol=1e-6)
            changed += (expected != logits[b]).sum()
    assert changed > 12


def test_a_bad_word_is_forbidden_only_behind_its_beginning(logits):
    (found,) = _during(bad_words([[4, 8], [2, 3, 9], [12]]), logits, [[]] * 4)
    excluded = [set(np.flatnonzero(np.isneginf(row))) for row in found]
    missing = set(np.flatnonzero(np.isneginf(logits[3])))
    assert excluded == [{9, 12}, {8, 12}, {12}, {12} | missing]


def test_logit_bias_suppress_and_forced_tokens(logits):
    (found,) = _during(logit_bias({3: 1.5, 7: -np.inf}), logits, [[]] * 4)
    expected = logits.copy()
    expected[:, 3] += 1.5
    expected[:, 7] = -np.inf
    np.testing.assert_array_equal(found, expected)
    (found,) = _during(suppress(range(12)), logits, [[]] * 4)
    assert np.isneginf(found[:, :12]).all()
    np.testing.assert_array_equal(found[:, 12:], logits[:, 12:])
    steps = _during(forced({0: 5, 2: 9}), logits, TAKEN)
    assert [set(np.flatnonzero(np.isfinite(row))) for row in steps[0]] == [{5}] * 4
    assert [set(np.flatnonzero(np.isfinite(row))) for row in steps[2]] == [{9}] * 4
    np.testing.assert_array_equal(steps[1], logits)
    np.testing.assert_array_equal(steps[4], logits)


@pytest.mark.filterwarnings("ignore")
def test_min_new_tokens_equals_that_of_transformers(logits, theirs):
    import torch

    found = _during(min_new_tokens(2, [3, 7]), logits, TAKEN)
    for step in range(5):
        for b, text in enumerate(TEXTS):
            processor = theirs.MinNewTokensLengthLogitsProcessor(len(text), 2, [3, 7], device="cpu")
            ids = torch.tensor([[*text, *TAKEN[b][:step]]])
            expected = processor(ids, torch.tensor(logits[b : b + 1])).numpy()
            np.testing.assert_array_equal(found[step][b : b + 1], expected)
    of_rows = _during(min_new_tokens(np.array([0, 1, 2, 9]), [3]), logits, TAKEN)
    assert [int(np.isneginf(step[:, 3]).sum()) for step in of_rows] == [3, 2, 1, 1, 1]


def test_count_penalty_counts_new_tokens_only(logits):
    found = _during(count_penalty(frequency=0.5, presence=np.array([1.0, 0, 0, 2])), logits, TAKEN)
    np.testing.assert_array_equal(found[0], logits)
    expected = logits.copy()
    for b, row in enumerate(TAKEN):
        for token in set(row):
            expected[b, token] -= 0.5 * row.count(token) + (1.0, 0, 0, 2)[b]
    np.testing.assert_allclose(found[4], expected, rtol=1e-6)


def test_mirostat_excludes_surprises_and_moves_its_limit(logits):
    # Natural logarithms of the taken tokens: 1 bit, then 9 bits, in every row.
    bits = np.array([[1.0] * 4, [9.0] * 4])
    found = _during(mirostat(3.0, 0.5), logits, [row[:2] for row in TAKEN], -bits * np.log(2))
    surprise = -np.asarray(jax.nn.log_softmax(logits, axis=-1)) / np.log(2)
    for step, limit in enumerate((6.0, 6.0 - 0.5 * (1 - 3), 7.0 - 0.5 * (9 - 3))):
        kept = (surprise <= limit) | (logits == logits.max(-1, keepdims=True))
        np.testing.assert_array_equal(np.isfinite(found[step]), kept & np.isfinite(logits))


class Flat:
    """Every token equally likely."""

    vocab_size, max_positions = 200, 10_000

    def prepare(self, params):
        return params

    def init(self, prepared, prompts, capacity):
        return (), StepOutput(jnp.zeros((prompts.tokens.shape[0], self.vocab_size)))

    def step(self, prepared, state, tokens):
        return (), StepOutput(jnp.zeros((tokens.shape[0], self.vocab_size)))


def test_a_watermark_is_found_by_its_seed_alone():
    def score(transform, seed):
        generation = decode(
            Flat(),
            (),
            Prompts.of([[1], [2], [3]]),
            max_new_tokens=200,
            transform=transform,
            sampler=categorical(),
            seeds=[1, 2, 3],
        )
        tokens = generation.tokens[:, :200]
        return np.asarray(watermark_score(tokens, jnp.ones((3, 200), bool), 200, seed, 0.25))

    marked = score(watermark(7, 0.25, 2.0), 7)
    # A green token is e^2 times as likely: 71 % of the text instead of 25 %.
    expected = (0.711 - 0.25) * np.sqrt(199 / (0.25 * 0.75))
    assert np.abs(marked - expected).max() < 4
    assert np.abs(score(watermark(7, 0.25, 2.0), 8)).max() < 4
    assert np.abs(score(chain(), 7)).max() < 4


def test_mirostat_excludes_none_of_equally_surprising_tokens():
    generation = decode(
        Flat(),
        (),
        Prompts.of([[1]]),
        max_new_tokens=64,
        transform=chain(min_new_tokens(3, [5]), mirostat(4.0)),
        sampler=categorical(),
        seeds=[0],
    )
    # All 200 tokens are equally surprising (7.6 bits): first the limit of 8 lets all pass.
    assert generation.lengths[0] == 64
    np.testing.assert_allclose(generation.logprobs[0, :64], -np.log(200), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: typical(1.0), "typical=1.0"),
        (lambda: eta(0.0), "eta=0.0"),
        (lambda: mirostat(-1.0), "tau=-1.0"),
        (lambda: no_repeat_ngram(0), "no_repeat_ngram=0"),
        (lambda: bad_words([[]]), "empty sequence"),
        (lambda: logit_bias({-1: 2.0}), "id -1"),
        (lambda: logit_bias({1: np.nan}), "id 1 is nan"),
        (lambda: forced({-1: 2}), "step -1"),
        (lambda: min_new_tokens(-2, [1]), "min_new_tokens=-2"),
        (lambda: count_penalty(np.inf), "frequency=inf"),
        (lambda: watermark(1, share=1.0), "share=1.0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
