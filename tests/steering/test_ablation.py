import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.errors import ConfigError
from tokjax.models import ModelConfig, Transformer
from tokjax.steering import ablate, last_states, select_tokens

SCORES = jnp.array([[9.0, 1.0, -2.0, 3.0, 3.0, 0.0], [9.0, -1.0, 2.0, 7.0, 7.0, 7.0]])
ELIGIBLE = np.array([[0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0]], bool)


def chosen(k, which):
    found = select_tokens(SCORES, ELIGIBLE, k, which)
    return [np.flatnonzero(row).tolist() for row in found]


def test_the_largest_and_the_smallest_are_taken_of_equals_the_earlier():
    assert chosen(1, "positive") == [[3], [2]]
    assert chosen(2, "positive") == [[3, 4], [2]]
    assert chosen(2, "negative") == [[2, 5], [1]]


def test_short_rows_keep_one_token():
    assert chosen(10, "positive") == [[1, 3, 4, 5], [2]]
    assert chosen(10, "negative") == [[1, 2, 3, 5], [1]]
    nobody = select_tokens(SCORES, np.zeros_like(ELIGIBLE), 3)
    assert not nobody.any()


def test_ablation_replaces_the_selected_tokens_only():
    tokens = np.array([[4, 5, 6]])
    assert ablate(tokens, np.array([[True, False, True]]), 9).tolist() == [[9, 5, 9]]


def test_last_states_are_raw_block_outputs():
    model = Transformer(ModelConfig(vocab_size=61, d_model=32, n_layers=2, n_heads=4))
    params = model.init(jax.random.key(0))
    params = {**params, "norm": 3 * params["norm"]}
    tokens, lengths = np.array([[5, 9, 2, 8], [7, 1, 0, 0]]), np.array([4, 2])
    found = last_states(model, params, tokens, lengths)
    captured = model.backbone(params, model.embed(params, tokens), capture={"resid_post"})
    expected = captured.captured["resid_post"][:, [0, 1], lengths - 1]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # Not what the final norm makes of the last one.
    assert np.abs(found[-1] - captured.x[[0, 1], lengths - 1]).max() > 0.1


def test_unknown_choices_are_refused():
    with pytest.raises(ConfigError, match="which='largest'"):
        select_tokens(SCORES, ELIGIBLE, 1, "largest")
