"""The hierarchical transformer: what each byte is predicted from, likelihoods, decoding."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows_for_tests import batch_of, gradient_of, loss_of, noisy, slots

from tokjax.decoding import Prompts, categorical, decode, greedy
from tokjax.decoding.transforms import logit_bias
from tokjax.errors import ConfigError
from tokjax.models import ModelConfig, Transformer
from tokjax.models.segments import Segments
from tokjax.models.stack import StackConfig
from tokjax.tokenization.hat import TEXT_END, WORD_END, Hat, WordTokenizer, hat
from tokjax.tokenization.hat.predictor import BACKBONE_STEPS

T = 24
SMALL = StackConfig(n_layers=1, d_model=16, n_heads=2)
HAT = Hat(encoder=SMALL, decoder=SMALL)
CONFIG = ModelConfig(
    vocab_size=258, d_model=32, n_layers=2, n_heads=2, d_ff=32, max_positions=64, init_scale=0.3
)
MODEL = Transformer(CONFIG)
TEXT = "the cat sat on it"
IDS = [TEXT_END, *WordTokenizer().encode(TEXT), TEXT_END]
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def params_of(objective, model=MODEL):
    own = model.init(jax.random.key(0))
    return noisy({**own, "heads": objective.init_heads(jax.random.key(1), model)})


@pytest.fixture(scope="module")
def params():
    return params_of(HAT)


def words_of(ids):
    """Which word each slot spells: the number of ends up to it."""
    return np.cumsum(np.array(ids[:-1]) >= WORD_END) - 1


@pytest.mark.parametrize("context", ["words", "none"])
def test_a_byte_changes_later_bytes_of_its_word_and_later_words_alone(params, context):
    objective = dataclasses.replace(HAT, context=context)
    before = np.asarray(slots(MODEL, objective, params, batch_of([[IDS]], T))[0][0])
    word = words_of(IDS)
    for at in (2, 5, 7, 11):
        assert IDS[at] < WORD_END
        changed = [*IDS[:at], ord("z"), *IDS[at + 1 :]]
        after = np.asarray(slots(MODEL, objective, params, batch_of([[changed]], T))[0][0])
        moved = np.abs(after - before).max(-1)[: len(word)] > 1e-5
        own = (word == word[at]) & (np.arange(len(word)) >= at)
        later = (word > word[at]) & (context == "words")
        np.testing.assert_array_equal(moved, own | later)


def test_a_words_vector_is_the_same_alone_filled_up_and_among_others(params):
    parts = HAT.parts(MODEL)
    w = parts.ready(params["heads"]["hat"])
    word, encoded = [WORD_END, *b" cat"], jax.jit(parts.encoded)

    def at_end(symbols, positions, words, place):
        given = (jnp.array(a)[None] for a in (symbols, positions, words))
        return np.asarray(encoded(w, *given))[0, place]

    alone = at_end(word, range(5), [1] * 5, 0)
    filled = at_end([*word, 7, 8, 9], range(8), [1] * 5 + [0] * 3, 0)
    beside = at_end(
        [*b"the", 256, *b" cat", 256], [1, 2, 3, 0, 1, 2, 3, 4, 0], [1] * 4 + [2] * 5, 8
    )
    np.testing.assert_allclose(filled, alone, **CLOSE)
    np.testing.assert_allclose(beside, alone, **CLOSE)
    assert np.abs(at_end([WORD_END, *b" act"], range(5), [1] * 5, 0) - alone).max() > 1e-3


def test_documents_of_a_row_know_nothing_of_one_another(params):
    first, second = IDS[:8], [TEXT_END, *WordTokenizer().encode("we do"), TEXT_END]
    packed = slots(MODEL, HAT, params, batch_of([[first, second]], T))[0][0]
    alone = slots(MODEL, HAT, params, batch_of([[first], [second]], T))[0]
    n, m = len(first) - 1, len(second) - 1
    np.testing.assert_allclose(packed[:n], alone[0, :n], **CLOSE)
    np.testing.assert_allclose(packed[n : n + m], alone[1, :m], **CLOSE)


def test_uniform_logits_cost_ln_257_for_each_byte_and_each_word():
    model = Transformer(dataclasses.replace(CONFIG, vocab_size=257))
    params = params_of(HAT, model)
    table = params["heads"]["hat"]["decoder"]["embedding"]
    params["heads"]["hat"]["decoder"]["embedding"] = jnp.zeros_like(table)
    ids = [WORD_END, *WordTokenizer().encode(TEXT)]
    loss = loss_of(model, HAT, params, batch_of([[ids]], T))
    n, words = len(TEXT.encode()), 5
    assert float(loss.total) == pytest.approx((n + words) * math.log(257), rel=1e-6)
    bits, units = map(float, loss.metrics["bits_per_byte"])
    assert units == n
    assert bits == pytest.approx((n + words) * math.log2(257), rel=1e-6)
    length, ends = map(float, loss.metrics["bytes_per_word"])
    assert length / ends == pytest.approx(n / words)


def test_words_of_one_byte_give_the_backbone_every_byte():
    ids = [TEXT_END, *WordTokenizer(longest=1).encode("abcd")]
    assert ids[2::2] == [WORD_END] * 4
    batch = batch_of([[ids]], T)
    found = Segments.of(batch.tokens >= WORD_END, batch.segment_ids, T)
    # The text's beginning, and all bytes but the last, whose word has not ended.
    assert int(found.count[0]) == 4


def test_symbols_without_room_are_left_out_and_the_others_stay(params):
    batch = batch_of([[IDS]], T)
    small = dataclasses.replace(HAT, room=3 / T)
    logp, _, weights = slots(MODEL, small, params, batch)
    whole = slots(MODEL, HAT, params, batch)[0]
    kept = np.asarray(weights[0]) > 0
    np.testing.assert_array_equal(kept[: len(IDS) - 1], words_of(IDS) < 3)
    np.testing.assert_allclose(logp[0][kept], whole[0][kept], **CLOSE)
    loss = loss_of(MODEL, small, params, batch)
    out, of = map(float, loss.metrics["left_out"])
    assert (out, of) == (len(IDS) - 1 - kept.sum(), len(IDS) - 1)


@pytest.fixture(scope="module")
def generated(params):
    """Two ragged prompts, the second without a beginning, two samples of each."""
    rows = [IDS[:7], IDS[2:5]]
    found = decode(
        *hat(MODEL, params, params["heads"], HAT, longest=20),
        Prompts.of(rows),
        max_new_tokens=12,
        samples=2,
        sampler=categorical(),
        seeds=[1, 2, 3, 4],
        transform=logit_bias({WORD_END: 9.0, TEXT_END: -50.0}),
        record={"steps": _steps},
    )
    return rows, found


def _steps(context):
    return context.signals[BACKBONE_STEPS]


def test_what_is_sampled_has_the_probability_it_is_scored_with(params, generated):
    rows, found = generated
    whole = [rows[b // 2] + row for b, row in enumerate(found.rows())]
    assert any(WORD_END in row for row in found.rows())
    logp, targets, _ = slots(
        MODEL, dataclasses.replace(HAT, room=1.0), params, batch_of([[r] for r in whole], T)
    )
    scored = np.take_along_axis(np.asarray(logp), np.asarray(targets)[..., None], -1)[..., 0]
    for b, row in enumerate(whole):
        start = len(rows[b // 2]) - 1
        np.testing.assert_allclose(
            found.logprobs[b][:12], scored[b, start : len(row) - 1], rtol=1e-4, atol=1e-4
        )


def test_the_backbone_runs_once_a_word(generated):
    rows, found = generated
    for b, row in enumerate(found.rows()):
        read = [*rows[b // 2], *row]
        start = len(rows[b // 2])
        # The text's beginning counts as one, where it is a symbol or not.
        first = int(read[0] < WORD_END)
        wanted = [first + sum(i >= WORD_END for i in read[: start + n]) for n in range(len(row))]
        np.testing.assert_array_equal(found.recorded["steps"][b][: len(row)], wanted)


def test_rows_do_not_depend_on_those_beside_them(params):
    rows, method = [IDS[:7], IDS[2:5], IDS[:3]], hat(MODEL, params, params["heads"], HAT)
    together = decode(*method, Prompts.of(rows), max_new_tokens=9).rows()
    alone = [decode(*method, Prompts.of([row]), max_new_tokens=9).rows()[0] for row in rows]
    assert together == alone


def test_no_word_is_longer_than_words_are(params):
    method = hat(MODEL, params, params["heads"], HAT, longest=4)
    away = logit_bias({WORD_END: -30.0, TEXT_END: -60.0})
    row = decode(
        *method, Prompts.of([[TEXT_END]]), max_new_tokens=14, transform=away, sampler=greedy()
    ).rows()[0]
    assert [i for i, symbol in enumerate(row) if symbol >= WORD_END] == [4, 9]
    with pytest.raises(ConfigError, match="more than longest=4 bytes at position 5"):
        decode(*method, Prompts.of([[TEXT_END, *b"abcde"]]), max_new_tokens=2)


def test_shared_bytes_have_one_table():
    shared = dataclasses.replace(HAT, shared_bytes=True)
    heads = shared.init_heads(jax.random.key(0), MODEL)["hat"]
    assert "embedding" not in heads["encoder"]
    params = params_of(shared)
    gradient = gradient_of(MODEL, shared, params, batch_of([[IDS]], T))
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(gradient))


def test_every_parameter_is_trained(params):
    gradient = gradient_of(MODEL, HAT, params, batch_of([[IDS]], T))
    for leaf in jax.tree.leaves({k: v for k, v in gradient.items() if k != "embedding"}):
        assert np.abs(leaf).max() > 0
    moved = np.flatnonzero(np.abs(gradient["embedding"]).max(-1))
    np.testing.assert_array_equal(moved, [TEXT_END])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Hat(room=0), "room=0"),
        (lambda: Hat(context="wrds"), "words"),
        (lambda: Hat(encoder=StackConfig(n_layers=0)), "encoder.n_layers"),
        (
            lambda: Hat().parts(Transformer(dataclasses.replace(CONFIG, vocab_size=99))),
            "257 symbols",
        ),
        (lambda: hat(MODEL, {}, {"toucan": {}}), "not those of objective 'hat'"),
    ],
)
def test_what_cannot_work_is_refused(make, says):
    with pytest.raises(ConfigError, match=says):
        make()
