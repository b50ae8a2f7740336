import dataclasses
import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.data.batch import Batch
from tokjax.errors import ConfigError
from tokjax.models import ModelConfig, Transformer
from tokjax.pretraining import patch_training
from tokjax.pretraining.next_token import NextToken
from tokjax.pretraining.patch_training import (
    Patch,
    next_patch_targets,
    patch_embeddings,
    relative_cost,
)

V, N, K = 17, 12, 3
CONFIG = ModelConfig(
    vocab_size=V, d_model=16, n_layers=2, n_heads=2, d_ff=24, init_scale=0.5, remat="none"
)
MODEL = Transformer(CONFIG)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(1))


def batch_of(*rows, weights=None, n=N):
    """A batch of rows, each a list of (start, tokens) documents, in the loader's conventions.

    A single row gets a row of filling beside it: one shape, hence one compilation, for all tests.
    """
    rows = rows if len(rows) > 1 or n != N else (*rows, [])
    shape = (len(rows), n)
    arrays = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "positions")}
    segments, w = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for r, row in enumerate(rows):
        for s, (start, document) in enumerate(row):
            m = len(document) - 1
            where = (r, slice(start, start + m))
            arrays["tokens"][where] = document[:-1]
            arrays["targets"][where] = document[1:]
            arrays["positions"][where] = np.arange(m)
            segments[where], w[where] = s + 1, 1.0
    if weights is not None:
        w = w * weights
    arrays = {name: jnp.asarray(a) for name, a in arrays.items()}
    ids = jnp.zeros((len(rows), 4), jnp.int32)
    return Batch(
        **arrays, segment_ids=jnp.asarray(segments), weights=jnp.asarray(w), example_id=ids
    )


def document(rng, tokens):
    return rng.integers(1, V, tokens).tolist()


def full_batch(seed=0, rows=2, weights=None):
    rng = np.random.default_rng(seed)
    return batch_of(*([(0, document(rng, N + 1))] for _ in range(rows)), weights=weights)


@jax.jit
def _logits(params, batch, x):
    out = MODEL.backbone(
        params, x, positions=batch.positions[:, ::K] // K, segments=batch.segment_ids[:, ::K]
    )
    return MODEL.unembed(params, out.x)


def patch_logits(params, batch):
    real = (batch.segment_ids > 0).astype(jnp.float32)
    return _logits(params, batch, patch_embeddings(MODEL.embed(params, batch.tokens), real, K))


_COMPILED = {}


def loss_and_gradient(objective, params, batch):
    if objective not in _COMPILED:

        def total(params, batch):
            loss = objective.loss(MODEL, params, (), batch, jax.random.key(0))
            return loss.total, loss

        _COMPILED[objective] = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, loss), gradient = _COMPILED[objective](params, batch)
    return loss, gradient


def mean(loss):
    return float(loss.total / loss.weight)


def close(found, expected, **tolerance):
    tolerance = {"rtol": 1e-5, "atol": 1e-6} | tolerance
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)


# --- the specification's exact checks, in its order ---


def test_oracle_1_patch_embeddings():
    table = jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0], [-1.0, 1.0]])
    found = patch_embeddings(table[jnp.array([[0, 1, 2, 3]])], jnp.ones((1, 4)), 2)
    np.testing.assert_array_equal(found, [[[0.5, 1.0], [1.0, 1.0]]])


# Oracle 2 (one log-softmax, two targets, its gradient) is a check of weighted_nll:
# tests/signals/test_weighted_nll.py.


def test_oracle_3_one_token_a_patch_is_next_token_prediction(params):
    rng = np.random.default_rng(5)
    batch = batch_of(
        [(0, document(rng, 6)), (5, document(rng, 7))],
        [(0, document(rng, 11))],
        weights=rng.normal(size=(2, N)).astype(np.float32),
    )
    loss, gradient = loss_and_gradient(Patch(k=1, z_loss=0.01), params, batch)
    expected, expected_gradient = loss_and_gradient(NextToken(z_loss=0.01), params, batch)
    close((loss.total, loss.weight), (expected.total, expected.weight), rtol=1e-6)
    close(loss.metrics["nll"], expected.metrics["nll"], rtol=1e-6)
    close(gradient, expected_gradient, rtol=1e-6, atol=1e-6)


def test_oracle_4_order_within_a_patch_changes_nothing(params):
    rng = np.random.default_rng(2)
    # 13 tokens: 4 patches of inputs; the last token is never part of a target patch.
    tokens = rng.integers(1, V, (4, K))
    order = [rng.permutation(K) for _ in range(4)]
    last = [3]
    one = batch_of([(0, [*tokens.reshape(-1), *last])])
    two = batch_of(
        [(0, [*(t for row, o in zip(tokens, order, strict=True) for t in row[o]), *last])]
    )
    assert not np.array_equal(one.tokens, two.tokens)
    close(patch_logits(params, one), patch_logits(params, two))
    a, b = (loss_and_gradient(Patch(k=K), params, batch)[0] for batch in (one, two))
    close((a.total, a.weight), (b.total, b.weight), rtol=1e-6)


def test_oracle_5_no_patch_sees_a_later_token(params):
    batch = full_batch(rows=1)
    x = patch_embeddings(MODEL.embed(params, batch.tokens), batch.weights, K)
    jacobian = jax.jit(jax.jacrev(lambda x: _logits(params, batch, x)[0].sum(-1)))(x)
    jacobian = np.abs(np.asarray(jacobian)[:, 0]).sum(-1)  # [output patch, input patch]
    later = np.triu(np.ones((N // K, N // K), bool), 1)
    assert (jacobian[later] == 0).all()
    assert (jacobian[~later] > 0).all()
    logits = patch_logits(params, batch)
    changed = dataclasses.replace(
        batch, tokens=batch.tokens.at[0, 2 * K].set(V - batch.tokens[0, 2 * K])
    )
    moved = np.abs(np.asarray(patch_logits(params, changed) - logits)).max(-1)[0]
    assert (moved[:2] == 0).all()
    assert (moved[2:] > 0).all()


@pytest.mark.parametrize(("pattern", "entropy"), [("abcd", 1.386294), ("aabc", 1.039721)])
def test_oracle_6_lowest_loss_is_the_histograms_entropy(pattern, entropy):
    from tokjax.signals import weighted_nll

    ids = jnp.array([[["abcd".index(c) for c in pattern]]], jnp.int32)
    weights = jnp.full((1, 1, 4), 0.25)
    histogram = jnp.bincount(ids.reshape(-1), length=4) / 4
    logits = jnp.log(jnp.maximum(histogram, 1e-30))

    def loss(x):
        return weighted_nll(x[None, None], jnp.eye(4), ids, weights)[0]

    value, gradient = jax.value_and_grad(loss)(logits)
    np.testing.assert_allclose(value, entropy, atol=1e-6)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)
    assert loss(logits.at[0].add(0.3)) > value


class Scripted:
    """A stand-in model whose patch i gives the target losses that a test asks for.

    The head is the identity over V log-probabilities, which are its hidden states.
    """

    def __init__(self, logprobs):
        self.logprobs = logprobs

    def embed(self, params, tokens):
        return jnp.zeros((*tokens.shape, 1))

    def backbone(self, params, x, **_):
        return dataclasses.make_dataclass("Out", ["x"])(jnp.asarray(self.logprobs))

    def head(self, params):
        return jnp.eye(self.logprobs.shape[-1])


@pytest.mark.parametrize(("average", "expected"), [("offset", 2.75), ("token", 7 / 3)])
def test_oracle_7_averages(average, expected):
    # Offset losses [[1, 2], [4, ignored]]: patch 0 predicts ids 1 and 2 at 1 and 4 nats, patch 1
    # predicts ids 3 (at 2 nats) and 4 (ignored). Id 0 takes the probability left.
    nll = np.full((2, 5), 9.0)
    nll[0, [1, 2]], nll[1, [3, 4]] = [1.0, 4.0], [2.0, 5.0]
    logprobs = -nll
    logprobs[:, 0] = np.log(1 - np.exp(logprobs[:, 1:]).sum(-1))
    # Patch 2 ends the row; the one token behind it is ignored too.
    batch = batch_of([(0, [0, 0, 1, 2, 3, 4, 0])], n=6)
    batch = dataclasses.replace(batch, weights=batch.weights.at[0, 4:].set(0.0))
    model = Scripted(np.concatenate([logprobs, logprobs[:1]])[None].astype(np.float32))
    loss = Patch(k=2, average=average).loss(model, {}, (), batch, jax.random.key(0))
    np.testing.assert_allclose(mean(loss), expected, rtol=1e-6)
    assert float(loss.weight) == 3.0
    for name, value in (("nll", expected), ("nll_offset_0", 1.5), ("nll_offset_1", 4.0)):
        total, weight = loss.metrics[name]
        np.testing.assert_allclose(total / weight, value, rtol=1e-6, err_msg=name)


def test_oracle_8_cost():
    assert relative_cost(4, 2 / 3) == 0.5
    assert relative_cost(4, 1 / 2) == 0.625
    assert relative_cost(4, 4 / 5) == 0.4
    assert relative_cost(2, 1 / 2) == 0.75
    assert doctest.testmod(patch_training).failed == 0


# --- targets, documents and weights ---


def test_targets_are_the_next_patch_of_the_same_document():
    batch = batch_of([(0, [1, 2, 3, 4, 5, 6]), (6, [7, 8, 9, 10, 11, 12, 13])])
    targets, weights = next_patch_targets(batch, K)
    # First document: patch (1 2 3) predicts (4 5 6); patch (4 5 .) has no next one.
    # Second: (7 8 9) predicts (10 11 12); (10 11 12) predicts 13, which lies behind the row.
    np.testing.assert_array_equal(weights[0], [[1, 1, 1], [0, 0, 0], [1, 1, 1], [1, 0, 0]])
    np.testing.assert_array_equal(targets[0, 0], [4, 5, 6])
    np.testing.assert_array_equal(targets[0, 2], [10, 11, 12])
    assert targets[0, 3, 0] == 13


def test_each_target_keeps_its_own_real_weight():
    values = np.arange(1.0, N + 1, dtype=np.float32)[None] * [[1], [-0.5]]
    batch = full_batch(weights=values)
    targets, weights = next_patch_targets(batch, K)
    # Row position p holds the weight of token p + 1; patch i + 1 holds tokens from (i + 1) K on.
    for i in range(N // K - 1):
        for j in range(K):
            p = (i + 1) * K + j - 1
            np.testing.assert_array_equal(weights[:, i, j], values[:, p])
            np.testing.assert_array_equal(targets[:, i, j], batch.targets[:, p])
    # Of the patch behind the row only the first token is known.
    np.testing.assert_array_equal(weights[:, -1, 0], values[:, -1])
    assert not np.asarray(weights[:, -1, 1:]).any()


@pytest.mark.parametrize("average", ["token", "offset"])
def test_loss_is_linear_in_real_valued_weights(params, average):
    rng = np.random.default_rng(3)
    weights = rng.normal(size=(2, N)).astype(np.float32)
    batch = full_batch(weights=weights)
    loss, _ = loss_and_gradient(Patch(k=K, average=average), params, batch)
    targets, w = next_patch_targets(batch, K)
    logprobs = jax.nn.log_softmax(patch_logits(params, batch))
    nll = -np.take_along_axis(np.asarray(logprobs), np.asarray(targets), -1).astype(np.float64)
    w = np.asarray(w, np.float64)
    expected = (w * nll).sum() / w.sum()
    if average == "offset":
        expected = np.mean([(w * nll)[..., j].sum() / w[..., j].sum() for j in range(K)])
        assert (w.sum((0, 1)) < 0).any()  # an offset of negative weight is a mean like others
    np.testing.assert_allclose(mean(loss), expected, rtol=1e-4)
    np.testing.assert_allclose(float(loss.weight), w.sum(), rtol=1e-5)


def test_averages_agree_where_offsets_have_equally_many_targets(params):
    # Without the token behind the row every offset has the same number of targets.
    batch = full_batch(weights=np.r_[np.ones(N - 1), 0.0].astype(np.float32))
    a, b = (
        loss_and_gradient(Patch(k=K, average=average), params, batch)
        for average in ("token", "offset")
    )
    close((a[0].total, a[1]), (b[0].total, b[1]))


def test_documents_of_one_row_never_mix(params):
    rng = np.random.default_rng(7)
    one, two = document(rng, 6), document(rng, 7)
    packed = batch_of([(0, one), (6, two)])
    apart = batch_of([(0, one)], [(0, two)])
    a, b = (loss_and_gradient(Patch(k=K), params, batch) for batch in (packed, apart))
    close((a[0].total, a[0].weight), (b[0].total, b[0].weight))
    close(a[1], b[1])
    logits = patch_logits(params, packed)
    alone = patch_logits(params, apart)
    close(logits[0, :2], alone[0, :2], atol=1e-5)
    close(logits[0, 2:], alone[1, :2], atol=1e-5)


def test_filling_changes_nothing(params):
    rng = np.random.default_rng(8)
    batch = batch_of([(0, document(rng, 6))], [(0, document(rng, 9))])
    empty = batch.segment_ids == 0
    other = dataclasses.replace(
        batch,
        tokens=jnp.where(empty, 11, batch.tokens),
        targets=jnp.where(empty, 12, batch.targets),
    )
    for targets in ("patch", "shuffled"):
        objective = Patch(k=K, targets=targets)
        a, b = (loss_and_gradient(objective, params, x) for x in (batch, other))
        close((a[0].total, a[1]), (b[0].total, b[1]), rtol=0, atol=0)


def test_a_partly_filled_patch_is_the_mean_of_its_tokens():
    x = jnp.arange(6.0).reshape(1, 6, 1)
    mask = jnp.array([[1, 1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(patch_embeddings(x, mask, 3)[0, :, 0], [1.0, 3.0])
    np.testing.assert_array_equal(patch_embeddings(x, mask, 2)[0, :, 0], [0.5, 2.5, 0.0])


def test_the_mean_is_taken_in_float32():
    # In bfloat16 the sum 256 + 1 + 1 + 1 would stay at 256, the mean at 64.
    x = jnp.array([256, 1, 1, 1], jnp.bfloat16).reshape(1, 4, 1)
    found = patch_embeddings(x, jnp.ones((1, 4)), 4)
    assert found.dtype == jnp.bfloat16
    assert found[0, 0, 0] == jnp.bfloat16(259 / 4)


# --- controls ---


def test_token_control_predicts_the_first_token_only(params):
    batch = full_batch()
    loss, _ = loss_and_gradient(Patch(k=K, targets="token"), params, batch)
    full, _ = loss_and_gradient(Patch(k=K), params, batch)
    close((loss.total, loss.weight), full.metrics["nll_offset_0"])
    assert set(loss.metrics) == {"nll", "nll_offset_0"}


def test_shuffled_control_predicts_another_rows_patches(params):
    batch = full_batch(rows=2)
    loss, _ = loss_and_gradient(Patch(k=K, targets="shuffled"), params, batch)
    swapped = dataclasses.replace(batch, targets=batch.targets[::-1])
    expected, _ = loss_and_gradient(Patch(k=K), params, swapped)
    close((loss.total, loss.weight), (expected.total, expected.weight))
    assert abs(mean(loss) - mean(loss_and_gradient(Patch(k=K), params, batch)[0])) > 1e-3


def test_shuffled_targets_of_one_row_are_refused(params):
    row = jax.tree.map(lambda a: a[:1], full_batch())
    with pytest.raises(ConfigError, match="one row only: raise batch_size"):
        loss_and_gradient(Patch(k=K, targets="shuffled"), params, row)


# --- refusals ---


def test_rows_that_are_not_whole_patches_are_refused(params):
    with pytest.raises(ConfigError, match="12 tokens are not whole patches of k=5"):
        loss_and_gradient(Patch(k=5), params, full_batch())
    with pytest.raises(ConfigError, match="multiple of 5"):
        next_patch_targets(full_batch(), 5)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"z_loss": -0.1}, "z_loss=-0.1"),
        ({"average": "tokens"}, "average='tokens'.*token"),
        ({"targets": "shuffle"}, "targets='shuffle'.*shuffled"),
    ],
    ids=str,
)
def test_impossible_settings_are_named(field, message):
    with pytest.raises(ConfigError, match=message):
        Patch(**field)
    assert Patch().tokens_per_position == 4
