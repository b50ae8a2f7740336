"""Segments: who belongs where, means, shifts, and what has no room."""

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.models.segments import Segments, first_of_documents, room_for

made = jax.jit(Segments.of, static_argnums=2)
BEGINS = jnp.array([[0, 0, 1, 0, 1, 0]], bool)
ONE = jnp.ones((1, 6), jnp.int32)
H = jnp.arange(1.0, 7.0)[None, :, None]


def test_means_are_shifted_so_that_no_slot_gets_its_own_segments():
    found = made(BEGINS, ONE, 4)
    np.testing.assert_array_equal(found.ids, [[0, 0, 1, 1, 2, 2]])
    np.testing.assert_array_equal(found.first, [[0, 2, 4, 6]])
    np.testing.assert_array_equal(found.count, [3])
    pooled = found.pool(H)
    np.testing.assert_array_equal(pooled[0, :, 0], [1.5, 3.5, 5.5, 0])
    shifted = found.shift(pooled, jnp.array([-9.0]))
    np.testing.assert_array_equal(shifted[0, :3, 0], [-9, 1.5, 3.5])
    np.testing.assert_array_equal(found.unpool(shifted)[0, :, 0], [-9, -9, 1.5, 1.5, 3.5, 3.5])


def test_offsets_count_from_each_segments_first_slot():
    np.testing.assert_array_equal(made(BEGINS, ONE, 3).offset, [[0, 1, 0, 1, 0, 1]])
    np.testing.assert_array_equal(made(BEGINS, ONE, 3).at_first(H)[0, :, 0], [1, 3, 5])


def test_a_document_begins_a_segment_and_shifts_nothing_over():
    documents = jnp.array([[1, 1, 2, 2, 2, 0]])
    begins = jnp.array([[0, 1, 0, 0, 1, 1]], bool)
    found = made(begins, documents, 5)
    np.testing.assert_array_equal(found.ids, [[0, 1, 2, 2, 3, 5]])
    np.testing.assert_array_equal(found.document, [[1, 1, 2, 2, 0]])
    np.testing.assert_array_equal(found.index[0, :4], [0, 1, 0, 1])
    shifted = found.shift(found.pool(H), jnp.array([0.0]))
    np.testing.assert_array_equal(shifted[0, :4, 0], [0, 1, 0, 3.5])
    np.testing.assert_array_equal(first_of_documents(documents), [[1, 0, 1, 0, 0, 0]])


def test_segments_without_room_are_told_and_leave_the_others_alone():
    whole, small = made(BEGINS, ONE, 3), made(BEGINS, ONE, 2)
    np.testing.assert_array_equal(small.fits, [[1, 1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(small.count, [3])
    np.testing.assert_array_equal(small.pool(H), whole.pool(H)[:, :2])


def test_filling_before_between_and_behind_belongs_to_nothing():
    documents = jnp.array([[0, 1, 1, 0, 2, 0]])
    found = made(jnp.ones((1, 6), bool), documents, 6)
    np.testing.assert_array_equal(found.ids, [[6, 0, 1, 6, 2, 6]])
    np.testing.assert_array_equal(found.document, [[1, 1, 2, 0, 0, 0]])
    np.testing.assert_array_equal(found.pool(H)[0, :, 0], [2, 3, 5, 0, 0, 0])


def test_the_weights_of_a_mean_have_a_gradient():
    found = made(BEGINS, ONE, 3)
    slope = jax.grad(lambda w: found.pool(H, w)[0, 1, 0])(jnp.ones((1, 6)))
    np.testing.assert_allclose(slope, [[0, 0, -0.25, 0.25, 0, 0]], atol=1e-6)


def test_room_is_at_least_one_segment_and_at_most_all_slots():
    assert [room_for(s, 7) for s in (0.01, 0.5, 1.0)] == [1, 4, 7]
