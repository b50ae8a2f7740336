"""The tree of a catalogue: its flows, and that its two forms on the device agree."""

import jax.numpy as jnp
import numpy as np
import pytest
from catalogues_for_tests import END, ITEMS, WEIGHTS, drawn, example, padded
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.decoding.constrained.trie import TokenTrie, walk
from tokjax.errors import ConfigError, DataError


def test_edges_are_the_logs_of_shares_of_flow():
    trie = example()
    root, node = trie.edges(), trie.edges([1])
    np.testing.assert_allclose([root[1], root[4]], [-0.08701, -2.48491], atol=5e-6)
    np.testing.assert_allclose(
        [node[2], node[3], node[END]], [-0.60614, -1.29928, -1.70475], atol=5e-6
    )
    assert set(root) == {1, 4}
    assert set(node) == {2, 3, END}
    assert trie.edges([4, 4]) == {}


def test_edges_add_up_to_the_log_of_an_items_share():
    trie = example()
    sums = [
        sum(trie.edges(item[:i])[token] for i, token in enumerate([*item, END])) for item in ITEMS
    ]
    np.testing.assert_allclose(sums, [-0.69315, -1.38629, -2.48491, -1.79176], atol=5e-6)
    np.testing.assert_allclose(sums, np.log(np.array(WEIGHTS) / 12), rtol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(1, 6))
def test_the_edges_of_every_node_are_a_distribution(seed, items, longest):
    trie = drawn(seed, min(items, 6**longest // 2 + 1), 6, longest)
    for node in range(trie.nodes - 1):
        part = slice(trie.begin[node], trie.begin[node + 1])
        np.testing.assert_allclose(np.exp(trie.log_edge[part]).sum(), 1.0, rtol=1e-12)
        assert np.all(np.diff(trie.tokens[part]) > 0)
    assert sorted(trie.item[trie.item >= 0]) == list(range(len(trie.items)))


@pytest.mark.parametrize("seed", range(4))
def test_both_forms_give_the_same_answers(seed):
    trie = drawn(seed)
    dense, compact = trie.arrays(9, "dense"), trie.arrays(9, "compact")
    nodes, tokens = jnp.meshgrid(
        jnp.arange(-1, trie.nodes), jnp.array([-1, *range(12)]), indexing="ij"
    )
    for a, b in zip(dense.step(nodes, tokens), compact.step(nodes, tokens), strict=True):
        np.testing.assert_array_equal(a, b)
    every = jnp.arange(-1, trie.nodes)
    np.testing.assert_array_equal(dense.allowed(every, 12), compact.allowed(every, 12))
    two = every[: 2 * (len(every) // 2)].reshape(2, -1)
    np.testing.assert_array_equal(dense.allowed(two, 9), compact.allowed(two, 9))
    paths = jnp.asarray(np.random.default_rng(seed).integers(0, 8, (50, 6)))
    for a, b in zip(walk(dense, paths), walk(compact, paths), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_form_is_chosen_by_size():
    trie = example()
    assert type(trie.arrays(5)).__name__ == "DenseTrie"
    assert type(trie.arrays(2**21)).__name__ == "CompactTrie"
    with pytest.raises(ConfigError, match="unknown form"):
        trie.arrays(5, "sparse")  # type: ignore[arg-type]


def test_walks_end_behind_the_end_token_and_off_the_tree():
    nodes, logs = walk(example().arrays(8), padded([(1, 2), (1, 5, 2), (4, 1)], 4))
    assert np.isfinite(logs).tolist() == [
        [True, True, True, False],
        [True, False, False, False],
        [True, False, False, False],
    ]
    assert (nodes[:, 0] == 0).all()
    assert nodes[0, 3] == example().nodes - 1
    assert nodes[0, 4] == nodes[1, 2] == nodes[1, 3] == -1


def test_items_are_found_by_their_tokens():
    trie = example()
    assert [trie.item_of((*item, END)) for item in ITEMS] == [0, 1, 2, 3]
    assert trie.item_of((1, 2)) == trie.item_of((2, END)) == trie.item_of(()) == -1
    np.testing.assert_allclose(trie.shares, np.array(WEIGHTS) / 12)
    assert trie.longest == 2


@pytest.mark.parametrize(
    ("items", "weights", "message"),
    [
        ([], [], "is empty"),
        ([(1,)], [1.0, 2.0], "2 weights for 1 items"),
        ([(1,), (2,)], [1.0, 0.0], "item 1 .* weight 0"),
        ([(1,)], [float("nan")], "weight nan"),
        ([()], [1.0], "no tokens"),
        ([(1, END)], [1.0], "holds the end token"),
        ([(1, 2), (3,), (1, 2)], [1.0, 1.0, 1.0], "items 0 and 2 .* same tokens"),
        ([(-4,)], [1.0], "negative id"),
    ],
)
def test_impossible_catalogues_are_refused(items, weights, message):
    with pytest.raises(DataError, match=message):
        TokenTrie.of(items, weights, END)


def test_a_catalogue_of_another_tokenizer_is_refused():
    with pytest.raises(ConfigError, match="another tokenizer"):
        example().arrays(4)
