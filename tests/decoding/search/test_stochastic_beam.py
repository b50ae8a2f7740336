import itertools

import numpy as np
import pytest

from tokjax.decoding import Prompts, on_tokens, temperature
from tokjax.decoding.search import stochastic_beam_search
from tokjax.errors import ConfigError
from tokjax.training.compiles import CompileWatch

P = np.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.7, 0.1, 0.2]])
MANY = 6000


def texts():
    """Every text of up to two tokens behind token 0 where 2 is the end, with its probability."""
    found = {(2,): P[0, 2]}
    for a, b in itertools.product((0, 1), range(3)):
        found[a, b] = P[0, a] * P[a, b]
    return found


@pytest.fixture(scope="module")
def drawn(table):
    return stochastic_beam_search(
        *table(P),
        Prompts.of([[0]] * MANY),
        max_new_tokens=2,
        beams=3,
        seeds=range(MANY),
        stop=on_tokens([2]),
    )


def near(counts, expected, total):
    """Counts within five standard deviations of what is expected."""
    for text, p in expected.items():
        assert abs(counts.get(text, 0) / total - p) < 5 * np.sqrt(p * (1 - p) / total)


def test_texts_are_drawn_without_replacement(drawn):
    probabilities = texts()
    assert sum(probabilities.values()) == pytest.approx(1)
    pairs, firsts = {}, {}
    for found in drawn.rows():
        one, two, three = (tuple(text) for text in found)
        assert len({one, two, three}) == 3
        firsts[one] = firsts.get(one, 0) + 1
        pairs[one, two] = pairs.get((one, two), 0) + 1
    near(firsts, probabilities, MANY)
    expected = {
        (a, b): p * q / (1 - p)
        for (a, p), (b, q) in itertools.permutations(probabilities.items(), 2)
    }
    near(pairs, expected, MANY)


def test_logprobs_are_those_of_the_texts(drawn):
    probabilities = texts()
    for found, logprobs, stopped in zip(
        drawn.rows()[:50], drawn.logprobs, drawn.stopped, strict=False
    ):
        expected = [np.log(probabilities[tuple(text)]) for text in found]
        np.testing.assert_allclose(logprobs, expected, atol=1e-5)
        assert stopped.tolist() == [text[-1] == 2 for text in found]
    assert (np.diff(drawn.perturbed, axis=1) <= 0).all()


def test_weighted_sums_are_unbiased(drawn):
    weights = np.asarray(drawn.importance_weights(), np.float64)
    lengths = np.asarray(drawn.lengths)[:, :-1]
    for values, truth in (
        (np.ones_like(weights), 1.0),
        (lengths, sum(p * len(text) for text, p in texts().items())),
    ):
        sums = (weights * values).sum(1)
        assert abs(sums.mean() - truth) < 5 * sums.std() / np.sqrt(MANY)


def test_more_beams_than_texts_find_them_all(table):
    found = stochastic_beam_search(
        *table(P), Prompts.of([[0]]), max_new_tokens=2, beams=9, seeds=[7], stop=on_tokens([2])
    )
    rows = [tuple(text) for text in found.rows()[0]]
    assert set(rows[:7]) == set(texts()) and rows[7:] == [(), ()]
    np.testing.assert_allclose(np.exp(found.logprobs[0]).sum(), 1, rtol=1e-5)
    assert np.isneginf(found.perturbed[0, 7:]).all()
    np.testing.assert_allclose(found.importance_weights().sum(), 1, rtol=1e-5)


def test_a_rows_draw_depends_on_its_seed_alone_and_states_follow(lm, rows, prompts):
    settings = {"max_new_tokens": 6, "beams": 3, "transform": temperature(1.5)}
    together = stochastic_beam_search(lm.model, lm.params, prompts, seeds=[1, 2, 3, 4], **settings)
    alone = stochastic_beam_search(
        lm.model, lm.params, Prompts.of([rows[2]] * 4), seeds=[3] * 4, **settings
    )
    assert alone.rows() == [together.rows()[2]] * 4
    for row, found, logprobs in zip(rows, together.rows(), together.logprobs, strict=True):
        for text, logprob in zip(found, logprobs, strict=True):
            logits = lm.run([*row, *text])[0][len(row) - 1 : -1] / 1.5
            logits -= np.log(np.exp(logits - logits.max()).sum(-1, keepdims=True)) + logits.max()
            np.testing.assert_allclose(logits[np.arange(6), text].sum(), logprob, atol=1e-3)


def test_new_values_compile_nothing_and_nonsense_is_refused(lm, prompts):
    def run(**settings):
        given = {"max_new_tokens": 6, "beams": 3, "seeds": [1, 2, 3, 4], **settings}
        stochastic_beam_search(lm.model, lm.params, prompts, **given).tokens.block_until_ready()

    run(transform=temperature(1.5))
    with CompileWatch() as watch:
        run(transform=temperature(0.5), seeds=[5, 5, 5, 5], max_new_tokens=[1, 2, 3, 4])
        with pytest.raises(ConfigError, match="beams=0 must be at least 1"):
            run(beams=0)
        with pytest.raises(ConfigError, match="seeds must be 4 integers"):
            run(seeds=[1])
        with pytest.raises(ConfigError, match="seeds must be 0 to"):
            run(seeds=[1, 2, 3, -4])
        assert watch.count == 0
