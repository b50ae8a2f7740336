import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.models.attention import Scores, dense_attention, visible_keys
from tokjax.models.cudnn_attention import by_documents, one_document

B, T, H, D = 2, 12, 2, 8


def _attend(q, k, v, mask, *, causal):
    """The kernel's meaning, in the place of the kernel."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=0.5, is_causal=causal)


def _expected(q, k, v, segments, causal):
    places = jnp.broadcast_to(jnp.arange(T), (B, T))
    mask = visible_keys(
        places, places, causal=causal, query_segments=segments, key_segments=segments
    )
    return dense_attention(q, k, v, mask, Scores(0.5, causal=causal))[0]


def test_only_rows_whose_text_sees_one_document_count_as_one():
    def is_one(row, causal=True):
        return bool(one_document(jnp.array([[1, 1, 1, 1], row]), causal))

    assert is_one([1, 1, 1, 1]) and is_one([3, 3, 3, 3]) and is_one([1, 1, 0, 0])
    assert not is_one([1, 1, 2, 2]) and not is_one([0, 0, 1, 1]) and not is_one([1, 0, 0, 1])
    # Without causality text sees the filling behind it.
    assert not is_one([1, 1, 0, 0], causal=False) and is_one([1, 1, 1, 1], causal=False)


@pytest.mark.parametrize("causal", [True, False])
def test_branches_give_what_a_mask_gives_and_so_do_their_gradients(causal):
    attend = functools.partial(_attend, causal=causal)
    q, k, v, d_out = jax.random.normal(jax.random.key(0), (4, B, T, H, D))

    @jax.jit
    def both(segments):
        text = (segments > 0)[..., None, None]

        def loss(function, *qkv):
            return (jnp.where(text, function(*qkv), 0.0) * d_out).sum()

        def found(*qkv):
            return by_documents(attend, causal, *qkv, segments)

        def expected(*qkv):
            return _expected(*qkv, segments, causal)

        return [
            (
                jnp.where(text, f(q, k, v), 0.0),
                jax.grad(functools.partial(loss, f), (0, 1, 2))(q, k, v),
            )
            for f in (found, expected)
        ]

    whole = np.ones((B, T), np.int32)
    padded, packed = whole.copy(), whole.copy()
    padded[1, 7:], packed[0, 5:] = 0, 2
    for segments in (whole, padded, packed):
        found, expected = both(segments)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
