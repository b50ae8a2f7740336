"""MAE-LM: what the encoder may know, what the decoder restores, and what a run leaves behind."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.config import load, resolve
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError
from tokjax.models import ModelConfig, Transformer
from tokjax.models.encoder import Encoder
from tokjax.models.stack import StackConfig
from tokjax.pretraining.corruption import Corruption, corrupt
from tokjax.pretraining.mae_lm import MaeLM, encode_visible
from tokjax.training.config import TrainConfig
from tokjax.training.objective import init_heads, of_model

V, MASK, B, T = 17, 16, 3, 12
CONFIG = ModelConfig(
    vocab_size=V, d_model=16, n_layers=2, n_heads=2, d_ff=24, remat="none", causal=False,
    max_positions=T, positions="learned", norm="layer", norm_bias=True, norm_placement="post",
    final_norm=False, embedding_norm=True, gated=False, activation="gelu", init_scale=0.5,
)  # fmt: skip
MODEL = Encoder(CONFIG)
KEY = jax.random.key(4)
OBJECTIVE = MaeLM(
    Corruption(rate=0.25, masked=1.0, random=0.0, count="fixed", mask_id=MASK),
    decoder=StackConfig(n_layers=1),
    exempt=(0,),
)
IN_PLACE = dataclasses.replace(OBJECTIVE, removal="attention")


def batch_of(tokens, segments, weights=None):
    ids = jnp.asarray(tokens, jnp.int32)
    segments = np.asarray(segments, np.int32)
    positions = np.zeros_like(segments)
    for row, own in zip(positions, segments, strict=True):
        for segment in set(own.tolist()):
            row[own == segment] = np.arange((own == segment).sum())
    return Batch(
        tokens=ids,
        targets=jnp.roll(ids, -1, 1),
        positions=jnp.asarray(positions),
        segment_ids=jnp.asarray(segments),
        weights=jnp.asarray(segments > 0 if weights is None else weights, jnp.float32),
        example_id=jnp.zeros((len(tokens), 2), jnp.int32),
    )


TOKENS = np.random.default_rng(0).integers(1, MASK, (B, T)).astype(np.int32)
TOKENS[:, 0] = 0
# A full row, a row with filling, a row of two pieces.
SEGMENTS = np.array([[1] * T, [1] * 8 + [0] * 4, [1] * 5 + [2] * 7])
BATCH = batch_of(TOKENS, SEGMENTS)
HIDDEN = np.array(OBJECTIVE.chosen(BATCH, KEY)[0])
VISIBLE = (SEGMENTS > 0) & ~HIDDEN


def params_of(objective, model=MODEL):
    return model.init(jax.random.key(1)) | init_heads(objective, jax.random.key(2), model)


@pytest.fixture(scope="module")
def params():
    return params_of(OBJECTIVE)


@pytest.fixture(scope="module")
def states():
    """A function giving the encoder's states of the batch with other tokens."""

    def on(room):
        def run(params, tokens, hidden):
            positions, segments = BATCH.positions, BATCH.segment_ids
            return encode_visible(
                MODEL, params, tokens, hidden, positions=positions, segments=segments, room=room
            )

        return jax.jit(run)

    in_place, gathered = on(None), on(9)

    def find(params, tokens=TOKENS, hidden=HIDDEN, gather=True):
        tokens, hidden = jnp.asarray(tokens), jnp.asarray(hidden)
        if not gather:
            return np.asarray(in_place(params, tokens, hidden)[0]), None
        found, fits = gathered(params, tokens, hidden)
        return np.asarray(found), bool(fits)

    return find


def test_full_rows_hide_the_whole_number_nearest_to_their_rate_and_special_tokens_never(params):
    assert HIDDEN.sum(1).tolist() == [3, 2, 3]  # of 12 places; of 7 words; of 12 places
    assert not HIDDEN[SEGMENTS == 0].any() and not HIDDEN[TOKENS == 0].any()
    assert VISIBLE.sum(1).max() <= T - OBJECTIVE.corruption.most(T)
    metrics = OBJECTIVE.predictions(MODEL, params, BATCH, KEY).metrics
    assert float(metrics["gathered"][0]) == 1 and float(metrics["chosen"][0]) == 8


def test_removing_tokens_and_hiding_them_in_place_give_equal_states(params, states):
    gathered, fits = states(params)
    in_place, _ = states(params, gather=False)
    assert fits
    np.testing.assert_allclose(gathered, in_place, atol=1e-5)
    assert (gathered[~VISIBLE] == 0).all() and (np.abs(gathered[VISIBLE]).sum(-1) > 0).all()


def test_rows_with_too_much_to_see_are_computed_in_place(params, states):
    few = HIDDEN & (np.arange(B) > 0)[:, None]
    gathered, fits = states(params, hidden=few)
    assert not fits
    np.testing.assert_array_equal(gathered, states(params, hidden=few, gather=False)[0])


@pytest.mark.parametrize("gather", [True, False])
def test_states_do_not_depend_on_the_identity_of_hidden_tokens(params, states, gather):
    other = np.where(HIDDEN | (SEGMENTS == 0), TOKENS % (MASK - 1) + 1, TOKENS).astype(np.int32)
    assert (other != TOKENS)[HIDDEN].all()
    found = (states(params, tokens, gather=gather)[0] for tokens in (TOKENS, other))
    np.testing.assert_array_equal(*found)
    seen = TOKENS.copy()
    seen[0, np.flatnonzero(VISIBLE[0])[-1]] = 3 + (TOKENS[0, np.flatnonzero(VISIBLE[0])[-1]] == 3)
    assert np.abs(states(params, seen, gather=gather)[0] - states(params)[0])[0].max() > 1e-3


def test_a_masked_language_model_does_know_tokens_that_it_keeps(params):
    """What the encoder of a BERT reads where a chosen token is kept as it is."""
    kept = Corruption(rate=0.25, masked=0.0, random=0.0, count="fixed", mask_id=MASK)
    eligible = jnp.asarray((SEGMENTS > 0) & (TOKENS != 0))

    def read(tokens):
        found = corrupt(KEY, jnp.asarray(tokens), eligible, kept)
        assert np.asarray(found.chosen).any()
        return MODEL.encode(params, found.tokens).x, np.asarray(found.chosen)

    (before, chosen), _ = read(TOKENS), None
    after, _ = read(np.where(chosen, TOKENS % (MASK - 1) + 1, TOKENS).astype(np.int32))
    assert np.abs(np.asarray(before - after))[~chosen].max() > 1e-3


def test_with_nothing_hidden_it_is_the_plain_encoder(params, states):
    found, _ = states(params, hidden=np.zeros_like(HIDDEN), gather=False)
    plain = MODEL.backbone(
        params,
        MODEL.embed(params, BATCH.tokens),
        positions=BATCH.positions,
        segments=BATCH.segment_ids,
    ).x
    np.testing.assert_allclose(found, jnp.where((SEGMENTS > 0)[..., None], plain, 0), atol=1e-6)


def test_visible_tokens_keep_their_positions(params):
    hidden = np.ones((1, 6), bool)
    hidden[0, [0, 2, 5]] = False
    tokens = jnp.asarray(TOKENS[:1, :6])
    found, fits = encode_visible(MODEL, params, tokens, jnp.asarray(hidden), room=3)
    assert fits
    x = MODEL.embed(params, tokens[:, jnp.array([0, 2, 5])])
    right = MODEL.backbone(params, x, positions=jnp.array([[0, 2, 5]])).x
    renumbered = MODEL.backbone(params, x, positions=jnp.array([[0, 1, 2]])).x
    np.testing.assert_allclose(found[:, jnp.array([0, 2, 5])], right, atol=1e-5)
    assert np.abs(np.asarray(right - renumbered)).max() > 1e-2


def test_the_loss_is_the_mean_nll_of_the_hidden_tokens(params):
    found = jax.jit(lambda p: IN_PLACE.loss(MODEL, p, (), BATCH, KEY))(params)
    states, _ = encode_visible(
        MODEL, params, BATCH.tokens, jnp.asarray(HIDDEN), positions=BATCH.positions,
        segments=BATCH.segment_ids,
    )  # fmt: skip
    x = OBJECTIVE.decoded(MODEL, params, states, jnp.asarray(HIDDEN), BATCH)
    x = OBJECTIVE.read(MODEL, params, x)
    head = OBJECTIVE.output_head(MODEL, params)
    logits = np.asarray(x) @ np.asarray(head.table).T + np.asarray(head.bias)
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), TOKENS[..., None], -1)[..., 0]
    assert float(found.weight) == HIDDEN.sum()
    assert float(found.total) == pytest.approx(nll[HIDDEN].sum(), rel=1e-4)
    other = jax.jit(lambda p: OBJECTIVE.loss(MODEL, p, (), BATCH, KEY))(params)
    assert float(other.total) == pytest.approx(float(found.total), rel=1e-5)


def test_the_decoder_alone_sees_the_mask_and_its_gradient_reaches_the_encoder(params, states):
    table = params["embedding"].at[MASK].add(1.0)
    np.testing.assert_array_equal(states({**params, "embedding": table})[0], states(params)[0])

    def total(params):
        return OBJECTIVE.loss(MODEL, params, (), BATCH, KEY).total

    gradient = jax.jit(jax.grad(total))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        # A bias of keys changes no softmax.
        if "key_bias" not in jax.tree_util.keystr(path):
            assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path
    assert np.abs(gradient["embedding"][MASK]).max() > 0


def test_a_decoder_without_layers_knows_nothing_of_the_text():
    objective = dataclasses.replace(OBJECTIVE, decoder=StackConfig(n_layers=0))
    params = params_of(objective)
    read = jax.jit(lambda batch: objective.predictions(MODEL, params, batch, KEY).x)
    other = batch_of(np.where(TOKENS == 0, 0, TOKENS % (MASK - 1) + 1), SEGMENTS)
    kept = np.asarray(objective.predictions(MODEL, params, BATCH, KEY).weights[..., 0]) > 0
    np.testing.assert_array_equal(np.asarray(read(BATCH))[kept], np.asarray(read(other))[kept])


@pytest.mark.parametrize("rotary", [False, True])
def test_a_rotary_decoder_knows_distances_without_its_table_of_positions(rotary):
    objective = dataclasses.replace(OBJECTIVE, decoder=StackConfig(1, rotary=rotary))
    params = params_of(objective)
    decoder = params["heads"]["decoder"]
    decoder["positions"] = jnp.zeros_like(decoder["positions"])
    row = batch_of(TOKENS[:1], SEGMENTS[:1])
    states, hidden = jax.random.normal(KEY, (1, T, CONFIG.d_model)), jnp.asarray(HIDDEN[:1])
    found = objective.decoded(MODEL, params, states, hidden, row)
    mixed = jax.random.permutation(jax.random.key(5), T)
    other = objective.decoded(MODEL, params, states[:, mixed], hidden[:, mixed], row)
    np.testing.assert_equal(np.allclose(other, found[:, mixed], atol=1e-5), not rotary)
    later = objective.decoded(
        MODEL, params, *(jnp.roll(a, 2, 1) for a in (states, hidden)),
        batch_of(np.roll(TOKENS[:1], 2, 1), np.array([[0] * 2 + [1] * (T - 2)])),
    )  # fmt: skip
    first = objective.decoded(
        MODEL, params, states, hidden, batch_of(TOKENS[:1], np.array([[1] * (T - 2) + [0] * 2]))
    )
    np.testing.assert_allclose(later[:, 2:], first[:, :-2], atol=1e-5)


def test_rows_without_a_token_to_hide_count_for_nothing(params):
    nothing = dataclasses.replace(OBJECTIVE, exempt=tuple(range(V)))
    found = jax.jit(lambda p: nothing.loss(MODEL, p, (), BATCH, KEY))(params)
    assert float(found.total) == 0 and float(found.weight) == 0
    # A row of a prompt alone: nothing is hidden there, and all of it is seen.
    weights = (SEGMENTS > 0) * (np.arange(B) > 0)[:, None]
    batch = batch_of(TOKENS, SEGMENTS, weights)
    hidden = np.asarray(OBJECTIVE.chosen(batch, KEY)[0])
    assert hidden.sum(1).tolist()[0] == 0 and hidden.sum(1).min(initial=9, where=[0, 1, 1]) > 0
    found = OBJECTIVE.loss(MODEL, params, (), batch, KEY)
    same = IN_PLACE.loss(MODEL, params, (), batch, KEY)
    assert float(found.metrics["gathered"][0]) == 0
    assert float(found.total) == pytest.approx(float(same.total), rel=1e-6)


def test_a_narrow_decoder_beside_rotary_positions():
    model = Encoder(ModelConfig(
        vocab_size=V, d_model=16, n_layers=1, n_heads=2, d_ff=24, causal=False, max_positions=T
    ))  # fmt: skip
    objective = dataclasses.replace(OBJECTIVE, decoder=StackConfig(1, d_model=8, n_heads=1))
    params = params_of(objective, model)
    w = params["heads"]["decoder"]
    assert w["narrow"].shape == (16, 8) and w["dense"].shape == (8, 16)
    value, gradient = jax.jit(
        jax.value_and_grad(lambda p: objective.loss(model, p, (), BATCH, KEY).total)
    )(params)
    assert np.isfinite(value) and np.abs(gradient["layers"]["attention"]["query"]).max() > 0
    in_place = dataclasses.replace(objective, removal="attention")
    assert float(value) == pytest.approx(
        float(in_place.loss(model, params, (), BATCH, KEY).total), rel=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"corruption": Corruption(masked=0.8, random=0.1, count="fixed")}, "masked=0.8 must be 1"),
        ({"corruption": Corruption(masked=1.0, random=0.0)}, "count='fixed'"),
        ({"corruption": Corruption(1.0, 1.0, 0.0, "fixed")}, "nothing to read"),
        ({"removal": "gathr"}, "Did you mean 'gather'"),
        ({"z_loss": -1.0}, "z_loss"),
    ],
)
def test_impossible_settings_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        dataclasses.replace(OBJECTIVE, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"positions": "relative"}, "set removal='attention'"),
        ({"sliding_window": 4}, "set removal='attention'"),
        ({"embedding_width": 8}, "embedding_width=8 must be None"),
    ],
)
def test_models_that_removal_would_change_are_refused(params, changes, said):
    model = Encoder(dataclasses.replace(CONFIG, **changes))
    with pytest.raises(ConfigError, match=said):
        OBJECTIVE.loss(model, params, (), BATCH, KEY)
    causal = Transformer(dataclasses.replace(CONFIG, causal=True))
    with pytest.raises(ConfigError, match=r"set model\.causal=False"):
        OBJECTIVE.loss(causal, params, (), BATCH, KEY)


def test_relative_positions_and_windows_work_in_place():
    for changes in ({"positions": "relative"}, {"sliding_window": 4}):
        model = Encoder(dataclasses.replace(CONFIG, **changes))
        found = IN_PLACE.loss(model, params_of(IN_PLACE, model), (), BATCH, KEY)
        assert np.isfinite(float(found.total))


def test_a_run_leaves_the_encoder_alone_behind(tiny_tree, tmp_path):
    from tokjax.training.loop import train
    from tokjax.training.run import build_run
    from tokjax.training.trained import load_trained

    tree = tiny_tree(
        objective={"name": "mae_lm", "decoder": {"n_layers": 1}},
        model__causal=False,
        model__vocab_size=258,
        model__n_layers=1,
        steps=4,
        evaluation__every_steps=4,
    )
    run = build_run(resolve(TrainConfig, tree), devices=jax.devices()[:1], show_progress=False)
    objective: Any = run.stages[0].objective
    assert objective.corruption.mask_id == run.tokenizer.vocab_size == 257
    assert objective.exempt
    result = train(run, tmp_path / "run")
    assert np.isfinite(result.metrics["eval/validation/nll"])
    found = load_trained(tmp_path / "run")
    assert isinstance(found.model, Encoder)
    assert jax.tree.structure(found.params) == jax.tree.structure(found.model.abstract_params())
    assert set(found.heads) == {"decoder"} and of_model(found.params) == found.params
    assert np.isfinite(found.model.encode(found.params, jnp.ones((1, 4), jnp.int32)).x).all()


def test_the_config_says_what_it_trains():
    found = resolve(TrainConfig, load("configs/mae_lm.py:decoder_layers=3"))
    assert found.objective.decoder.n_layers == 3 and not found.model.causal
    assert type(found.objective).__name__ == "MaeLM"
    found = resolve(TrainConfig, load("configs/mae_lm.py:masks=True"))
    assert type(found.objective).__name__ == "MaskedLM"
