"""Rows to be copied: answers, splits, and what they become as documents."""

import pytest

from tokjax.data.copying import CopySource, copies
from tokjax.data.sources import Document, read_documents
from tokjax.errors import ConfigError


def test_answers_are_the_row_backwards_or_as_it_stands():
    found = list(copies(CopySource(examples=50, length=9, kinds=12)))
    assert len(found) == 50 and all(answer == text[::-1] for text, answer in found)
    assert {len(text) for text, _ in found} == {9}
    assert set("".join(text for text, _ in found)) == set("0123456789ab")
    assert all(a == t for t, a in copies(CopySource(examples=5, reverse=False)))


def test_none_occurs_twice_and_the_splits_share_none():
    parts = {
        split: [t for t, _ in copies(CopySource(length=3, kinds=3, split=split))]
        for split in ("train", "validation", "all")
    }
    assert all(len(set(part)) == len(part) for part in parts.values())
    assert not set(parts["train"]) & set(parts["validation"])
    assert set(parts["train"]) | set(parts["validation"]) == set(parts["all"])
    assert len(parts["all"]) == 27


def test_the_answer_alone_has_weight():
    document = next(iter(read_documents(CopySource(length=4))))
    assert isinstance(document, Document)
    assert document.weights == ((4, 8, 1.0),) and document.text[4:] == document.text[3::-1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"length": 0}, "length=0"),
        ({"kinds": 1}, "kinds=1"),
        ({"kinds": 63}, "kinds=63"),
        ({"validation_share": 2}, "validation_share"),
    ],
)
def test_impossible_settings_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        CopySource(**settings)
