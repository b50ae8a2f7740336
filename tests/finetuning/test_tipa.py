import gzip
import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.data.tokenizers import TokenizerConfig, read_tokenizer
from tokjax.errors import ConfigError, DataError
from tokjax.finetuning.tipa import (
    character_map,
    mixed,
    sentence_samples,
    text_of_map,
    token_samples,
    tokens_of,
    vocabulary_texts,
    write_chats,
)


@pytest.fixture(scope="module")
def pythia(real_data, tmp_path_factory):
    """A byte-level BPE of some 50,000 tokens, most of which begin with a space."""
    file = tmp_path_factory.mktemp("pythia") / "tokenizer.json"
    packed = (real_data / "tokenizers/pythia_20B_tokenizer.json.gz").read_bytes()
    file.write_bytes(gzip.decompress(packed))
    return read_tokenizer(TokenizerConfig(name="huggingface", path=str(file)))


def test_maps_list_characters_in_the_stated_order():
    assert character_map("hello") == '{"5":"o","4":"l","3":"l","2":"e","1":"h"}'
    assert character_map("hello", "forward") == '{"1":"h","2":"e","3":"l","4":"l","5":"o"}'
    assert character_map("\u4f60\u597d") == '{"2":"\u597d","1":"\u4f60"}'
    assert character_map("x") == '{"1":"x"}'


@given(st.text(min_size=1, max_size=40), st.sampled_from(["reverse", "forward"]))
def test_a_map_is_the_text_again(text, order):
    answer = character_map(text, order)
    assert text_of_map(answer) == text
    keys = list(json.loads(answer))
    assert (keys[0] == str(len(text))) or order == "forward"
    assert json.loads(answer) == json.loads(character_map(text))


@pytest.mark.parametrize("answer", ["[]", "{", '{"1":"a","3":"b"}', '{"x":"a"}', "null"])
def test_what_is_no_map_is_refused(answer):
    with pytest.raises(DataError):
        text_of_map(answer)


def test_bytes_that_are_no_character_and_blanks_are_left_out():
    tokenizer = ByteTokenizer()
    found = vocabulary_texts(tokenizer)
    assert found.broken == 128  # half of the bytes begin or continue a longer character
    assert "a" in found.kept and " " not in found.kept and "\n" not in found.kept
    counted = found.special + found.broken + found.blank + found.repeated + found.divided
    assert counted + len(found.kept) == tokenizer.vocab_size


def test_every_kept_token_of_a_real_vocabulary_comes_back(pythia):
    found = vocabulary_texts(pythia)
    assert len(found.kept) > 45_000
    assert " hello" in found.kept and "hello" in found.kept
    for text in found.kept[::97]:
        assert text_of_map(character_map(text)) == text
        assert len(pythia.encode(text)) == 1
    counted = found.special + found.broken + found.blank + found.repeated + found.divided
    assert counted + len(found.kept) == pythia.vocab_size


def test_stripped_words_are_counted_once_and_often_divided(pythia):
    whole, stripped = vocabulary_texts(pythia), vocabulary_texts(pythia, strip=True)
    assert stripped.repeated > whole.repeated + 5_000
    assert stripped.divided > whole.divided
    assert all(text == text.strip() for text in stripped.kept)


def test_pruning_keeps_the_tokens_of_the_task(pythia):
    texts = ["The quick brown fox", "jumps over the lazy dog"]
    ids = tokens_of(pythia, texts)
    kept = vocabulary_texts(pythia, ids).kept
    assert set(kept) == {pythia.token_bytes(i).decode() for i in ids}
    every = vocabulary_texts(pythia, range(pythia.vocab_size))
    assert every == vocabulary_texts(pythia)


def test_a_sample_is_a_chat_whose_answer_is_the_map():
    (sample,) = token_samples(["\u6211\u4eec"])
    roles = [message["role"] for message in sample["messages"]]
    assert roles == ["system", "user", "assistant"]
    assert sample["messages"][1]["content"] == "\u6211\u4eec"
    assert sample["messages"][2]["content"] == '{"2":"\u4eec","1":"\u6211"}'
    assert '{"5":"o"' in sample["messages"][0]["content"]


def test_sentences_are_cut_within_the_stated_lengths():
    sentences = ["".join(chr(97 + (i + j) % 26) for j in range(200)) for i in range(50)]
    samples = sentence_samples([*sentences, "short", " "], share=0.5)
    assert len(samples) == 25
    for sample in samples:
        text, answer = (sample["messages"][i]["content"] for i in (1, 2))
        assert 80 <= len(text) <= 120 or text == "short"
        keys = [int(key) for key in json.loads(answer)]
        assert keys == list(range(len(text), 0, -1))
    assert samples == sentence_samples([*sentences, "short", " "], share=0.5)
    assert samples != sentence_samples([*sentences, "short", " "], share=0.5, seed=1)


@pytest.mark.parametrize("settings", [{"share": 0}, {"share": 1.1}, {"shortest": 9, "longest": 8}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError):
        sentence_samples(["abc"], **settings)


def test_mixtures_hold_every_sample_once(tmp_path):
    parts = token_samples(["a", "b"]), token_samples(["c"]) * 2
    found = mixed(*parts, seed=3)
    count = lambda samples: Counter(json.dumps(s) for s in samples)  # noqa: E731
    assert count(found) == count([*parts[0], *parts[1]])
    write_chats(tmp_path / "x.jsonl", found)
    lines = (tmp_path / "x.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == found
