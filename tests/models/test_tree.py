"""Trees over leaves: sizes, what a walk leaves to attend to, summaries, and the policy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.errors import ConfigError
from tokjax.models import ModelConfig
from tokjax.models.stack import StackConfig
from tokjax.models.tree import (
    Aggregator,
    CrossAttention,
    Tree,
    TreeShape,
    arranged,
    attention_policy,
    build_tree,
    exchange_siblings,
    leaves_under,
    projections,
    retrieved,
    uniform_policy,
    walk,
)

D = 8
CONFIG = ModelConfig(
    vocab_size=11, d_model=D, n_layers=1, n_heads=2, d_ff=16, causal=False, init_scale=0.5,
    remat="none",
)  # fmt: skip
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def paths_of(shape):
    every = list(itertools.product(range(shape.branching), repeat=shape.depth))
    return np.array(every, np.int32).reshape(len(every), shape.depth)


@pytest.mark.parametrize(
    ("branching", "leaves", "depth", "per_node", "read"),
    [
        *((2, 8, 2, 2, 4), (2, 16, 3, 2, 5), (2, 128, 6, 2, 8), (2, 256, 7, 2, 9)),
        *((2, 512, 8, 2, 10), (2, 1000, 9, 2, 11), (2, 513, 9, 2, 11), (2, 9, 3, 2, 5)),
        *((3, 16, 2, 2, 6), (3, 81, 3, 3, 9), (3, 100, 4, 2, 10)),
        *((2, 1, 0, 1, 1), (2, 2, 0, 2, 2), (2, 3, 1, 2, 3), (7, 7, 0, 7, 7), (9, 7, 0, 7, 7)),
    ],
)
def test_sizes_are_exact_also_at_powers(branching, leaves, depth, per_node, read):
    shape = TreeShape(leaves, branching)
    assert (shape.depth, shape.per_node, shape.retrieved) == (depth, per_node, read)
    assert shape.slots == per_node * branching**depth >= leaves
    assert shape.nodes == sum(branching**level for level in range(1, depth + 1)) + shape.slots


@pytest.mark.parametrize(("leaves", "branching"), [(8, 2), (11, 2), (16, 3), (100, 3), (4, 9)])
def test_every_path_reads_each_leaf_once_and_the_chosen_leaves_themselves(leaves, branching):
    shape = TreeShape(leaves, branching)
    under, paths = leaves_under(shape), paths_of(shape)
    assert under.shape == (shape.nodes, shape.slots)
    nodes = np.asarray(retrieved(shape, jnp.asarray(paths)))
    assert nodes.shape == (branching**shape.depth, shape.retrieved)
    np.testing.assert_array_equal(under[nodes].sum(1), 1)
    # The last ones are the slots at the end of the path.
    for number, found in enumerate(nodes):
        at = np.flatnonzero(under[found[-shape.per_node :]].any(0))
        np.testing.assert_array_equal(at, number * shape.per_node + np.arange(shape.per_node))


def test_each_token_stands_once_and_evenly_among_the_slots():
    shape = TreeShape(11)
    mask = np.ones((4, 11), bool)
    mask[1, [0, 3, 4, 9]] = False
    mask[2, 1:] = False
    mask[3] = False
    values = normal(4, 11).at[1, 3].set(np.nan)
    for order in (None, values):
        places, real = map(np.asarray, arranged(shape, jnp.asarray(mask), order))
        assert places.shape == real.shape == (4, shape.slots)
        for row in range(4):
            expected = np.flatnonzero(mask[row])
            if order is not None:
                expected = expected[np.argsort(np.asarray(order)[row][expected])]
            np.testing.assert_array_equal(places[row][real[row]], expected)
            # A slot that does not count repeats the token before it.
            copies = np.flatnonzero(~real[row])
            assert (copies == 0).sum() == (row == 3)
            assert (places[row][copies] == places[row][np.maximum(copies - 1, 0)]).all()
        # No lowest node of a full row is empty; a short row reaches into both halves.
        assert real[0].reshape(-1, shape.per_node).any(1).all()
        assert real[1][: shape.slots // 2].any() and real[1][shape.slots // 2 :].any()
    points = normal(1, 11, 3)
    line = np.asarray(projections(points, 4))
    np.testing.assert_array_equal(line, projections(points, 4))
    assert np.abs(line - projections(points, 5)).max() > 1e-2


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TreeShape(0), "leaves=0"),
        (lambda: TreeShape(1 << 16), "leaves=65536"),
        (lambda: TreeShape(4, 1), "branching=1"),
        (lambda: arranged(TreeShape(4), jnp.ones((1, 5), bool)), "5 tokens do not fit"),
        (lambda: Aggregator(StackConfig(1, d_model=4), CONFIG), "d_model=4 must be None"),
    ],
)
def test_impossible_trees_are_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_without_a_transformer_a_node_is_the_mean_of_the_leaves_under_it():
    shape, leaves = TreeShape(16, 4), normal(2, 16, D)
    mean = Aggregator(StackConfig(0), CONFIG)
    tree = build_tree(shape, mean, mean.init(jax.random.key(0)), leaves, jnp.ones((2, 16), bool))
    np.testing.assert_allclose(tree.root, leaves.mean(1), atol=1e-6)
    under = leaves_under(shape).astype(np.float32)
    expected = (under / under.sum(1, keepdims=True)) @ np.asarray(leaves)
    np.testing.assert_allclose(tree.vectors, expected, atol=1e-6)


SHAPE = TreeShape(6)  # two choices, four lowest nodes of two slots
AGGREGATOR = Aggregator(StackConfig(1), CONFIG)


@pytest.fixture(scope="module")
def trees():
    """A compiled function giving the tree over leaves, and what the size of its root teaches."""
    params = AGGREGATOR.init(jax.random.key(0))

    def squared(params, leaves, real):
        tree = build_tree(SHAPE, AGGREGATOR, params, leaves, real)
        return jnp.square(tree.root).sum(), tree

    both = jax.jit(jax.value_and_grad(squared, argnums=(0, 1), has_aux=True))

    def make(leaves, real):
        (_, tree), gradients = both(params, leaves, jnp.asarray(real))
        return tree, gradients

    return make


def test_slots_that_do_not_count_and_the_order_of_siblings_mean_nothing(trees):
    leaves, real = normal(2, SHAPE.slots, D), np.ones((2, SHAPE.slots), bool)
    real[0, [1, 4, 5, 6]] = False
    tree, _ = trees(leaves, real)
    other = jnp.where(real[..., None], leaves, 100.0)
    changed, _ = trees(other, real)
    inner = slice(0, SHAPE.first(SHAPE.depth + 1))
    np.testing.assert_array_equal(tree.vectors[:, inner], changed.vectors[:, inner])
    np.testing.assert_array_equal(tree.root, changed.root)
    moved, _ = trees(leaves.at[0, 7].add(1.0), real)
    assert np.abs(moved.root - tree.root)[0].max() > 1e-3
    # Both slots of a lowest node change places, real or not.
    swap = np.arange(SHAPE.slots) ^ 1
    swapped, _ = trees(leaves[:, swap], real[:, swap])
    np.testing.assert_allclose(swapped.root, tree.root, atol=1e-5)
    # A node whose leaves do not count is none, and holds zeros.
    empty = SHAPE.first(SHAPE.depth) + 2
    assert tree.there[:, empty].tolist() == [False, True]
    assert (tree.vectors[0, empty] == 0).all() and np.isfinite(tree.vectors).all()


def test_a_summary_teaches_the_aggregator_and_with_bptt_the_leaves_that_count(trees):
    leaves, real = normal(2, SHAPE.slots, D), np.ones((2, SHAPE.slots), bool)
    real[0, 3] = False
    _, (d_params, d_leaves) = trees(leaves, real)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(d_params["layers"]))
    assert np.abs(d_leaves).max() == 0
    mean = Aggregator(StackConfig(0), CONFIG)

    @jax.jit
    @jax.grad
    def through(leaves):
        tree = build_tree(SHAPE, mean, {"layers": {}}, leaves, jnp.asarray(real), bptt=True)
        return jnp.square(tree.root).sum()

    found = np.abs(through(leaves)).sum(-1)
    np.testing.assert_array_equal(found > 0, real)


def test_exchanged_siblings_keep_their_leaves_and_their_set_of_vectors():
    vectors = normal(40, SHAPE.nodes, D)
    tree = Tree(vectors, jnp.ones((40, SHAPE.nodes), bool), vectors[:, 0])
    other = exchange_siblings(SHAPE, tree, jax.random.key(3))
    first = SHAPE.first(SHAPE.depth + 1)
    np.testing.assert_array_equal(other.vectors[:, first:], vectors[:, first:])
    a, b = (np.asarray(t.vectors[:, :first]).reshape(40, -1, 2, D) for t in (tree, other))
    same = (a == b).all((-1, -2))
    np.testing.assert_array_equal(np.where(same[..., None, None], a, a[:, :, ::-1]), b)
    assert 0.4 < same.mean() < 0.6
    # Each row and each group by itself.
    assert 0.6 < (same.any(1) & ~same.all(1)).mean() < 0.9


BLOCK = CrossAttention.beside(CONFIG)


QUERIES = 2000
EVERY = np.ones((2, SHAPE.nodes), bool)
HEADS = (2, D // 2)


@pytest.fixture(scope="module")
def walks():
    """A compiled function giving walks of queries that have these keys."""

    def run(q, k, there, key, path, uniform):
        policy = uniform_policy if uniform else attention_policy(BLOCK, q, k)
        return walk(SHAPE, policy, there, QUERIES, key, path)

    compiled = jax.jit(run, static_argnums=5)

    def find(q, k, there=EVERY, key=None, path=None, uniform=False):
        q = jnp.broadcast_to(q, (2, QUERIES, *HEADS))
        found = compiled(q, k, jnp.asarray(there), key, path, uniform)
        return jax.tree.map(np.asarray, found)

    return find


def ends(path):
    """The lowest node that each path leads to."""
    return path @ 2 ** np.arange(SHAPE.depth)[::-1]


def test_probabilities_of_all_paths_sum_to_one(walks):
    paths = paths_of(SHAPE)
    path = np.broadcast_to(np.tile(paths, (QUERIES // len(paths), 1)), (2, QUERIES, SHAPE.depth))
    q, k = normal(2, 1, *HEADS), normal(2, SHAPE.nodes, *HEADS)
    found = walks(q, k, path=jnp.asarray(path))
    np.testing.assert_array_equal(found.path, path)
    probs = np.exp(found.log_probs[:, : len(paths)])
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-5)
    assert probs.std() > 0.01
    # The mean of two levels; what is chosen last does not change it.
    np.testing.assert_allclose(found.entropy[:, ::2], found.entropy[:, 1::2], atol=1e-6)
    assert (found.entropy < np.log(2)).all() and (found.entropy > 0).all()
    uniform = walks(q, k, path=jnp.asarray(path), uniform=True)
    np.testing.assert_allclose(uniform.log_probs, -SHAPE.depth * np.log(2), atol=1e-5)
    np.testing.assert_allclose(uniform.entropy, np.log(2), atol=1e-6)


def test_draws_follow_the_policy_and_the_likeliest_child_is_taken_without(walks):
    q, k = normal(2, 1, *HEADS), normal(2, SHAPE.nodes, *HEADS)
    found = walks(q, k, key=jax.random.key(1))
    for row in range(2):
        number = ends(found.path[row])
        seen, probs = np.bincount(number, minlength=4) / QUERIES, np.zeros(4)
        probs[number] = np.exp(found.log_probs[row])
        assert np.abs(seen - probs).max() < 5 * np.sqrt(0.25 / QUERIES)
    greedy = walks(q, k).path
    assert (greedy == greedy[:, :1]).all()
    policy = np.asarray(BLOCK.probabilities(q, k[:, :2], jnp.ones((1, 1, 2), bool))).mean(2)
    assert greedy[:, 0, 0].tolist() == policy[:, 0].argmax(-1).tolist()


def test_a_node_without_leaves_is_never_chosen(walks):
    under = leaves_under(SHAPE)
    real = np.zeros((2, SHAPE.slots), bool)
    real[0, [2, 3, 7]] = True
    there = np.any(under[None] & real[:, None], axis=-1)
    # Masked keys would win by far.
    k = jnp.where(there[..., None, None], normal(2, SHAPE.nodes, *HEADS), 50.0)
    q = jnp.abs(normal(2, QUERIES, *HEADS))
    for key, uniform in ((jax.random.key(5), False), (None, False), (jax.random.key(5), True)):
        found = walks(q, k, there, key, uniform=uniform)
        assert set(ends(found.path[0]).tolist()) <= {1, 3}
        nodes = np.asarray(retrieved(SHAPE, jnp.asarray(found.path[0])))
        covered = (under[nodes] & there[0][nodes][..., None]).sum(1)
        np.testing.assert_array_equal(covered[:, real[0]], 1)
        assert np.isfinite(found.log_probs).all() and np.isfinite(found.entropy).all()
    # A row without any leaf: somewhere, and nothing is there.
    assert not there[1].any() and (found.path[1] < 2).all()


def test_a_query_without_keys_is_left_alone_by_attention():
    w = BLOCK.init(jax.random.key(0))
    x, states = normal(1, 3, D), normal(1, 4, D)
    mask = jnp.array([[[True, False, True, True], [False] * 4, [False, True, False, False]]])

    @jax.jit
    def run(x, states):
        q, (k, v) = BLOCK.queries(w, x), BLOCK.keys_values(w, states)
        own = [jnp.broadcast_to(a[:, None], (1, 3, *a.shape[1:])) for a in (k, v)]
        sets = (k, v), (k, jnp.zeros_like(v)), (own[0], own[1])
        found = [BLOCK.attend(w, x, q, k, v, mask) for k, v in sets]
        return found, BLOCK.probabilities(q, k, mask).sum(-1)

    (out, other, own), sums = run(x, states)
    np.testing.assert_array_equal(out[:, 1], other[:, 1])
    assert np.abs(out - other)[:, [0, 2]].min() > 0
    # A set of keys for each query gives the same as one for all.
    np.testing.assert_allclose(own, out, atol=1e-5)
    np.testing.assert_allclose(sums[0], [[1, 1], [0, 0], [1, 1]], atol=1e-6)
