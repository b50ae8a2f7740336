import jax
import numpy as np
import pytest

from tokjax.errors import ConfigError
from tokjax.evaluation.requests import Pair, writing
from tokjax.evaluation.scoring import EXCLUDED, score_pairs
from tokjax.evaluation.writing import write_texts


def greedy_of(lm, context, n):
    found = lm.generate([list(context)], max_new_tokens=n, stop=[])
    return tuple(found.tokens[0].tolist())


@pytest.fixture(scope="module")
def pairs(lm):
    contexts = [(97, 98, 99), (5,), (100,) * 9, (7, 8), (97, 99)]
    rows = [(1, 2, 3), (44,), (9, 9, 9, 9, 9, 9, 9), (200, 3), ()]
    found = [Pair(c, r or greedy_of(lm, c, 4)) for c, r in zip(contexts, rows, strict=True)]
    return [*found, Pair((97,) * 30, (98,) * 19)]  # 49 ids: all positions


def direct(lm, pair):
    ids = [*pair.context, *pair.continuation]
    logprobs = np.asarray(jax.nn.log_softmax(lm.logits([ids[:-1]])[0]), np.float64)
    at = range(len(pair.context), len(ids))
    return (
        sum(logprobs[i - 1, ids[i]] for i in at),
        all(logprobs[i - 1].argmax() == ids[i] for i in at),
    )


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_scores_are_those_of_the_logits_in_the_order_of_the_pairs(lm, pairs, batch_size):
    found = score_pairs(lm, pairs, batch_size=batch_size)
    for pair, (total, greedy) in zip(pairs, found, strict=True):
        expected, is_greedy = direct(lm, pair)
        assert total == pytest.approx(expected, abs=1e-4)
        assert greedy == is_greedy
    assert [greedy for _, greedy in found] == [False] * 4 + [True, False]
    assert score_pairs(lm, []) == []


def test_a_strategy_that_changes_nothing_gives_the_models_scores(lm, pairs):
    plain = score_pairs(lm, pairs[:5], batch_size=4)
    guided = score_pairs(lm, pairs[:5], batch_size=4, strategy="guided", options={"weight": 1.0})
    np.testing.assert_allclose([t for t, _ in guided], [t for t, _ in plain], atol=1e-4)
    assert [g for _, g in guided] == [g for _, g in plain]


def test_a_strategys_scores_are_of_what_it_would_predict(lm, pairs):
    settings = {"strategy": "dola", "layers": [0]}
    context = pairs[0].context
    row = lm.generate([list(context)], max_new_tokens=4, stop=[], **settings)
    own, other = tuple(row.tokens[0].tolist()), (1, 2)
    (total, greedy), (excluded, wrong) = score_pairs(
        lm, [Pair(context, own), Pair(context, other)], strategy="dola", options={"layers": [0]}
    )
    assert greedy and total == pytest.approx(float(row.logprobs[0].sum()), abs=1e-4)
    assert not wrong and 2 * EXCLUDED <= excluded <= EXCLUDED  # finite where DoLa excludes
    with pytest.raises(ConfigError, match="no option 'layer'"):
        score_pairs(lm, pairs, strategy="dola", options={"layer": 1})


def test_texts_end_before_their_until_and_keep_their_order(lm):
    contexts = [list(b"abc"), list(b"x"), list(b"a longer context"), list(b"abc"), list(b"q")]
    free = lm.generate(contexts, max_new_tokens=12).texts
    end = free[2][3]
    writings = [writing({"max_gen_toks": 12, "until": [end] if i % 2 else []}) for i in range(5)]
    found, cut = write_texts(lm, contexts, writings, batch_size=2)
    assert cut == 0
    assert found == [text.split(end)[0] if i % 2 else text for i, text in enumerate(free)]


def test_drawn_texts_do_not_depend_on_the_batches(lm):
    contexts = [list(b"abc")] * 5
    writings = [writing({"max_gen_toks": 12, "do_sample": True, "temperature": 3.0})] * 5
    one, _ = write_texts(lm, contexts, writings, batch_size=2, seed=3)
    two, _ = write_texts(lm, contexts, writings, batch_size=3, seed=3)
    assert one == two and len(set(one)) == 5
    assert write_texts(lm, contexts, writings, batch_size=2, seed=4)[0] != one


def test_long_contexts_are_cut_from_the_left_and_counted(lm):
    long, n = list(b"0123456789" * 6), 12
    found, cut = write_texts(lm, [long, [97]], [writing({"max_gen_toks": n})] * 2)
    assert cut == 1
    assert found[0] == lm.generate([long[-36:]], max_new_tokens=n).texts[0]
    with pytest.raises(ConfigError, match="max_gen_toks=48 leaves no room"):
        write_texts(lm, [long], [writing({"max_gen_toks": 48})])
