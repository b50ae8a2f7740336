import itertools

import jax
import numpy as np
import pytest

from tokjax import struct
from tokjax.decoding import (
    Conditioned,
    Prompts,
    chain,
    count_penalty,
    decode,
    on_tokens,
    repetition_penalty,
    temperature,
)
from tokjax.decoding.contrast import guided, layercake
from tokjax.decoding.search import beam_search, gnmt, power
from tokjax.decoding.transforms.base import Memoryless
from tokjax.errors import ConfigError, DataError
from tokjax.models import EncDecConfig, EncoderDecoder, ModelConfig
from tokjax.models.huggingface import load
from tokjax.training.compiles import CompileWatch

NEW = 8
STOPS = [4, 11, 19, 27, 33, 40, 52]


def reference(logp, prompt, *, beams, groups=1, diversity=0.0, ends=lambda new: False, new=NEW):
    """Beam search with `power(1.0)` in plain Python, without a cache and without stopping early:
    a list of (score, tokens) for each group.
    """
    width = beams // groups
    live = [[(0.0, ())] for _ in range(groups)]
    found = [[] for _ in range(groups)]
    for step in range(1, new + 1):
        taken = np.zeros(len(logp(prompt)))
        for g in range(groups):
            candidates = []
            for score, text in live[g]:
                scores = score + logp([*prompt, *text]) - diversity * taken
                candidates += [(s, (*text, v)) for v, s in enumerate(scores) if np.isfinite(s)]
            candidates.sort(key=lambda c: -c[0])
            found[g] += [
                (score / step, text)
                for score, text in candidates[:width]
                if step == new or ends(text)
            ]
            live[g] = [c for c in candidates if not ends(c[1])][:width]
            for _, text in live[g]:
                taken[text[-1]] += 1
    return [sorted(group, key=lambda c: -c[0])[:width] for group in found]


def check(beams, b, expected):
    assert beams.rows()[b] == [list(text) for _, text in expected]
    np.testing.assert_allclose(beams.scores[b], [score for score, _ in expected], atol=1e-4)


def test_two_beams_find_what_greedy_decoding_misses(table):
    # Token 0 is behind the prompt, 1 and 2 come first, then 3 or 4.
    p = [[0, 0.6, 0.4, 0, 0], [0, 0, 0, 0.55, 0.45], [0, 0, 0, 0.95, 0.05], [1, 0, 0, 0, 0]]
    predictor, params = table([*p, p[-1]])
    for beams, text, probability in ((1, [1, 3], 0.33), (2, [2, 3], 0.38)):
        found = beam_search(
            predictor,
            params,
            Prompts.of([[0]]),
            max_new_tokens=2,
            beams=beams,
            length_penalty=gnmt(0.0),
        )
        assert found.rows()[0][0] == text
        np.testing.assert_allclose(np.exp(found.scores[0, 0]), probability, rtol=1e-5)


def test_length_penalties_are_those_of_the_papers():
    penalty = gnmt(0.6)
    np.testing.assert_allclose(-6 / penalty(5.0), -4.416, atol=5e-4)
    np.testing.assert_allclose(-7 / penalty(10.0), -4.040, atol=5e-4)
    np.testing.assert_allclose(power(2.0)(np.array([1.0, 3.0])), [1, 9])
    np.testing.assert_array_equal(gnmt(0.0)(np.arange(5.0)), np.ones(5))


def test_a_later_group_avoids_what_an_earlier_one_took(table):
    predictor, params = table([[0.5, 0.35, 0.15]] * 3)

    def first(diversity):
        found = beam_search(
            predictor,
            params,
            Prompts.of([[0]]),
            max_new_tokens=1,
            beams=2,
            groups=2,
            diversity=diversity,
        )
        return found.rows()[0], found

    assert first(0.0)[0] == [[0], [0]]
    texts, found = first(0.5)
    assert texts == [[0], [1]]
    # What it costs to be different only chooses; token 1 was not taken before and costs nothing.
    np.testing.assert_allclose(found.scores[0], np.log([0.5, 0.35]), rtol=1e-5)
    # A token already taken can still be the best; its cost stays in the score.
    texts, found = first(0.2)
    assert texts == [[0], [0]]
    np.testing.assert_allclose(found.scores[0], np.log([0.5, 0.5]) - [0, 0.2], rtol=1e-5)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A random Llama of transformers, and the same as ours."""
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        tie_word_embeddings=False,
        initializer_range=0.5,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)

    def generate(rows, **settings):
        """The new tokens and scores, [B, K, N] and [B, K]; filled up with -1."""
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        seen = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        with torch.no_grad():
            found = model.generate(
                ids,
                attention_mask=seen,
                do_sample=False,
                pad_token_id=60,
                eos_token_id=STOPS[:3],
                num_return_sequences=settings["num_beams"],
                return_dict_in_generate=True,
                output_scores=True,
                **settings,
            )
        new = found.sequences[:, longest:].numpy()
        shape = (len(rows), settings["num_beams"])
        return new.reshape(*shape, -1), found.sequences_scores.numpy().reshape(shape)

    return (*load(folder), generate)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_beams_equal_those_of_transformers(llama, early_stopping):
    model, params, generate = llama
    rows = [[5, 9, 2], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]]
    stopped = 0
    for exponent, repetition in ((1.0, 1.0), (0.0, 1.0), (-0.7, 1.3), (2.5, 1.3)):
        theirs, scores = generate(
            rows,
            num_beams=4,
            max_new_tokens=12,
            early_stopping=early_stopping,
            length_penalty=exponent,
            repetition_penalty=repetition,
        )
        found = beam_search(
            model,
            params,
            Prompts.of(rows),
            max_new_tokens=12,
            beams=4,
            length_penalty=power(exponent),
            early_stopping=early_stopping,
            transform=repetition_penalty(repetition),
            stop=on_tokens(STOPS[:3]),
        )
        np.testing.assert_allclose(found.scores, scores, atol=1e-4)
        for b, k in np.ndindex(scores.shape):
            text, filled = found.rows()[b][k], theirs[b, k].tolist()
            assert filled[: len(text)] == text
            assert set(filled[len(text) :]) <= {60}
        stopped += int(found.stopped.sum())
    assert 6 < stopped < 48  # both ways to end were there


def test_the_stop_rule_never_stops_too_early(lm, rows, prompts):
    found = beam_search(
        lm.model,
        lm.params,
        prompts,
        max_new_tokens=NEW,
        beams=3,
        length_penalty=power(1.0),
        stop=on_tokens(STOPS),
    )
    for b, row in enumerate(rows):
        expected = reference(lm.logp, row, beams=3, ends=lambda new: new[-1] in STOPS)
        check(found, b, expected[0])
    assert 0 < int(found.stopped.sum()) < found.stopped.size
    np.testing.assert_allclose(found.scores, found.logprobs.sum(-1) / found.lengths, atol=1e-5)


def test_diverse_groups_equal_the_reference(lm, rows, prompts):
    found = beam_search(
        lm.model,
        lm.params,
        prompts,
        max_new_tokens=NEW,
        beams=4,
        groups=2,
        diversity=0.9,
        length_penalty=power(1.0),
    )
    for b, row in enumerate(rows):
        groups = reference(lm.logp, row, beams=4, groups=2, diversity=0.9)
        check(found, b, sorted([*groups[0], *groups[1]], key=lambda c: -c[0]))
        assert set(groups[0]) != set(groups[1])


def test_groups_without_diversity_are_copies_of_a_narrower_search(table):
    given = table(np.random.default_rng(1).dirichlet(np.ones(7), 7))
    narrow, copies = (
        beam_search(*given, Prompts.of([[0], [5]]), max_new_tokens=NEW, **settings).rows()
        for settings in ({"beams": 2}, {"beams": 4, "groups": 2})
    )
    for one, two in zip(narrow, copies, strict=True):
        assert two == [one[0], one[0], one[1], one[1]]


def test_one_beam_is_greedy_decoding(lm, prompts):
    stop = on_tokens(STOPS)
    greedy = decode(lm.model, lm.params, prompts, max_new_tokens=[5, 8, 3, 7], stop=stop)
    beam = beam_search(
        lm.model,
        lm.params,
        prompts,
        max_new_tokens=[5, 8, 3, 7],
        beams=1,
        stop=stop,
        early_stopping=True,
    )
    assert [found[0] for found in beam.rows()] == greedy.rows()
    np.testing.assert_allclose(beam.logprobs[:, 0], greedy.logprobs, atol=1e-5)
    np.testing.assert_array_equal(beam.stopped[:, 0], greedy.stopped)


def test_a_beam_as_wide_as_the_tree_finds_the_likeliest_texts(table):
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), 3)
    found = beam_search(
        *table(p),
        Prompts.of([[0], [2]]),
        max_new_tokens=3,
        beams=27,
        length_penalty=gnmt(0),
        num_return=5,
    )
    for b, start in enumerate((0, 2)):
        texts = sorted(
            itertools.product(range(3), repeat=3),
            key=lambda t: -(p[start, t[0]] * p[t[0], t[1]] * p[t[1], t[2]]),
        )
        assert found.rows()[b] == [list(t) for t in texts[:5]]


def test_continuations_that_do_not_exist_are_empty(table):
    found = beam_search(*table([[0.7, 0.3]] * 2), Prompts.of([[0]]), max_new_tokens=1, beams=4)
    assert found.rows() == [[[0], [1], [], []]]
    assert np.isneginf(found.scores[0, 2:]).all()
    assert not np.isnan(found.scores).any()


@struct.dataclass
class Falls:
    """Ends a row when its token is lower than the one before it, by all that a stop may read."""

    def __call__(self, context):
        at = context.step - 1
        before = context.generated[:, jax.numpy.maximum(at - 1, 0)]
        logp = jax.nn.log_softmax(context.logits, axis=-1)
        likely = jax.numpy.take_along_axis(logp, context.last[:, None], axis=1)[:, 0]
        consistent = jax.numpy.abs(likely - context.last_logprob) < 1e-4
        return consistent & (at > 0) & (context.last < before)


def test_any_stop_sees_a_candidate_as_if_it_had_been_written(lm, rows, prompts):
    found = beam_search(
        lm.model,
        lm.params,
        prompts,
        max_new_tokens=NEW,
        beams=2,
        length_penalty=power(1.0),
        stop=Falls(),
    )
    for b, row in enumerate(rows):
        ends = lambda new: len(new) > 1 and new[-1] < new[-2]  # noqa: E731
        check(found, b, reference(lm.logp, row, beams=2, ends=ends)[0])


@struct.dataclass
class EndsEven(Memoryless):
    """Ends a row at its second even token: a transform with a state that knows when it is done."""

    def init(self, prompts, vocab_size):
        return jax.numpy.zeros(prompts.lengths.shape, jax.numpy.int32)

    def update(self, logits, state, context):
        assert context.limits.shape == context.last.shape
        return logits, state + ((context.step > 0) & (context.last % 2 == 0))

    def ends(self, state, context):
        return (state + (context.last % 2 == 0)) >= 2


def test_a_transform_may_end_a_continuation(lm, rows, prompts):
    found = beam_search(
        lm.model,
        lm.params,
        prompts,
        max_new_tokens=NEW,
        beams=2,
        length_penalty=power(1.0),
        transform=chain(EndsEven()),
    )
    for b, row in enumerate(rows):
        ends = lambda new: sum(t % 2 == 0 for t in new) >= 2  # noqa: E731
        check(found, b, reference(lm.logp, row, beams=2, ends=ends)[0])


@struct.dataclass
class Force(Memoryless):
    """Leaves each row only the token of a given text."""

    texts: jax.Array

    def update(self, logits, state, context):
        forced = self.texts[:, context.step, None] == jax.numpy.arange(logits.shape[1])
        return jax.numpy.where(forced, logits, -jax.numpy.inf), state


def encoder_decoder():
    decoder = ModelConfig(
        vocab_size=61, d_model=16, n_layers=2, n_heads=2, max_positions=64, cross_attention=True
    )
    encoder = ModelConfig(
        vocab_size=None, d_model=16, n_layers=1, n_heads=2, max_positions=64, causal=False
    )
    model = EncoderDecoder(EncDecConfig(encoder=encoder, decoder=decoder))
    params = jax.tree.map(lambda a: 3 * a, model.init(jax.random.key(3)))
    inputs = np.random.default_rng(0).integers(0, 61, (4, 6)).astype(np.int32)
    return model, Conditioned(params, model.encode(params, inputs))


@pytest.mark.parametrize("name", ["guided", "layercake", "encoder-decoder"])
def test_each_predictors_state_follows_its_beam(lm, rows, prompts, name):
    classes = {
        "punctuation": [[i % 3 == 0 for i in range(len(row))] for row in rows],
        "concept": [[i % 3 == 1 for i in range(len(row))] for row in rows],
    }
    given = {
        "guided": lambda: guided(lm.model, lm.params, weight=[1.5, 2.0, 0.5, 1.2]),
        "layercake": lambda: layercake(
            lm.model, lm.params, **classes, new_concept=np.arange(61) % 2 == 0
        ),
        "encoder-decoder": encoder_decoder,
    }[name]()
    beams = beam_search(*given, prompts, max_new_tokens=NEW, beams=3, transform=count_penalty(0.7))
    # The same predictor is made to write each continuation, as samples of its prompt.
    forced = decode(
        *given,
        prompts,
        max_new_tokens=NEW,
        samples=3,
        transform=Force(beams.tokens.reshape(12, -1)),
    )
    assert forced.rows() == [text for found in beams.rows() for text in found]
    np.testing.assert_allclose(forced.logprobs.reshape(4, 3, -1), beams.logprobs, atol=1e-4)
    assert len({tuple(text) for found in beams.rows() for text in found}) == 12
    # Scores hold what the transform took off for tokens used before.
    for found, scores, logprobs in zip(beams.rows(), beams.scores, beams.logprobs, strict=True):
        for text, score, own in zip(found, scores, logprobs, strict=True):
            used = sum(0.7 * text[:i].count(token) for i, token in enumerate(text))
            np.testing.assert_allclose(
                score, (own.sum() - used) / gnmt()(float(len(text))), atol=1e-4
            )


def test_renormalised_scores_are_log_probabilities_behind_the_transform(table):
    p = np.array([0.5, 0.3, 0.2])
    for renormalize, expected in ((False, 2 * np.log(p)), (True, np.log(p**2 / (p**2).sum()))):
        found = beam_search(
            *table([p] * 3),
            Prompts.of([[0]]),
            max_new_tokens=1,
            beams=3,
            transform=temperature(0.5),
            renormalize=renormalize,
        )
        np.testing.assert_allclose(found.scores[0], expected, rtol=1e-5)
        np.testing.assert_allclose(found.logprobs[0, :, 0], np.log(p), rtol=1e-5)


def test_a_row_finds_alone_what_it_finds_among_others(lm, rows, prompts):
    settings = {"max_new_tokens": NEW, "beams": 4, "groups": 2, "stop": on_tokens(STOPS)}
    together = beam_search(lm.model, lm.params, prompts, diversity=[0.0, 0.5, 1.0, 2.0], **settings)
    for b, diversity in ((1, 0.5), (3, 2.0)):
        alone = beam_search(
            lm.model, lm.params, Prompts.of([rows[b]] * 4), diversity=diversity, **settings
        )
        assert alone.rows() == [together.rows()[b]] * 4
        np.testing.assert_allclose(alone.scores[0], together.scores[b], atol=1e-5)


def test_new_values_compile_nothing(lm, prompts):
    def run(diversity, alpha, ids, limit):
        beam_search(
            lm.model,
            lm.params,
            prompts,
            max_new_tokens=limit,
            beams=4,
            groups=2,
            diversity=diversity,
            length_penalty=gnmt(alpha),
            stop=on_tokens(ids),
            transform=chain(temperature(alpha)),
        ).tokens.block_until_ready()

    run(0.5, 0.6, [1, 2], 6)
    with CompileWatch() as watch:
        run(0, 1, [3], 7)
        run(2.5, np.float64(0.1), [], [3, 1, 8, 2])
        assert watch.count == 0


def test_what_cannot_be_meant_is_refused(lm, prompts):
    def run(prompts=prompts, max_new_tokens=4, **settings):
        beam_search(lm.model, lm.params, prompts, max_new_tokens=max_new_tokens, **settings)

    with CompileWatch() as watch:
        for settings, message in (
            ({"beams": 0}, "groups=1 must divide beams=0, and both be at least 1"),
            ({"beams": 4, "groups": 3}, "groups=3 must divide beams=4"),
            ({"num_return": 5}, "num_return=5 must be 1 to beams=4"),
            ({"early_stopping": "always"}, "early_stopping='always' must be True, False or"),
            ({"early_stopping": 1}, "early_stopping=1 must be True, False or 'never'"),
            ({"diversity": -1.0}, "diversity=-1.0 must be 0 or more"),
            ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
            ({"max_new_tokens": 90}, "lower max_new_tokens"),
        ):
            with pytest.raises(ConfigError, match=message):
                run(**settings)
        with pytest.raises(ConfigError, match="alpha=nan must be a finite number"):
            gnmt(float("nan"))
        with pytest.raises(DataError, match="prompt 0 has id 61"):
            run(Prompts.of([[61]]))
        assert watch.count == 0
