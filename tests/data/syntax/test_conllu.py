import gzip

import pytest

from tokjax.data.syntax.conllu import documents, read_conllu
from tokjax.data.syntax.lexicon import Lexicon
from tokjax.data.syntax.tags import UNIVERSAL
from tokjax.errors import ConfigError, DataError


def line(number, form, upos, misc="_"):
    return "\t".join([number, form, "_", upos, *["_"] * 5, misc])


TEXT = "\n".join(
    [
        "# newdoc id = one",
        "# text = I don't know.",
        line("1", "I", "PRON"),
        line("2-3", "don't", "_"),
        line("2", "do", "AUX"),
        line("3", "n't", "PART"),
        line("3.1", "ghost", "VERB"),
        line("4", "know", "VERB", "SpaceAfter=No"),
        line("5", ".", "PUNCT"),
        "",
        line("1-2", "du", "_"),
        line("1", "de", "ADP"),
        line("2", "le", "DET"),
        line("3", "vin", "NOUN", "Gloss=wine|SpaceAfter=No"),
        "",
        "# newdoc id = two",
        line("1", "Ça", "FOO"),
        "",
    ]
)


@pytest.fixture
def treebank(tmp_path):
    path = tmp_path / "gold.conllu.gz"
    path.write_bytes(gzip.compress(TEXT.encode()))
    return path


def spelled(text, words):
    return [(text[w.start : w.end], UNIVERSAL[w.tags[0][0]]) for w in words]


def test_words_lie_where_their_characters_are(treebank):
    first, second, third = read_conllu(treebank)
    assert first.text == "I don't know." and first.begins and not first.tight
    expected = [("I", "PRON"), ("do", "VERB"), ("n't", "PRT"), ("know", "VERB"), (".", ".")]
    assert spelled(first.text, first.words) == expected
    # Words whose forms are not what is written share its characters.
    assert spelled(second.text, second.words) == [("du", "ADP"), ("du", "DET"), ("vin", "NOUN")]
    assert second.tight and not second.begins
    assert spelled(third.text, third.words) == [("Ça", "X")]


def test_documents_join_their_sentences(treebank):
    found = list(documents([str(treebank)]))
    assert [text for text, _ in found] == ["I don't know. du vin", "Ça"]
    text, words = found[0]
    assert spelled(text, words)[-2:] == [("du", "DET"), ("vin", "NOUN")]


def test_files_that_are_no_treebank_are_named(tmp_path):
    path = tmp_path / "bad.conllu"
    path.write_text("1\tword\n")
    with pytest.raises(DataError, match=r"bad\.conllu:1: 2 columns"):
        list(read_conllu(path))
    path.write_text("# nothing\n")
    with pytest.raises(DataError, match="holds no sentence"):
        list(read_conllu(path))
    path.write_text(line("x", "word", "NOUN") + "\n")
    with pytest.raises(DataError, match="'x' numbers no word"):
        list(read_conllu(path))
    with pytest.raises(ConfigError):
        list(documents([str(tmp_path / "none.conllu")]))


def test_the_lexicon_knows_forms_then_endings(treebank):
    gold = [("the walker walked", [(0, 3, "DET"), (4, 10, "NOUN"), (11, 17, "VERB")])]
    from tokjax.data.syntax.tags import tag_index, tagged

    lexicon = Lexicon((t, [tagged(a, b, tag_index(u) or 0) for a, b, u in ws]) for t, ws in gold)
    said = spelled("The talked, 12 the", lexicon("The talked, 12 the"))
    assert said == [("The", "DET"), ("talked", "VERB"), (",", "."), ("12", "NUM"), ("the", "DET")]


def test_the_lexicon_splits_clitics():
    lexicon = Lexicon([])
    text = "I don't think it's can't-fail"
    words = [text[w.start : w.end] for w in lexicon(text)]
    assert words == ["I", "do", "n't", "think", "it", "'s", "ca", "n't", "-", "fail"]


def test_real_gold_tags_are_read_whole(real_data):
    files = [str(real_data / "ud_english_ewt" / "en_ewt-ud-dev.conllu.gz")]
    sentences = list(read_conllu(files[0]))
    assert len(sentences) == 2001
    text = sentences[0].text
    assert text == "From the AP comes this story :"
    with gzip.open(files[0], "rt", encoding="utf-8") as lines:
        stated = [x.split(" = ", 1)[1].rstrip("\n") for x in lines if x.startswith("# text = ")]
    assert [s.text for s in sentences] == [" ".join(t.split()) for t in stated]


def test_a_lexicon_tags_unseen_text_mostly_right(real_data):
    folder = real_data / "ud_english_ewt"
    lexicon = Lexicon(documents([str(folder / "en_ewt-ud-train.conllu.gz")]))
    mass = total = 0.0
    for text, words in documents([str(folder / "en_ewt-ud-dev.conllu.gz")]):
        for word in words:
            told = dict(lexicon.tags(text[word.start : word.end]))
            mass += told.get(word.tags[0][0], 0.0)
            total += 1
    assert total == pytest.approx(25_150, rel=0.02)
    assert mass / total > 0.8
