import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.data.batch import Batch
from tokjax.errors import ConfigError
from tokjax.models import ModelConfig, Transformer, lora
from tokjax.models.lora import LoraConfig
from tokjax.preference.dpo import DPO, pair_loss, position_losses
from tokjax.preference.kto import KTO, kto_loss
from tokjax.preference.mismatched import mismatched

CONFIG = ModelConfig(vocab_size=24, d_model=16, n_layers=2, n_heads=2, max_positions=32)


@pytest.fixture(scope="module")
def plain():
    model = Transformer(CONFIG)
    return model, model.init(jax.random.key(0))


@pytest.fixture(scope="module")
def adapted(plain):
    model, params = lora.on(*plain, LoraConfig(rank=2), jax.random.key(1))
    moved = jax.tree.map(lambda a: a + 0.05, lora.split(params)[1])
    return model, lora.join(params, moved)


def pairs(seed=0, weights=None):
    """Two rows: one with two pairs and filling, one with a pair whose rejected answer is empty."""
    rng = np.random.default_rng(seed)
    lengths = [[4, 3, 5, 4], [6, 5, 0, 0]]
    tokens = rng.integers(0, 24, (2, 18)).astype(np.int32)
    targets = rng.integers(0, 24, (2, 18)).astype(np.int32)
    segments, places = np.zeros((2, 18), np.int32), np.zeros((2, 18), np.int32)
    w = np.zeros((2, 18), np.float32)
    examples = np.full((2, 4), -1, np.int32)
    for b, row in enumerate(lengths):
        at = 0
        for s, n in enumerate(row):
            if not n:
                continue
            segments[b, at : at + n], places[b, at : at + n] = s + 1, np.arange(n)
            w[b, at + 1 : at + n] = 1.0 if s % 2 == 0 else -1.0
            examples[b, s] = 10 * b + s // 2
            at += n
    w[1, 6:] = 0.0  # the rejected answer of the second row says nothing
    if weights is not None:
        w *= weights
    return Batch(tokens, targets, places, segments, w, examples)


def logprob_sums(model, params, batch):
    """Sum of weight x log-probability over each segment, one segment at a time."""
    found = np.zeros(batch.example_id.shape)
    for b in range(2):
        for s in range(batch.example_id.shape[1]):
            own = batch.segment_ids[b] == s + 1
            if not own.any():
                continue
            logits, _ = model(params, jnp.asarray(batch.tokens[b, own][None]))
            logp = np.asarray(jax.nn.log_softmax(logits[0]))
            each = logp[np.arange(own.sum()), batch.targets[b, own]]
            found[b, s] = (each * np.abs(batch.weights[b, own])).sum()
    return found


@pytest.mark.parametrize(
    ("weights", "chosen", "rejected", "expected"),
    [
        ([0.05, 0.9, 0.2, 1.0], [0.1, 0.2, 0.0, 0.1], [-0.2, 0.3, -0.1, 0.05], 0.687662),
        ([1.0] * 4, [0.1, 0.2, 0.0, 0.1], [-0.2, 0.3, -0.1, 0.05], 0.675800),
        ([0.0] * 4, [0.1, 0.2, 0.0, 0.1], [-0.2, 0.3, -0.1, 0.05], np.log1p(np.exp(-0.04))),
    ],
    ids=["weighted", "plain", "without the rejected side"],
)
def test_numbers_of_the_critical_tokens_example(weights, chosen, rejected, expected):
    margin = np.sum(chosen) - np.dot(weights, rejected)
    np.testing.assert_allclose(pair_loss(jnp.float32(margin), 0.1), expected, atol=1e-6)


def test_the_position_form_of_the_same_example():
    ratio = np.array([[0.1, 0.2, 0.0, 0.1, -0.2 * 0.05, 0.3 * 0.9, -0.1 * 0.2, 0.05]], np.float32)
    ids = np.array([[1] * 4 + [2] * 4], np.int32)
    ones = np.ones((1, 8), np.float32)
    batch = Batch(ids, ids, ids, ids, ones, np.zeros((1, 2), np.int32))
    losses, count = position_losses(jnp.asarray(ratio), batch, lambda m: pair_loss(m, 0.1))
    assert count == 4
    np.testing.assert_allclose(losses.sum() / count, 0.691778, atol=1e-6)


def test_answers_of_unequal_length_are_compared_from_their_beginnings():
    ratio = np.array([[9.0, 1.0, 2.0, 9.0, 5.0]], np.float32)
    ids = np.array([[1, 1, 1, 2, 2]], np.int32)
    weights = np.array([[0.0, 1.0, 1.0, 0.0, -1.0]], np.float32)
    batch = Batch(ids, ids, ids, ids, weights, np.zeros((1, 2), np.int32))
    losses, count = position_losses(jnp.asarray(ratio), batch, lambda m: m)
    np.testing.assert_allclose(sorted(losses[losses != 0].tolist()), [-4.0, 2.0])
    assert count == 2


@pytest.mark.parametrize(
    ("kind", "margin", "expected"),
    [("ipo", 2.0, 9.0), ("hinge", 2.0, 0.8), ("hinge", 12.0, 0.0), ("sigmoid", 0.0, np.log(2))],
)
def test_shapes_of_the_loss(kind, margin, expected):
    np.testing.assert_allclose(pair_loss(jnp.float32(margin), 0.1, kind), expected, atol=1e-6)


def test_smoothing_mixes_the_two_labels():
    smooth = pair_loss(jnp.float32(3.0), 0.5, label_smoothing=0.2)
    right, wrong = pair_loss(jnp.float32(3.0), 0.5), pair_loss(jnp.float32(-3.0), 0.5)
    np.testing.assert_allclose(smooth, 0.8 * right + 0.2 * wrong, rtol=1e-6)


@pytest.mark.parametrize("weights", [None, 0.37])
def test_packed_pairs_equal_answers_scored_one_by_one(adapted, weights):
    model, params = adapted
    batch = pairs(weights=weights)
    objective = DPO(beta=0.3)
    aux = objective.init(jax.random.key(0), model, params)
    assert aux == ()
    loss = jax.jit(lambda p: objective.loss(model, p, aux, batch, jax.random.key(0)))(params)
    base = lora.off(model), lora.split(params)[0]
    ratios = logprob_sums(model, params, batch) - logprob_sums(*base, batch)
    margins = np.array([ratios[0, 0] - ratios[0, 1], ratios[0, 2] - ratios[0, 3]])
    expected = np.log1p(np.exp(-0.3 * margins))
    np.testing.assert_allclose(loss.total, expected.sum(), atol=1e-5)
    assert loss.weight == 2  # the pair without a rejected answer is left out
    np.testing.assert_allclose(loss.metrics["reward_margin"][0], 0.3 * margins.sum(), atol=1e-5)


def test_the_reference_is_a_copy_of_the_first_parameters(plain):
    model, params = plain
    objective = DPO(beta=2.0)
    aux = objective.init(jax.random.key(0), model, params)
    moved = jax.tree.map(lambda a: 1.1 * a, params)
    first = objective.loss(model, params, aux, pairs(), jax.random.key(0))
    np.testing.assert_allclose(first.total / first.weight, np.log(2), atol=1e-6)
    after = objective.loss(model, moved, aux, pairs(), jax.random.key(0))
    assert abs(float(after.total / after.weight) - np.log(2)) > 1e-4


def test_no_gradient_reaches_the_reference(plain):
    model, params = plain
    objective = DPO()
    gradient = jax.grad(
        lambda aux: objective.loss(model, params, aux, pairs(), jax.random.key(0)).total
    )(jax.tree.map(jnp.copy, params))
    assert all(not g.any() for g in jax.tree.leaves(gradient))


def test_what_follows_in_a_row_changes_no_earlier_pair(plain):
    model, params = plain
    objective = DPO()
    aux = objective.init(jax.random.key(0), model, jax.tree.map(lambda a: 1.1 * a, params))
    batch = pairs()
    tokens = batch.tokens.copy()
    tokens[0, 7:] = (tokens[0, 7:] + 5) % 24  # the second pair
    ratio = lambda b: objective.loss(model, params, aux, b, jax.random.key(0))  # noqa: E731
    one = batch.replace(weights=np.where(batch.segment_ids < 3, batch.weights, 0))
    other = one.replace(tokens=tokens)
    np.testing.assert_array_equal(ratio(one).total, ratio(other).total)


def test_a_batch_without_pairs_adds_nothing(plain):
    model, params = plain
    batch = pairs(weights=0.0)
    loss = DPO(sft_weight=0.5).loss(model, params, params, batch, jax.random.key(0))
    assert loss.total == 0 and loss.weight == 0


def test_the_chosen_answers_may_be_imitated_besides(plain):
    model, params = plain
    aux, batch = params, pairs()
    alone = DPO().loss(model, params, aux, batch, jax.random.key(0))
    both = DPO(sft_weight=0.5).loss(model, params, aux, batch, jax.random.key(0))
    sums = logprob_sums(model, params, batch)
    good = np.maximum(batch.weights, 0).sum()
    nll = -(sums[0, 0] + sums[0, 2] + sums[1, 0]) / good
    np.testing.assert_allclose(both.total - alone.total, 0.5 * 2 * nll, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"beta": 0}, "beta=0"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "no meaning"),
        ({"sft_weight": -1}, "sft_weight=-1"),
    ],
)
def test_impossible_settings_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        DPO(**settings)


# Sums of log-probabilities of three pairs: chosen, rejected, and both under the reference; and what
# the library TRL 0.19.1 makes of them.
SUMS = np.array([[-10.0, -3.5, -22.25], [-12.0, -3.25, -20.0]], np.float32)
REFERENCE = np.array([[-11.0, -3.0, -25.0], [-11.5, -4.0, -19.0]], np.float32)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"beta": 0.1}, [0.620957, 0.757599, 0.523123]),
        ({"beta": 0.5, "label_smoothing": 0.1}, [0.461871, 0.991201, 0.330175]),
        ({"beta": 0.1, "kind": "ipo"}, [12.25, 39.0625, 1.5625]),
        ({"beta": 0.5, "kind": "hinge"}, [0.25, 1.625, 0.0]),
    ],
)
def test_losses_of_pairs_are_those_of_trl(settings, expected):
    chosen, rejected = SUMS - REFERENCE
    np.testing.assert_allclose(pair_loss(chosen - rejected, **settings), expected, atol=1e-6)


# ---- KTO


def test_losses_of_answers_are_those_of_trl():
    ratios = (SUMS - REFERENCE).reshape(-1)
    good = np.array([True] * 3 + [False] * 3)
    found = kto_loss(ratios, good, jnp.float32(0.1), 0.1, bad_weight=1.33)
    expected = [0.477515, 0.514995, 0.434135, 0.645056, 0.686605, 0.628462]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_kto_numbers():
    """Equation 8 by hand: beta .1, ratio 2, z0 .5."""
    good = kto_loss(jnp.float32(2.0), jnp.bool_(True), jnp.float32(0.5), 0.1)
    bad = kto_loss(jnp.float32(2.0), jnp.bool_(False), jnp.float32(0.5), 0.1, bad_weight=1.33)
    sigma = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    np.testing.assert_allclose(good, 1 - sigma(0.15), rtol=1e-6)
    np.testing.assert_allclose(bad, 1.33 * (1 - sigma(-0.15)), rtol=1e-6)


def test_kto_reads_good_and_bad_from_the_sign_of_weights(adapted):
    model, params = adapted
    batch, objective = pairs(weights=2.0), KTO(beta=0.2)
    aux = objective.init(jax.random.key(0), model, params)
    loss = objective.loss(model, params, aux, batch, jax.random.key(0))
    base = lora.off(model), lora.split(params)[0]
    ratios = logprob_sums(model, params, batch) - logprob_sums(*base, batch)
    counted = np.array([[1, 1, 1, 1], [1, 0, 0, 0]], bool)
    kl = max((ratios[counted] / 2).mean(), 0)  # the average is of unweighted ratios
    good = np.array([[1, 0, 1, 0], [1, 0, 0, 0]], bool)
    sign = np.where(good, 1, -1)
    expected = 1 - 1 / (1 + np.exp(-0.2 * sign * (ratios - kl)))
    assert loss.weight == 5
    np.testing.assert_allclose(loss.total, expected[counted].sum(), atol=1e-5)
    np.testing.assert_allclose(loss.aux["kl"], kl, atol=1e-5)


def test_kto_averages_z0_over_steps(adapted):
    model, params = adapted
    objective = KTO(kl_decay=0.75)
    before = {"reference": (), "kl": jnp.float32(4.0)}
    now = KTO().loss(model, params, before, pairs(), jax.random.key(0)).aux["kl"]
    after = objective.loss(model, params, before, pairs(), jax.random.key(0)).aux["kl"]
    np.testing.assert_allclose(after, 3.0 + 0.25 * now, rtol=1e-6)


def test_mismatched_answers_are_those_of_the_next_sample(adapted):
    batch = pairs()
    found = mismatched(batch)
    # Samples of the first row have 4, 3, 5, 4 slots, the only one of the second has 6; the first
    # slot of each belongs to its prompt and the second one predicts the answer's first token.
    own = [(0, 0, 4), (0, 4, 3), (0, 7, 5), (0, 12, 4), (1, 0, 6)]
    tokens, targets, signs = [], [], []
    for n, (b, at, _) in enumerate(own):
        c, there, size = own[(n + 1) % len(own)]
        tokens += [*batch.tokens[b, at : at + 2], *batch.tokens[c, there + 2 : there + size]]
        targets += [batch.targets[b, at], *batch.targets[c, there + 1 : there + size]]
        signs += [0, *batch.weights[c, there + 1 : there + size]]
    lengths = [3, 5, 4, 6, 4]
    full = np.asarray(found.segment_ids) > 0
    np.testing.assert_array_equal(full.sum(1), [18, 4])
    np.testing.assert_array_equal(np.asarray(found.tokens)[full], tokens)
    np.testing.assert_array_equal(np.asarray(found.targets)[full], targets)
    np.testing.assert_array_equal(np.asarray(found.weights)[full], signs)
    ids = np.repeat([1, 2, 3, 4, 1], lengths)
    np.testing.assert_array_equal(np.asarray(found.segment_ids)[full], ids)
    places = np.concatenate([np.arange(n) for n in lengths])
    np.testing.assert_array_equal(np.asarray(found.positions)[full], places)
    np.testing.assert_array_equal(found.example_id, [[0, 0, 1, 1], [10, -1, -1, -1]])
    for values in (found.tokens, found.targets, found.weights, found.positions):
        assert not np.asarray(values)[~full].any()


def test_mismatched_answers_are_cut_at_the_end_of_rows():
    """Rows of one sample each: the second one's prompt leaves no room for the whole answer."""
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    weights = np.array([[0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0]], np.float32)
    segments = np.array([[1] * 6, [1, 1, 1, 1, 1, 0]], np.int32)
    places = np.tile(np.arange(6, dtype=np.int32), (2, 1))
    batch = Batch(tokens, tokens + 1, places, segments, weights, np.array([[0], [1]], np.int32))
    found = mismatched(batch)
    np.testing.assert_array_equal(found.tokens, [[0, 1, 10, 0, 0, 0], [6, 7, 8, 9, 2, 3]])
    np.testing.assert_array_equal(found.targets, [[1, 10, 11, 0, 0, 0], [7, 8, 9, 2, 3, 4]])
    np.testing.assert_array_equal(found.weights, [[0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]])


def test_a_single_sample_has_no_mismatched_answer(adapted):
    one = jax.tree.map(lambda a: a[:1], pairs()).replace(example_id=np.zeros((1, 1), np.int32))
    with pytest.raises(ConfigError, match="needs the answers of other samples"):
        KTO(reference_point="mismatched").loss(*adapted, {"reference": (), "kl": 0.0}, one, None)


def test_kto_takes_z0_from_mismatched_answers(adapted):
    """Each answer beside the prompt of the sample before it, scored one by one."""
    model, params = adapted
    batch = pairs(seed=2, weights=2.0)
    base = lora.off(model), lora.split(params)[0]
    shuffled = jax.tree.map(np.asarray, mismatched(batch))
    ratios = logprob_sums(model, params, shuffled) - logprob_sums(*base, shuffled)
    kl = ratios.sum() / 2 / 5
    own = logprob_sums(model, params, batch) - logprob_sums(*base, batch)
    assert kl > 0 and abs(kl - own.sum() / 2 / 5) > 1e-3
    objective = KTO(reference_point="mismatched")
    start = objective.init(jax.random.key(0), model, params)

    def z0(params):
        return objective.loss(model, params, start, batch, jax.random.key(0)).aux["kl"]

    value, gradient = jax.jit(jax.value_and_grad(z0))(params)
    np.testing.assert_allclose(value, kl, atol=1e-5)
    assert all(not g.any() for g in jax.tree.leaves(gradient))


def test_unknown_reference_points_are_refused():
    with pytest.raises(ConfigError, match="unknown reference_point='mismatch'"):
        KTO(reference_point="mismatch")  # type: ignore[arg-type]
