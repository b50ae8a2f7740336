import dataclasses
import sys
import types

import numpy as np
import pytest

from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.data.syntax.distributional import context_counts, distributional_classes
from tokjax.data.syntax.sources import Distributional, Tagger, Treebank, tag_counts_file
from tokjax.data.syntax.tag_counts import TagCounts, from_bytes, read_tag_counts, to_bytes
from tokjax.data.syntax.tags import UNIVERSAL
from tokjax.errors import ConfigError, DataError

TOKENIZER = ByteTokenizer()


class Store:
    """Texts as a token store holds them."""

    fingerprint = "a" * 64

    def __init__(self, *texts):
        self.texts = texts
        self.num_examples = len(texts)

    def tokens(self, i):
        return np.array([*TOKENIZER.encode(self.texts[i]), TOKENIZER.eos_id], np.int32)


STORE = Store("ab a", "a")
calls = []


def letters(text):
    """A tagger: a is a noun, b a verb."""
    calls.append(text)
    return [(i, i + 1, {"a": "NOUN", "b": "VERB"}[c]) for i, c in enumerate(text) if c != " "]


def foreign(text):
    return [(0, len(text), "NNS")]


def outside(text):
    return [(0, len(text) + 1, "NOUN")]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Makes the taggers importable by name: pytest need not have put this module there."""
    module = types.ModuleType("taggers_for_tests")
    module.__dict__.update({f.__name__: f for f in (letters, foreign, outside)})
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_a_tagger_counts_the_training_data_once(tmp_path):
    calls.clear()
    source = Tagger("taggers_for_tests:letters")
    path = tag_counts_file(source, TOKENIZER, [STORE], tmp_path, progress=False)
    table = read_tag_counts(path)
    a, b, space = (TOKENIZER.encode(c)[0] for c in "ab ")
    assert table.counts[a, UNIVERSAL.index("NOUN")] == 3
    assert table.counts[b, UNIVERSAL.index("VERB")] == 1
    assert table.counts[space, UNIVERSAL.index("X")] == 1 and table.counts.sum() == 5
    assert np.flatnonzero(table.special).tolist() == [TOKENIZER.eos_id]
    assert table.covered == pytest.approx(3 / 256)
    assert tag_counts_file(source, TOKENIZER, [STORE], tmp_path, progress=False) == path
    assert len(calls) == 2
    path.write_bytes(path.read_bytes()[:-100])  # damaged: made anew
    tag_counts_file(source, TOKENIZER, [STORE], tmp_path, progress=False)
    assert read_tag_counts(path).digest == table.digest and len(calls) == 4
    other = dataclasses.replace(source, version="2")
    assert tag_counts_file(other, TOKENIZER, [STORE], tmp_path, progress=False) != path


def test_taggers_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="module:function"):
        Tagger("nowhere")
    with pytest.raises(DataError, match="neither universal nor UPOS, such as NNS"):
        Tagger("taggers_for_tests:foreign").count(TOKENIZER, [STORE], False)
    with pytest.raises(DataError, match="puts a word at 0:5 of a text of 4"):
        Tagger("taggers_for_tests:outside").count(TOKENIZER, [STORE], False)


def test_a_treebank_counts_its_own_words_or_the_training_data(tmp_path):
    rows = [f"{i}\t{form}\t_\t{tag}" + "\t_" * 6 for i, (form, tag) in enumerate(
        [("a", "NOUN"), ("b", "VERB")], 1)]  # fmt: skip
    path = tmp_path / "gold.conllu"
    path.write_text("\n".join(rows) + "\n\n")
    a, b = (TOKENIZER.encode(c)[0] for c in "ab")
    noun, verb = UNIVERSAL.index("NOUN"), UNIVERSAL.index("VERB")
    own = Treebank((str(path),), of="treebank").count(TOKENIZER, [STORE], False)
    assert own.counts[a, noun] == own.counts[b, verb] == 1
    corpus = Treebank((str(path),)).count(TOKENIZER, [Store("a a b a")], False)
    assert corpus.counts[a, noun] == 3 and corpus.counts[b, verb] == 1
    with pytest.raises(ConfigError, match="needs files"):
        Treebank()
    with pytest.raises(ConfigError, match="corpus"):
        Treebank((str(path),), of="corps")  # type: ignore[arg-type]


def test_contexts_are_counted_on_both_sides_and_not_across_ends():
    found = context_counts([np.array([0, 1, 2]), np.array([1, 0])], 4, np.array([0, 1]))
    # columns: left 0, left 1, right 0, right 1
    expected = [[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert found.tolist() == expected


def sentences(n, seed=0):
    """Determiner, noun, verb, full stop: Zipfian words of four classes."""
    rng = np.random.default_rng(seed)
    ranks = 1 / np.arange(1, 21)
    draw = lambda start: start + rng.choice(20, n, p=ranks / ranks.sum())  # noqa: E731
    return np.stack([draw(0) % 4, draw(20), draw(40), np.full(n, 60)], -1)


def test_classes_are_the_parts_of_speech_of_a_simple_language():
    ids = sentences(4000)
    counts = np.bincount(ids.ravel(), minlength=62)
    contexts = context_counts(ids, 62, np.argsort(-counts)[:20])
    own = distributional_classes(contexts, counts, classes=4, min_count=5)
    for words in (range(4), range(20, 40), range(40, 60)):
        assert len({int(own[w]) for w in words if counts[w] >= 5}) == 1
    assert len({int(own[w]) for w in (0, 20, 40, 60)}) == 4
    assert own[61] == -1  # never seen
    again = distributional_classes(contexts, counts, classes=4, min_count=5)
    assert (own == again).all()


def test_distributional_tags_count_occurrences_in_the_column_of_the_class():
    table = Distributional(classes=2, min_count=1).count(TOKENIZER, [Store("abab", "baba")], False)
    a, b = (TOKENIZER.encode(c)[0] for c in "ab")
    assert table.counts.sum() == 8 and table.counts[a].sum() == table.counts[b].sum() == 4
    assert not table.counts[TOKENIZER.eos_id].any()
    with pytest.raises(DataError, match="lower it"):
        Distributional(min_count=99).count(TOKENIZER, [STORE], False)


def test_tables_are_checked_when_they_are_read(tmp_path):
    table = TagCounts(np.ones((2, 1)), ("N",), np.array([True, False]))
    data = to_bytes(table)
    assert from_bytes(data, "x").digest == table.digest
    with pytest.raises(DataError, match="damaged"):
        from_bytes(data[:40], "x")
    with pytest.raises(DataError, match="no counts of tags in"):
        read_tag_counts(tmp_path / "none.npz")
    with pytest.raises(DataError, match="finite and not negative"):
        TagCounts(-np.ones((2, 1)), ("N",), np.array([True, False]))
