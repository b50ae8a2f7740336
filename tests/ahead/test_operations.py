"""The operations of traced functions: products, loops, recomputation, branches."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tokjax.ahead.operations import operations

A, B = jnp.ones((3, 4, 5)), jnp.ones((3, 5, 6))
ONE = 2 * 3 * 4 * 5 * 6


def count(function, *arguments):
    return operations(jax.make_jaxpr(function)(*arguments))


def test_a_product_counts_two_for_each_pair_of_numbers():
    assert count(lambda a, b: a @ b, A, B) == ONE
    assert count(lambda a: a + a, A) == 0


def test_a_scan_counts_as_often_as_it_runs():
    def loop(x):
        return jax.lax.scan(lambda c, _: (c @ jnp.ones((5, 5)), None), x, None, length=7)[0]

    assert count(loop, jnp.ones((2, 5))) == 7 * 2 * 2 * 5 * 5


def test_calls_inside_calls_count():
    assert count(jax.jit(lambda a, b: jax.jit(jnp.matmul)(a, b)), A, B) == ONE


def test_the_costliest_branch_of_a_condition_counts():
    def branch(a, b):
        return jax.lax.cond(a[0, 0, 0] > 0, lambda: (a @ b).sum(), lambda: 0.0)

    assert count(branch, A, B) == ONE


def test_a_gradient_takes_three_products_and_recomputation_one_more():
    def loss(w, x, wrap):
        return wrap(lambda w: jnp.sin(x @ w))(w).sum()

    w, x = jnp.ones((5, 6)), jnp.ones((4, 5))
    forward = 2 * 4 * 5 * 6
    plain = jax.grad(lambda w, x: loss(w, x, lambda f: f), argnums=(0, 1))
    assert count(plain, w, x) == 3 * forward
    again = jax.grad(lambda w, x: loss(w, x, jax.checkpoint))
    assert count(again, w, x) == (1 + 1 + 1) * forward  # forward, again, gradient of w


def test_what_each_device_does_counts_for_all():
    auto = (AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4], axis_types=auto)
    spread = jax.shard_map(lambda a, b: a @ b, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"))
    a, b = jnp.ones((8, 5)), jnp.ones((5, 6))
    assert count(spread, a, b) == 2 * 8 * 5 * 6


def test_a_kernel_counts_for_every_point_of_its_grid():
    def kernel(a, b, out):
        out[...] = a[...] @ b[...]

    product = pl.pallas_call(
        kernel,
        grid=(2, 3),
        in_specs=[
            pl.BlockSpec((4, 5), lambda i, j: (i, 0)),
            pl.BlockSpec((5, 6), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((4, 6), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((8, 18), jnp.float32),
        interpret=True,
    )
    a, b = jnp.ones((7, 8, 5)), jnp.ones((5, 18))
    assert count(product, a[0], b) == 2 * 8 * 5 * 18
    assert count(jax.vmap(product, (0, None)), a, b) == 7 * 2 * 8 * 5 * 18


def test_a_convolution_counts_its_kernel_for_every_output():
    def convolve(x, k):
        return jax.lax.conv(x, k, (1,), "VALID")

    x, k = jnp.ones((2, 3, 10)), jnp.ones((7, 3, 4))
    assert count(convolve, x, k) == 2 * (2 * 7 * 7) * 3 * 4
