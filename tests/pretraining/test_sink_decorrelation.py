"""Sink decorrelation: the penalty's numbers, gradients and tokens, and what it leaves alone."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.config import load, resolve
from tokjax.data.batch import Batch
from tokjax.data.syntax.tag_counts import TagCounts, write_tag_counts
from tokjax.errors import ConfigError
from tokjax.finetuning.sft import SFT
from tokjax.models import ModelConfig, Transformer, parameters
from tokjax.pretraining.mae_lm import MaeLM
from tokjax.pretraining.masked_lm import MaskedLM
from tokjax.pretraining.next_token import NextToken
from tokjax.pretraining.patch_training import Patch
from tokjax.pretraining.sink_decorrelation import (
    SinkDecorrelation,
    decorrelation,
    output_tokens,
    random_anchors,
)
from tokjax.pretraining.syntactic_smoothing import SyntacticSmoothing
from tokjax.signals.sinks import first_positions
from tokjax.training.config import TrainConfig

V, B, T, LAYERS = 19, 3, 12, 3
MODEL = Transformer(
    ModelConfig(
        vocab_size=V, d_model=16, n_layers=LAYERS, n_heads=2, d_ff=24, max_positions=T, remat="none"
    )
)
KEY = jax.random.key(4)
ROWS = jnp.array([[1.0, 0], [1, 1], [0, 2], [-3, 0]])
ORDINARY = jnp.array([[False, True, True, True]])
# A full row, a row with filling, a row of two pieces; the prompts are 5, 4, 3 and 3 tokens long.
SEGMENTS = np.array([[1] * T, [1] * 8 + [0] * 4, [1] * 5 + [2] * 7])
OUTPUT = np.zeros((B, T), bool)
OUTPUT[0, 5:], OUTPUT[1, 4:8], OUTPUT[2, 3:5], OUTPUT[2, 8:] = True, True, True, True
INPUT = np.zeros((B, T), bool)
INPUT[0, 1:5], INPUT[1, 1:4], INPUT[2, 1:3], INPUT[2, 6:8] = True, True, True, True
TOKENS = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)


def batch_of(tokens, weights=None):
    ids = jnp.asarray(tokens, jnp.int32)
    begins = np.array(first_positions(jnp.asarray(SEGMENTS)))
    # Position t predicts token t + 1.
    own = np.pad(OUTPUT, ((0, 0), (0, 1)))[:, 1:] if weights is None else weights
    return Batch(
        tokens=ids,
        targets=jnp.roll(ids, -1, 1),
        positions=jnp.asarray(np.arange(T) - begins),
        segment_ids=jnp.asarray(SEGMENTS),
        weights=jnp.asarray(own, jnp.float32),
        example_id=jnp.zeros((B, 2), jnp.int32),
    )


BATCH = batch_of(TOKENS)
OBJECTIVE = SinkDecorrelation(coefficient=7.0)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(1))


@pytest.fixture(scope="module")
def measured():
    """A function giving a batch's loss by an objective and its gradient; compiled once each."""
    compiled = {}

    def find(objective, params, batch=BATCH, key=KEY, **changes):
        def both(params, aux, batch, key):
            def total(params):
                found = objective.loss(MODEL, params, aux, batch, key)
                return found.total, found

            (_, found), gradient = jax.value_and_grad(total, has_aux=True)(params)
            return found, gradient

        run = compiled.setdefault(objective, jax.jit(both))
        aux = objective.init(KEY, MODEL, params)
        if changes:
            aux = dataclasses.replace(aux, **changes)
        found, gradient = run(params, aux, batch, key)
        find.compiled = run._cache_size()
        return found, gradient

    return find


PENALTY = jax.jit(decorrelation)


@jax.jit
def states_of(params, batch=BATCH):
    """All layers' states, as transformers numbers them but for the last norm."""
    captured = MODEL.backbone(
        params,
        MODEL.embed(params, batch.tokens),
        positions=batch.positions,
        segments=batch.segment_ids,
        capture={"resid_pre", "resid_post"},
    ).captured
    return jnp.concatenate([captured["resid_pre"][:1], captured["resid_post"]])


def mean(metric):
    return float(metric[0] / metric[1])


# ---------------------------------------------------------------- the penalty of given states


def test_the_penalty_is_the_mean_squared_cosine_without_the_first_token():
    find = PENALTY
    states = jnp.stack([ROWS] * 4)[:, None]
    assert float(find(states, ORDINARY)) == pytest.approx(0.5)
    assert 1e4 * float(find(states, ORDINARY)) == pytest.approx(5000)
    assert float(find(states, jnp.ones((1, 4), bool))) == pytest.approx(0.625)  # the mistake
    # Tokens equal to the first one, and tokens at right angles to it.
    same = jnp.ones((4, 1, 4, 2))
    assert float(find(same, ORDINARY)) == pytest.approx(1)
    apart = same.at[:, :, 0, 1].set(0.0).at[:, :, 1:, 0].set(0.0)
    assert float(find(apart, ORDINARY)) == 0
    # No token to penalise, and states of zeros.
    assert float(find(states, jnp.zeros((1, 4), bool))) == 0
    assert float(find(jnp.zeros_like(states), ORDINARY)) == 0


def test_the_penalty_ignores_scales_signs_and_rotations_of_the_space():
    rng = np.random.default_rng(0)
    states = jnp.asarray(rng.normal(size=(5, 2, 4, 6)), jnp.float32)
    mask = jnp.array([[False, True, True, True], [False, True, False, False]])
    found = float(PENALTY(states, mask))
    scales = jnp.asarray(rng.choice([-3.0, 0.1, 40.0], (5, 2, 4, 1)), jnp.float32)
    turn = jnp.asarray(np.linalg.qr(rng.normal(size=(6, 6)))[0], jnp.float32)
    assert float(PENALTY(states * scales @ turn, mask)) == pytest.approx(found, rel=1e-5)
    assert found != pytest.approx(float(PENALTY(states[:-1], mask)), rel=1e-3)


def test_gradients_reach_both_sides_of_inner_layers_alone_at_right_angles_to_the_states():
    rng = np.random.default_rng(1)
    states = jnp.asarray(rng.normal(size=(4, 1, 4, 5)), jnp.float32)
    gradient_of = jax.jit(jax.grad(decorrelation))
    gradient = np.asarray(gradient_of(states, ORDINARY))
    assert not gradient[0].any() and not gradient[-1].any()
    inner = gradient[1:-1]
    assert (np.abs(inner).max(-1) > 1e-3).all()  # of the first token too
    np.testing.assert_allclose((inner * np.asarray(states[1:-1])).sum(-1), 0, atol=1e-6)
    assert np.isfinite(gradient_of(jnp.zeros_like(states), ORDINARY)).all()


def test_states_without_an_inner_layer_are_refused():
    with pytest.raises(ConfigError, match="no inner one"):
        decorrelation(jnp.ones((2, 1, 4, 2)), ORDINARY)


# ---------------------------------------------------------------- in training


def test_the_layer_loop_adds_up_what_the_captured_states_give(params, measured):
    found, gradient = measured(OBJECTIVE, params)
    anchors = first_positions(BATCH.segment_ids)
    expected = PENALTY(states_of(params), jnp.asarray(INPUT), anchors)
    assert mean(found.metrics["decorrelation"]) == pytest.approx(float(expected), rel=1e-5)
    plain, _ = measured(NextToken(), params)
    assert float(found.weight) == float(plain.weight) == OUTPUT.sum()
    assert mean(found.metrics["nll"]) == float(plain.total / plain.weight)
    total = float(plain.total) + 7.0 * float(plain.weight) * float(expected)
    assert float(found.total) == pytest.approx(total, rel=1e-5)
    assert mean(found.metrics["penalised"]) == pytest.approx(INPUT.sum() / (SEGMENTS > 0).sum())

    def written_out(params):
        states = states_of(params)
        return plain.weight * 7.0 * decorrelation(states, jnp.asarray(INPUT), anchors)

    own = jax.jit(jax.grad(written_out))(params)
    _, of_nll = measured(NextToken(), params)
    both = jax.tree.map(jnp.add, own, of_nll)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-4, rtol=1e-3), gradient, both)
    # Blocks below the last one, and the embeddings, learn from the penalty; the last does not.
    by_layer = np.abs(own["layers"]["mlp"]["down"]).max((1, 2))
    assert (by_layer[:-1] > 1e-4).all() and by_layer[-1] == 0
    assert np.abs(own["embedding"]).max() > 1e-4


def test_unrolled_layers_give_the_same_penalty(params):
    aux = OBJECTIVE.init(KEY, MODEL, params)
    run = jax.jit(lambda p: OBJECTIVE.loss(MODEL, p, aux, BATCH, KEY).metrics["decorrelation"])
    scanned, unrolled = run(params), run(parameters.unstack(params))
    np.testing.assert_allclose(scanned, unrolled, rtol=1e-5)


def test_a_coefficient_of_zero_is_the_base_bit_for_bit_and_another_value_compiles_nothing(
    params, measured
):
    plain, gradient = measured(NextToken(), params)
    found, own = measured(OBJECTIVE, params, coefficient=jnp.float32(0))
    before = measured.compiled
    assert float(found.total) == float(plain.total)
    jax.tree.map(np.testing.assert_array_equal, own, gradient)
    stronger, _ = measured(OBJECTIVE, params, coefficient=jnp.float32(1e4))
    assert measured.compiled == before
    penalty = mean(stronger.metrics["decorrelation"])
    rise = float(stronger.total - plain.total) / float(plain.weight)
    assert rise == pytest.approx(1e4 * penalty, rel=1e-4)


def test_output_tokens_and_filling_do_not_move_the_penalty_of_the_input(params, measured):
    found, _ = measured(OBJECTIVE, params)
    other = np.where(OUTPUT | (SEGMENTS == 0), (TOKENS + 5) % V, TOKENS)
    moved, _ = measured(OBJECTIVE, params, batch_of(other))
    assert float(found.metrics["decorrelation"][0]) == float(moved.metrics["decorrelation"][0])
    assert float(found.metrics["nll"][0]) != float(moved.metrics["nll"][0])
    changed = TOKENS.copy()
    changed[0, 2] = (changed[0, 2] + 1) % V
    moved, _ = measured(OBJECTIVE, params, batch_of(changed))
    assert float(found.metrics["decorrelation"][0]) != float(moved.metrics["decorrelation"][0])


def test_a_piece_of_a_packed_row_has_the_penalty_that_it_has_in_a_row_of_its_own(params):
    packed = states_of(params)[:, 2:]
    pairs = OBJECTIVE.pairs(BATCH, KEY)
    second = INPUT[2:] & (SEGMENTS[2:] == 2)
    found = PENALTY(packed, jnp.asarray(second), pairs.anchors[2:])
    moved = dataclasses.replace(
        batch_of(np.roll(TOKENS, -5, axis=1)),
        segment_ids=jnp.ones((B, T), jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(T), (B, T)),
    )
    alone = states_of(params, moved)[:, 2:]
    expected = PENALTY(alone, jnp.asarray(np.roll(second, -5, axis=1)))
    assert second.sum() == 2 and float(found) == pytest.approx(float(expected), rel=1e-4)


# ---------------------------------------------------------------- which tokens


def test_each_choice_of_tokens_penalises_its_own():
    pairs = {
        choice: SinkDecorrelation(tokens=choice).pairs(BATCH, KEY)
        for choice in ("input", "all", "output")
    }
    behind = (SEGMENTS > 0) & (np.arange(T) != np.array(pairs["all"].anchors))
    np.testing.assert_array_equal(output_tokens(BATCH), OUTPUT)
    np.testing.assert_array_equal(pairs["input"].mask, INPUT)
    np.testing.assert_array_equal(pairs["output"].mask, OUTPUT)
    np.testing.assert_array_equal(pairs["all"].mask, behind)
    np.testing.assert_array_equal(pairs["all"].anchors[2], [0] * 5 + [5] * 7)
    # Tokens behind the first output count as output although their own targets weigh nothing.
    weights = np.zeros((B, T))
    weights[0, 4] = -0.5
    later = SinkDecorrelation().pairs(batch_of(TOKENS, weights), KEY).mask
    np.testing.assert_array_equal(later[0], [False, *[True] * 4, *[False] * 7])
    # Without prompts nothing is input.
    assert not SinkDecorrelation().pairs(batch_of(TOKENS, SEGMENTS > 0), KEY).mask.any()


def test_random_anchors_are_other_penalised_tokens_of_the_same_segment():
    first = first_positions(BATCH.segment_ids)
    mask = np.array(OBJECTIVE.pairs(BATCH, KEY).mask)
    draw = jax.jit(random_anchors)
    seen = set()
    for seed in range(40):
        anchors = np.array(draw(jax.random.key(seed), first, jnp.asarray(mask)))
        for b, begin, end in ((0, 0, T), (1, 0, 8), (2, 0, 5), (2, 5, T)):
            assert len(set(anchors[b, begin:end])) == 1
            assert mask[b, anchors[b, begin]] and begin < anchors[b, begin] < end
        seen.add(int(anchors[0, 0]))
    assert seen == {1, 2, 3, 4}
    assert (np.array(draw(KEY, first, jnp.zeros_like(mask))) == np.array(first)).all()
    control = SinkDecorrelation(anchor="random")
    pairs = control.pairs(BATCH, KEY)
    assert int(pairs.mask.sum()) == INPUT.sum() - 4  # each piece's anchor is left out


def test_patches_are_penalised_as_patches(params):
    objective = SinkDecorrelation(Patch(k=2), 1.0)
    pairs = objective.pairs(dataclasses.replace(BATCH, segment_ids=jnp.ones((B, T), int)), KEY)
    # Row 0 has its first output token in the third patch, row 1 too.
    np.testing.assert_array_equal(pairs.mask[0], [False, True, *[False] * 4])
    np.testing.assert_array_equal(pairs.mask[1], [False, True, *[False] * 4])
    assert objective.tokens_per_position == 2


def test_other_objectives_of_one_pass_keep_their_loss(params, tmp_path):
    tags = np.eye(4, dtype=np.float32)[np.arange(V) % 4]
    path = tmp_path / "tags.npz"
    write_tag_counts(path, TagCounts(tags, ("N", "V", "A", "X"), np.arange(V) == 0))
    for base in (
        SFT(),
        SyntacticSmoothing(table=str(path)),
    ):
        objective = SinkDecorrelation(base, 3.0)
        aux = objective.advance(objective.init(KEY, MODEL, params), jnp.float32(0.5))

        def both(params, aux, objective=objective, base=base):
            found = objective.loss(MODEL, params, aux, BATCH, KEY)
            return found, base.loss(MODEL, params, aux.base, BATCH, KEY)

        found, plain = jax.jit(both)(params, aux)
        penalty = mean(found.metrics["decorrelation"])
        expected = float(plain.total) + 3 * float(plain.weight) * penalty
        assert penalty > 0 and float(found.total) == pytest.approx(expected, rel=1e-5)
        assert set(found.metrics) == {*plain.metrics, "decorrelation", "penalised"}
        assert float(found.weight) == float(plain.weight)
    assert float(aux.base.progress) == 0.5
    # A table is known by its content, beside the base's other settings.
    assert SinkDecorrelation(SFT()).content == {}
    digest = objective.content["base"]
    assert digest == SinkDecorrelation(SyntacticSmoothing(table=str(path)), 1.0).content["base"]
    other = dataclasses.replace(objective.base, special="include")
    assert digest != SinkDecorrelation(other).content["base"]


def test_what_makes_no_sense_is_refused(params):
    refused: list[tuple[dict[str, Any], str]] = [
        ({"base": MaskedLM()}, "base='masked_lm'"),
        ({"base": MaeLM()}, "base='mae_lm'"),
        ({"base": SyntacticSmoothing(base=MaskedLM())}, "sees both sides"),
        ({"coefficient": -1.0}, "coefficient=-1.0"),
        ({"coefficient": float("nan")}, "coefficient=nan"),
        ({"tokens": "inputs"}, "Did you mean 'input'"),
        ({"anchor": "frist"}, "Did you mean 'first'"),
    ]
    for changes, said in refused:
        with pytest.raises(ConfigError, match=said):
            SinkDecorrelation(**changes)
    shallow = Transformer(dataclasses.replace(MODEL.config, n_layers=1))
    with pytest.raises(ConfigError, match="n_layers=1"):
        OBJECTIVE.init(KEY, shallow, shallow.init(KEY))


def test_a_run_reports_both_parts_and_leaves_an_ordinary_model(tiny_tree, tmp_path):
    from tokjax.training.loop import train
    from tokjax.training.run import build_run

    tree = tiny_tree(
        objective={"name": "sink_decorrelation", "coefficient": 5.0, "tokens": "all"},
        steps=2,
        evaluation__every_steps=2,
    )
    run = build_run(resolve(TrainConfig, tree), devices=jax.devices()[:1], show_progress=False)
    result = train(run, tmp_path / "run")
    assert np.isfinite(result.metrics["eval/validation/loss"])
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    for name in ("nll", "decorrelation", "penalised"):
        assert name in header


def test_the_config_says_what_it_trains():
    found = resolve(TrainConfig, load("configs/sink_decorrelation.py:coefficient=3.0"))
    assert found.objective.coefficient == 3 and found.objective.tokens == "all"
    found = resolve(TrainConfig, load("configs/sink_decorrelation.py:coefficient=0.0"))
    assert found.objective.coefficient == 0
