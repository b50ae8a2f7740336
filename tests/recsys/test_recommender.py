"""The recommender: cached steps, beams within the catalogue, training that stops and goes on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.decoding.engine import decode
from tokjax.decoding.predictors import Conditioned
from tokjax.decoding.prompts import Prompts
from tokjax.errors import ConfigError, DataError
from tokjax.evaluation.recommendations import hits
from tokjax.models.encdec import EncoderDecoder
from tokjax.recsys import (
    FitConfig,
    ItemCodes,
    RecommenderConfig,
    evaluate_recommender,
    leave_one_out,
    recommend,
    train_recommender,
    training,
)

CONFIG = RecommenderConfig(
    d_model=16, d_ff=32, n_heads=2, head_dim=8, n_layers=1, branch_d_ff=16, dropout=0.1
)
CODES = ItemCodes(np.array([[i // 3, i % 3] for i in range(9)]), 3)
MODEL = CONFIG.model(CODES)
LOGITS, LOSSES, ENCODE = jax.jit(MODEL), jax.jit(MODEL.losses), jax.jit(MODEL.encode)
HISTORIES = CODES.histories(np.array([[-1, 2, 5], [0, 1, 8]]))
ANSWERS = CODES.answers(np.array([4, 7]))
SEQUENCES = [[(start + step * i) % 9 for i in range(6)] for start in range(9) for step in (1, 2)]
SPLIT = leave_one_out(SEQUENCES, longest=3)
FIT = FitConfig(epochs=40, batch_size=16, peak_lr=1e-2, patience=40)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


@pytest.fixture(scope="module")
def trained():
    return train_recommender(MODEL, CODES, SPLIT.train, SPLIT.validation, FIT, progress=False)


def test_without_the_block_it_is_the_plain_encoder_decoder():
    config = dataclasses.replace(CONFIG, positions=False, branch="none", gate=False)
    model = config.model(CODES)
    own = model.init(jax.random.key(0))
    plain = EncoderDecoder(model.config)
    given = HISTORIES, ANSWERS[:, :-1]
    logits, _ = jax.jit(plain)(own["stacks"], *given, HISTORIES != 0)
    np.testing.assert_array_equal(jax.jit(model)(own, *given), logits)


def test_the_loss_is_the_mean_over_codes_and_end_token(params):
    logp = jax.nn.log_softmax(LOGITS(params, HISTORIES, ANSWERS[:, :-1]), axis=-1)
    wanted = [-np.mean([logp[b, t, ANSWERS[b, t + 1]] for t in range(3)]) for b in range(2)]
    np.testing.assert_allclose(LOSSES(params, HISTORIES, ANSWERS), wanted, rtol=1e-5)


def test_no_later_token_and_no_other_row_changes_logits(params):
    tokens = ANSWERS[:, :-1]
    before = LOGITS(params, HISTORIES, tokens)
    changed = tokens.copy()
    changed[0, 2] = 5
    after = LOGITS(params, HISTORIES, changed)
    np.testing.assert_array_equal(before[0, :2], after[0, :2])
    np.testing.assert_array_equal(before[1], after[1])
    assert not np.allclose(before[0, 2], after[0, 2])


def test_filling_in_front_does_not_change_what_is_recommended(params):
    """More filling changes nothing: places of the items, counted from the end, are the same."""
    few = CODES.histories(np.array([[2, 5]]))
    many = CODES.histories(np.array([[-1, -1, 2, 5]]))
    tokens = ANSWERS[:1, :-1]
    np.testing.assert_allclose(
        LOGITS(params, few, tokens), LOGITS(params, many, tokens), rtol=1e-4, atol=1e-5
    )


def test_cached_steps_give_the_logits_of_the_whole_item(params):
    memory = ENCODE(params, HISTORIES)
    found = decode(
        MODEL.predictor,
        Conditioned(params, memory),
        Prompts.of([[0], [0]]),
        max_new_tokens=3,
        samples=2,
        record={"logits": lambda context: context.logits},
    )
    tokens = np.asarray(found.tokens)[:, :3]
    rows = np.repeat(np.arange(2), 2)
    inputs = np.concatenate([np.zeros((4, 1), int), tokens[:, :2]], axis=1)
    whole = LOGITS(params, HISTORIES[rows], inputs)
    np.testing.assert_allclose(found.recorded["logits"][:, :3], whole, rtol=1e-4, atol=1e-5)


def test_every_beam_is_an_item_and_all_beams_are_all_items_in_order(params):
    trained = training.TrainedRecommender(MODEL, params, CODES, np.zeros(0), 0.0)
    found = recommend(trained, [[2, 5], [0, 1, 8], [3]], k=9, beams=9, batch_size=2)
    assert found.items.shape == (3, 9)
    assert [sorted(row) for row in found.items.tolist()] == [list(range(9))] * 3
    # Against the probabilities of all items, one by one.
    history = np.repeat(CODES.histories(np.array([[2, 5]])), 9, axis=0)
    scores = -3 * np.asarray(LOSSES(params, history, CODES.answers(np.arange(9))))
    assert found.items[0].tolist() == np.argsort(-scores, kind="stable").tolist()
    np.testing.assert_allclose(found.scores[0], np.sort(scores)[::-1], rtol=1e-4)


def test_hits_at_the_third_place_count_half_and_not_among_two():
    ranked, wanted = np.array([[4, 5, 6]]), np.array([6])
    assert hits(ranked, wanted, 2) == (0.0, 0.0)
    recall, gain = hits(ranked, wanted, 3)
    assert recall.tolist() == [1.0] and gain.tolist() == [0.5]


def test_training_learns_what_follows(trained):
    found = evaluate_recommender(trained, SPLIT.train, at=(1, 3), beams=9)
    assert found["recall@3"].mean() > 0.8
    assert (found["recall@1"] <= found["recall@3"]).all()
    assert (found["ndcg@3"] <= found["recall@3"]).all()
    assert trained.losses[-1] < 0.5 * trained.losses[0]
    assert trained.validation < trained.losses[0]


def test_training_goes_on_from_its_file_with_the_same_numbers(trained, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    own, calls = training._update, []

    def stop(*args):
        calls.append(0)
        if len(calls) == 13:
            raise Stopped
        return own(*args)

    file = tmp_path / "recommender.fit"
    given = (MODEL, CODES, SPLIT.train, SPLIT.validation, FIT)
    monkeypatch.setattr(training, "_update", stop)
    with pytest.raises(Stopped):
        train_recommender(*given, checkpoint=file, progress=False)
    monkeypatch.setattr(training, "_update", own)
    again = train_recommender(*given, checkpoint=file, progress=False)
    np.testing.assert_array_equal(again.losses, trained.losses)
    jax.tree.map(np.testing.assert_array_equal, again.params, trained.params)
    other = dataclasses.replace(FIT, seed=1)
    with pytest.raises(ConfigError, match="is of a training with fit="):
        train_recommender(*given[:4], other, checkpoint=file, progress=False)


def test_training_ends_when_validation_gets_no_better(tmp_path):
    config = dataclasses.replace(FIT, patience=2, peak_lr=1.0)  # too large to get better for long
    given = (MODEL, CODES, SPLIT.train, SPLIT.validation, config)
    file = tmp_path / "recommender.fit"
    found = train_recommender(*given, checkpoint=file, progress=False)
    per_epoch = -(-len(SPLIT.train) // 16)
    assert len(found.losses) % per_epoch == 0
    assert 3 * per_epoch <= len(found.losses) < FIT.epochs * per_epoch
    held_out = CODES.histories(SPLIT.validation.items), CODES.answers(SPLIT.validation.targets)
    loss = jnp.mean(LOSSES(found.params, *held_out))
    np.testing.assert_allclose(found.validation, loss, rtol=1e-4)
    again = train_recommender(*given, checkpoint=file, progress=False)
    np.testing.assert_array_equal(again.losses, found.losses)


def test_another_seed_compiles_nothing(trained):
    before = training._update._cache_size()
    other = dataclasses.replace(FIT, seed=3, epochs=1, peak_lr=1e-3)
    train_recommender(MODEL, CODES, SPLIT.train, SPLIT.validation, other, progress=False)
    assert training._update._cache_size() == before


def test_prompts_are_begin_tokens_one_for_each_history(params):
    memory = ENCODE(params, HISTORIES)
    given = MODEL.predictor, Conditioned(params, memory)
    with pytest.raises(ConfigError, match="the begin token alone"):
        decode(*given, Prompts.of([[0, 2], [0]]), max_new_tokens=2)
    with pytest.raises(ConfigError, match="2 histories for 1 prompts"):
        decode(*given, Prompts.of([[0]]), max_new_tokens=2)


def test_what_cannot_be_asked_is_refused(trained):
    with pytest.raises(ConfigError, match="k=11 items must be 1 to beams=10"):
        recommend(trained, [[1]], k=11, beams=10)
    with pytest.raises(DataError, match="no history"):
        recommend(trained, [])
    with pytest.raises(DataError, match="item 9 is not among the 9"):
        recommend(trained, [[9]], k=2, beams=2)
    with pytest.raises(ConfigError, match="patience=0"):
        FitConfig(patience=0)
    with pytest.raises(ConfigError, match="padding='left'"):
        RecommenderConfig(padding="left")  # type: ignore[arg-type]
