import jax
import jax.numpy as jnp
import numpy as np

from tokjax.models.head import Head, logits, logits_vjp


def test_logits_and_their_gradient_follow_the_formula():
    rng = np.random.default_rng(0)
    table, x = rng.normal(size=(7, 3)), rng.normal(size=(4, 3))
    bias, d_z = rng.normal(size=7), rng.normal(size=(4, 7)).astype(np.float32)
    head = Head(*(jnp.asarray(a, jnp.float32) for a in (table, bias)), softcap=2.0, scale=1.5)
    x32 = jnp.asarray(x, jnp.float32)
    z, pull = jax.vjp(logits, head, x32)
    np.testing.assert_allclose(z, 2 * np.tanh(1.5 * (x @ table.T + bias) / 2), rtol=1e-5)
    found_x, found_head = logits_vjp(head, x32, z, jnp.asarray(d_z))
    expected_head, expected_x = pull(jnp.asarray(d_z))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        (found_x, found_head),
        (expected_x, expected_head),
    )
