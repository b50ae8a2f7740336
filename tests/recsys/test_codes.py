"""Items as codes: ids, filling, uniqueness, and what an autoencoder makes of embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.errors import ConfigError, DataError
from tokjax.recsys import CodesConfig, ItemCodes, train_codes, unique_codes
from tokjax.recsys.codes import END, PAD
from tokjax.recsys.rqvae import alignment, diversity

SMALL = CodesConfig(
    levels=3, size=4, hidden=(16,), width=4, epochs=60, batch_size=20, clusters=2, epsilon=0.01
)
EMBEDDINGS = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)


def test_ids_are_those_of_the_paper():
    codes = ItemCodes(np.array([[3, 0, 7, 255], [3, 0, 7, 1]]), 256)
    assert codes.vocab_size == 1026
    assert codes.tokens[0].tolist() == [5, 258, 2 + 512 + 7, 1025]
    assert codes.answers(np.array([0])).tolist() == [[PAD, 5, 258, 521, 1025, END]]
    front = codes.histories(np.full((1, 20), -1))
    assert front.shape == (1, 81)
    assert front[0, -1] == END and not front[0, :-1].any()


def test_histories_are_filled_in_front_or_behind_and_keep_their_order():
    codes = ItemCodes(np.array([[0, 1], [1, 0], [1, 1]]), 2)
    items = np.array([[-1, 2, 0], [1, 0, 2]])
    assert codes.histories(items).tolist() == [[0, 0, 3, 5, 2, 5, 1], [3, 4, 2, 5, 3, 5, 1]]
    assert codes.histories(items, "behind")[0].tolist() == [3, 5, 2, 5, 0, 0, 1]
    with pytest.raises(DataError, match="item 3 is not among the 3"):
        codes.histories(np.array([[3]]))


def test_the_trie_holds_each_item_with_its_end():
    codes = ItemCodes(np.array([[0, 1], [1, 0]]), 2)
    assert [codes.trie.item_of([*row, END]) for row in codes.tokens.tolist()] == [0, 1]
    assert codes.trie.item_of([*codes.tokens[0], PAD]) == -1


@pytest.mark.parametrize(
    ("codes", "told"),
    [
        ([[0, 1], [2, 2], [0, 1]], "items 0 and 2 have the same codes"),
        ([[0, 4]], "not 0 to 3"),
        ([0, 1], "a row of codes"),
    ],
)
def test_codes_that_cannot_be_are_refused(codes, told):
    with pytest.raises(DataError, match=told):
        ItemCodes(np.array(codes), 4)


def test_codes_come_back_from_their_file(tmp_path):
    codes = ItemCodes(np.array([[0, 1], [1, 0]]), 2)
    codes.save(tmp_path / "codes.npz")
    again = ItemCodes.load(tmp_path / "codes.npz")
    np.testing.assert_array_equal(again.codes, codes.codes)
    assert again.size == 2
    (tmp_path / "other.npz").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"other.npz holds no codes"):
        ItemCodes.load(tmp_path / "other.npz")


def test_colliding_items_take_the_nearest_free_last_codes():
    books = np.array([[[0.0], [10.0]], [[0.0], [1.0]]])
    x = np.array([[0.1], [0.4], [10.0]])
    found = unique_codes(x, books, np.array([[0, 0], [0, 0], [1, 0]]))
    assert found.tolist() == [[0, 0], [0, 1], [1, 0]]


def test_without_collisions_codes_stay():
    books = np.random.default_rng(1).normal(size=(2, 3, 2))
    ids = np.array([[0, 0], [0, 1], [2, 2]])
    assert unique_codes(np.ones((3, 2)), books, ids).tolist() == ids.tolist()


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_as_many_items_as_codes_all_find_their_own(levels):
    rng = np.random.default_rng(levels)
    count = 3**levels
    books, x = rng.normal(size=(levels, 3, 2)), rng.normal(size=(count, 2))
    found = unique_codes(x, books, np.zeros((count, levels), int))
    assert len(np.unique(found, axis=0)) == count
    assert found.min() >= 0 and found.max() < 3
    with pytest.raises(DataError, match="do not fit"):
        unique_codes(np.ones((count + 1, 2)), books, np.zeros((count + 1, levels), int))


@pytest.mark.parametrize("letter", [False, True])
def test_training_lowers_the_loss_and_gives_each_item_its_own_codes(letter):
    options, taste = {}, None
    if letter:
        options = {"collaborative": 0.02, "diversity": 1e-2}
        taste = np.random.default_rng(1).normal(size=(30, 4))
    config = CodesConfig(**{**vars(SMALL), **options})
    found = train_codes(EMBEDDINGS, config, taste=taste, progress=False)
    assert found.losses[-5:].mean() < found.losses[:5].mean()
    assert len(found.codes) == 30 and found.codes.levels == 3
    assert 0 <= found.collisions < 1


def test_training_goes_on_from_its_file_with_the_same_numbers(tmp_path):
    taste = np.random.default_rng(1).normal(size=(30, 4))
    config = CodesConfig(**{**vars(SMALL), "collaborative": 0.02, "diversity": 1e-2, "epochs": 4})
    whole = train_codes(EMBEDDINGS, config, taste=taste, progress=False)
    file = tmp_path / "codes.fit"
    given = {"taste": taste, "checkpoint": file, "checkpoint_steps": 1, "progress": False}

    class Stopped(Exception):
        pass

    calls = []

    def stop(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise Stopped
        return own(*args, **kwargs)

    from tokjax.recsys import rqvae

    own = rqvae._update
    rqvae._update = stop
    try:
        with pytest.raises(Stopped):
            train_codes(EMBEDDINGS, config, **given)
    finally:
        rqvae._update = own
    again = train_codes(EMBEDDINGS, config, **given)
    np.testing.assert_array_equal(again.losses, whole.losses)
    np.testing.assert_array_equal(again.codes.codes, whole.codes.codes)
    with pytest.raises(ConfigError, match="name another file"):
        train_codes(EMBEDDINGS * 2, config, **given)


def test_alignment_is_the_cross_entropy_of_the_own_item():
    z, taste = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.eye(2)
    expected = (np.log(1 + np.exp(-1.0)) + np.log(1 + np.exp(-2.0))) / 2
    np.testing.assert_allclose(alignment(z, taste), expected, rtol=1e-6)


def test_diversity_tells_a_neighbour_from_all_other_entries():
    codes = jnp.array([[1.0], [2.0], [0.0]])
    clusters = jnp.array([0, 0, 1])
    # Entry 0's neighbour is entry 1 (score 2), against entry 2 (score 0); entry 2 has none.
    found = diversity(jax.random.key(0), codes, clusters, jnp.array([0, 2]))
    np.testing.assert_allclose(found, np.log(1 + np.exp(-2.0)), rtol=1e-6)
    assert diversity(jax.random.key(0), codes, clusters, jnp.array([2])) == 0


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"embeddings": np.full((3, 2), np.nan)}, DataError, "row of item 0 in embeddings"),
        ({"embeddings": np.ones(3)}, DataError, "a row for each item"),
        ({"embeddings": np.ones((65, 2))}, DataError, "65 items do not fit"),
        ({"taste": np.ones((30, 4))}, ConfigError, "need a weight"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(change, error, told):
    given = {"embeddings": EMBEDDINGS, "taste": None, **change}
    with pytest.raises(error, match=told):
        train_codes(given["embeddings"], SMALL, taste=given["taste"], progress=False)
