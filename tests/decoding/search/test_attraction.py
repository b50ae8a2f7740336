import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.decoding import Prompts, chain, decode, min_new_tokens, on_tokens
from tokjax.decoding.search import attraction, beam_search, power
from tokjax.decoding.search.attraction import Place, attraction_logprobs, moved
from tokjax.errors import ConfigError, DataError
from tokjax.training.compiles import CompileWatch

REFERENCE = [5, 6, 7, 8]
END = 0


def place(pointer, departures):
    return Place(jnp.array([pointer]), jnp.array([departures]))


def pulled(pointer, departures, reference=REFERENCE, temperature=0.2, filling=()):
    ids = jnp.array([[*reference, *filling]])
    where = place(pointer, departures)
    found = attraction_logprobs(where, ids, jnp.array([len(reference)]), 12, temperature)
    return np.exp(np.asarray(found[0], np.float64))


# ---- the attraction of one row


def test_numbers_of_the_attraction():
    ahead = pulled(1, 0)
    np.testing.assert_allclose(ahead[[6, 7, 8]], [0.965940, 0.022717, 0.011344], atol=2e-6)
    assert ahead[[6, 7, 8]].sum() == pytest.approx(1) and ahead[5] == 0
    departed = pulled(2, 1)
    np.testing.assert_allclose(departed[[6, 7, 8]], [0.325658, 0.608410, 0.065932], atol=2e-6)


def test_repeated_tokens_add_up_and_filling_attracts_nothing():
    weights = np.array([1 + 1 / 9, 1 / 4])  # 6 7 6
    expected = np.exp(weights / 0.5) / np.exp(weights / 0.5).sum()
    found = pulled(0, 0, [6, 7, 6], temperature=0.5, filling=[9, 7])
    np.testing.assert_allclose(found[[6, 7]], expected, rtol=1e-5)
    assert found[9] == 0


def walked(tokens, reference, **windows):
    """Pointer and departures behind each token."""
    where, found = place(0, 0), []
    for token in tokens:
        where = moved(
            where,
            jnp.array([reference]),
            jnp.array([len(reference)]),
            jnp.array([token]),
            **windows,
        )
        found.append((int(where.pointer[0]), int(where.departures[0])))
    return found


def test_a_pointer_follows_substitutions():
    long = [5, 6, 7, 8, 9, 10, 0]
    assert walked([5, 1, 7, 8], long) == [(1, 0), (2, 1), (3, 0), (4, 0)]


def test_a_pointer_goes_back_behind_words_too_many():
    long = [5, 6, 7, 8, 9, 10, 0]
    # One word too many: the second departure is the word that was expected one step before.
    assert walked([5, 1, 6, 7], long) == [(1, 0), (2, 1), (2, 0), (3, 0)]
    # Two too many: found two places back, and only with a window of two.
    assert walked([5, 1, 2, 6], long) == [(1, 0), (2, 1), (3, 2), (2, 0)]
    assert walked([5, 1, 2, 6], long, insertions=1)[-1] == (4, 3)
    # A word that was written rightly before is not found again at the first departure.
    assert walked([5, 6, 5], long)[-1] == (3, 1)


def test_a_pointer_goes_on_behind_words_left_out():
    long = [5, 6, 7, 8, 9, 10, 0]
    assert walked([6, 7], long) == [(2, 0), (3, 0)]
    assert walked([8], long) == [(4, 0)]
    assert walked([9], long) == [(1, 1)]  # four are too many
    assert walked([8], long, deletions=2) == [(1, 1)]


def test_a_pointer_stays_at_the_references_end():
    assert walked([1, 2, 3, 4, 1, 0], REFERENCE)[-1] == (3, 6)


# ---- in a search


@pytest.fixture(scope="module")
def references(rows):
    return [[11, 12, END], [3, END], [7, 7, 8, 9, 7, 10, 4, END], [20, 21, 22, 23, 24, END]]


def search(lm, prompts, transform, **more):
    settings = {"max_new_tokens": 12, "beams": 3, "stop": on_tokens([END]), **more}
    return beam_search(lm.model, lm.params, prompts, transform=transform, **settings)


@pytest.mark.parametrize("off", [{"model_share": 1.0}, {"threshold": 1.0}])
def test_without_attraction_it_is_plain_beam_search(lm, prompts, references, off):
    plain = search(lm, prompts, chain())
    found = search(lm, prompts, attraction(references, **off))
    for name in ("tokens", "lengths", "stopped", "scores", "logprobs"):
        np.testing.assert_array_equal(getattr(found, name), getattr(plain, name))
    drawn = search(lm, prompts, attraction(references))
    assert drawn.rows() != plain.rows()


@pytest.mark.parametrize("beams", [1, 3])
def test_attraction_alone_writes_the_reference(lm, prompts, references, beams):
    alone = attraction(references, model_share=0.0, threshold=0.0)
    found = search(lm, prompts, alone, beams=beams)
    assert [row[0] for row in found.rows()] == references
    if beams == 1:
        sampled = decode(
            lm.model,
            lm.params,
            prompts,
            transform=alone,
            stop=on_tokens([END]),
            max_new_tokens=12,
            samples=2,
        )
        assert sampled.rows() == [row for row in references for _ in range(2)]


def by_hand(lm, prompt, reference, beams, new, share, threshold, temperature):
    """The attracted beam search in plain Python; a list of (score, tokens), best first."""

    def logp(text, pointer, departures):
        own = lm.logp([*prompt, *text])
        if not np.exp(own[reference[pointer]]) > threshold:
            return own
        weights = np.zeros(len(own))
        for begin in (pointer, max(pointer - departures, 0)):
            for j in range(begin, len(reference)):
                weights[reference[j]] += 0.5 / (j - begin + 1) ** 2
        pull = np.where(weights > 0, np.exp(weights / temperature), 0)
        return np.log(share * np.exp(own) + (1 - share) * pull / pull.sum())

    live, found = [(0.0, (), 0, 0)], []
    for _ in range(new):
        candidates = []
        for score, text, pointer, departures in live:
            for token, more in enumerate(logp(text, pointer, departures)):
                (ahead,) = walked_from(pointer, departures, token, reference)
                candidates.append((score + more, (*text, token), *ahead))
        candidates.sort(key=lambda c: -c[0])
        found += [(s / len(t), t) for s, t, *_ in candidates[:beams] if t[-1] == END]
        live = [c for c in candidates if c[1][-1] != END][:beams]
    found += [(s / len(t), t) for s, t, *_ in candidates[:beams] if t[-1] != END]
    return sorted(found, key=lambda c: -c[0])[:beams]


def walked_from(pointer, departures, token, reference):
    word = lambda at: reference[at] if 0 <= at < len(reference) else None  # noqa: E731
    if token == word(pointer):
        ahead = (pointer + 1, 0)
    else:
        departures += 1
        back = [k for k in (1, 2, 3) if departures > k and word(pointer - k) == token]
        on = [k for k in (1, 2, 3) if word(pointer + k) == token]
        ahead = (pointer + 1, departures)
        if back:
            ahead = (pointer - back[0] + 1, 0)
        elif on:
            ahead = (pointer + on[0] + 1, 0)
    return [(min(ahead[0], len(reference) - 1), ahead[1])]


def test_the_search_is_that_by_hand_in_ragged_batches(lm, rows, prompts):
    # What the model would write with one token left out, and one added: the pointer is repaired.
    plain = [row[0] for row in search(lm, prompts, chain(), max_new_tokens=6).rows()]
    near = [[*row[:2], 33, *row[3:], END] for row in plain]
    near[0] = [*plain[0][:1], *plain[0][2:], END]
    settings = {"model_share": 0.6, "threshold": 0.02, "temperature": 0.4}
    found = search(
        lm, prompts, attraction(near, **settings), max_new_tokens=6, length_penalty=power(1.0)
    )
    for b, (row, reference) in enumerate(zip(rows, near, strict=True)):
        expected = by_hand(lm, row, reference, 3, 6, 0.6, 0.02, 0.4)
        assert found.rows()[b] == [list(text) for _, text in expected]
        np.testing.assert_allclose(found.scores[b], [s for s, _ in expected], atol=1e-4)


def test_rows_have_their_own_references_and_settings(lm, rows, references, prompts):
    settings = {"model_share": [0.0, 0.3, 1.0, 0.1], "threshold": [0.0, 0.0, 0.5, 0.001]}
    together = search(lm, prompts, attraction(references, **settings)).rows()
    for b in range(len(rows)):
        own = {name: [values[b]] * 4 for name, values in settings.items()}
        copies = Prompts(prompts.tokens[[b] * 4], prompts.lengths[[b] * 4])
        alone = search(lm, copies, attraction([references[b]] * 4, **own)).rows()
        assert alone == [together[b]] * 4


def test_a_new_value_or_reference_compiles_nothing(lm, prompts, references):
    search(lm, prompts, attraction(references))
    with CompileWatch() as watch:
        search(lm, prompts, attraction(references[::-1], model_share=0.7, temperature=0.3))
    assert watch.count == 0


def test_the_end_can_be_kept_from_the_beginning(lm, prompts):
    ends = [[END]] * 4
    first = chain(attraction(ends, model_share=0.1, threshold=0.0), min_new_tokens(1, [END]))
    for row in search(lm, prompts, first).rows():
        assert row[0][0] != END


def test_what_does_not_fit_is_refused(lm, prompts, references):
    with pytest.raises(ConfigError, match="3 references for 4 prompts"):
        search(lm, prompts, attraction(references[:3]))
    with pytest.raises(ConfigError, match="model_share has 2 values for 4"):
        search(lm, prompts, attraction(references, model_share=[0.1, 0.2]))
    with pytest.raises(DataError, match="reference 1 has id 61"):
        search(lm, prompts, attraction([[1], [61], [2], [3]]))
    for settings, message in (
        ({"model_share": 1.5}, "model_share=1.5 must be 0 to 1"),
        ({"threshold": -0.1}, "threshold=-0.1 must be 0 to 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"insertions": -1}, "insertions=-1"),
    ):
        with pytest.raises(ConfigError, match=message):
            attraction(references, **settings)
    for bad, message in (([[1], []], "needs a reference"), ([[-1]], "the id -1")):
        with pytest.raises(ConfigError, match=message):
            attraction(bad)
