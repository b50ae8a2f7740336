import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tokjax import struct
from tokjax.decoding import (
    ModelPredictor,
    Prompts,
    StepOutput,
    categorical,
    chain,
    check_prompts,
    decode,
    greedy,
    min_p,
    never,
    on_tokens,
    prepare,
    repetition_penalty,
    temperature,
    top_k,
    top_p,
)
from tokjax.decoding.context import Context
from tokjax.decoding.engine import _run
from tokjax.decoding.prompts import bucket
from tokjax.decoding.transforms.base import Memoryless
from tokjax.errors import ConfigError, DataError
from tokjax.models import ModelConfig, Transformer, parameters
from tokjax.parallel.mesh import MeshConfig, build_mesh
from tokjax.parallel.rules import parameter_shardings
from tokjax.signals import token_stats
from tokjax.training.compiles import CompileWatch

V = 61
MODEL = Transformer(
    ModelConfig(
        vocab_size=V,
        d_model=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        max_positions=96,
        tie_embeddings=False,
    )
)
ROWS = [[5, 9, 2], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3], [60, 0, 60, 0, 11]]


@pytest.fixture(scope="module")
def params():
    params = MODEL.init(jax.random.key(1))
    # Sharper than a fresh model: texts differ, and the likeliest token leads by a margin.
    return {**params, "embedding": 50 * params["embedding"], "head": 3 * params["head"]}


@jax.jit
def _score(params, tokens):
    x = MODEL.backbone(params, MODEL.embed(params, tokens)).x
    targets = jnp.roll(tokens, -1, axis=1)
    stats = token_stats(x, MODEL.head(params), targets, want=("logprob", "entropy"))
    return stats, MODEL.unembed(params, x)


def _scored(params, ids):
    """Statistics and logits [1 64] of a text without a cache; causal, so filling has no effect."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(ids)] = ids
    return _score(params, padded)


def _recomputed(params, prompt, n):
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(_scored(params, ids)[1][0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


def test_greedy_with_a_cache_equals_greedy_by_full_recomputation(params):
    generation = decode(MODEL, params, Prompts.of(ROWS), max_new_tokens=30)
    expected = [_recomputed(params, row, 30) for row in ROWS]
    assert generation.rows() == expected
    assert len({t for row in expected for t in row}) > 10  # the texts are no single repeated token
    assert not np.asarray(generation.stopped).any()
    np.testing.assert_array_equal(generation.sampling_logprobs, 0)


def test_logprobs_and_entropies_equal_rescored_ones(params):
    settings = chain(repetition_penalty(1.2), temperature(0.7), top_k(20), top_p(0.9), min_p(0.01))
    generation = decode(
        MODEL,
        params,
        Prompts.of(ROWS),
        max_new_tokens=24,
        transform=settings,
        sampler=categorical(),
        seeds=[3, 1, 4, 1],
    )
    update = jax.jit(settings.update)
    for b, (row, new) in enumerate(zip(ROWS, generation.rows(), strict=True)):
        assert len(new) == 24
        stats, logits = _scored(params, [*row, *new])
        behind = slice(len(row) - 1, len(row) + 23)
        for found, rescored in [
            (generation.logprobs, stats.logprob),
            (generation.entropies, stats.entropy),
        ]:
            np.testing.assert_allclose(found[b, :24], rescored[0, behind], atol=1e-5)
        # The sampling log-probabilities, by applying the transforms to the rescored logits.
        prompt, latest = Prompts.of([row]), row[-1]
        state = settings.init(prompt, V)
        for step, token in enumerate(new):
            context = Context(
                np.int32(step), np.array([latest]), np.array([new]), np.zeros(1, bool), prompt
            )
            changed, state = update(logits[:, len(row) - 1 + step], state, context)
            expected = scipy.special.log_softmax(np.asarray(changed[0], np.float64))[token]
            assert np.isfinite(expected)
            # Twice the logits' rounding, and that over a temperature of 0.7.
            np.testing.assert_allclose(
                generation.sampling_logprobs[b, step], expected, atol=2e-5, rtol=0
            )
            latest = token


def test_unstacked_parameters_give_the_same_text(params):
    prompts = Prompts.of(ROWS)
    stacked = decode(MODEL, params, prompts, max_new_tokens=30)
    unstacked = decode(MODEL, parameters.unstack(params), prompts, max_new_tokens=30)
    assert unstacked.rows() == stacked.rows()
    np.testing.assert_allclose(unstacked.logprobs, stacked.logprobs, atol=1e-5)


def test_prepared_parameters_give_the_same_text_and_are_not_prepared_again(params):
    prompts = Prompts.of(ROWS)
    prepared = prepare(MODEL, params)
    for form in (params, parameters.unstack(params), prepared):
        again = prepare(MODEL, form)
        assert jax.tree.structure(again) == jax.tree.structure(prepared)
        jax.tree.map(np.testing.assert_array_equal, again, prepared)
    ours = decode(MODEL, prepared, prompts, max_new_tokens=30)
    plain = decode(MODEL, params, prompts, max_new_tokens=30)
    assert ours.rows() == plain.rows()
    np.testing.assert_array_equal(ours.logprobs, plain.logprobs)


def test_a_rows_text_does_not_depend_on_the_rows_beside_it(params):
    sample = functools.partial(
        decode,
        MODEL,
        params,
        max_new_tokens=20,
        transform=chain(temperature(1.0), top_p(0.95)),
        sampler=categorical(),
        stop=on_tokens([7]),
    )
    seeds = [11, 12, 13, 14]
    together = sample(Prompts.of(ROWS), seeds=seeds)
    backwards = sample(Prompts.of(ROWS[::-1]), seeds=seeds[::-1])
    assert together.rows() == backwards.rows()[::-1]
    for b, row in enumerate(ROWS):
        alone = sample(Prompts.of([row]), seeds=seeds[b : b + 1])
        assert alone.rows() == together.rows()[b : b + 1]
        np.testing.assert_allclose(alone.logprobs[0], together.logprobs[b], atol=1e-5)
    same_prompt = sample(Prompts.of([ROWS[0]] * 4), seeds=[5, 5, 6, 7]).rows()
    assert same_prompt[0] == same_prompt[1] != same_prompt[2]


def test_filling_behind_a_prompt_has_no_effect(params):
    tokens = np.array([[5, 9, 2, 0, 0], [7, 0, 0, 0, 0]] * 2, np.int32)
    lengths = np.array([3, 1] * 2, np.int32)
    filled = np.where(np.arange(5) < lengths[:, None], tokens, 33)
    plain, other = (
        decode(MODEL, params, Prompts(t, lengths), max_new_tokens=20) for t in (tokens, filled)
    )
    np.testing.assert_array_equal(plain.tokens, other.tokens)
    np.testing.assert_array_equal(plain.logprobs, other.logprobs)


def test_rows_end_with_their_stop_or_their_limit(params):
    free = _recomputed(params, ROWS[0], 18)
    at = next(i for i, t in enumerate(free) if i >= 2 and t not in free[:i])
    stop = on_tokens([free[at], 59])
    long = len(free) - 1
    prompts = Prompts.of([ROWS[0]] * 4)
    generation = decode(MODEL, params, prompts, stop=stop, max_new_tokens=[long, at, at + 1, 1])
    assert generation.rows() == [free[: at + 1], free[:at], free[: at + 1], free[:1]]
    assert np.asarray(generation.stopped).tolist() == [True, False, True, False]
    assert np.asarray(generation.mask).sum(-1).tolist() == [at + 1, at, at + 1, 1]
    for a in (generation.tokens, generation.logprobs, generation.entropies):
        np.testing.assert_array_equal(np.where(generation.mask, 0, a), 0)


def test_a_token_equal_to_the_filling_is_an_ordinary_token():
    # Id 0 fills arrays, yet a model that says 0 writes a text of zeros.
    generation = decode(
        Scripted(((0, 0, 2, 0),)), {}, Prompts.of([[0, 0]]), max_new_tokens=9, stop=on_tokens([2])
    )
    assert generation.rows() == [[0, 0, 2]]


PASSES = []


@dataclass(frozen=True)
class Scripted:
    """A predictor that says the tokens of a script, and counts its passes."""

    script: tuple[tuple[int, ...], ...]
    vocab_size: int = 5
    max_positions: int = 1000

    def prepare(self, params):
        return params

    def init(self, prepared, prompts, capacity):
        return jnp.int32(0), self._say(0)

    def step(self, prepared, state, tokens):
        jax.debug.callback(lambda: PASSES.append(1))
        return state + 1, self._say(state + 1)

    def _say(self, step):
        script = jnp.array(self.script)[:, step]
        return StepOutput(10 * jax.nn.one_hot(script, self.vocab_size))


def test_the_loop_ends_with_the_last_row_and_no_pass_follows_the_last_token():
    predictor = Scripted(((1, 2, 3, 3, 3, 3), (1, 1, 1, 2, 3, 3)))
    prompts = Prompts.of([[1], [1]])
    PASSES.clear()
    generation = decode(predictor, {}, prompts, max_new_tokens=6, stop=on_tokens([2]))
    assert generation.rows() == [[1, 2], [1, 1, 1, 2]]
    jax.effects_barrier()
    assert len(PASSES) == 3
    PASSES.clear()
    assert decode(predictor, {}, prompts, max_new_tokens=1).rows() == [[1], [1]]
    jax.effects_barrier()
    assert not PASSES


def test_draws_at_different_steps_are_independent():
    n = 2000
    settings = chain(temperature(1e6))  # makes any script a uniform distribution over five tokens
    tokens = decode(
        Scripted(((0,) * 16,) * n),
        {},
        Prompts.of([[0]] * n),
        max_new_tokens=16,
        transform=settings,
        sampler=categorical(),
        seeds=np.arange(n),
    ).tokens
    pairs = np.asarray(tokens)[:, :-1] * 5 + np.asarray(tokens)[:, 1:]
    counts = np.bincount(pairs.ravel(), minlength=25)
    assert counts.sum() == 30_000
    chi_square = ((counts - 1200) ** 2 / 1200).sum()
    assert chi_square < 60  # about 24 when every pair of neighbours is equally likely


def test_new_values_compile_nothing(params):
    def run(rows, n, t, k, p, ids, seeds, penalty):
        settings = chain(repetition_penalty(penalty), temperature(t), top_k(k), top_p(p))
        decode(
            MODEL,
            params,
            Prompts.of(rows),
            max_new_tokens=n,
            transform=settings,
            sampler=categorical(),
            stop=on_tokens(ids),
            seeds=seeds,
        ).tokens.block_until_ready()

    with CompileWatch() as watch:
        run(ROWS[:2], 19, 0.71, 7, 0.9, [2], [1, 2], 1.1)
        first = watch.count
        run(ROWS[1:2] + ROWS[3:], 31, 0.0, 0, 1.0, [3, 4, 5], [2**31, 4], 1)
        run(ROWS[:2], [17, 20], 1, np.int64(9), 0.5, [], [1, 2], 2.0)
        assert watch.count == first > 0
        run(ROWS[:2], 33, 0.71, 7, 0.9, [2], [1, 2], 1.1)  # another bucket: the watch does work
        assert watch.count > first


def test_settings_may_differ_from_row_to_row(params):
    prompts = Prompts.of([ROWS[0]] * 3)
    mixed = decode(
        MODEL,
        params,
        prompts,
        max_new_tokens=12,
        transform=chain(temperature([0.0, 1.5, 1.5]), top_k([0, 1, 0])),
        sampler=categorical(),
        seeds=[1, 2, 3],
    ).rows()
    assert mixed[0] == mixed[1] == _recomputed(params, ROWS[0], 12) != mixed[2]


def test_a_key_gives_each_row_its_own_randomness(params):
    def sample(seed):
        prompts = Prompts.of([ROWS[0]] * 2)
        key = jax.random.key(seed)
        return decode(
            MODEL, params, prompts, max_new_tokens=12, sampler=categorical(), key=key
        ).rows()

    assert sample(0) == sample(0) != sample(1)
    assert sample(0)[0] != sample(0)[1]


def test_a_sharded_model_writes_the_same_text(params):
    alone = decode(MODEL, params, Prompts.of(ROWS), max_new_tokens=20)
    prompts = Prompts.of(ROWS[:3])  # three rows, which no mesh axis divides
    mesh = build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        axes = parameters.logical_axes(MODEL.config)
        shardings = parameter_shardings(axes, MODEL.abstract_params(), mesh)
        sharded = decode(MODEL, jax.device_put(params, shardings), prompts, max_new_tokens=20)
    assert sharded.rows() == alone.rows()[:3]
    np.testing.assert_allclose(sharded.logprobs, alone.logprobs[:3], atol=1e-5)
    assert sharded.tokens.sharding.is_fully_replicated


def test_bfloat16_decodes_with_float32_logprobs():
    model = Transformer(ModelConfig(V, d_model=32, n_layers=2, dtype="bfloat16"))
    generation = decode(model, model.init(jax.random.key(0)), Prompts.of(ROWS), max_new_tokens=8)
    assert generation.logprobs.dtype == jnp.float32
    assert np.isfinite(generation.logprobs).all()


def test_too_long_a_text_is_refused_before_anything_is_compiled():
    # 8 prompt tokens + 88 fill the 96 positions exactly; the 97th is one too many.
    assert check_prompts(ModelPredictor(MODEL), Prompts.of([[1] * 8]), 88)
    with (
        CompileWatch() as watch,
        pytest.raises(ConfigError, match=r"prompt 1 has 9 .*=88.* 97,.*96"),
    ):
        decode(MODEL, {}, Prompts.of([[1] * 3, [1] * 9]), max_new_tokens=88)
    assert watch.count == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompts": Prompts(np.ones((1, 2), np.int32), np.array([0]))}, ConfigError, "BOS"),
        ({"prompts": Prompts(np.ones((1, 2), np.int32), np.array([3]))}, ConfigError, "1 to 2"),
        ({"prompts": Prompts(np.ones(2, np.int32), np.array([1]))}, ConfigError, r"\[B, P\]"),
        ({"prompts": Prompts.of([[1, 2], [4, V]])}, DataError, "prompt 1 has id 61 at position 1"),
        ({"prompts": Prompts.of([[1], [-1]])}, DataError, "prompt 1 has id -1"),
        ({"max_new_tokens": 0}, ConfigError, "at least 1"),
        ({"max_new_tokens": 2.5}, ConfigError, "max_new_tokens=2.5"),
        ({"max_new_tokens": [1, 2, 3]}, ConfigError, "an integer or 1"),
        ({"sampler": categorical()}, ConfigError, "give seeds"),
        ({"sampler": categorical(), "seeds": [1, 2]}, ConfigError, "1 integers"),
        ({"seeds": [2**32]}, ConfigError, "0 to 4294967295, not 4294967296"),
        ({"seeds": [-1]}, ConfigError, "not -1"),
        ({"seeds": [1], "key": 0}, ConfigError, "not both"),
    ],
)
def test_what_cannot_be_meant_is_refused(change, error, message):
    given = {"prompts": Prompts.of([[1]]), "max_new_tokens": 4, "sampler": greedy(), **change}
    with pytest.raises(error, match=message):
        decode(MODEL, {}, given.pop("prompts"), stop=never(), **given)


def test_prompts_without_tokens_are_refused():
    with pytest.raises(ConfigError, match="prompt 1 has no tokens"):
        Prompts.of([[1], []])
    with pytest.raises(ConfigError, match="no prompts"):
        Prompts.of([])


def test_buckets_are_few_and_waste_at_most_a_quarter():
    sizes = [bucket(n) for n in range(1, 4097)]
    assert all(n <= size <= max(16, n + 15, 1.25 * n) for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 32
    assert all(bucket(size) == size for size in sizes)


def test_samples_of_a_prompt_are_those_of_the_prompt_repeated(params):
    rows = [[3, 1, 4, 1, 5], [9, 2]]
    common = {"max_new_tokens": 9, "sampler": categorical()}
    several = decode(MODEL, params, Prompts.of(rows), samples=3, seeds=range(6), **common)
    repeated = Prompts.of([row for row in rows for _ in range(3)])
    expected = decode(MODEL, params, repeated, seeds=range(6), **common)
    assert several.rows() == expected.rows()
    assert len({tuple(row) for row in several.rows()}) > 3
    np.testing.assert_allclose(several.logprobs, expected.logprobs, rtol=1e-4, atol=1e-5)
    limited = decode(MODEL, params, Prompts.of(rows), samples=2, max_new_tokens=np.array([4, 7]))
    assert limited.lengths.tolist() == [4, 4, 7, 7]


def test_impossible_samples_are_refused(params):
    with pytest.raises(ConfigError, match="samples=0"):
        decode(MODEL, params, Prompts.of([[1]]), samples=0, max_new_tokens=2)
    with pytest.raises(ConfigError, match="seeds must be 4 integers"):
        decode(MODEL, params, Prompts.of([[1], [2]]), samples=2, max_new_tokens=2, seeds=[1, 2])


@struct.dataclass
class _MarginOver:
    """How far the likeliest token leads, over a given number."""

    least: Any

    def __call__(self, context):
        best = jax.lax.top_k(context.logits, 2)[0]
        return best[:, 0] - best[:, 1] - self.least


def _last(context):
    return context.last


def test_recorded_signals_are_those_of_the_token_they_stand_beside(params):
    record = {"margin": _MarginOver(np.float32(0.5)), "token": _last}
    limits = [12, 5, 12, 12]
    prompts = Prompts.of(ROWS)
    found = decode(MODEL, params, prompts, max_new_tokens=limits, samples=2, record=record)
    np.testing.assert_array_equal(found.recorded["token"], found.tokens)
    for b, new in enumerate(found.rows()):
        row = ROWS[b // 2]
        logits = np.sort(_scored(params, [*row, *new])[1][0])
        behind = slice(len(row) - 1, len(row) - 1 + len(new))
        expected = (logits[:, -1] - logits[:, -2])[behind] - 0.5
        np.testing.assert_allclose(found.recorded["margin"][b, : len(new)], expected, atol=1e-4)
        np.testing.assert_array_equal(found.recorded["margin"][b, len(new) :], 0)
    compiled = _run._cache_size()
    other = {**record, "margin": _MarginOver(np.float32(1.5))}
    decode(MODEL, params, prompts, max_new_tokens=limits, samples=2, record=other)
    assert _run._cache_size() == compiled


def test_a_predictors_signals_reach_transforms_stops_and_records(params):
    found = decode(
        _Counting(),
        np.float32(0),
        Prompts.of([[1], [2, 3]]),
        max_new_tokens=8,
        transform=_ByCount(),
        stop=_AtCount(np.array(4)),
        record={"count": lambda context: context.signals["count"]},
    )
    assert found.rows() == [[0, 1, 2, 3, 4]] * 2
    np.testing.assert_array_equal(found.recorded["count"][:, :5], [[0, 1, 2, 3, 4]] * 2)


@dataclass(frozen=True)
class _Counting:
    """Knows nothing but how many tokens it was given."""

    vocab_size: int = 16
    max_positions: int = 64

    def prepare(self, params):
        return params

    def init(self, prepared, prompts, capacity):
        count = jnp.zeros(prompts.tokens.shape[0], jnp.int32)
        return count, self._said(count)

    def step(self, prepared, state, tokens):
        return state + 1, self._said(state + 1)

    def _said(self, count):
        return StepOutput(jnp.zeros((count.shape[0], self.vocab_size)), {"count": count})


@struct.dataclass
class _ByCount(Memoryless):
    """Allows only the token whose id is the count."""

    def update(self, logits, state, context):
        allowed = jnp.arange(logits.shape[1]) == context.signals["count"][:, None]
        return jnp.where(allowed, logits, -jnp.inf), state


@struct.dataclass
class _AtCount:
    """Ends a row at a count."""

    count: Any

    def __call__(self, context):
        return context.signals["count"] == self.count
