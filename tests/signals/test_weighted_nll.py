import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tokjax.models.head import Head
from tokjax.parallel.mesh import MeshConfig, build_mesh
from tokjax.signals import vocabulary, weighted_nll

B, T, D, V = 4, 6, 8, 33


def case(k=1, b=B, t=T, v=V, dtype=jnp.float32):
    """Random states, table, targets and weights, negative and zero ones among them."""
    rng = np.random.default_rng(k)
    x = jnp.asarray(rng.normal(size=(b, t, D)), dtype)
    table = jnp.asarray(rng.normal(size=(v, D)), dtype)
    weights = jnp.asarray(rng.normal(size=(b, t, k)), jnp.float32)
    weights = weights.at[0, 1].set(0.0)
    return x, table, jnp.asarray(rng.integers(0, v, (b, t, k)), jnp.int32), weights


def naive(x, table, targets, weights, z_loss=0.0):
    logits = jnp.einsum("btd,vd->btv", x.astype(jnp.float32), table.astype(jnp.float32))
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets, axis=-1)
    lse = jax.nn.logsumexp(logits, axis=-1)
    total = (weights * nll).sum() + z_loss * (weights.sum(-1) * lse**2).sum()
    return total, nll


def close(found, expected, **tolerance):
    tolerance = {"rtol": 1e-5, "atol": 1e-5} | tolerance
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)


def graded(fn, z_loss, scale=1.0):
    """Returns (x, table, targets, weights) -> (value, nll), gradients; jitted."""

    def total(x, table, weights, targets):
        value, nll = fn(x, table, targets, weights, z_loss)
        return scale * value, nll

    both = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
    return lambda x, table, targets, weights: both(x, table, weights, targets)


@pytest.mark.parametrize("z_loss", [0.0, 0.03])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("chunk", [5, 24])
def test_value_and_gradients_equal_the_naive_form(monkeypatch, chunk, k, z_loss):
    # 24 tokens: chunks of 5 leave one that is filled up.
    monkeypatch.setattr(vocabulary, "_CHUNK_TOKENS", chunk)
    monkeypatch.setattr(vocabulary, "_CHUNK_LOGITS", 1)
    args = case(k)
    assert float(args[3].min()) < 0
    # The factor in front checks that the cotangent reaches every gradient.
    close(graded(weighted_nll, z_loss, -1.7)(*args), graded(naive, z_loss, -1.7)(*args))


def test_value_without_a_gradient_is_the_same_number(monkeypatch):
    monkeypatch.setattr(vocabulary, "_CHUNK_TOKENS", 5)
    monkeypatch.setattr(vocabulary, "_CHUNK_LOGITS", 1)
    args = case(2)
    close(jax.jit(lambda *a: weighted_nll(*a, z_loss=0.1))(*args), naive(*args, z_loss=0.1))


def test_bias_softcap_and_scale_enter_values_and_gradients(monkeypatch):
    monkeypatch.setattr(vocabulary, "_CHUNK_TOKENS", 5)
    monkeypatch.setattr(vocabulary, "_CHUNK_LOGITS", 1)
    x, table, targets, weights = case(2)
    bias = jnp.asarray(np.random.default_rng(5).normal(size=V), jnp.float32)

    def loss(x, head):
        return weighted_nll(x, head, targets, weights, 0.03)[0]

    def plain(x, head):
        z = 2.0 * jnp.tanh(0.7 * (jnp.einsum("btd,vd->btv", x, head.table) + head.bias) / 2.0)
        return naive(z, jnp.eye(V), targets, weights, 0.03)[0]

    arguments = (x, Head(table, bias, softcap=2.0, scale=0.7))
    found, expected = (
        jax.jit(jax.value_and_grad(fn, argnums=(0, 1)))(*arguments) for fn in (loss, plain)
    )
    close(found, expected)


def test_repeated_targets_of_one_position_add_up():
    x, table, targets, weights = case(3)
    targets = jnp.broadcast_to(targets[..., :1], targets.shape)
    close(
        graded(weighted_nll, 0.0)(x, table, targets, weights)[1],
        graded(naive, 0.0)(x, table, targets, weights)[1],
    )


def test_oracle_two_targets_share_one_distribution():
    # Logits 1, 0, -1: the head is the identity over the hidden state.
    x, table = jnp.array([[[1.0, 0.0, -1.0]]]), jnp.eye(3)
    half = jnp.full((1, 1, 2), 0.5)

    def loss(x, a, b):
        return weighted_nll(x, table, jnp.array([[[a, b]]], jnp.int32), half)[0]

    np.testing.assert_allclose(loss(x, 0, 2), 1.407606, atol=1e-6)
    np.testing.assert_allclose(loss(x, 1, 1), 1.407606, atol=1e-6)
    gradient = jax.grad(loss)(x, 0, 2)[0, 0]
    np.testing.assert_allclose(gradient, [0.165241, 0.244728, -0.409969], atol=1e-6)
    nll = weighted_nll(x, table, jnp.array([[[0, 1]]], jnp.int32), half)[1]
    np.testing.assert_allclose(nll[0, 0], [0.407606, 1.407606], atol=1e-6)


def test_per_token_losses_carry_no_gradient():
    x, table, targets, weights = case()
    gradient = jax.grad(lambda x: weighted_nll(x, table, targets, weights)[1].sum())(x)
    assert not np.asarray(gradient).any()


def test_weight_zero_leaves_a_target_out():
    x, table, targets, weights = case()
    fn = graded(weighted_nll, 0.1)
    (value, _), gradients = fn(x, table, targets, weights)
    (other, _), moved = fn(x.at[0, 1].mul(5.0), table, targets.at[0, 1].set(7), weights)
    assert value == other
    assert not np.asarray(gradients[0][0, 1]).any()
    np.testing.assert_array_equal(gradients[1], moved[1])


def test_bfloat16_states_give_float32_sums_near_the_exact_ones():
    args = case(2, dtype=jnp.bfloat16)
    (value, nll), (d_x, d_table, d_weights) = graded(weighted_nll, 0.01)(*args)
    assert (value.dtype, nll.dtype, d_weights.dtype) == (jnp.float32,) * 3
    assert (d_x.dtype, d_table.dtype) == (jnp.bfloat16,) * 2
    (expected, _), gradients = graded(naive, 0.01)(*args)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for found, exact in zip((d_x, d_table, d_weights), gradients, strict=True):
        found, exact = np.asarray(found, np.float32), np.asarray(exact, np.float32)
        assert np.linalg.norm(found - exact) < 0.02 * np.linalg.norm(exact)


def test_huge_logits_stay_finite():
    x, table, targets, weights = case()
    found = graded(weighted_nll, 0.0)(x * 1e4, table, targets, weights)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"data": 2, "sequence": 2, "tensor": 2},
        {"data": 8},  # does not divide the rows: each device then computes them all
    ],
    ids=str,
)
def test_a_mesh_gives_the_same_value_and_gradients(mesh):
    args = case(2)
    expected = graded(weighted_nll, 0.02)(*args)
    mesh = build_mesh(MeshConfig(**{"data": 1, **mesh}))
    with jax.set_mesh(mesh):
        rows = tuple(a for a in ("data", "fsdp") if B % mesh.shape[a] == 0)
        tokens = NamedSharding(mesh, P(rows, "sequence"))
        table = NamedSharding(mesh, P(None, "fsdp"))
        placed = jax.device_put(args, (tokens, table, tokens, tokens))
        found = graded(weighted_nll, 0.02)(*placed)
    close(jax.device_get(found), expected)


@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_the_heads_gradient_adds_up_over_devices_in_float32(axis):
    x, table, targets, weights = case(1, b=8, t=8, v=256, dtype=jnp.bfloat16)
    args = x, table, targets, weights + 1.0
    alone = np.asarray(graded(weighted_nll, 0.0)(*args)[1][1], np.float32)
    with jax.set_mesh(build_mesh(MeshConfig(**{"data": 1, axis: 8}))):
        shared = np.asarray(graded(weighted_nll, 0.0)(*args)[1][1], np.float32)
    differ = lambda a: (a != alone).mean()  # noqa: E731
    # Each rounds once, behind all sums; the order of the sums moves a number over an edge at most.
    assert differ(shared) < 0.01
    # Sums of what each device has rounded are elsewhere.
    rows = [tuple(a if a is table else a[i : i + 1] for a in args) for i in range(8)]
    apart = [graded(weighted_nll, 0.0)(*row)[1][1].astype(jnp.float32) for row in rows]
    assert differ(np.asarray(sum(apart).astype(jnp.bfloat16), np.float32)) > 0.05


def test_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        graded(weighted_nll, 0.1)(*case(2, dtype=jnp.bfloat16))


def test_no_buffer_of_all_logits(monkeypatch):
    monkeypatch.setattr(vocabulary, "_CHUNK_TOKENS", 16)
    monkeypatch.setattr(vocabulary, "_CHUNK_LOGITS", 1)
    # 8,192 logits in chunks of 16 tokens: a whole buffer would hold 8 * 16 = 128 rows of them.
    args = case(1, b=8, t=16, v=512)

    def largest(fn):
        total = lambda x, table, w: fn(x, table, args[2], w, 0.0)[0]  # noqa: E731
        step = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
        text = step.lower(args[0], args[1], args[3]).compile().as_text()
        sizes = [
            np.prod([int(n) for n in s.split(",")]) for s in re.findall(r"f32\[([\d,]+)\]", text)
        ]
        return max(sizes)

    logits = 8 * 16 * 512
    assert largest(naive) >= logits  # the measure sees such a buffer where there is one
    assert largest(weighted_nll) < logits / 4


def test_an_id_outside_the_vocabulary_is_left_out_by_weight_only():
    x, table, targets, weights = case()
    fn = graded(weighted_nll, 0.1)
    # Position [0, 1] has weight 0.
    (value, nll), gradients = fn(x, table, targets.at[0, 1].set(-100), weights)
    (expected, _), (d_x, d_table, _) = fn(x, table, targets, weights)
    assert value == expected and np.isnan(nll[0, 1])
    np.testing.assert_array_equal(gradients[0], d_x)
    np.testing.assert_array_equal(gradients[1], d_table)
    assert np.isnan(fn(x, table, targets.at[0, 0].set(V), weights)[0][0])


@pytest.mark.parametrize("shape", [(B, T), (B, T + 1, 1), (B, T, 2)])
def test_shapes_that_do_not_fit_are_named(shape):
    x, table, _, weights = case()
    with pytest.raises(ValueError, match=re.escape(str(shape))):
        weighted_nll(x, table, jnp.zeros(shape, jnp.int32), weights)


def test_chunks_cover_every_token_once():
    arrays = (jnp.arange(10.0), jnp.arange(20.0).reshape(10, 2))
    (one, two), n = vocabulary.in_chunks(arrays, 4)
    assert (n, one.shape, two.shape) == (10, (3, 4), (3, 4, 2))
    np.testing.assert_array_equal(one.reshape(-1)[:10], arrays[0])
    assert not np.asarray(one.reshape(-1)[10:]).any()


def test_chunk_size_is_bounded_by_tokens_and_from_below():
    assert vocabulary.chunk_size(8192, 10**6) == 512
    assert vocabulary.chunk_size(150_000, 10**6) == 256
    assert vocabulary.chunk_size(1024, 10**6) == 4096
    assert vocabulary.chunk_size(1024, 24) == 24
