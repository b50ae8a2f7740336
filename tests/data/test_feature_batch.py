"""Rows that hold vectors of frames before their text."""

import dataclasses

import jax
import numpy as np
import pytest

from tokjax.data.feature_batch import FeatureExample, feature_batch
from tokjax.errors import DataError

END = 2


def example(frames, text, seed=0):
    made = np.random.default_rng(seed).normal(size=(frames, 3)).astype(np.float32)
    return FeatureExample(made, [*text, END], before=[0], prompt=[1])


EXAMPLES = [example(5, [4, 5], 1), example(2, [6], 2)]


def test_rows_hold_gaps_for_the_vectors_and_targets_of_the_text_alone():
    batch = feature_batch(EXAMPLES, 2)
    np.testing.assert_array_equal(batch.tokens, [[0, 0, 0, 0, 1, 4, 5], [0, 0, 1, 6, 0, 0, 0]])
    np.testing.assert_array_equal(batch.slots, [[-1, 0, 1, 2, -1, -1, -1], [-1, 0, *[-1] * 5]])
    np.testing.assert_array_equal(batch.weights, [[0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch.targets[0, 4:], [4, 5, END])
    np.testing.assert_array_equal(batch.targets[1, 2:4], [6, END])
    np.testing.assert_array_equal(batch.segment_ids, [[1] * 7, [1] * 4 + [0] * 3])
    np.testing.assert_array_equal(batch.frame_counts, [5, 2])
    np.testing.assert_array_equal(batch.frames[1, :2], EXAMPLES[1].frames)
    assert not np.asarray(batch.frames)[1, 2:].any()
    # Micro-batches are made by splitting every leaf by rows.
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(batch))
    wider = feature_batch(EXAMPLES, 2, width=9, frames=6)
    assert wider.tokens.shape == (2, 9) and wider.frames.shape == (2, 6, 3)


def test_rows_that_cannot_be_made_are_refused():
    first, second = EXAMPLES
    for examples, options, said in (
        ([], {}, "needs an example"),
        ([dataclasses.replace(first, frames=np.zeros((0, 3)))], {}, "at least one frame"),
        ([dataclasses.replace(first, frames=np.zeros(3))], {}, "example 0"),
        ([first, dataclasses.replace(second, frames=np.zeros((2, 4)))], {}, "example 1"),
        ([dataclasses.replace(first, text=[])], {}, "needs a text"),
        ([dataclasses.replace(first, before=())], {}, "token before its frames"),
        (EXAMPLES, {"width": 6}, "width=6"),
        (EXAMPLES, {"frames": 4}, "frames=4"),
    ):
        with pytest.raises(DataError, match=said):
            feature_batch(examples, 2, **options)
