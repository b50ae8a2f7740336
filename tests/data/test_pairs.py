"""Pairs of answers and rated answers, from records to batches."""

import json

import numpy as np
import pytest

from tokjax.config import resolve
from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.data.config import DataConfig
from tokjax.data.encoding import Encoder
from tokjax.data.loader import EvalLoader, Loader, StageSlice
from tokjax.data.prepare import ensure_store
from tokjax.data.records import BadRecord, to_document
from tokjax.data.sources import JsonlSource
from tokjax.data.store import TokenStore
from tokjax.errors import ConfigError, DataError

PAIR = {"prompt": "2+2=", "chosen": "4", "rejected": "five"}


def source(kind, **settings):
    return JsonlSource(files=("x.jsonl",), kind=kind, **settings)


def encoded(record, kind, **settings):
    document = to_document(record, source(kind, **settings), "x:1")
    (example,) = Encoder(ByteTokenizer(), before=(256,), after=(257,)).encode([document])
    return example


def test_a_pair_is_two_sequences_with_weights_of_opposite_sign():
    example = encoded(PAIR, "preference")
    assert example.tokens.tolist() == [256, *b"2+2=4", 257, 256, *b"2+2=five", 257]
    assert example.weights.tolist() == [0] * 5 + [1, 1] + [0] * 5 + [-1] * 5
    assert example.cuts == (7,)


def test_weights_of_a_pair_are_in_two_fields():
    record = {**PAIR, "weights": [[0, 1, 0.5]], "rejected_weights": [[1, 4, 0.25]]}
    example = encoded(record, "preference")
    assert example.weights[5:7].tolist() == [0.5, 0.5]
    assert example.weights[12:].tolist() == [-1, -0.25, -0.25, -0.25, -0.25]


@pytest.mark.parametrize(
    "record",
    [
        {
            "prompt": [{"role": "user", "content": "hi"}],
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        },
        {
            "chosen": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "good"}],
            "rejected": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}],
        },
    ],
    ids=["prompt apart", "whole dialogues"],
)
def test_chats_are_pairs_too(record):
    example = encoded(record, "preference", chat_template="chatml")
    text = bytes(t for t in example.tokens[: example.cuts[0]] if t < 256).decode()
    assert text.startswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\ngood")
    counted = [t for t, w in zip(example.tokens, example.weights, strict=True) if w > 0]
    assert bytes(t for t in counted if t < 256).startswith(b"good")
    counted = [t for t, w in zip(example.tokens, example.weights, strict=True) if w < 0]
    assert bytes(t for t in counted if t < 256).startswith(b"no")


def test_earlier_turns_of_a_dialogue_have_no_weight():
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "and"},
    ]
    ends = [{"role": "assistant", "content": c} for c in ("last", "bad")]
    record = {"chosen": [*turns, ends[0]], "rejected": [*turns, ends[1]]}
    example = encoded(record, "preference", chat_template="chatml")
    counted = bytes(
        t for t, w in zip(example.tokens, example.weights, strict=True) if w > 0 and t < 256
    )
    assert b"first" not in counted and b"last" in counted


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rejected": None}, "'rejected' is null"),
        ({"chosen": 3}, "'chosen' is not text"),
        ({"prompt": None}, "'prompt' is null"),
        ({"chosen": []}, "no list of messages"),
        ({"rejected_weights": [[0, 9, 1]]}, "outside the text"),
    ],
)
def test_a_bad_half_makes_a_bad_pair(change, said):
    with pytest.raises(BadRecord, match=said):
        to_document({**PAIR, **change}, source("preference"), "x:1")


def test_bad_answers_have_negative_weights():
    record = {"prompt": "a", "response": "bc", "label": False, "weights": [[0, 1, 0.5]]}
    bad = encoded(record, "rated")
    assert bad.weights.tolist() == [0, 0, -0.5, -1, -1]
    good = encoded({**record, "label": 1}, "rated")
    assert good.weights.tolist() == [0, 0, 0.5, 1, 1]
    assert bad.key != good.key


def test_rated_chats():
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "zz"}]
    bad = encoded({"messages": messages, "label": False}, "rated", chat_template="chatml")
    assert set(bad.weights.tolist()) == {0.0, -1.0}


@pytest.mark.parametrize("label", ["yes", 2, [True]])
def test_a_label_is_true_or_false(label):
    with pytest.raises(BadRecord, match="not true or false"):
        to_document({"prompt": "a", "response": "b", "label": label}, source("rated"), "x:1")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    records = [
        {"prompt": f"say {'a' * (i % 5)}", "chosen": "x" * (i % 4 + 1), "rejected": "y" * (i % 3)}
        for i in range(12)
    ]
    (folder / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    data = resolve(
        DataConfig,
        {
            "tokenizer": {"name": "bytes"},
            "train": [
                {
                    "source": {
                        "name": "jsonl",
                        "files": (str(folder / "x.jsonl"),),
                        "kind": "preference",
                    }
                }
            ],
        },
    )
    path = ensure_store(data.train[0].source, data, cache_dir=folder, progress=False)
    return TokenStore.open(path, verify=True)


def loaded(store, **changes):
    settings = {"seq_len": 64, "batch_size": 2, "stages": [StageSlice(3)]}
    return Loader([store], rates=None, seed=0, **(settings | changes))


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_both_answers_of_a_pair_are_neighbours_in_one_row(store, packing):
    assert store.has_pairs
    loader, seen = loaded(store, packing=packing, stages=[StageSlice(6)]), set()
    for step in range(6):
        batch = loader.batch(step)
        for b in range(2):
            examples = batch.example_id[b][batch.example_id[b] >= 0]
            assert (examples[0::2] == examples[1::2]).all()
            for s, example in enumerate(examples):
                own = batch.segment_ids[b] == s + 1
                tokens = batch.tokens[b, own]
                cut = store.cut(int(example))
                whole = store.tokens(int(example))
                part = whole[:cut] if s % 2 == 0 else whole[cut:]
                expected = part if s % 2 == 0 else part[:-1]
                np.testing.assert_array_equal(tokens, expected)
                np.testing.assert_array_equal(batch.positions[b, own], np.arange(own.sum()))
                signs = np.sign(batch.weights[b, own])
                assert (signs >= 0).all() if s % 2 == 0 else (signs <= 0).all()
                # The end of the chosen answer has no successor.
                if s % 2 == 0:
                    assert batch.weights[b, own][-1] == 0
                seen.add(int(example))
    assert seen == set(range(12))


def test_every_weighted_target_of_a_pair_is_there(store):
    loader = EvalLoader([store], seq_len=64, batch_size=2)
    total = np.sum([np.abs(loader.batch(i).weights).sum() for i in range(len(loader))])
    assert total == sum(np.abs(store.weights(i)).sum() for i in range(12))


def test_a_pair_longer_than_a_row_is_refused(store):
    with pytest.raises(DataError, match="longer than a row"):
        loaded(store, seq_len=20)


def test_what_would_tear_pairs_apart_is_refused(store):
    with pytest.raises(ConfigError, match="concat"):
        loaded(store, packing="concat")
    with pytest.raises(ConfigError, match="shortens"):
        loaded(store, stages=[StageSlice(3, 4)])


# ---- weights of tokens


@pytest.mark.parametrize(
    ("record", "kind", "expected"),
    [
        (
            {"prompt": "ab", "response": "cd", "weights": [0.5, -2]},
            "response",
            [0, 0, 0, 0.5, -2, -2],
        ),
        ({"text": "abc", "weights": [1, 0, 0.25]}, "text", [0, 1, 0, 0.25, 0.25]),
        (
            {"prompt": "a", "response": "bc", "label": False, "weights": [0.5, 1]},
            "rated",
            [0, 0, -0.5, -1, -1],
        ),
    ],
)
def test_weights_may_be_given_for_each_token(record, kind, expected):
    assert encoded(record, kind).weights.tolist() == expected


def test_weights_of_another_tokenizer_are_refused():
    record = {"prompt": "ab", "response": "cd", "weights": [1.0]}
    document = to_document(record, source("response"), "x:1")
    (problem,) = Encoder(ByteTokenizer()).encode([document])
    assert problem.reason == "weights do not fit the tokens"
    assert "1 weights for 2 tokens" in problem.detail
