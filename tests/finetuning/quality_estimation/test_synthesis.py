"""From pairs to a file of judged translations, with two small translation models."""

import json

import jax
import numpy as np
import pytest

from tokjax.errors import ConfigError, DataError
from tokjax.finetuning.quality_estimation import (
    Judged,
    Pair,
    ReferencedSearch,
    Severity,
    Span,
    Synthesis,
    Translator,
    read_synthetic,
    synthesis,
    write_synthetic,
)
from tokjax.models import EncDecConfig, EncoderDecoder, ModelConfig, Transformer

V, END = 40, 1
SIZE = {"vocab_size": V, "d_model": 32, "n_layers": 1, "n_heads": 2, "max_positions": 64}
# Ranks of a model that knows nothing are anywhere: most edited words would be critical.
BOUNDS = (5, 15, 30)
PAIRS = [
    Pair([20, 21, 2], [30, 31, 32]),
    Pair([22, 2], [33]),
    Pair([23, 24, 25, 26, 2], [34, 30, 35, 30, 36]),
    Pair([27, 2], [37, 38]),
    Pair([28, 29, 2], [39, 38, 37]),
]


def causal(seed):
    model = Transformer(ModelConfig(**SIZE, tie_embeddings=False))
    params = model.init(jax.random.key(seed))
    return Translator(model, {**params, "head": 30 * params["head"]}, END, never=(0,))


def encoder_decoder(seed):
    decoder = ModelConfig(**SIZE, cross_attention=True, tie_embeddings=False)
    encoder = ModelConfig(**SIZE, causal=False)
    model = EncoderDecoder(EncDecConfig(encoder, decoder))
    params = model.init(jax.random.key(seed))
    params["decoder"] = {**params["decoder"], "head": 30 * params["decoder"]["head"]}
    return Translator(model, params, END, start=3, never=(0,))


def words(ids):
    """Words of one or two tokens: an odd id joins the even one before it."""
    found, numbers = [], []
    for i in ids:
        if found and i % 2 and len(found[-1]) == 1:
            found[-1].append(i)
        else:
            found.append([i])
        numbers.append(len(found) - 1)
    return ["-".join(map(str, word)) for word in found], numbers


def chained(words):
    return list(range(len(words)))


@pytest.fixture(scope="module", params=[causal, encoder_decoder], ids=lambda make: make.__name__)
def models(request):
    return request.param(0), request.param(1)


SEARCH = ReferencedSearch(beams=2, model_share=0.4, threshold=0.0, temperature=0.7, more_tokens=4)


def test_attraction_alone_gives_references_without_errors(models):
    drawn = ReferencedSearch(beams=2, model_share=0.0, threshold=0.0)
    made = Synthesis(*models, words, chained, drawn).judged(PAIRS)
    for pair, judged in zip(PAIRS, made, strict=True):
        assert judged is not None and list(judged.hypothesis) == list(pair.reference)
        assert judged.score == 1 and not any(judged.tags) and not judged.spans and judged.end == 0


def test_ranks_are_those_of_the_whole_predictions(models):
    translator = models[1]
    targets = [[30, 31], [33], [5, 6, 7, 8], [9, 9], [10]]
    sources = [pair.source for pair in PAIRS]
    for source, target, ranks in zip(
        sources, targets, translator.ranks(sources, targets), strict=True
    ):
        if translator.start is None:
            ids = np.array([[*source, *target]])
            logits = translator.model(translator.params, ids)[0][0, len(source) - 1 :]
        else:
            inputs, source_ids = np.array([[3, *target]]), np.array([source])
            logits = translator.model(translator.params, source_ids, inputs)[0][0]
        expected = [
            int((row > row[token]).sum())
            for row, token in zip(np.asarray(logits), [*target, END], strict=True)
        ]
        assert ranks.tolist() == expected


def test_edited_words_are_as_bad_as_the_annotator_says(models):
    generator, annotator = models
    pairs = PAIRS[:3]
    hypotheses = [[30, 5, 32], None, [34, 30, 7]]
    found = Synthesis(generator, annotator, words, bounds=BOUNDS).judge(pairs, hypotheses)
    assert found[1] is None
    ranks = annotator.ranks([p.source for p in pairs], [hypotheses[0], [0], hypotheses[2]])
    of = lambda rank: int(np.digitize(rank, BOUNDS))  # noqa: E731
    # The reference's words are 30-31 32, of the third 34 30-35 30 36.
    first, third = found[0], found[2]
    assert first.words == ("30-5", "32")
    assert first.severities == (max(of(ranks[0][0]), of(ranks[0][1])), 0)
    assert first.end == 0  # nothing is missing
    assert third.words == ("34", "30-7") and third.severities[0] == 0
    assert third.end == of(ranks[2][3])
    plain = Synthesis(generator, None, words).judge(pairs, hypotheses)[0]
    assert plain.spans == (Span(0, 1, Severity.MAJOR),) and plain.score == 0.5
    # The tree makes the phrase wider, and no worse.
    widened = Synthesis(generator, None, words, lambda w: [2, 0][: len(w)])
    assert widened.judge(pairs[:1], hypotheses[:1])[0].spans == plain.spans
    unknown = Synthesis(generator, None, words, unknown=frozenset({32}))
    assert unknown.judge(pairs, hypotheses)[0] is None


class Killed(Exception):
    pass


def test_a_file_is_continued_where_it_was_stopped(models, tmp_path, monkeypatch):
    made = Synthesis(*models, words, chained, SEARCH, (1, 10, 30), unknown=frozenset({33}))
    options = {"batch_size": 2, "progress": False}
    whole = tmp_path / "whole.jsonl"
    kept, left_out = write_synthetic(whole, PAIRS, made, **options)
    assert left_out == 1 and kept == 4
    found = read_synthetic(whole)
    assert found == [each for each in made.judged(PAIRS) if each is not None]
    assert all(isinstance(each, Judged) for each in found)
    assert any(any(each.tags) or each.end for each in found)
    record = json.loads(whole.read_text().splitlines()[1])
    assert len(record["tags"]) == len(record["words"])

    stopped, one = tmp_path / "stopped.jsonl", synthesis.Synthesis._one
    left = [3]

    def dying(self, *arguments):
        left[0] -= 1
        if not left[0]:
            raise Killed
        return one(self, *arguments)

    monkeypatch.setattr(synthesis.Synthesis, "_one", dying)
    with pytest.raises(Killed):
        write_synthetic(stopped, PAIRS, made, **options)
    monkeypatch.undo()
    torn = stopped.read_bytes()
    assert 1 < torn.count(b"\n") < 6
    stopped.write_bytes(torn[:-20])  # in the middle of a batch, and of a line
    assert write_synthetic(stopped, PAIRS, made, **options) == (kept, left_out)
    assert stopped.read_bytes() == whole.read_bytes()
    assert write_synthetic(stopped, PAIRS, made, **options) == (kept, left_out)

    other = Synthesis(*models, words, None, SEARCH, (1, 10, 30), unknown=frozenset({33}))
    with pytest.raises(ConfigError, match="phrases=True, not False"):
        write_synthetic(stopped, PAIRS, other, **options)
    with pytest.raises(ConfigError, match="pairs="):
        write_synthetic(stopped, PAIRS[1:], made, **options)
    assert stopped.read_bytes() == whole.read_bytes()


def test_other_files_are_refused(models, tmp_path):
    path, made = tmp_path / "other.jsonl", Synthesis(*models, words)
    path.write_text('{"text": "x"}\n')
    with pytest.raises(DataError, match="no file of judged translations"):
        write_synthetic(path, PAIRS, made, progress=False)
    with pytest.raises(DataError, match="no file of judged translations"):
        read_synthetic(path)
    path.write_text('{"tokjax_quality_estimation": {}}\n{"pair": 0}\n')
    with pytest.raises(DataError, match="line 2 is no judged translation"):
        read_synthetic(path)
    path.write_text("")
    with pytest.raises(DataError, match="is empty"):
        read_synthetic(path)
    with pytest.raises(ConfigError, match="batch_size=0"):
        write_synthetic(path, PAIRS, made, batch_size=0)
    for settings in ({"beams": 0}, {"more_tokens": -1}):
        with pytest.raises(ConfigError, match="must be at least 1, and"):
            ReferencedSearch(**settings)
    with pytest.raises(ConfigError, match="start="):
        Translator(models[0].model, {}, END, None if models[0].start else 3)
