import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tokjax.decoding import Prompts, decode
from tokjax.decoding.contrast import dola
from tokjax.decoding.contrast.dola import (
    candidate_layers,
    dola_scores,
    early_exit_logits,
    select_layer,
)
from tokjax.errors import ConfigError
from tokjax.signals.divergences import js_divergence
from tokjax.training.compiles import CompileWatch

NEW = 12


def logp(*rows):
    return jnp.log(jnp.array(rows, jnp.float32))


def test_both_divergences_choose_the_papers_layer():
    final, early = logp([0.5, 0.3, 0.1, 0.1]), logp([[0.4, 0.4, 0.1, 0.1]], [[0.1, 0.2, 0.3, 0.4]])
    for form, expected in (
        ("definition", [0.006367, 0.152158]),
        ("dola_code", [0.001601, 0.044456]),
    ):
        apart = [float(js_divergence(final[0], each[0], form=form)) for each in early]
        np.testing.assert_allclose(apart, expected, atol=1e-6)
        chosen, prediction = select_layer(final, early, form)
        assert chosen.tolist() == [1]
        np.testing.assert_array_equal(prediction, early[1])


def test_each_row_chooses_its_own_layer():
    final = logp([0.5, 0.3, 0.2], [0.5, 0.3, 0.2])
    near, far = [0.5, 0.25, 0.25], [0.1, 0.1, 0.8]
    chosen, _ = select_layer(final, jnp.stack([logp(near, far), logp(far, near)]))
    assert chosen.tolist() == [1, 0]


def test_scores_are_the_papers():
    final, early = logp([0.70, 0.20, 0.06, 0.04])[0], logp([0.40, 0.30, 0.05, 0.25])[0]
    np.testing.assert_allclose(
        dola_scores(final, early, 0.0), [0.5596, -0.4055, 0.1823, -1.8326], atol=5e-5
    )
    kept = dola_scores(final, early)
    np.testing.assert_allclose(jax.nn.softmax(kept), [0.7241, 0.2759, 0, 0], atol=5e-5)
    np.testing.assert_allclose(
        dola_scores(final, early, scoring=True), [-0.7692, -1.7343, -1000, -1000], atol=5e-5
    )


def test_buckets_are_the_papers():
    expected = {
        32: (range(0, 15, 2), range(16, 31, 2)),
        40: (range(0, 19, 2), range(20, 39, 2)),
        60: (range(0, 19, 2), range(40, 59, 2)),
        80: (range(0, 19, 2), range(60, 79, 2)),
    }
    for depth, (low, high) in expected.items():
        assert candidate_layers(depth, "low") == tuple(low)
        assert candidate_layers(depth, "high") == tuple(high)
    for depth in (1, 2, 3, 7, 24, 100):
        for bucket in ("low", "high"):
            found = candidate_layers(depth, bucket)
            assert found
            assert 0 <= min(found) <= max(found) < depth
    with pytest.raises(ConfigError, match="'low' or 'high'"):
        candidate_layers(32, "middle")


@pytest.mark.parametrize("final_norm", [False, True])
def test_decoding_equals_recomputation_without_a_cache(
    lm, rows, check_recomputed, masked, final_norm
):
    layers, choices = (0, 1), set()
    generation = decode(
        *dola(lm.model, lm.params, layers=layers, final_norm=final_norm, plausibility=0.02),
        Prompts.of(rows),
        max_new_tokens=NEW,
    )
    scale = np.asarray(lm.params["norm"], np.float64)
    head = np.asarray(lm.params["head"], np.float64)

    def scores(ids):
        logits, states = lm.run(ids)
        final = scipy.special.log_softmax(logits[-1])
        states = np.asarray(states, np.float64)[:, -1]
        if final_norm:
            eps = lm.model.config.norm_eps
            states = states / np.sqrt((states**2).mean(-1, keepdims=True) + eps) * scale
        early = scipy.special.log_softmax(states @ head.T, axis=-1)
        middle = np.log((np.exp(final) + np.exp(early)) / 2)
        apart = [
            (np.exp(final) * (final - m)).sum() + (np.exp(e) * (e - m)).sum()
            for e, m in zip(early, middle, strict=True)
        ]
        choices.add(int(np.argmax(apart)))
        return masked(final - early[np.argmax(apart)], final, 0.02)

    for b, row in enumerate(rows):
        check_recomputed(generation, b, row, scores)
    if not final_norm:
        assert len(choices) > 1  # the layer is chosen anew


def test_one_candidate_is_the_static_form_and_other_layers_compile_nothing(lm, rows):
    def run(layers, plausibility=0.1):
        given = dola(lm.model, lm.params, layers=layers, plausibility=plausibility)
        return decode(*given, Prompts.of(rows), max_new_tokens=NEW).rows()

    first = run([0])
    with CompileWatch() as watch:
        second = run([1])
        run([0], plausibility=0)
        assert watch.count == 0
    assert first != second


def test_a_row_alone_says_the_same_as_among_others(lm, rows):
    run = lambda rows: decode(  # noqa: E731
        *dola(lm.model, lm.params, layers=[0, 1]), Prompts.of(rows), max_new_tokens=NEW
    ).rows()
    assert run([rows[2]] * 4) == run(rows)[2:3] * 4


def test_a_share_of_one_leaves_the_likeliest_token(lm, rows):
    given = dola(lm.model, lm.params, layers=[0], plausibility=1.0)
    found = decode(*given, Prompts.of(rows), max_new_tokens=NEW)
    for row, new in zip(rows, found.rows(), strict=True):
        logp = lm.logp([*row, *new])
        assert new == logp[len(row) - 1 : -1].argmax(-1).tolist()


def test_the_last_layers_exit_with_the_norm_is_the_models_prediction(lm, rows):
    out = lm.model.backbone(
        lm.params, lm.model.embed(lm.params, np.array([rows[2]])), capture={"resid_post"}
    )
    exits = early_exit_logits(lm.model, lm.params, out.captured["resid_post"][-1], final_norm=True)
    np.testing.assert_allclose(exits, lm.model.unembed(lm.params, out.x), atol=1e-5)


def test_layers_that_do_not_exist_are_refused(lm):
    for layers in ([2], [-1], []):
        with pytest.raises(ConfigError, match="must be some of 0 to 1"):
            dola(lm.model, lm.params, layers=layers)
    with pytest.raises(ConfigError, match="divergence='kl'"):
        dola(lm.model, lm.params, divergence="kl")
