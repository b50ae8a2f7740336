"""The permutation evaluated by index is a bijection, keyed, and looks random."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.data.shuffle import derive_seed, permute


@settings(max_examples=60, deadline=None)
@given(
    size=st.one_of(st.integers(1, 40), st.integers(41, 4000)),
    seed=st.integers(-(2**70), 2**70),
    epoch=st.integers(0, 2**40),
)
def test_permute_is_a_bijection(size, seed, epoch):
    images = permute(np.arange(size), size, seed, epoch)
    assert images.dtype == np.int64
    np.testing.assert_array_equal(np.sort(images), np.arange(size))


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 2**62), seed=st.integers(0, 2**64), data=st.data())
def test_one_index_agrees_with_an_array_of_any_shape(size, seed, data):
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=4, max_size=4))
    images = permute(np.array(indices).reshape(2, 2), size, seed, 1)
    assert images.shape == (2, 2)
    assert images.ravel().tolist() == [permute(i, size, seed, 1) for i in indices]
    assert all(0 <= image < size for image in images.ravel().tolist())
    assert len(set(images.ravel().tolist())) == len(set(indices))


def test_seed_and_epoch_choose_the_permutation():
    everything = np.arange(1000)
    first = permute(everything, 1000, seed=1, epoch=0)
    for other in ({"seed": 2, "epoch": 0}, {"seed": 1, "epoch": 1}):
        fixed = (permute(everything, 1000, **other) == first).sum()
        assert fixed < 10  # two unrelated permutations agree at one place on average


def test_an_array_of_epochs_gives_each_index_its_own_permutation():
    indices, epochs = np.arange(40) % 7, np.arange(40) // 7
    images = permute(indices, 7, seed=2, epoch=epochs)
    alone = [permute(i, 7, 2, e) for i, e in zip(indices.tolist(), epochs.tolist(), strict=True)]
    assert images.tolist() == alone


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_permutation_of_a_small_size_occurs_equally_often(size):
    draws = 300 * (1 if size < 5 else 4)
    seen: dict[tuple, int] = {}
    for seed in range(draws):
        images = tuple(permute(np.arange(size), size, seed).tolist())
        seen[images] = seen.get(images, 0) + 1
    count = int(np.prod(np.arange(1, size + 1)))
    assert len(seen) == count
    expected = draws / count
    chi_squared = sum((n - expected) ** 2 / expected for n in seen.values())
    assert chi_squared < count - 1 + 5 * np.sqrt(2 * (count - 1)) + 5


@pytest.mark.parametrize("size", [4096, 10_007])
def test_displacement_and_neighbours_look_random(size):
    images = permute(np.arange(size), size, seed=5).astype(float)
    mean = np.abs(images - np.arange(size)).mean() / size
    # |X - Y| of two uniforms has mean 1/3 and variance 1/18.
    assert abs(mean - 1 / 3) < 5 * np.sqrt(1 / 18 / size)
    steps = np.abs(np.diff(images)).mean() / size
    assert abs(steps - 1 / 3) < 5 * np.sqrt(1 / 18 / size)
    assert abs(np.corrcoef(images, np.arange(size))[0, 1]) < 5 / np.sqrt(size)


def test_one_bit_of_the_index_moves_the_image_anywhere():
    size = 1 << 20
    rng = np.random.default_rng(0)
    base = rng.integers(0, size, 2000)
    for bit in (0, 7, 19):
        distance = np.abs(permute(base, size, 9) - permute(base ^ (1 << bit), size, 9)) / size
        assert abs(distance.mean() - 1 / 3) < 5 * np.sqrt(1 / 18 / len(base))


def test_index_outside_the_size_is_refused():
    with pytest.raises(ValueError, match=r"outside \[0, 5\)"):
        permute(5, 5, 0)
    with pytest.raises(ValueError, match=r"outside \[0, 5\)"):
        permute(np.array([0, -1]), 5, 0)
    with pytest.raises(ValueError, match="size 0"):
        permute(0, 0, 0)
    assert permute(np.zeros(0, np.int64), 5, 0).shape == (0,)


def test_streams_of_one_seed_are_unrelated():
    seeds = [derive_seed(7, "a"), derive_seed(7, "b"), derive_seed(8, "a"), derive_seed(7, "a", 0)]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert derive_seed(7, "a", 1) == derive_seed(np.int64(7), "a", 1)
