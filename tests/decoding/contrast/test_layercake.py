import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.decoding import ModelPredictor, Prompts, decode
from tokjax.decoding.contrast import layercake
from tokjax.decoding.contrast.layercake import (
    layer_thresholds,
    layercake_options,
    layercake_scores,
    score_answers,
)
from tokjax.errors import ConfigError
from tokjax.models import Edits, Suppression, parameters
from tokjax.parallel.rules import parameter_shardings
from tokjax.training.compiles import CompileWatch

NEW = 10
WIDTH, V, L = 48, 61, 2
INTACT, CONCEPT, PUNCTUATION = (
    jnp.log(jnp.array(p, jnp.float32))
    for p in (
        [0.40, 0.35, 0.15, 0.07, 0.03],
        [0.55, 0.20, 0.15, 0.05, 0.05],
        [0.35, 0.40, 0.15, 0.06, 0.04],
    )
)
# Ids divisible by five are punctuation, other even ones concepts; the first token is punctuation.
NEW_PUNCTUATION = np.arange(V) % 5 == 0
NEW_CONCEPT = (np.arange(V) % 2 == 0) & ~NEW_PUNCTUATION


def classes(rows, of_ids, first):
    return [[first if i == 0 else bool(of_ids[token]) for i, token in enumerate(r)] for r in rows]


def settings(rows, **changes):
    given = {
        "punctuation": classes(rows, NEW_PUNCTUATION, True),
        "concept": classes(rows, NEW_CONCEPT, False),
        "punctuation_layers": (0, 0),
        "concept_layers": (1, 1),
        "plausibility": 0.02,
    }
    return {**given, **changes}


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [(0.0, [0.2059, 0.2795, 0.2259, 0.2887, 0]), (1.0, [0.3516, 0.4176, 0.1446, 0.0862, 0])],
)
def test_scores_are_the_papers(alpha, expected):
    scores = layercake_scores(INTACT, [CONCEPT, PUNCTUATION], alpha)
    np.testing.assert_allclose(jax.nn.softmax(scores), expected, atol=5e-5)
    spelled = (1 + alpha) * INTACT - (CONCEPT + PUNCTUATION) / 2
    np.testing.assert_allclose(scores[:4], spelled[:4], atol=1e-6)
    # Each contrast normalised: a constant a row, the same distribution.
    normalised = layercake_scores(INTACT, [CONCEPT, PUNCTUATION], alpha, renormalize=True)
    np.testing.assert_allclose(jax.nn.softmax(normalised), expected, atol=5e-5)
    scored = layercake_scores(INTACT, [CONCEPT, PUNCTUATION], alpha, sentinel=-1000.0)
    assert scored[4] == -1000
    np.testing.assert_array_equal(scored[:4], scores[:4])


def test_undamaged_passes_leave_nothing_or_the_intact_prediction():
    zero = layercake_scores(INTACT, [INTACT, INTACT], 0.0)
    np.testing.assert_array_equal(zero[:4], 0)
    assert jnp.isneginf(zero[4])
    one = layercake_scores(INTACT, [INTACT, INTACT], 1.0)
    np.testing.assert_allclose(one[:4], INTACT[:4], atol=1e-7)


def test_option_letters_are_contrasted_in_probabilities():
    options = jnp.array([1, 3])
    found = layercake_options(INTACT, [CONCEPT, PUNCTUATION], options, 1.0)
    p, c, q = (
        np.exp(a)[options] / np.exp(a)[options].sum() for a in (INTACT, CONCEPT, PUNCTUATION)
    )
    np.testing.assert_allclose(found, 2 * p - (c + q) / 2, atol=1e-6)


def damaged(lm, ids, columns, by, thresholds, rows):
    """Log-probabilities [T, V] of one text without a cache, damaged in some rows."""

    def wide(flags):
        padded = np.zeros((L, 1, WIDTH), bool)
        padded[:, :, : len(flags)] = flags
        return padded

    given = Suppression(wide(columns), wide(rows), thresholds, np.full(L, -100.0, np.float32), by)
    return lm.logp(ids, Edits(suppression=(given,)))


def reference(lm, ids, punctuation, concept, alpha, share, damaged_rows=None):
    """Scores of a text's last position: intact and damaged passes without a cache."""
    rows = np.arange(len(ids)) == len(ids) - 1 if damaged_rows is None else damaged_rows
    intact = lm.logp(ids)[-1]
    c = damaged(lm, ids, concept, "row", np.array([2, 0.05], np.float32), rows)[-1]
    p = damaged(lm, ids, punctuation, "column", np.array([0.1, 2], np.float32), rows)[-1]
    scores = (1 + alpha) * intact - (c + p) / 2
    return np.where(np.exp(intact) >= share * np.exp(intact).max(), scores, -np.inf), (c, p, intact)


@pytest.mark.parametrize("extended", [False, True])
def test_decoding_equals_recomputation_with_damage_on_the_last_row_only(
    lm, rows, check_recomputed, extended
):
    further = {"new_punctuation": NEW_PUNCTUATION, "new_concept": NEW_CONCEPT} if extended else {}
    generation = decode(
        *layercake(lm.model, lm.params, **settings(rows, alpha=0.5, **further)),
        Prompts.of(rows),
        max_new_tokens=NEW,
    )
    harm = []
    for b, row in enumerate(rows):

        def flags(ids, of_ids, first, row=row):
            known = len(ids) if extended else len(row)
            return [first if i == 0 else bool(of_ids[t]) for i, t in enumerate(ids[:known])]

        def scores(ids, flags=flags):
            punctuation, concept = flags(ids, NEW_PUNCTUATION, True), flags(ids, NEW_CONCEPT, False)
            found, (c, p, intact) = reference(lm, ids, punctuation, concept, 0.5, 0.02)
            harm.append((np.abs(c - intact).max(), np.abs(p - intact).max()))
            return found

        check_recomputed(generation, b, row, scores)
    assert (np.max(harm, axis=0) > 0.1).all()  # both passes are damaged


def test_damaged_keys_never_enter_the_cache(lm, rows):
    predictor, params = layercake(lm.model, lm.params, **settings(rows))
    plain = ModelPredictor(lm.model)
    prompts, capacity = Prompts.of(rows), 24
    new = jnp.array([[4, 8], [15, 16], [23, 42], [5, 9]], jnp.int32)

    prepared = jax.jit(predictor.prepare)(params)
    state, _ = jax.jit(lambda p: predictor.init(p, prompts, capacity))(prepared)
    intact, _ = jax.jit(lambda p: plain.init(p, prompts, capacity))(prepared.model)
    step, plain_step = jax.jit(predictor.step), jax.jit(plain.step)
    for t in range(2):
        state, _ = step(prepared, state, new[:, t])
        intact, _ = plain_step(prepared.model, intact, new[:, t])
    cache = state.cache
    assert cache.lengths.tolist() == [len(row) + 2 for row in rows]
    for ours, theirs in zip(cache.keys + cache.values, intact.keys + intact.values, strict=True):
        for b, n in enumerate(intact.lengths):
            np.testing.assert_allclose(ours[b, :, :n], theirs[b, :, :n], atol=1e-5)

    # Written to the cache, damaged keys would be read by later rows: damage in all rows since the
    # prompt's last is what a damaged pass with a cache of its own computes.
    ids = rows[2] + [4, 8, 15, 16]
    punctuation = classes([ids], NEW_PUNCTUATION, True)[0]
    concept = classes([ids], NEW_CONCEPT, False)[0]
    written = np.arange(len(ids)) >= len(rows[2]) - 1
    right, wrong = (
        reference(lm, ids, punctuation, concept, 0.0, 0.0, which)[0] for which in (None, written)
    )
    assert np.abs(right - wrong).max() > 0.05


def test_thresholds_above_one_leave_the_plain_text(lm, rows):
    nothing = [[False] * len(row) for row in rows]
    for off in (
        {"concept_threshold": 1.0, "punctuation_threshold": 2.0},
        {"punctuation": nothing, "concept": nothing},
    ):
        given = layercake(lm.model, lm.params, **settings(rows, alpha=1.0, **off))
        found = decode(*given, Prompts.of(rows), max_new_tokens=NEW)
        for row, new in zip(rows, found.rows(), strict=True):
            logp = lm.logp([*row, *new])
            assert new == logp[len(row) - 1 : -1].argmax(-1).tolist()


def test_new_values_compile_nothing_and_rows_are_independent(lm, rows):
    def run(rows, **changes):
        given = layercake(lm.model, lm.params, **settings(rows, **changes))
        return decode(*given, Prompts.of(rows), max_new_tokens=NEW).rows()

    together = run(rows)
    with CompileWatch() as watch:
        assert run([rows[1]] * 4) == together[1:2] * 4
        assert run([rows[2]] * 4) == together[2:3] * 4
        other = run(
            rows,
            alpha=2,
            concept_layers=(0, 1),
            punctuation_layers=(1, 1),
            concept_threshold=0.3,
            punctuation_threshold=0.01,
            plausibility=0.5,
        )
        assert watch.count == 0
    assert other != together


def test_samples_of_a_prompt_have_its_classes_and_alpha(lm, rows):
    def run(which, alpha, samples):
        texts = [rows[i] for i in which]
        given = layercake(lm.model, lm.params, **settings(texts, alpha=alpha))
        return decode(*given, Prompts.of(texts), max_new_tokens=NEW, samples=samples).rows()

    assert run([2, 3], [0.5, 2.0], 2) == run([2, 2, 3, 3], [0.5, 0.5, 2.0, 2.0], 1)


def test_a_single_pass_with_both_damages_is_another_variant(lm, rows):
    row = rows[2]
    given = settings([row], alpha=0.0, plausibility=0.0, single=True)
    predictor, params = layercake(lm.model, lm.params, **given)
    _, out = jax.jit(lambda p: predictor.init(predictor.prepare(p), Prompts.of([row]), 16))(params)
    columns = np.zeros((2, L, 1, WIDTH), bool)
    columns[0, :, :, : len(row)], columns[1, :, :, : len(row)] = (
        given["concept"][0],
        given["punctuation"][0],
    )
    last = np.broadcast_to(np.arange(WIDTH) == len(row) - 1, (L, 1, WIDTH))
    score = np.full(L, -100.0, np.float32)
    both = (
        Suppression(columns[0], last, np.array([2, 0.05], np.float32), score, "row"),
        Suppression(columns[1], last, np.array([0.1, 2], np.float32), score, "column"),
    )
    expected = lm.logp(row)[-1] - lm.logp(row, Edits(suppression=both))[-1]
    np.testing.assert_allclose(out.logits[0], expected, atol=2e-4)


def test_unrestricted_punctuation_passes_suppress_whatever_gets_attention(lm, rows):
    row = rows[2]
    # No concepts take more than all of a row's attention: 1 switches their pass off.
    off = {"concept_threshold": 1.0, "restrict_to_punctuation": False}
    given = settings([row], alpha=0.0, plausibility=0.0, **off)
    predictor, params = layercake(lm.model, lm.params, **given)
    _, out = jax.jit(lambda p: predictor.init(predictor.prepare(p), Prompts.of([row]), 16))(params)
    rows_ = np.arange(len(row)) == len(row) - 1
    thresholds = np.array([0.1, 2], np.float32)
    harmed = damaged(lm, row, [True] * len(row), "column", thresholds, rows_)[-1]
    expected = (lm.logp(row)[-1] - harmed) / 2
    np.testing.assert_allclose(out.logits[0], expected, atol=2e-4)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5])
def test_scored_answers_damage_every_predicting_row(lm, rows, threshold):
    # Behind the second text is filling, whose attention must not count.
    texts = [rows[2], rows[0] + [44, 12, 3, 8]]
    starts = np.array([4, 7])
    given = settings(texts, alpha=[0.0, 1.0], punctuation_threshold=threshold, plausibility=0.1)
    predictor, params = layercake(lm.model, lm.params, **given)
    found = score_answers(predictor, params, Prompts.of(texts), starts)
    concept_threshold = np.array([2, 0.05], np.float32)
    punctuation_threshold = np.array([threshold, 2], np.float32)
    for b, (ids, start, alpha) in enumerate(zip(texts, starts, (0.0, 1.0), strict=True)):
        answering = np.arange(len(ids)) >= start - 1
        intact = lm.logp(ids)
        c = damaged(lm, ids, given["concept"][b], "row", concept_threshold, answering)
        p = damaged(lm, ids, given["punctuation"][b], "column", punctuation_threshold, answering)
        kept = np.exp(intact) >= 0.1 * np.exp(intact).max(-1, keepdims=True)
        expected = np.where(kept, (1 + alpha) * intact - (c + p) / 2, -1000)
        np.testing.assert_allclose(found[b, : len(ids)], expected, atol=5e-4)


def test_a_sharded_model_writes_the_same_text(lm, rows, mesh):
    predictor, params = layercake(lm.model, lm.params, **settings(rows, alpha=0.5))
    alone = decode(predictor, params, Prompts.of(rows), max_new_tokens=NEW)
    shardings = parameter_shardings(
        parameters.logical_axes(lm.model.config), lm.model.abstract_params(), mesh
    )
    with jax.set_mesh(mesh):
        placed = params.replace(model=jax.device_put(lm.params, shardings))
        sharded = decode(predictor, placed, Prompts.of(rows), max_new_tokens=NEW)
    assert sharded.rows() == alone.rows()
    np.testing.assert_allclose(sharded.logprobs, alone.logprobs, atol=1e-3)


def test_layer_ranges_include_both_ends():
    np.testing.assert_allclose(layer_thresholds(4, (1, 2), 0.05), [2, 0.05, 0.05, 2])
    for layers in ((2, 1), (-1, 2), (0, 4)):
        with pytest.raises(ConfigError, match="of 0 to 3"):
            layer_thresholds(4, layers, 0.05)


def test_what_cannot_be_meant_is_refused(lm, rows):
    with pytest.raises(ConfigError, match=r"concept \(3, 16\) must have a value for each token"):
        decode(
            *layercake(
                lm.model, lm.params, **settings(rows, concept=settings(rows)["concept"][:3])
            ),
            Prompts.of(rows),
            max_new_tokens=NEW,
        )
    with pytest.raises(ConfigError, match=r"new_concept \(5,\).* 61 ids"):
        layercake(lm.model, lm.params, **settings(rows, new_concept=np.ones(5, bool)))
    with pytest.raises(ConfigError, match="one value for each token of each prompt"):
        layercake(lm.model, lm.params, **settings(rows, concept=[True, False]))
