import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.decoding import Prompts, categorical, chain, decode, temperature, top_k
from tokjax.decoding.constrained import (
    choices,
    constrained,
    json_schema,
    match_logprobs,
    matches,
    regex,
)
from tokjax.decoding.engine import _run
from tokjax.decoding.stops import on_tokens
from tokjax.errors import ConfigError
from tokjax.models import ModelConfig, Transformer

pytest.importorskip("outlines_core", reason="the extra 'constrained' is not installed")

V, EOS = 272, 256
MODEL = Transformer(ModelConfig(vocab_size=V, d_model=32, n_layers=1, n_heads=2, max_positions=128))
PROMPTS = Prompts.of([[1, 2, 3], [7], [200, 5]])
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "n": {"type": "integer"}},
    "required": ["name", "n"],
}


@pytest.fixture(scope="module")
def params():
    params = MODEL.init(jax.random.key(3))
    return {**params, "embedding": 20 * params["embedding"]}


def write(params, transform, prompts=PROMPTS, n=32, samples=4, **settings):
    rows = len(prompts.lengths) * samples
    return decode(
        MODEL,
        params,
        prompts,
        max_new_tokens=n,
        samples=samples,
        transform=transform,
        sampler=categorical(),
        seeds=range(rows),
        stop=on_tokens([EOS]),
        **settings,
    )


def texts(generation):
    return [bytes(t for t in row if t < 256).decode() for row in generation.rows()]


def test_every_text_satisfies_its_constraint(params, by_bytes):
    for pattern in ("[0-9]{3}-[a-f]+", "(yes|no)( maybe)*\\.", "[\u3041-\u3093]{1,9}"):
        found = write(params, constrained(regex(pattern, by_bytes)))
        for text in texts(found):
            assert re.fullmatch(pattern, text), text
    found = write(params, constrained(json_schema(SCHEMA, by_bytes)))
    assert len(set(texts(found))) > 6
    for text in texts(found):
        assert set(json.loads(text)) == {"name", "n"}


@pytest.mark.parametrize("n", [16, 17, 25])
def test_texts_are_finished_within_each_rows_limit(params, by_bytes, n):
    automaton = json_schema(SCHEMA, by_bytes)
    assert automaton.shortest == len('{"name":"","n":0}') == 17
    if n < 17:
        with pytest.raises(ConfigError, match="has 17 tokens: raise max_new_tokens=16"):
            write(params, constrained(automaton), n=n)
        with pytest.raises(ConfigError, match=r"prompt 1: .*max_new_tokens=16"):
            write(params, constrained(automaton), n=np.array([20, 16, 20]))
        return
    limits = np.array([n, n + 3, 30])
    found = write(params, constrained(automaton), n=limits)
    assert (np.asarray(found.lengths) <= np.repeat(limits, 4)).all()
    for text in texts(found):
        json.loads(text)


def test_without_finishing_a_text_may_be_cut_off(params, by_bytes):
    automaton = json_schema(SCHEMA, by_bytes)
    found = write(params, constrained(automaton, finish=False), n=17)
    broken = 0
    for row, text in zip(found.rows(), texts_or_parts(found), strict=True):
        assert automaton.run(row) >= 0
        broken += not automaton.matches(row)
        assert text.startswith(b"{")
    assert broken > 0


def texts_or_parts(found):
    return [bytes(t for t in row if t < 256) for row in found.rows()]


def test_a_text_that_cannot_go_on_ends_without_an_eos(params, by_bytes):
    found = write(params, constrained(choices(["ab", "cde"], by_bytes)))
    assert np.asarray(found.stopped).all()
    assert {tuple(row) for row in found.rows()} <= {tuple(b"ab"), tuple(b"cde")}
    longer = write(params, constrained(regex("ab*", by_bytes)))
    for row, stopped in zip(longer.rows(), np.asarray(longer.stopped), strict=True):
        assert (row[-1] == EOS) == stopped


def test_each_row_has_its_own_constraint_or_none(params, by_bytes):
    each = [regex("a{2,4}", by_bytes), None, choices(["x", "yz"], by_bytes)]
    found = write(params, constrained(each), n=32)
    rows = found.rows()
    for row in rows[:4]:
        assert re.fullmatch("a{2,4}", bytes(t for t in row if t < 256).decode())
    assert all(bytes(row) in (b"x", b"yz") for row in rows[8:])
    # The row without one is that of a decode without any.
    free = write(params, chain(), n=32)
    assert rows[4:8] == free.rows()[4:8]
    assert max(max(row) for row in rows[4:8]) > 127
    one = write(params, constrained(each[0]), n=32)
    assert one.rows()[:4] == rows[:4]
    with pytest.raises(ConfigError, match="2 constraints for 3 prompts"):
        write(params, constrained(each[:2]))
    with pytest.raises(ConfigError, match="needs one automaton"):
        constrained([])


def test_other_transforms_act_on_what_is_allowed(params, by_bytes):
    automaton = regex("[a-z]{3}", by_bytes)
    greedy = write(params, chain(constrained(automaton), temperature(0.0)))
    narrow = write(params, chain(constrained(automaton), temperature(2.0), top_k(1)))
    assert narrow.rows() == greedy.rows()


def test_the_constraint_decides_where_all_else_was_excluded(params, by_bytes):
    class Nothing:
        """Leaves one token that the constraint does not allow."""

        def init(self, prompts, vocab_size):
            return ()

        def update(self, logits, state, context):
            return jnp.where(jnp.arange(V) == 5, logits, -jnp.inf), state

    nothing = jax.tree_util.register_static(Nothing)()
    found = write(params, chain(nothing, constrained(regex("[a-c]{9}", by_bytes))))
    for text in texts(found):
        assert re.fullmatch("[a-c]{9}", text)
    assert np.isfinite(np.asarray(found.sampling_logprobs)).all()


def test_a_vocabulary_that_is_not_the_models_is_refused(params, table):
    other = table(*[bytes([97 + i % 26]) * (1 + i // 26) for i in range(V)])
    with pytest.raises(ConfigError, match=f"made for {V + 1} token ids, the model has {V}"):
        write(params, constrained(regex("a+", other)))
    with pytest.raises(ConfigError, match="different vocabularies"):
        constrained([regex("a", other), regex("a", table(b"a"))])


def test_another_constraint_of_its_size_compiles_nothing(params, by_bytes):
    write(params, constrained(regex("[0-9]{3}", by_bytes)))
    before = _run._cache_size()
    write(params, constrained(regex("[a-f]{2}x", by_bytes)))
    assert _run._cache_size() == before


def test_local_masking_distorts_and_weights_correct_it(markov, table):
    """p(a)=.9, p(a|a)=.01, p(a|b)=.9, language {aa, ba}: masking writes aa with .9, truth .0909."""
    letters = table(b"a", b"b", eos=())
    automaton = choices(["aa", "ba"], letters)
    odds = jnp.log(jnp.array([[0.0, 0.9, 0.1], [0.0, 0.01, 0.99], [0.0, 0.9, 0.1]]))
    n = 4000
    found = decode(
        markov(3),
        odds,
        Prompts.of([[0]]),
        max_new_tokens=2,
        samples=n,
        transform=constrained(automaton),
        sampler=categorical(),
        seeds=range(n),
    )
    rows = np.asarray(found.tokens)[:, :2]
    assert {tuple(row) for row in rows} == {(1, 1), (2, 1)}
    is_aa = rows[:, 0] == 1
    assert is_aa.mean() == pytest.approx(0.9, abs=4 * np.sqrt(0.09 / n))
    law = np.exp(np.asarray(found.sampling_logprobs)[:, :2].sum(1))
    np.testing.assert_allclose(law[is_aa], 0.9, atol=1e-6)
    weights = np.exp((np.asarray(found.logprobs) - found.sampling_logprobs)[:, :2].sum(1))
    exact = law * weights  # one of each text: the law's own expectation
    aa, ba = exact[is_aa][0], exact[~is_aa][0]
    assert aa / (aa + ba) == pytest.approx(0.0909, abs=5e-5)
    resampled = np.sum(weights * is_aa) / np.sum(weights)
    assert resampled == pytest.approx(0.0909, abs=0.02)
    np.testing.assert_allclose([aa, ba], [0.009, 0.09], rtol=1e-5)


def test_listed_texts_have_the_models_probabilities(params, by_bytes):
    automaton = choices(["ab", "a"], by_bytes)
    rows = matches(automaton)
    assert rows == [list(b"ab"), [97, EOS]]
    found = match_logprobs(MODEL, params, [1, 2, 3], rows)
    logprobs = jax.nn.log_softmax(MODEL(params, jnp.array([[1, 2, 3, 97]]))[0][0])
    expected = [logprobs[2, 97] + logprobs[3, 98], logprobs[2, 97] + logprobs[3, EOS]]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    with pytest.raises(ConfigError, match="prompt has no tokens"):
        match_logprobs(MODEL, params, [], rows)
    with pytest.raises(ConfigError, match="continuation has no tokens"):
        match_logprobs(MODEL, params, [1], [[], [2]])
