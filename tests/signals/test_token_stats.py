import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.models.head import Head
from tokjax.parallel.mesh import MeshConfig, build_mesh
from tokjax.signals import token_stats, vocabulary, weighted_nll
from tokjax.signals.soft_targets import SoftTargets
from tokjax.signals.token_stats import PAIRED, WANTED, TokenStats

B, T, D, V, K, TOP = 4, 6, 8, 33, 2, 3
EXACT = ("rank", "top_ids")


def small_tiles(monkeypatch):
    """24 tokens by 5, the last chunk filled up; 33 ids by 8, the last block moved back."""
    monkeypatch.setattr(vocabulary, "_CHUNK_TOKENS", 5)
    monkeypatch.setattr(vocabulary, "_TILE_LOGITS", 40)
    monkeypatch.setattr(vocabulary, "_UNCUT", 8)
    monkeypatch.setattr(vocabulary, "_BLOCK", 8)


@pytest.fixture(params=["whole", "tiles"])
def tiles(request, monkeypatch):
    if request.param == "tiles":
        small_tiles(monkeypatch)
    return request.param


def case(dtype=np.float32, bias=True, **head):
    """Two distributions, K targets, and soft targets that have every part."""
    rng = np.random.default_rng(0)

    def side(width):
        b = rng.normal(size=V).astype(dtype) if bias else None
        return rng.normal(size=(B, T, width)), rng.normal(size=(V, width)), b

    (x, table, b), (x2, table2, b2) = side(D), side(D // 2)
    soft = SoftTargets(
        ids=rng.integers(0, V, (B, T, K)).astype(np.int32),
        probs=rng.uniform(size=(B, T, K)).astype(np.float32),
        rows=rng.dirichlet(np.ones(V), 5).astype(np.float32),
        row_ids=rng.integers(0, 5, (B, T)).astype(np.int32),
        row_probs=rng.uniform(size=(B, T)).astype(np.float32),
        uniform=rng.uniform(size=(B, T)).astype(np.float32),
    )
    targets = rng.integers(0, V, (B, T, K)).astype(np.int32)
    sides = (
        (x.astype(dtype), Head(table.astype(dtype), b, **head)),
        (x2.astype(dtype), Head(table2.astype(dtype), b2)),
    )
    return jax.tree.map(jnp.asarray, (sides, targets, soft))


CAPPED = {"softcap": 3.0, "scale": 0.7}


def dense(soft):
    """The soft targets as one array [B, T, V]."""
    q = (jax.nn.one_hot(soft.ids, V) * soft.probs[..., None]).sum(-2)
    return q + soft.row_probs[..., None] * soft.rows[soft.row_ids] + soft.uniform[..., None] / V


def naive_logprobs(x, head):
    z = jnp.einsum("btd,vd->btv", x, head.table)
    z = (z if head.bias is None else z + head.bias) * head.scale
    return jax.nn.log_softmax(
        z if head.softcap is None else head.softcap * jnp.tanh(z / head.softcap)
    )


def naive(sides, targets, soft):
    """Every statistic from logits that are kept, in the precision of the arguments."""
    a, b = (naive_logprobs(*side) for side in sides)
    p, r = jnp.exp(a), jnp.exp(b)
    logprob = jnp.take_along_axis(a, targets, -1)
    ordered = jnp.sort(a, -1)[..., ::-1]
    m = jnp.log((p + r) / 2)
    entropy = -(p * a).sum(-1)
    return {
        "nll": -logprob,
        "logprob": logprob,
        "rank": (a[..., None, :] > logprob[..., None]).sum(-1),
        "cross_entropy": -(dense(soft).astype(a.dtype) * a).sum(-1),
        "entropy": entropy,
        "varentropy": (p * (-a - entropy[..., None]) ** 2).sum(-1),
        "max_logprob": ordered[..., 0],
        "margin": ordered[..., 0] - ordered[..., 1],
        "top_ids": jnp.argsort(-a, -1)[..., :TOP],
        "top_logprobs": ordered[..., :TOP],
        "kl": (p * (a - b)).sum(-1),
        "reverse_kl": (r * (b - a)).sum(-1),
        "jsd": (p * (a - m) + r * (b - m)).sum(-1) / 2,
    }


def everything(sides, targets, soft, mask=None):
    return token_stats(*sides[0], targets, WANTED, TOP, soft=soft, other=sides[1], mask=mask)


def inexact(stats):
    return {name: a for name, a in vars(stats).items() if name not in EXACT}


@functools.cache
def pulled_back(tiles):
    """Returns (sides, targets, soft, mask, cotangents) -> statistics, gradients of the sides.

    Jitted once for each way of cutting logits, for all tests: the compiled program keeps it.
    """

    def fn(sides, targets, soft, mask, cotangents):
        def stats(sides):
            found = everything(sides, targets, soft, mask=mask)
            return inexact(found), found

        _, pull, found = jax.vjp(stats, sides, has_aux=True)
        return found, pull(cotangents)[0]

    return jax.jit(fn)


def ones():
    shapes = {"nll": (K,), "logprob": (K,), "top_logprobs": (TOP,)}
    names = {f.name for f in dataclasses.fields(TokenStats)} - set(EXACT)
    return {name: np.ones((B, T, *shapes.get(name, ())), np.float32) for name in names}


@pytest.mark.parametrize(
    ("tiles", "head"), [("whole", {}), ("tiles", {}), ("tiles", CAPPED)], indirect=["tiles"]
)
def test_values_and_gradients_equal_the_naive_form_in_float64(tiles, head):
    rng = np.random.default_rng(1)
    cotangents = {n: rng.normal(size=c.shape).astype(np.float32) for n, c in ones().items()}
    singled_out = lambda name: {  # noqa: E731
        n: c if n == name else np.zeros_like(c) for n, c in cotangents.items()
    }
    fn, everywhere = pulled_back(tiles), np.ones((B, T), bool)
    measured = {n: fn(*case(**head), everywhere, singled_out(n)) for n in cotangents}
    with jax.enable_x64(True):
        sides, targets, soft = case(np.float64, **head)

        @jax.jit
        def reference(cotangents):
            stats = lambda sides: naive(sides, targets, soft)  # noqa: E731
            exact = {
                n: np.zeros((B, T, K if n == "rank" else TOP), jax.dtypes.float0) for n in EXACT
            }
            return jax.vjp(stats, sides)[1](cotangents | exact)[0]

        values = jax.device_get(jax.jit(naive)(sides, targets, soft))
        slopes = {
            name: jax.device_get(
                reference({n: c.astype(np.float64) for n, c in singled_out(name).items()})
            )
            for name in cotangents
        }
    assert set(values) == cotangents.keys() | set(EXACT)
    for name, (found, gradients) in measured.items():
        np.testing.assert_allclose(getattr(found, name), values[name], 1e-5, 1e-5, err_msg=name)
        for a, b in zip(*map(jax.tree.leaves, (gradients, slopes[name])), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients)) > 0.01, name
    for name in EXACT:
        np.testing.assert_array_equal(getattr(found, name), values[name])


def test_layers_are_scored_by_vmap_and_under_rematerialisation(monkeypatch):
    small_tiles(monkeypatch)
    ((x, head), _), targets, _ = case()
    layers = jnp.stack([x, -x])

    def total(layers, head, wrap):
        def one(x):
            stats = token_stats(x, head, targets, ["nll", "kl"], other=(x[::-1], head))
            return (stats.nll[..., 0] * stats.kl).sum()

        return wrap(one)(layers).sum()

    each = lambda fn: lambda layers: jnp.stack([fn(x) for x in layers])  # noqa: E731
    scanned = lambda fn: lambda layers: jax.lax.map(jax.checkpoint(fn), layers)  # noqa: E731
    found = [
        jax.jit(jax.value_and_grad(functools.partial(total, wrap=w), argnums=(0, 1)))(layers, head)
        for w in (each, jax.vmap, scanned)
    ]
    for other in found[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), other, found[0]
        )


def test_what_no_gradient_is_asked_of_costs_no_product(monkeypatch):
    small_tiles(monkeypatch)
    sides, _, _ = case()

    def products(stop, argnums):
        def loss(x, head):
            other = jax.tree.map(stop, sides[1])
            other = (other[0] + stop(x[..., : D // 2]), other[1])
            return token_stats(x, head, want=["kl"], other=other).kl.sum()

        step = jax.jit(jax.grad(loss, argnums=argnums))
        return step.lower(*sides[0]).compile().as_text().count(" dot(")

    keep, stopped = (lambda a: a), jax.lax.stop_gradient
    # Two passes forward over two sides, both again backward, and two gradients of one side.
    assert products(stopped, (0, 1)) == 8
    assert products(stopped, 0) == 7
    assert products(keep, 0) == 8


def test_gradient_of_a_combination_of_some_statistics(tiles):
    sides, targets, soft = case()
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(B, T)), jnp.float32)

    def loss(sides, stats):
        found = stats(sides)
        return (weights * (found["nll"][..., 0] + 0.1 * found["entropy"])).sum()

    streamed = lambda sides: vars(everything(sides, targets, soft))  # noqa: E731
    plain = lambda sides: naive(sides, targets, soft)  # noqa: E731
    found = jax.jit(jax.grad(lambda s: loss(s, streamed)))(sides)
    expected = jax.jit(jax.grad(lambda s: loss(s, plain)))(sides)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )
    assert not np.asarray(found[1][0]).any()


def test_oracle_numbers():
    # Logits 1, 0, -1 and the target 1; the other distribution is even.
    x = jnp.array([[[1.0, 0.0, -1.0]]])
    want = set(WANTED) - {"cross_entropy"}
    other = (jnp.zeros((1, 1, 1)), jnp.zeros((3, 1)))
    found = token_stats(x, jnp.eye(3), jnp.array([[1]]), want, k=2, other=other)
    np.testing.assert_allclose(found.nll, [[1.407606]], atol=1e-6)
    np.testing.assert_allclose(found.entropy, [[0.832395]], atol=1e-6)
    np.testing.assert_allclose(found.kl, [[np.log(3) - 0.832395]], atol=1e-6)
    np.testing.assert_allclose(found.reverse_kl, [[1.407606 - np.log(3)]], atol=1e-6)
    np.testing.assert_allclose(found.margin, [[1.0]], atol=1e-6)
    assert found.rank == 1
    np.testing.assert_array_equal(found.top_ids, [[[0, 1]]])


def test_rank_counts_strictly_likelier_tokens_only():
    x, table = jnp.ones((1, 1, 1)), jnp.array([[2.0], [2.0], [1.0], [1.0]])
    targets = jnp.arange(4)[None, None]
    np.testing.assert_array_equal(token_stats(x, table, targets, ["rank"]).rank, [[[0, 0, 2, 2]]])


def test_impossible_tokens_leave_every_number_finite(tiles):
    # Probabilities of 0, by underflow and by -inf, in whole blocks (the last among them) and in
    # part of one.
    impossible = np.r_[0:8, 20:33]
    (first, second), targets, soft = case()
    possible = np.setdiff1d(np.arange(V), impossible)
    targets = jnp.asarray(possible)[targets % len(possible)]
    rows = soft.rows.at[:, impossible].set(0.0)
    soft = soft.replace(ids=targets, rows=rows, uniform=jnp.zeros((B, T)))
    x, head = first
    table = head.table.at[9].set(0.0)
    bias = head.bias.at[impossible].set(-jnp.inf).at[9].set(-3e38)
    sides = ((x, Head(table, bias)), (second[0], second[1].replace(bias=bias)))

    stats, gradients = pulled_back(tiles)(sides, targets, soft, np.ones((B, T), bool), ones())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((stats, gradients)))
    rows = np.setdiff1d(possible, [9])
    cut = lambda side: (side[0], Head(side[1].table[rows], side[1].bias[rows]))  # noqa: E731
    expected = token_stats(*cut(sides[0]), want=["entropy", *PAIRED], other=cut(sides[1]))
    for name in ("entropy", *PAIRED):
        np.testing.assert_allclose(getattr(stats, name), getattr(expected, name), atol=1e-5)


def test_large_logits_keep_their_digits():
    (side, _), targets, _ = case(bias=False)
    x, head = 1e4 * side[0], side[1]
    found = token_stats(x, head, targets, ["nll", "entropy"])
    z = np.einsum("btd,vd->btv", np.float64(x), np.float64(head.table))
    z -= z.max(-1, keepdims=True)
    a = z - np.log(np.exp(z).sum(-1, keepdims=True))
    np.testing.assert_allclose(
        found.nll, -np.take_along_axis(a, np.asarray(targets), -1), rtol=1e-5
    )
    np.testing.assert_allclose(found.entropy, -(np.exp(a) * a).sum(-1), atol=1e-5)


def test_statistics_not_asked_for_are_absent():
    (side, other), targets, soft = case()
    found = token_stats(*side, targets, ["nll", "rank"], soft=soft, other=other)
    assert {n for n, v in vars(found).items() if v is not None} == {"nll", "rank"}
    assert token_stats(*side, want=["entropy"]).nll is None


def test_a_table_is_a_plain_head_and_one_target_drops_its_axis():
    ((x, head), _), targets, _ = case(bias=False)
    several = token_stats(x, head, targets, ["nll", "rank"])
    one = token_stats(x, head.table, targets[..., 1], ["nll", "rank"])
    np.testing.assert_array_equal(one.nll, several.nll[..., 1])
    np.testing.assert_array_equal(one.rank, several.rank[..., 1])


@pytest.mark.parametrize("head", [{}, CAPPED], ids=["plain", "capped"])
def test_nll_equals_the_training_loss(head):
    (side, _), targets, _ = case(**head)
    _, nll = weighted_nll(*side, targets, jnp.ones((B, T, K)))
    np.testing.assert_allclose(token_stats(*side, targets).nll, nll, rtol=1e-5, atol=1e-6)


def test_masked_positions_are_zero_whatever_they_hold(tiles):
    sides, targets, soft = case()
    mask = jnp.arange(T) < jnp.array([[T], [3], [0], [5]])
    (x, head), (x2, head2) = sides
    dirty = (
        (jnp.where(mask[..., None], x, jnp.nan), head),
        (jnp.where(mask[..., None], x2, jnp.inf), head2),
    )
    ids = jnp.where(mask[..., None], targets, -100)
    fn = pulled_back(tiles)
    found, expected = fn(dirty, ids, soft, mask, ones()), fn(sides, targets, soft, mask, ones())
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    stats, ((d_x, _), (d_x2, _)) = found
    for a in (d_x, d_x2, *jax.tree.leaves(stats)):
        assert not np.asarray(a)[~np.asarray(mask)].any()


def test_an_id_outside_the_vocabulary_is_not_a_number(tiles):
    (side, _), _, _ = case()
    found = token_stats(*side, jnp.full((B, T), V), ["nll", "entropy"])
    assert np.isnan(found.nll).all() and np.isfinite(found.entropy).all()


@pytest.mark.parametrize(
    "mesh", [{"data": 2, "sequence": 2, "tensor": 2}, {"fsdp": 4, "sequence": 2}], ids=str
)
def test_a_mesh_gives_the_same_numbers_and_gradients(monkeypatch, mesh):
    small_tiles(monkeypatch)
    arguments = (*case(**CAPPED), np.ones((B, T), bool), ones())
    fn = pulled_back("tiles")
    expected = fn(*arguments)
    with jax.set_mesh(build_mesh(MeshConfig(**{"data": 1, **mesh}))):
        found = fn(*arguments)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        jax.device_get(found),
        jax.device_get(expected),
    )


def test_the_heads_gradient_adds_up_over_devices_in_float32(monkeypatch):
    small_tiles(monkeypatch)
    rng = np.random.default_rng(0)
    x, table = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((8, 4, 8), (80, 8)))
    targets = jnp.asarray(rng.integers(0, 80, (8, 4)), jnp.int32)
    gradient = jax.jit(jax.grad(lambda table, x, ids: token_stats(x, table, ids).nll.sum()))
    alone = np.float32(gradient(table, x, targets))
    with jax.set_mesh(build_mesh(MeshConfig(data=2, fsdp=4))):
        shared = np.float32(gradient(table, x, targets))
    assert (shared != alone).mean() < 0.01
    rows = [gradient(table, x[i : i + 1], targets[i : i + 1]).astype(jnp.float32) for i in range(8)]
    assert (np.float32(sum(rows).astype(jnp.bfloat16)) != alone).mean() > 0.05


def test_bfloat16_inputs_under_strict_promotion(monkeypatch):
    small_tiles(monkeypatch)
    sides, targets, soft = case(jnp.bfloat16, **CAPPED)
    want = ("nll", "cross_entropy", "entropy", "kl")

    def fn(sides):
        def stats(sides):
            found = token_stats(*sides[0], targets, want, soft=soft, other=sides[1])
            return {name: getattr(found, name) for name in want}

        found, pull = jax.vjp(stats, sides)
        return found, pull(jax.tree.map(jnp.ones_like, found))[0]

    with jax.numpy_dtype_promotion("strict"):
        found, gradients = jax.jit(fn)(sides)
    assert {a.dtype for a in found.values()} == {jnp.dtype("float32")}
    assert {a.dtype for a in jax.tree.leaves(gradients)} == {jnp.dtype("bfloat16")}
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), sides)
    expected, exact = jax.jit(fn)(wide)
    np.testing.assert_allclose(found["nll"], expected["nll"], rtol=1e-5, atol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (gradients, exact)), strict=True):
        assert np.linalg.norm(np.float32(a) - b) < 0.02 * np.linalg.norm(b)


def test_the_chunks_gradients_add_up_in_float32(monkeypatch):
    # One chunk a token: in bfloat16 a sum stops growing at 256 times what is added.
    monkeypatch.setattr(vocabulary, "_CHUNK_TOKENS", 1)
    monkeypatch.setattr(vocabulary, "_TILE_LOGITS", 1)
    ((x, head), _), targets, _ = case(jnp.bfloat16, bias=False)

    def total(table, times):
        wide = jnp.repeat(x[:1, :1], times, axis=1)
        return token_stats(wide, table, jnp.full((1, times), targets[0, 0, 0])).nll.sum()

    one, many = (
        jax.jit(jax.grad(total), static_argnums=1)(head.table, n).astype(jnp.float32)
        for n in (1, 1000)
    )
    np.testing.assert_allclose(many, 1000 * one, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("tokens", [8 * 16, 4], ids=["many tokens", "few tokens"])
def test_no_buffer_of_all_logits(monkeypatch, tokens):
    monkeypatch.setattr(vocabulary, "_CHUNK_TOKENS", 16)
    monkeypatch.setattr(vocabulary, "_TILE_LOGITS", 16 * 32)
    monkeypatch.setattr(vocabulary, "_UNCUT", 32)
    monkeypatch.setattr(vocabulary, "_BLOCK", 32)
    ids = 4096
    x, head = jnp.zeros((tokens // 4, 4, 2)), Head(jnp.zeros((ids, 2)), jnp.zeros(ids))
    targets = jnp.zeros((*x.shape[:2], 1), jnp.int32)
    soft = SoftTargets(targets, jnp.ones(targets.shape))
    want = set(WANTED) - {"top_k", "margin", "max_logprob"}

    def streamed(x, head):
        stats = token_stats(x, head, targets, want, soft=soft, other=(x + 1.0, head))
        return sum(a.sum() for a in inexact(stats).values() if a is not None)

    def whole(x, head):
        a = naive_logprobs(x, head)
        return (jnp.exp(a) * a).sum()

    def measure(fn):
        compiled = jax.jit(jax.grad(fn, argnums=(0, 1))).lower(x, head).compile()
        shapes = re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
        largest = max(np.prod([int(n) for n in s.split(",")]) for s in shapes)
        return largest, compiled.memory_analysis().temp_size_in_bytes

    largest, temporary = measure(streamed)
    assert largest <= max(tokens * ids // 16, head.table.size)
    assert measure(whole)[0] >= tokens * ids
    if tokens > 4:
        assert temporary < 4 * tokens * ids / 10


seeds = st.integers(0, 2**16)
scales = st.sampled_from([0.0, 1e-3, 1.0, 30.0])


@jax.jit
def compare(x, head, other, head2):
    return token_stats(x, head, None, ["entropy", "varentropy", *PAIRED], other=(other, head2))


def drawn(seed, scale):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32)  # noqa: E731
    return normal(1, 2, 4), Head(normal(V, 4), normal(V))


@settings(max_examples=30, deadline=None)
@given(seeds, scales, scales)
def test_divergences_and_entropies_keep_their_bounds(seed, scale, other_scale):
    first, second = drawn(seed, scale), drawn(seed + 1, other_scale)
    there, back = compare(*first, *second), compare(*second, *first)
    assert (there.kl >= 0).all() and (there.reverse_kl >= 0).all() and (there.jsd >= 0).all()
    assert (there.jsd <= np.log(2) + 1e-6).all()
    assert (there.entropy <= np.log(V) + 1e-5).all() and (there.entropy >= -1e-6).all()
    assert (there.varentropy >= 0).all()
    np.testing.assert_allclose(there.jsd, back.jsd, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(there.kl, back.reverse_kl, rtol=1e-5, atol=1e-6)
    same = compare(*first, *first)
    for name in PAIRED:
        assert not np.asarray(getattr(same, name)).any()


@settings(max_examples=20, deadline=None)
@given(seeds, st.floats(-20, 20, width=32))
def test_a_shift_of_the_bias_changes_nothing(seed, shift):
    x, head = drawn(seed, 1.0)
    moved = compare(x, head.replace(bias=head.bias + shift), x, head)
    still = compare(x, head, x, head)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), moved, still)


def refuse(message, **changes):
    ((x, head), other), targets, soft = case()
    arguments = {"x": x, "head": head, "targets": targets, "want": WANTED, "k": TOP}
    with pytest.raises(ValueError, match=message):
        token_stats(**(arguments | {"soft": soft, "other": other} | changes))


def test_arguments_that_cannot_be_meant_are_named():
    refuse(r"unknown token statistic 'entrop'.*entropy", want=["entrop"])
    refuse(r"want='nll' must be a collection", want="nll")
    refuse(re.escape("targets (4, 5)"), targets=jnp.zeros((4, 5), jnp.int32))
    refuse(re.escape("x (4, 6, 9) must be [B, T, D]"), x=jnp.zeros((4, 6, 9)))
    refuse(re.escape("bias (32,) must be [V]"), head=Head(jnp.zeros((V, D)), jnp.zeros(V - 1)))
    refuse("softcap=0.0 must be positive", head=Head(jnp.zeros((V, D)), softcap=0.0))
    refuse("'nll' needs the argument targets", targets=None)
    refuse("'cross_entropy' needs the argument soft", soft=None)
    refuse("'kl' needs the argument other", other=None)
    refuse("'top_k' takes 34 tokens of a vocabulary of 33", k=V + 1)
    refuse("'top_k' takes 0 tokens", k=0)
    refuse(re.escape("mask (4,)"), mask=jnp.ones(4, bool))
    refuse(
        "must have a row for each of the 33 ids", other=(jnp.zeros((B, T, 2)), jnp.zeros((3, 2)))
    )
    refuse(re.escape("other's states (4, 6, 3)"), other=(jnp.zeros((B, T, 3)), jnp.zeros((V, 2))))
