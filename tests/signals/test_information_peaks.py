import jax
import numpy as np
import pytest

from tokjax.errors import ConfigError
from tokjax.models import ModelConfig, Transformer
from tokjax.signals.hsic import normalised_hsic
from tokjax.signals.information_peaks import (
    mi_curves,
    outlier_peaks,
    peak_tokens,
    top_peaks,
)

MODEL = Transformer(ModelConfig(vocab_size=61, d_model=32, n_layers=2, n_heads=4, max_positions=96))
PROMPTS = [[5, 9, 2], [7], [3, 1]]
TEXTS = [[8, 8, 30, 2], [1, 2, 3, 4, 5, 6, 7], []]
SOLUTIONS = [[4, 4], [60, 1, 1, 1, 9], [2]]


@pytest.fixture(scope="module")
def params():
    params = MODEL.init(jax.random.key(1))
    return {**params, "embedding": 50 * params["embedding"]}


@pytest.mark.parametrize("layer", [0, 1])
def test_a_value_belongs_to_the_token_that_its_state_predicts(params, layer):
    def block_output(ids):
        out = MODEL.backbone(params, MODEL.embed(params, np.array([ids])), capture={"resid_post"})
        return np.asarray(out.captured["resid_post"][layer, 0])

    curves = mi_curves(
        MODEL, params, PROMPTS, TEXTS, SOLUTIONS, layer=layer, sigma=1.0, batch_size=2
    )
    assert [len(curve) for curve in curves] == [4, 7, 0]
    for curve, prompt, text, solution in zip(
        curves[:2], PROMPTS[:2], TEXTS[:2], SOLUTIONS[:2], strict=True
    ):
        gold = block_output(solution)[-1]
        for t, value in enumerate(curve):
            # All that is read is what comes before the token.
            own = block_output([*prompt, *text[:t]])[-1]
            expected = float(normalised_hsic(own, gold, sigma=1.0))
            assert value == pytest.approx(expected, rel=1e-3)


def test_another_solution_gives_another_curve(params):
    given = {"layer": 1, "sigma": 1.0}
    own = mi_curves(MODEL, params, PROMPTS, TEXTS, SOLUTIONS, **given)
    other = mi_curves(MODEL, params, PROMPTS, TEXTS, SOLUTIONS[::-1], **given)
    assert np.abs(own[0] - other[0]).max() > 1e-2
    # The middle row's solution is the same.
    np.testing.assert_allclose(own[1], other[1])


def test_peaks_are_outliers_or_the_largest():
    curve = np.array([1.0, 1.1, 0.9, 5.0, 1.0, 1.05, 4.0, 0.95, 1.0, 1.0, 1.1, 0.9])
    assert outlier_peaks(curve).tolist() == [3, 6]
    low, high = np.quantile(curve, [0.25, 0.75])
    assert outlier_peaks(curve, factor=(4.5 - high) / (high - low)).tolist() == [3]
    assert top_peaks(curve, 3).tolist() == [1, 3, 6]
    assert top_peaks(curve, 2, first=6).tolist() == [1, 3]
    assert top_peaks(curve).tolist() == list(range(12))
    assert outlier_peaks(np.ones(5)).tolist() == outlier_peaks(np.zeros(0)).tolist() == []


def test_peak_tokens_are_counted_over_texts():
    found = peak_tokens(TEXTS, [[2, 0], np.array([0]), []])
    assert dict(found) == {30: 1, 8: 1, 1: 1}


def test_rows_that_do_not_fit_are_refused(params):
    with pytest.raises(ConfigError, match="layer=2 must be 0 to 1"):
        mi_curves(MODEL, params, PROMPTS, TEXTS, SOLUTIONS, layer=2)
    with pytest.raises(ConfigError, match="3 prompts, 3 texts and 2 solutions"):
        mi_curves(MODEL, params, PROMPTS, TEXTS, SOLUTIONS[:2], layer=0)
    with pytest.raises(ConfigError, match="solution 1 has no tokens"):
        mi_curves(MODEL, params, PROMPTS, TEXTS, [[1], [], [1]], layer=0)
    with pytest.raises(ConfigError, match="101 tokens is longer"):
        mi_curves(MODEL, params, [[1]], [[1] * 100], [[1]], layer=0)
