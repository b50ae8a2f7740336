import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.data.batch import Batch
from tokjax.errors import ConfigError, DataError
from tokjax.finetuning.cat_attention import CausalAttention, causal_bits, causal_pairs, penalty
from tokjax.finetuning.sft import SFT
from tokjax.models import ModelConfig, Transformer

# Dense, as attention is wherever its probabilities are asked for: equal to the last bits.
MODEL = Transformer(
    ModelConfig(
        vocab_size=24, d_model=16, n_layers=2, n_heads=2, max_positions=32, attention="dense"
    )
)
KEY = jax.random.key(0)
ONE = jnp.ones(())


@pytest.fixture(scope="module")
def params():
    params = MODEL.init(jax.random.key(0))
    return jax.tree.map(lambda p: 3 * p, params)  # so that attention is uneven


def rows(relations, ids, seed=0):
    """Two samples packed in one row behind each other, the same annotations in each."""
    effect, cause = causal_bits(ids, relations)
    n = len(ids) - 1
    twice = lambda a: np.tile(np.asarray(a), 2)[None]  # noqa: E731
    return Batch(
        twice(ids[:-1]).astype(np.int32),
        twice(ids[1:]).astype(np.int32),
        twice(np.arange(n)).astype(np.int32),
        np.repeat([1, 2], n)[None].astype(np.int32),
        twice(np.arange(n) > 1).astype(np.float32),
        np.array([[0, 1]], np.int32),
        {"effect": twice(effect[1:]), "cause": twice(cause[1:])},
    )


IDS = [3, 6, 7, 8, 9, 6, 5, 8, 9]
RELATIONS = [([8, 9], [[6], [7, 8]])]


def of(objective, params, batch, aux=ONE):
    def mean(params):
        loss = objective.loss(MODEL, params, aux, batch, KEY)
        return loss.total / loss.weight

    return jax.jit(jax.value_and_grad(mean))(params)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("hinge", 1.75), ("div", -0.283263), ("div2", -0.068993), ("nll", -0.2)],
)
def test_penalties_of_one_row(kind, expected):
    attention, causes = np.array([0.1, 0.5, 0.1, 0.3]), np.array([True, False, True, False])
    a1, a0 = attention[causes].mean(), attention[~causes].mean()
    found = penalty(jnp.float32(a1), jnp.float32(a0), 2.0, kind)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["hinge", "div", "div2", "nll"])
def test_enough_attention_has_neither_penalty_nor_gradient(kind):
    value, gradient = jax.value_and_grad(lambda a: penalty(a, jnp.float32(0.2), 2.0, kind))(0.5)
    assert value == 0 and gradient == 0


def test_uniform_attention_has_ratio_one():
    np.testing.assert_allclose(penalty(jnp.float32(0.2), jnp.float32(0.2), 2.0, "hinge"), 1.0)


def test_annotated_rows_are_those_that_predict_the_effect():
    ids = [5, 6, 7, 8, 9]
    effect, cause = causal_bits(ids, [([8, 9], [[6]])])
    assert effect.tolist() == [0, 0, 0, 1, 1] and cause.tolist() == [0, 1, 0, 0, 0]
    batch = rows([([8, 9], [[6]])], ids)
    annotated, others = causal_pairs(batch)
    expected = np.zeros((8, 8), bool)
    expected[[2, 3], 1] = expected[[6, 7], 5] = True
    np.testing.assert_array_equal(annotated[0], expected)
    seen = np.tril(np.ones((4, 4), bool))
    np.testing.assert_array_equal((annotated | others)[0, :4, :4], seen)
    assert not (annotated | others)[0, 4:, :4].any()  # the other sample is not seen


def test_causes_count_for_the_effects_behind_them():
    effect, cause = causal_bits(IDS, RELATIONS)
    # 8 9 at 3 begins behind 6 at 1; that at 7 also behind 6 at 5 and 7 8 at 2.
    assert effect.tolist() == [0, 0, 0, 1, 1, 0, 0, 2, 2]
    assert cause.tolist() == [0, 3, 2, 2, 0, 2, 0, 0, 0]


def test_phrases_that_do_not_occur_are_left_out():
    for relations in ([([1, 2], [[6]])], [([8], [[1]])], [([6], [[9]])][:1], [([], [[6]])]):
        effect, _ = causal_bits([6, 8, 7], relations)
        assert not effect.any()


def test_too_many_effects_are_refused():
    ids = [1, 0, *[2, 0] * 30]
    with pytest.raises(DataError, match="more than 24 times"):
        causal_bits(ids, [([2], [[1]])])


@pytest.mark.parametrize("per", ["row", "sample"])
@pytest.mark.parametrize("kind", ["hinge", "nll"])
def test_the_loss_is_that_of_attention_maps(params, per, kind):
    batch = rows(RELATIONS, IDS)
    objective = CausalAttention(alpha=3.0, gamma=0.7, kind=kind, per=per)
    out = MODEL.backbone(
        params,
        MODEL.embed(params, batch.tokens),
        positions=batch.positions,
        segments=batch.segment_ids,
        capture={"attn_probs"},
    )
    attention = np.asarray(out.captured["attn_probs"]).mean((0, 2))[0]
    annotated, others = (np.asarray(m)[0] for m in causal_pairs(batch))
    means = [
        (attention[j, annotated[j]].mean(), attention[j, others[j]].mean(), j // 8)
        for j in range(16)
        if annotated[j].any() and others[j].any()
    ]
    assert len(means) == 8
    if per == "sample":
        means = [tuple(np.mean([m[:2] for m in means if m[2] == s], axis=0)) for s in (0, 1)]
    each = [float(penalty(jnp.float32(m[0]), jnp.float32(m[1]), 3.0, kind)) for m in means]
    plain, _ = of(SFT(), params, batch)
    found, _ = of(objective, params, batch)
    np.testing.assert_allclose(found, plain + 0.7 * np.mean(each), rtol=1e-5)


def test_without_weight_it_is_plain_sft(params):
    batch = rows(RELATIONS, IDS)
    (a, ga), (b, gb) = of(CausalAttention(gamma=0.0), params, batch), of(SFT(), params, batch)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), ga, gb)


@pytest.mark.parametrize("fill", [0.0, 1.0], ids=["nothing", "everything"])
def test_rows_without_both_kinds_of_keys_do_not_count(params, fill):
    batch = rows(RELATIONS, IDS)
    full = np.full_like(batch.channels["cause"], fill)
    first = full * (batch.positions == 0)  # one visible key: the whole row is annotated
    batch = batch.replace(channels={"effect": first, "cause": full})
    loss = CausalAttention().loss(MODEL, params, ONE, batch, KEY)
    assert loss.metrics["penalty"] == (0, 0)
    np.testing.assert_allclose(loss.total / loss.weight, of(SFT(), params, batch)[0], rtol=1e-6)


def test_training_on_it_raises_the_ratio(params):
    batch = rows(RELATIONS, IDS)
    objective = CausalAttention(alpha=4.0, gamma=5.0)
    ratio = lambda p: float(  # noqa: E731
        np.divide(*objective.loss(MODEL, p, ONE, batch, KEY).metrics["ratio"])
    )
    moved = params
    for _ in range(10):
        _, gradient = of(objective, moved, batch)
        moved = jax.tree.map(lambda p, g: p - 0.02 * g, moved, gradient)
    assert ratio(moved) > 1.2 * ratio(params)


def test_the_weight_decays_behind_each_micro_batch(params):
    batch = rows(RELATIONS, IDS)
    loss = CausalAttention(decay=0.5).loss(MODEL, params, jnp.float32(0.5), batch, KEY)
    assert loss.aux == 0.25


def test_what_follows_does_not_change_earlier_rows(params):
    batch = rows(RELATIONS, IDS)
    first = batch.channels["effect"] * (batch.positions < 5) * (batch.segment_ids == 1)
    batch = batch.replace(channels={**batch.channels, "effect": first})
    tokens = batch.tokens.copy()
    tokens[0, 6:] = (tokens[0, 6:] + 5) % 24
    ratios = [
        CausalAttention().loss(MODEL, params, ONE, b, KEY).metrics["ratio"][0]
        for b in (batch, batch.replace(tokens=tokens))
    ]
    assert ratios[0] == ratios[1] > 0


def test_a_missing_channel_is_named(params):
    batch = rows(RELATIONS, IDS).replace(channels={})
    with pytest.raises(ConfigError, match="channel 'effect'"):
        CausalAttention().loss(MODEL, params, ONE, batch, KEY)


@pytest.mark.parametrize("settings", [{"alpha": 0}, {"gamma": -1}, {"decay": 0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError):
        CausalAttention(**settings)
