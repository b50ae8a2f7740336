"""Signals as capture functions: reduced inside the layer loop, nothing long is kept."""

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.models import ModelConfig, Transformer
from tokjax.signals import (
    attention_received,
    cosine_to_bos,
    effective_rank,
    head_mean,
    init_moments,
    init_pair_cosines,
    massive_activations,
    mean_pair_cosine,
    merge_moments,
    merge_pair_cosines,
    pair_cosines,
    spectrum,
    state_moments,
    visible_pairs,
)


def test_reduced_inside_the_backbone_equals_reduced_afterwards():
    L, D = 2, 16
    model = Transformer(ModelConfig(vocab_size=17, d_model=D, n_layers=L, n_heads=2))
    params = model.init(jax.random.key(0))
    tokens = jnp.arange(12).reshape(2, 6)
    mask = jnp.array([[True] * 6, [True] * 4 + [False] * 2])

    def of_attention(probs):
        return attention_received(head_mean(probs), visible_pairs(mask))

    def of_states(x):
        geometry = state_moments(x, mask), pair_cosines(x, mask)
        return (*geometry, cosine_to_bos(x), massive_activations(x, mask))

    functions = {
        "attn_probs": lambda probs: (of_attention(probs), probs),
        "resid_post": lambda x: (of_states(x), x),
    }

    @jax.jit
    def run(params):
        found = model.backbone(params, model.embed(params, tokens), capture=functions).captured
        (mass, probs), (reduced, states) = found["attn_probs"], found["resid_post"]
        # The layer axis in front is one more leading axis to the same functions.
        return (mass, *reduced), (of_attention(probs), *of_states(states))

    inside, afterwards = run(params)
    assert inside[0].shape == (L, *tokens.shape)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # noqa: E731
    jax.tree.map(close, inside, afterwards)
    _, moments, cosines, *_ = inside
    total = merge_moments(init_moments(D, L), moments)
    assert effective_rank(spectrum(total, centred=False)).shape == (L,)
    total = merge_pair_cosines(init_pair_cosines(D, L), cosines)
    assert mean_pair_cosine(total).shape == (L,)
