import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.parallel.mesh import MeshConfig, build_mesh
from tokjax.signals import token_stats, vocabulary, weighted_nll
from tokjax.signals.token_stats import WANTED

B, T, D, V, TOP = 4, 6, 8, 33, 3


@pytest.fixture
def small_chunks(monkeypatch):
    # 24 tokens in chunks of 5: the last one is filled up.
    monkeypatch.setattr(vocabulary, "_CHUNK_TOKENS", 5)
    monkeypatch.setattr(vocabulary, "_CHUNK_LOGITS", 1)


def case(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x, table = rng.normal(size=(B, T, D)), rng.normal(size=(V, D))
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    return jnp.asarray(x, dtype), jnp.asarray(table, dtype), jnp.asarray(targets)


def naive(x, table, targets):
    logits = jnp.einsum("btd,vd->btv", x, table)
    logprobs = jax.nn.log_softmax(logits)
    of_target = jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0]
    ordered = jnp.sort(logprobs, -1)[..., ::-1]
    return {
        "nll": -of_target,
        "logprob": of_target,
        "entropy": -(jnp.exp(logprobs) * logprobs).sum(-1),
        "max_logprob": ordered[..., 0],
        "margin": ordered[..., 0] - ordered[..., 1],
        "rank": (logprobs > of_target[..., None]).sum(-1),
        "top_ids": jnp.argsort(-logprobs, -1)[..., :TOP],
        "top_logprobs": ordered[..., :TOP],
    }


def compiled(x, table, targets):
    return jax.jit(lambda *a: token_stats(*a, want=WANTED, k=TOP))(x, table, targets)


def test_every_statistic_equals_the_naive_form(small_chunks):
    found, expected = compiled(*case()), naive(*case())
    fields = {f.name for f in dataclasses.fields(found)}
    assert fields == set(expected)
    for name in fields:
        value = getattr(found, name)
        exact = jnp.issubdtype(value.dtype, jnp.integer)
        tolerance = {"rtol": 0} if exact else {"rtol": 1e-5, "atol": 1e-5}
        np.testing.assert_allclose(value, expected[name], err_msg=name, **tolerance)


@pytest.mark.parametrize("name", ["nll", "entropy", "margin", "top_logprobs"])
def test_gradients_are_exact(small_chunks, name):
    x, table, targets = case()
    shape = naive(x, table, targets)[name].shape
    mix = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    want = "top_k" if name == "top_logprobs" else name

    def of_stats(x, table):
        return (getattr(token_stats(x, table, targets, [want], TOP), name) * mix).sum()

    def of_naive(x, table):
        return (naive(x, table, targets)[name] * mix).sum()

    found = jax.jit(jax.grad(of_stats, argnums=(0, 1)))(x, table)
    expected = jax.jit(jax.grad(of_naive, argnums=(0, 1)))(x, table)
    for a, b in zip(found, expected, strict=True):
        assert np.abs(b).max() > 0.01
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_oracle_numbers():
    # Logits 1, 0, -1 and the target 1.
    x = jnp.array([[[1.0, 0.0, -1.0]]])
    found = token_stats(x, jnp.eye(3), jnp.array([[1]]), WANTED, k=2)
    np.testing.assert_allclose(found.nll, [[1.407606]], atol=1e-6)
    np.testing.assert_allclose(found.entropy, [[0.832395]], atol=1e-6)
    np.testing.assert_allclose(found.margin, [[1.0]], atol=1e-6)
    assert found.rank == 1
    np.testing.assert_array_equal(found.top_ids, [[[0, 1]]])


def test_rank_counts_strictly_likelier_tokens_only():
    x, table = jnp.ones((1, 1, 1)), jnp.array([[2.0], [2.0], [1.0], [1.0]])
    ranks = [int(token_stats(x, table, jnp.array([[t]]), ["rank"]).rank[0, 0]) for t in range(4)]
    assert ranks == [0, 0, 2, 2]


def test_impossible_tokens_leave_entropy_finite():
    # Probabilities of 0, by underflow and by a logit of -inf: 0 log 0 counts as 0.
    x, table = jnp.ones((1, 1, 1)), jnp.array([[0.0], [0.0], [-3e38], [-jnp.inf]])

    def entropy(x):
        return token_stats(x, table, jnp.zeros((1, 1), jnp.int32), ["entropy"]).entropy.sum()

    np.testing.assert_allclose(entropy(x), np.log(2), rtol=1e-6)


def test_statistics_not_asked_for_are_absent():
    found = token_stats(*case(), want=["nll", "rank"])
    assert {n for n, v in vars(found).items() if v is not None} == {"nll", "rank"}
    assert token_stats(*case()).logprob is None


def test_nll_equals_the_training_loss():
    x, table, targets = case()
    _, nll = weighted_nll(x, table, targets[..., None], jnp.ones((B, T, 1)))
    np.testing.assert_allclose(token_stats(x, table, targets).nll, nll[..., 0], rtol=1e-6)


@pytest.mark.parametrize(
    "mesh", [{"data": 2, "sequence": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}], ids=str
)
def test_a_mesh_gives_the_same_numbers_and_gradients(mesh):
    x, table, targets = case()

    def total(x, table):
        stats = token_stats(x, table, targets, WANTED, TOP)
        return (stats.nll + 0.5 * stats.entropy).sum(), stats

    fn = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    expected = jax.jit(fn)(x, table)
    with jax.set_mesh(build_mesh(MeshConfig(**{"data": 1, **mesh}))):
        found = jax.jit(fn)(x, table)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        jax.device_get(found),
        jax.device_get(expected),
    )


def test_bfloat16_inputs_under_strict_promotion():
    x, table, targets = case(jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        found = compiled(x, table, targets)
    assert found.nll.dtype == found.entropy.dtype == jnp.float32
    expected = naive(x.astype(jnp.float32), table.astype(jnp.float32), targets)
    np.testing.assert_allclose(found.nll, expected["nll"], rtol=1e-5)


def test_the_chunks_gradients_add_up_in_float32(monkeypatch):
    # One chunk a token: in bfloat16 a sum stops growing at 256 times what is added.
    monkeypatch.setattr(vocabulary, "_CHUNK_TOKENS", 1)
    monkeypatch.setattr(vocabulary, "_CHUNK_LOGITS", 1)
    x, table, targets = case(jnp.bfloat16)

    def total(table, times):
        wide = jnp.repeat(x[:1, :1], times, axis=1)
        return token_stats(wide, table, jnp.full((1, times), targets[0, 0])).nll.sum()

    one, many = (
        jax.jit(jax.grad(total), static_argnums=1)(table, n).astype(jnp.float32) for n in (1, 1000)
    )
    np.testing.assert_allclose(many, 1000 * one, rtol=0.02, atol=1e-3)


def test_no_buffer_of_all_logits(monkeypatch):
    monkeypatch.setattr(vocabulary, "_CHUNK_TOKENS", 16)
    monkeypatch.setattr(vocabulary, "_CHUNK_LOGITS", 1)
    x, table = jnp.zeros((8, 16, D)), jnp.zeros((512, D))
    targets = jnp.zeros((8, 16), jnp.int32)

    def largest(fn):
        step = jax.jit(jax.grad(fn, argnums=(0, 1)))
        text = step.lower(x, table).compile().as_text()
        return max(
            np.prod([int(n) for n in s.split(",")]) for s in re.findall(r"\[([\d,]+)\]", text)
        )

    def streamed(x, table):
        stats = token_stats(x, table, targets, ["nll", "entropy"])
        return (stats.nll + stats.entropy).sum()

    def whole(x, table):
        stats = naive(x, table, targets)
        return (stats["nll"] + stats["entropy"]).sum()

    logits = 8 * 16 * 512
    assert largest(whole) >= logits
    assert largest(streamed) < logits / 4


def test_unknown_statistics_and_other_shapes_are_named():
    x, table, targets = case()
    with pytest.raises(ValueError, match=r"unknown token statistic 'entrop'.*entropy"):
        token_stats(x, table, targets, ["entrop"])
    with pytest.raises(ValueError, match=re.escape("targets (4, 5)")):
        token_stats(x, table, targets[:, :-1])
