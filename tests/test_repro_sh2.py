"""The invented reports of SH2's reproduction."""

import runpy

import numpy as np
import pytest

from tokjax.reproduction.plan import PLANS


@pytest.fixture(scope="module")
def config():
    return runpy.run_path(str(PLANS / "sh2.py"))


def test_only_the_passage_tells_the_true_name(config):
    rng = np.random.default_rng(0)
    for i in range(200):
        item = config["question"](rng, rival=i % 2 == 1)
        words, first = item["passage"].split(), item["stem"].split()[-1]
        true, *wrong = item["options"]
        if set(item["options"]) & set(config["NOUNS"]):
            assert set(config["LASTS"]) & set(config["NOUNS"]) == {"garden"}
            continue
        assert words[words.index(first) + 1] == true
        assert words.count(true) == 1
        assert len({true, *wrong}) == 4
        assert sum(name in words for name in wrong) == (1 if item["rival"] else 0)
        assert item["names"] <= set(words)


def test_the_vocabulary_covers_every_document_and_the_template(config):
    rng = np.random.default_rng(1)
    words = set(config["WORDS"])
    texts = [config["report"](rng)["text"] for _ in range(300)]
    assert any(text.startswith(config["HEADER"]) for text in texts)
    for text in texts:
        assert set(text.split()) <= words


def test_passages_are_as_long_as_the_claim_is_about(config):
    rng = np.random.default_rng(2)
    lengths = [len(config["question"](rng, False)["passage"].split()) for _ in range(200)]
    assert 60 <= np.mean(lengths) <= 120
