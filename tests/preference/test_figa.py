import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.config import resolve
from tokjax.data.store import TokenStore
from tokjax.errors import ConfigError, DataError
from tokjax.preference.figa import (
    FIGA,
    figa_weights,
    gated_weights,
    revisions_to_keep,
)
from tokjax.preference.token_weights import write_token_weights
from tokjax.training.config import TrainConfig
from tokjax.training.loop import train
from tokjax.training.metrics import read_metrics
from tokjax.training.run import build_run

NLL = np.array([0.3, 1.2, 0.2, 0.5, 0.3, 0.4, 0.2, 0.9, 0.1], np.float32)  # revised, initial
WEIGHTS = np.array([0, 1, 0, 1, 0, -0.5, 0, -0.5, 0], np.float32)
PAIRS = [
    {"prompt": "sort: ", "chosen": "abcd", "rejected": "abdd"},
    {"prompt": "say ", "chosen": "same", "rejected": "same"},
    {"prompt": "x", "chosen": "12", "rejected": "three"},
    {"prompt": "y", "chosen": "", "rejected": "long"},
]


# ---- weights of a store


@pytest.fixture(scope="module")
def store(stored) -> TokenStore:
    return stored(PAIRS, "preference")


def test_weights_of_edits_ends_and_prompts(store):
    weights = figa_weights(store, alpha=2.0, beta=0.5, gamma=0.25)
    # <end> s o r t : _ a b c d <end>, then the same with a b d d
    expected = [0] * 7 + [0.25, 0.25, 2, 0.25, 2] + [0] * 7 + [0, 0, 0.5, 0, 0]
    np.testing.assert_array_equal(weights[0], expected)


def test_equal_answers_leave_the_end_of_the_revised_one(store):
    (places,) = np.nonzero(figa_weights(store)[1])
    assert places.tolist() == [store.cut(1) - 1]
    assert store.tokens(1)[places[0]] == 256


def test_disjoint_answers_are_marked_throughout_but_for_the_initial_end(store):
    for i, revised in ((2, [1, 1, 1]), (3, [1])):
        expected = [0, 0, *revised, 0, 0, *[0.5] * (5 if i == 2 else 4), 0]
        np.testing.assert_array_equal(figa_weights(store)[i], expected)


def test_an_initial_end_is_not_bad_even_where_the_revision_has_none(stored):
    # Of the revised answer only "a" counts, so that "b" and the end seem deleted.
    record = {"prompt": "q", "chosen": "ab", "rejected": "ab", "weights": [[1, 2, 0.0]]}
    weights = figa_weights(stored([record], "preference"))[0]
    np.testing.assert_array_equal(weights, [0] * 5 + [0] * 3 + [0.5, 0])


def test_the_channel_keeps_the_signs_of_the_data(store, batch_of):
    batch = batch_of(store, figa_weights(store, beta=0.5, gamma=0.25))
    chosen = batch.segment_ids % 2 == 1
    assert set(batch.weights[chosen].tolist()) == {0.0, 0.25, 1.0}
    assert set(batch.weights[~chosen].tolist()) == {0.0, -0.5}


def test_single_answers_and_negative_weights_are_refused(store, stored):
    with pytest.raises(ConfigError, match="beta=-1"):
        figa_weights(store, beta=-1.0)
    rated = stored([{"prompt": "a", "response": "b", "label": True}], "rated")
    with pytest.raises(DataError, match="kind 'preference'"):
        figa_weights(rated)


def test_pairs_are_kept_where_the_revision_is_much_better():
    initial, revised = [0.5, 0.5, 2.0, 0.9], [4.5, 2.0, 6.0, 3.2]
    keep = revisions_to_keep(initial, revised, at_most=1.0, at_least=3.0, gap=3.5)  # type: ignore[arg-type]
    assert keep.tolist() == [True, False, False, False]


# ---- the loss


def test_numbers_of_the_loss():
    weights = np.asarray(gated_weights(NLL, WEIGHTS, 0.6))
    assert (weights != 0).sum() == 3
    np.testing.assert_allclose((weights * NLL).sum() / 3, 0.5, atol=1e-7)


def test_an_unlikely_bad_token_has_no_gradient_and_is_not_counted():
    def total(nll, gate=0.6):
        return (gated_weights(nll, WEIGHTS, gate) * nll).sum()

    np.testing.assert_allclose(jax.grad(total)(NLL), [0, 1, 0, 1, 0, -0.5, 0, 0, 0])
    raised = NLL.copy()
    raised[5] = 0.61
    np.testing.assert_allclose(jax.grad(total)(raised), [0, 1, 0, 1, 0, 0, 0, 0, 0])
    count = [int((gated_weights(n, WEIGHTS, 0.6) != 0).sum()) for n in (NLL, raised)]
    assert count == [3, 2]
    at_the_gate = np.full(9, 0.6, np.float32)
    np.testing.assert_array_equal(gated_weights(at_the_gate, WEIGHTS, 0.6), WEIGHTS)
    open_gate = jax.grad(lambda nll: total(nll, None))(NLL)
    np.testing.assert_array_equal(open_gate, WEIGHTS)


def losses(lm, batch, **settings):
    model, params = lm

    @jax.jit
    def of(params, batch):
        return FIGA(**settings).loss(model, params, (), batch, jax.random.key(0))

    return of(params, batch)


def nll_of(store, i, params, next_logprobs):
    """The nll of each token of an example, answer by answer."""
    own, ids = np.zeros(int(store.lengths[i])), store.tokens(i)
    for start, stop in ((0, store.cut(i)), (store.cut(i), len(ids))):
        logp = next_logprobs(params, ids[start:stop])
        own[start + 1 : stop] = -logp[np.arange(stop - start - 1), ids[start + 1 : stop]]
    return own


@pytest.mark.parametrize("gate", [None, 4.0, 0.6])
def test_packed_pairs_equal_answers_scored_one_by_one(store, lm, batch_of, next_logprobs, gate):
    weights, total, count, bad = figa_weights(store), 0.0, 0, []
    for i in range(store.num_examples):
        nll = nll_of(store, i, lm[1], next_logprobs)
        signed = weights[i] * np.sign(store.weights(i))
        bad += nll[signed < 0].tolist()
        if gate is not None:
            signed = np.where((signed < 0) & (nll > gate), 0, signed)
        total, count = total + (signed * nll).sum(), count + (signed != 0).sum()
    found = losses(lm, batch_of(store, weights), gate=gate)
    np.testing.assert_allclose(found.total, total, rtol=1e-4)
    assert found.weight == count
    below = bad if gate is None else [n for n in bad if n <= gate]
    if gate == 4.0:
        assert 0 < len(below) < len(bad)
    assert found.metrics["bad_in_use"] == (len(below), len(bad))
    np.testing.assert_allclose(found.metrics["bad_nll"][0], sum(bad), rtol=1e-4)


def test_without_bad_tokens_it_is_the_nll_of_the_revised_answers(
    store, lm, batch_of, next_logprobs
):
    weights = figa_weights(store, alpha=1.0, beta=0.0, gamma=1.0)
    found = losses(lm, batch_of(store, weights))
    nll = [
        nll_of(store, i, lm[1], next_logprobs)[: store.cut(i)][
            store.weights(i)[: store.cut(i)] != 0
        ]
        for i in range(store.num_examples)
    ]
    expected = np.concatenate(nll).mean()
    np.testing.assert_allclose(found.total / found.weight, expected, rtol=1e-5)


def test_a_batch_without_weights_adds_nothing(store, lm, batch_of):
    batch = batch_of(store)
    found = losses(lm, batch.replace(weights=np.zeros_like(batch.weights)))
    assert found.total == 0 and found.weight == 0


def test_what_follows_in_a_row_changes_no_earlier_pair(store, lm, batch_of):
    batch = batch_of(store, figa_weights(store))
    row = int(np.argmax(batch.segment_ids.max(1)))
    last = batch.segment_ids[row].max() - 1
    assert last > 2
    early = np.zeros_like(batch.weights)
    early[row] = np.where(batch.segment_ids[row] < last, batch.weights[row], 0)
    batch, tokens = batch.replace(weights=early), batch.tokens.copy()
    tokens[row, batch.segment_ids[row] >= last] = 7
    found = [losses(lm, b, gate=None).total for b in (batch, batch.replace(tokens=tokens))]
    np.testing.assert_array_equal(*found)


def test_no_gradient_of_a_closed_gate_is_left(store, lm, batch_of):
    """With a gate of 0 only good tokens are learned: beta changes nothing."""
    model, params = lm

    @jax.jit
    def gradient(params, batch):
        objective = FIGA(gate=0.0)
        return jax.grad(lambda p: objective.loss(model, p, (), batch, jax.random.key(0)).total)(
            params
        )

    one, other = (
        gradient(params, batch_of(store, figa_weights(store, beta=beta))) for beta in (0.0, 3.0)
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert any(jnp.abs(a).max() > 1e-3 for a in jax.tree.leaves(one))


def test_a_gate_below_zero_is_refused():
    with pytest.raises(ConfigError, match="gate=-1"):
        FIGA(gate=-1.0)


def test_a_run_reads_the_artifact_and_trains_on_edits(tmp_path, tiny_tree, stored):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(p) + "\n" for p in PAIRS))
    store = stored(PAIRS, "preference")
    weights = figa_weights(store)
    write_token_weights(tmp_path / "edits.parquet", store, weights, method="figa")
    source = {"name": "jsonl", "files": (str(file),), "kind": "preference"}
    tree = tiny_tree(
        objective={"name": "figa"},
        data__train=[{"source": source, "artifact": str(tmp_path / "edits.parquet")}],
        data__evals={},
        data__cache_dir=str(tmp_path / "cache"),
        data__batch_size=2,
        steps=4,
    )
    run = build_run(resolve(TrainConfig, tree), devices=jax.devices()[:1], show_progress=False)
    train(run, tmp_path / "run")
    table = read_metrics(tmp_path / "run")
    good = [float(x) for x in table["good_nll"]]
    assert good[-1] < good[0] and {"bad_nll", "bad_in_use"} <= set(table)
