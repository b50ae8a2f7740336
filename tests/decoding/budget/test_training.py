import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.decoding.budget import (
    LengthPredictor,
    concise,
    evaluate_predictor,
    fit_gamma,
    gamma_nll,
    load,
    newline_tokens,
    predicted_gammas,
    remaining_lengths,
    save,
    train_predictor,
)
from tokjax.decoding.budget.training import label_rows
from tokjax.errors import CheckpointError, ConfigError, DataError, NonFiniteError, StorageError
from tokjax.training.compiles import CompileWatch

V, THINK, CLOSE = 48, 1, 2
IDS = {"think_start": THINK, "think_end": CLOSE}
LINEAR = LengthPredictor(32, V, "linear")
ENCODER = LengthPredictor(32, V, "encoder", width=16, n_layers=2, n_heads=2)
SETTINGS = {**IDS, "batch_size": 16, "peak_lr": 3e-2, "progress": False}


def test_lengths_count_the_label_itself_and_end_at_one():
    row = [9, THINK, 5, 5, CLOSE, 8, THINK, CLOSE, THINK, 7]
    assert remaining_lengths(row, **IDS).tolist() == [0, 4, 3, 2, 1, 0, 2, 1, 0, 0]
    assert remaining_lengths([CLOSE, THINK, THINK, CLOSE], **IDS).tolist() == [0, 3, 2, 1]
    assert remaining_lengths([], **IDS).tolist() == []


def test_a_concise_copy_thinks_its_answer():
    row = [9, THINK, 5, 5, 5, CLOSE, 8, 7, 0]
    assert concise(row, **IDS, end=[0]) == [9, THINK, 8, 7, CLOSE, 8, 7, 0]
    # Of several turns the last is shortened.
    turns = [9, THINK, 5, CLOSE, 8, *row]
    assert concise(turns, **IDS, end=[0]) == [9, THINK, 5, CLOSE, 8, *concise(row, **IDS, end=[0])]
    with pytest.raises(DataError, match="no thinking"):
        concise([9, THINK, 5], **IDS)
    with pytest.raises(DataError, match="there is no answer"):
        concise([9, THINK, 5, CLOSE, 0], **IDS, end=[0])


def test_tokens_with_a_line_break():
    tokenizer = ByteTokenizer()
    table = newline_tokens(tokenizer, tokenizer.vocab_size + 7)
    assert table.shape == (tokenizer.vocab_size + 7,)
    assert np.flatnonzero(table).tolist() == tokenizer.encode("\n")


@pytest.fixture(scope="module")
def trained(lm, traces):
    return train_predictor(lm.model, lm.params, LINEAR, traces[:128], epochs=30, **SETTINGS)


def test_training_beats_the_best_constant_on_held_out_traces(lm, traces, trained):
    held_out = traces[128:]
    lengths = np.concatenate([remaining_lengths(row, **IDS)[1:] for row in held_out])
    lengths = jnp.float32(lengths[lengths > 0])
    constant = gamma_nll(lengths, *(jnp.float32(v) for v in fit_gamma(lengths))).mean()
    judge = lambda weights: evaluate_predictor(  # noqa: E731
        lm.model, lm.params, LINEAR, weights, held_out, **IDS
    )
    before = judge(LINEAR.init(jax.random.key(0)))
    after = judge(trained.params)
    assert after < constant - 0.3 < constant < before
    assert trained.losses.shape == (30 * 8,)
    assert trained.losses[-8:].mean() < constant


def test_the_encoder_learns_too_and_can_go_on(lm, traces):
    settings = {**SETTINGS, "peak_lr": 3e-3}
    first = train_predictor(lm.model, lm.params, ENCODER, traces[:64], epochs=6, **settings)
    assert first.losses[-4:].mean() < first.losses[:4].mean() - 0.3
    again = train_predictor(lm.model, lm.params, ENCODER, traces[:64], epochs=6, **settings)
    np.testing.assert_array_equal(first.losses, again.losses)
    with CompileWatch() as watch:
        more = train_predictor(
            lm.model, lm.params, ENCODER, traces[:64], start=first.params, **settings
        )
        assert watch.count == 0
    assert more.losses.mean() < first.losses[:4].mean()
    assert jnp.isfinite(first.params["alpha"]).all()  # what was given was not given away


def test_evaluation_counts_labels_whatever_the_batches_are(lm, traces, trained):
    found = [
        evaluate_predictor(
            lm.model, lm.params, LINEAR, trained.params, traces[:10], **IDS, batch_size=size
        )
        for size in (10, 4)
    ]
    np.testing.assert_allclose(*found, rtol=1e-5)
    tokens = np.array([traces[0]])
    alpha, rate = predicted_gammas(lm.model, lm.params, LINEAR, trained.params, tokens)
    left = remaining_lengths(traces[0], **IDS)[1:]
    nll = gamma_nll(jnp.float32(left), alpha[0], rate[0])[left > 0].mean()
    one = evaluate_predictor(lm.model, lm.params, LINEAR, trained.params, traces[:1], **IDS)
    np.testing.assert_allclose(one, nll, rtol=1e-5)


@pytest.mark.parametrize("predictor", [LINEAR, ENCODER], ids=lambda p: p.kind)
def test_a_prediction_sees_the_token_it_is_for_and_none_behind_it(lm, traces, predictor):
    weights = predictor.init(jax.random.key(3))
    row = np.array([traces[0]])
    changed = row.copy()
    changed[0, 6:] = (changed[0, 6:] + 7) % V
    one, other = (
        predicted_gammas(lm.model, lm.params, predictor, weights, tokens)
        for tokens in (row, changed)
    )
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a[:, :5], b[:, :5])
        assert (a[:, 5] != b[:, 5]).all()


@pytest.mark.parametrize("predictor", [LINEAR, ENCODER], ids=lambda p: p.kind)
def test_one_candidates_gamma_is_that_of_the_whole_vocabulary(lm, predictor):
    weights = predictor.init(jax.random.key(3))
    states = jax.random.normal(jax.random.key(0), (5, 3, 32))
    tokens = jnp.array([0, 7, 47, 7, 2])
    for one, all_ in zip(
        predictor.of_tokens(weights, states, tokens), predictor(weights, states), strict=True
    ):
        assert all_.shape == (5, V)
        assert (all_ > 0).all()
        np.testing.assert_allclose(one, all_[jnp.arange(5), tokens], rtol=1e-5)


def test_the_encoder_reads_layers_in_any_order_and_number():
    weights = ENCODER.init(jax.random.key(3))
    states = jax.random.normal(jax.random.key(0), (2, 5, 32))
    z = ENCODER.read(weights, states)
    np.testing.assert_allclose(ENCODER.read(weights, states[:, ::-1]), z, atol=1e-5)
    assert jnp.abs(ENCODER.read(weights, states[:, :3]) - z).max() > 1e-3


@pytest.mark.parametrize("predictor", [LINEAR, ENCODER], ids=lambda p: p.kind)
def test_what_is_saved_is_loaded(tmp_path, predictor):
    weights = predictor.init(jax.random.key(3))
    save(tmp_path / "lengths.safetensors", predictor, weights)
    found, restored = load(tmp_path / "lengths.safetensors")
    assert found == predictor
    assert jax.tree.structure(restored) == jax.tree.structure(weights)
    jax.tree.map(np.testing.assert_array_equal, restored, weights)


def test_files_that_hold_no_whole_predictor_are_refused(tmp_path):
    path = tmp_path / "lengths.safetensors"
    with pytest.raises(StorageError, match="No such file"):
        load(path)
    save(path, LINEAR, LINEAR.init(jax.random.key(0)))
    whole = path.read_bytes()
    for damaged in (whole[:-10], b"", b"{}" * 20):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="no whole length predictor"):
            load(path)
    save(path, LINEAR, {"alpha": np.zeros((V, 32), np.float32)})
    with pytest.raises(CheckpointError, match="tensor 'rate'"):
        load(path)
    save(path, LINEAR, dict.fromkeys(("alpha", "rate"), np.zeros((V, 31), np.float32)))
    with pytest.raises(CheckpointError, match=r"should have the shape \(48, 32\), not \(48, 31\)"):
        load(path)


def test_what_cannot_be_trained_is_refused_before_anything_is_compiled(lm, traces):
    def train(rows=traces[:4], predictor=LINEAR, **changes):
        return train_predictor(lm.model, lm.params, predictor, rows, **{**SETTINGS, **changes})

    with pytest.raises(ConfigError, match=r"vocab_size=50, but the model has 48"):
        train(predictor=LengthPredictor(32, 50, "linear"))
    with pytest.raises(ConfigError, match=r"d_model=16, but the model has 32"):
        train(predictor=LengthPredictor(16, V, "linear"))
    for wrong in ({"batch_size": 0}, {"epochs": 0}, {"peak_lr": 0.0}, {"warmup_share": 2}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
            train(**wrong)
    with pytest.raises(DataError, match="none of 1 rows has thinking"):
        train(rows=[[5, THINK, 6]])
    with pytest.raises(DataError, match="row 1 has id 48 at position 0"):
        train(rows=[traces[0], [V, THINK, CLOSE]])
    with pytest.raises(ConfigError, match="kind='bert'"):
        LengthPredictor(32, V, "bert")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not divisible by n_heads=5"):
        LengthPredictor(32, V, width=16, n_heads=5)
    broken = {**lm.params, "embedding": lm.params["embedding"] * np.nan}
    with pytest.raises(NonFiniteError, match="loss of step 0 is nan"):
        train_predictor(lm.model, broken, LINEAR, traces[:16], **SETTINGS)


def test_rows_cut_short_keep_the_length_of_the_whole(lm):
    row = [9, THINK, *[5] * 200, CLOSE, 8]
    ((ids, left),) = label_rows(lm.model, [row, [4, 4]], THINK, CLOSE, max_length=8192)
    assert len(ids) == len(left) == lm.model.config.max_positions == 96
    assert left.tolist() == [0, *range(202, 202 - 95, -1)]
