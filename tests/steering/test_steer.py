import jax
import numpy as np
import pytest

from tokjax.decoding import Prompts, decode
from tokjax.errors import ConfigError
from tokjax.models import Edits, ModelConfig, Transformer
from tokjax.steering import score_options, steered, steering_edits
from tokjax.training.compiles import CompileWatch

L, D, NEW = 2, 32, 14
MODEL = Transformer(
    ModelConfig(
        vocab_size=61,
        d_model=D,
        n_layers=L,
        n_heads=4,
        n_kv_heads=2,
        max_positions=96,
        tie_embeddings=False,
    )
)
ROWS = [[5, 9, 2], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]]
PROMPTS = Prompts.of(ROWS)
VECTOR = np.random.default_rng(0).normal(size=(L, D)).astype(np.float32) / 10
OPTIONS = [[[4, 5], [6]], [[8, 9, 10]], [[2], [3, 2], [4, 4, 2]]]


@pytest.fixture(scope="module")
def params():
    params = MODEL.init(jax.random.key(1))
    return {**params, "embedding": 50 * params["embedding"], "head": 3 * params["head"]}


@jax.jit
def forward(params, tokens, edits):
    logits, out = MODEL(params, tokens, edits=edits, capture={"resid_pre", "resid_post"})
    return logits, out.captured


def padded(ids):
    return np.array([[*ids, *[0] * (32 - len(ids))]], np.int32)


@pytest.mark.parametrize("layer", range(L))
def test_one_block_is_steered_by_the_formula_and_no_other(params, layer):
    tokens = padded(ROWS[2])
    _, plain = forward(params, tokens, Edits())
    _, found = forward(params, tokens, steering_edits(VECTOR, layer, 0.5))
    h = np.asarray(plain["resid_post"][layer], np.float64)
    moved = h + 10 * 0.5 * VECTOR[layer]
    norm = lambda x: np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    np.testing.assert_allclose(
        found["resid_post"][layer], moved * norm(h) / norm(moved), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        found["resid_pre"][: layer + 1], plain["resid_pre"][: layer + 1], atol=1e-6
    )
    free = steering_edits(VECTOR, layer, 0.5, keep_norm=False)
    np.testing.assert_allclose(
        forward(params, tokens, free)[1]["resid_post"][layer], moved, rtol=1e-4, atol=1e-4
    )


def test_strength_zero_leaves_the_logits_bit_for_bit(params):
    tokens = np.concatenate([padded(row) for row in ROWS])
    plain, _ = forward(params, tokens, Edits())
    found, _ = forward(params, tokens, steering_edits(VECTOR, [0, 1], 0.0))
    np.testing.assert_array_equal(found, plain)
    expected = decode(MODEL, params, PROMPTS, max_new_tokens=NEW)
    generation = decode(
        *steered(MODEL, params, VECTOR, layers=1, alpha=0), PROMPTS, max_new_tokens=NEW
    )
    jax.tree.map(np.testing.assert_array_equal, generation, expected)


def test_steered_decoding_equals_recomputation_row_by_row(params):
    strengths = [0.0, 0.5, -1.0]
    generation = decode(
        *steered(MODEL, params, VECTOR, layers=0, alpha=strengths), PROMPTS, max_new_tokens=NEW
    )
    for b, alpha in enumerate(strengths):
        ids = list(ROWS[b])
        for n in range(NEW):
            logits, _ = forward(params, padded(ids), steering_edits(VECTOR, 0, alpha))
            logp = np.asarray(jax.nn.log_softmax(logits[0, len(ids) - 1]))
            assert np.diff(np.sort(logp)[-2:])[0] > 1e-4
            assert generation.logprobs[b, n] == pytest.approx(logp.max(), abs=1e-3)
            ids.append(int(logp.argmax()))
        assert generation.rows()[b] == ids[len(ROWS[b]) :]


def test_new_strengths_layers_and_vectors_compile_nothing(params):
    decode(*steered(MODEL, params, VECTOR, layers=0, alpha=1.0), PROMPTS, max_new_tokens=NEW)
    with CompileWatch() as watch:
        other = steered(MODEL, params, -VECTOR, layers=[0, 1], alpha=3)
        decode(*other, PROMPTS, max_new_tokens=NEW)
        assert watch.count == 0


def test_options_are_scored_as_alone(params):
    for edits in (None, steering_edits(VECTOR, 1, 0.7)):
        found = score_options(MODEL, params, ROWS, OPTIONS, edits=edits, batch_size=4)
        assert [len(each.total) for each in found] == [2, 1, 3]
        for scores, prompt, options in zip(found, ROWS, OPTIONS, strict=True):
            for i, option in enumerate(options):
                ids = [*prompt, *option]
                logits, _ = forward(params, padded(ids), edits or Edits())
                logp = jax.nn.log_softmax(logits[0])
                each = [float(logp[t - 1, ids[t]]) for t in range(len(prompt), len(ids))]
                assert scores.last[i] == pytest.approx(each[-1], abs=1e-4)
                assert scores.total[i] == pytest.approx(sum(each), abs=1e-4)
                assert scores.lengths[i] == len(option)


def test_impossible_settings_are_refused(params):
    for layers in (2, -1, [0, 2], []):
        with pytest.raises(ConfigError, match="must be some of 0 to 1"):
            steering_edits(VECTOR, layers)
    with pytest.raises(ConfigError, match="alpha=inf"):
        steering_edits(VECTOR, 0, np.inf)
    with pytest.raises(ConfigError, match="and finite"):
        steering_edits(VECTOR * np.nan, 0)
    with pytest.raises(ConfigError, match=r"\(1, 32\) must be \[L, D\] = \[2, 32\]"):
        steered(MODEL, params, VECTOR[:1], layers=0)
    two = steered(MODEL, params, VECTOR, layers=0, alpha=[1, 2])
    with pytest.raises(ConfigError, match="its second axis must be 1 or the 3 prompts"):
        decode(*two, PROMPTS, max_new_tokens=NEW)
    with pytest.raises(ConfigError, match="at least one option"):
        score_options(MODEL, params, ROWS, [[[1]], [[2]], []])
    with pytest.raises(ConfigError, match="the second axis must be 1"):
        score_options(MODEL, params, ROWS, OPTIONS, edits=steering_edits(VECTOR, 0, [1, 2]))
