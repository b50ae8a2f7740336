"""Where kept samples go, and what becomes of their tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.data.batch import Batch
from tokjax.finetuning.compaction import chosen_loss, compacted, first_fit, lengths_of, shapes
from tokjax.models import ModelConfig, Transformer


def batch_of(rows, samples, width):
    """A batch of token sequences, several in a row; prompts of two tokens have no weight."""
    shape = (len(rows), width)
    ints = {n: np.zeros(shape, np.int32) for n in ("tokens", "targets", "positions", "segment_ids")}
    weights, ids = np.zeros(shape, np.float32), np.full((len(rows), samples), -1, np.int32)
    number = 0
    for r, row in enumerate(rows):
        start = 0
        for s, tokens in enumerate(row):
            n = len(tokens) - 1
            span = slice(start, start + n)
            ints["tokens"][r, span], ints["targets"][r, span] = tokens[:-1], tokens[1:]
            ints["positions"][r, span], ints["segment_ids"][r, span] = np.arange(n), s + 1
            weights[r, start + 1 : start + n] = np.arange(2, n + 1)
            ids[r, s] = number
            number, start = number + 1, start + n
    arrays = {name: jnp.asarray(a) for name, a in ints.items()}
    return Batch(**arrays, weights=jnp.asarray(weights), example_id=jnp.asarray(ids))


def test_pruned_tokens_are_neither_labels_nor_context():
    batch = batch_of([[[10, 11, 12, 13, 14], [20, 21, 22, 23]], [[30, 31, 32]]], 2, 8)
    batch = dataclasses.replace(batch, channels={"score": batch.weights * 10})
    # Of the first sample 12 and 14 go, of the second its first predicted token, 21.
    keep = jnp.array([[1, 0, 1, 0, 0, 1, 1, 0], [0] * 8]) == 1
    layout, index = first_fit(lengths_of(batch, keep), ((1, 8), (2, 8)), 4)
    assert index == 0
    found = compacted(batch, keep, layout, (1, 8))
    np.testing.assert_array_equal(found.tokens[0, :4], [10, 11, 20, 22])
    np.testing.assert_array_equal(found.targets[0, :4], [11, 13, 22, 23])
    np.testing.assert_array_equal(found.positions[0], [0, 1, 0, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(found.segment_ids[0], [1, 1, 2, 2, 0, 0, 0, 0])
    np.testing.assert_array_equal(found.weights[0, :4], [0, 3, 2, 3])
    np.testing.assert_array_equal(found.channels["score"][0, :4], [0, 30, 20, 30])
    np.testing.assert_array_equal(found.example_id[0, :3], [0, 1, -1])
    assert not np.asarray(found.weights[0, 4:]).any()


@pytest.mark.parametrize(
    ("rows", "samples", "most", "expected"),
    [
        (16, 1, 4, [(2, 32), (3, 32), (4, 32)]),
        (16, 1, 1, [(1, 16), (1, 24), (1, 32)]),
        (16, 1, 2, [(1, 32), (2, 24), (2, 32)]),
        (8, 1, 8, [(4, 32), (6, 32), (8, 32)]),
        (16, 4, 16, [(3, 32), (4, 32), (6, 32), (16, 32)]),
    ],
)
def test_shapes_are_few_and_the_last_holds_everything(rows, samples, most, expected):
    batch = batch_of([[]] * rows, samples, 32)
    assert list(shapes(batch, most)) == expected


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_every_kept_sample_has_a_place_of_its_own(data):
    B, S, width = 6, 3, 12
    rows = data.draw(
        st.lists(st.lists(st.integers(0, 4), min_size=S, max_size=S), min_size=B, max_size=B)
    )
    lengths = np.array(rows, np.int32)
    choices = ((2, 12), (3, 12), (5, 6), (B, width))
    layout, index = jax.tree.map(np.asarray, _placed(jnp.asarray(lengths), choices, B * S))
    rows, width = choices[index]
    used = np.zeros((rows, width), int)
    numbers = set()
    for place in np.ndindex(B, S):
        row, offset, n = layout.row[place], layout.offset[place], lengths[place]
        if n == 0:
            assert row < 0
            continue
        assert 0 <= row < rows and offset + n <= width
        used[row, offset : offset + n] += 1
        numbers.add((int(row), int(layout.number[place])))
    assert used.max(initial=0) <= 1 and used.sum() == lengths.sum()
    assert len(numbers) == (lengths > 0).sum()
    if lengths.sum() > 24:
        assert index > 0


_placed = jax.jit(first_fit, static_argnums=(1, 2))


def test_samples_that_fit_nowhere_stay_in_their_rows():
    # Longest first puts 5 + 4 into one row and 4 + 3 + 3 into the other: a 3 is left over.
    packed = jnp.array([[5, 3, 3], [4, 4, 3]])
    layout, index = first_fit(packed, ((2, 11),), 6)
    assert index == 0
    np.testing.assert_array_equal(layout.row, [[0, 0, 0], [1, 1, 1]])
    np.testing.assert_array_equal(layout.offset, [[0, 5, 8], [0, 4, 8]])
    np.testing.assert_array_equal(layout.number, [[1, 2, 3], [1, 2, 3]])


def test_later_tokens_and_pruned_ones_move_no_kept_logit():
    """In the batch that is trained a token sees kept tokens before it and nothing else."""
    config = ModelConfig(vocab_size=50, d_model=16, n_layers=2, n_heads=2, d_ff=24, init_scale=0.7)
    model = Transformer(config)
    params = model.init(jax.random.key(0))
    batch = batch_of([[[10, 11, 12, 13, 14, 15], [20, 21, 22, 23]]], 2, 8)
    keep = jnp.array([[1, 1, 0, 1, 1, 1, 0, 1]]) == 1
    layout, _ = first_fit(lengths_of(batch, keep), ((1, 8),), 2)

    @jax.jit
    def logits(targets, tokens):
        changed = dataclasses.replace(batch, targets=targets, tokens=tokens)
        small = compacted(changed, keep, layout, (1, 8))
        x = model.embed(params, small.tokens)
        out = model.backbone(params, x, positions=small.positions, segments=small.segment_ids)
        return model.unembed(params, out.x)[0]

    before = logits(batch.targets, batch.tokens)
    # New slots: 10>11, 11>12, 12>14, 14>15 of the first sample, 20>21, 21>23 of the second.
    for slot, moved in {1: {2, 3}, 2: set(), 3: {3}, 4: set(), 6: set(), 7: set()}.items():
        targets = batch.targets.at[0, slot].set(40)
        tokens = batch.tokens.at[0, slot + 1].set(40) if slot not in (4, 7) else batch.tokens
        change = np.abs(np.asarray(logits(targets, tokens) - before)).max(-1)[:6]
        assert set(np.flatnonzero(change).tolist()) == moved, slot


def test_gradients_come_from_the_chosen_branch_alone():
    losses = [lambda p, x: (p["a"] * x).sum(), lambda p, x: (jnp.sin(p["a"]) * p["b"] * x).sum()]
    params = {"a": jnp.arange(3.0), "b": jnp.float32(2.0)}
    x = jnp.array([1.0, 2.0, 5.0])
    for index, loss in enumerate(losses):
        run = jax.jit(jax.value_and_grad(lambda p, i: 3 * chosen_loss(losses, i, p, x)))
        value, gradient = run(params, jnp.int32(index))
        expected, expected_gradient = jax.value_and_grad(lambda p, f=loss: 3 * f(p, x))(params)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), gradient, expected_gradient
        )
        assert chosen_loss(losses, jnp.int32(index), params, x) * 3 == pytest.approx(float(value))
