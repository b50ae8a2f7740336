import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.data.huggingface_tokenizer import HuggingFaceTokenizer
from tokjax.decoding.streaming import Streamed
from tokjax.decoding.text import continuation
from tokjax.decoding.text_stream import TextStream, cut, pieces

BYTES = ByteTokenizer()


def streamed(tokenizer, prompt, new, ends=()):
    """The pieces, each after its token."""
    stream = TextStream(tokenizer, prompt, ends)
    return [stream.push(t, done=i == len(new) - 1) for i, t in enumerate(new)]


@given(
    st.lists(st.sampled_from([*b"ab!. ", 0xE6, 0x97, 0xA5, 0xF0, 0xC3, 0xFF, 256]), min_size=1),
    st.lists(st.sampled_from([*b"a", 0xE6, 0x97, 0xF0, 256]), max_size=4),
    st.sampled_from([(), ("!",), ("ab", "b!a"), ("aab", "\u65e5")]),
)
@settings(max_examples=400, deadline=None)
def test_pieces_together_are_the_finished_text(new, prompt, ends):
    found = streamed(BYTES, prompt, new, ends)
    assert "".join(found) == cut(continuation(BYTES, prompt, new), ends)


def test_a_character_comes_when_it_is_whole():
    found = streamed(BYTES, [97], list("x\u65e5\U0001f600!".encode()))
    assert found == ["x", "", "", "\u65e5", "", "", "", "\U0001f600", "!"]
    assert streamed(BYTES, [97], [0xE6, 0x97]) == ["", "\ufffd"]  # it never came


def test_what_may_begin_an_end_is_held_back_until_it_is_none():
    assert streamed(BYTES, [97], list(b"xENxEND"), ["END"]) == ["x", "", "", "ENx", "", "", ""]
    assert streamed(BYTES, [97], list(b"xEN"), ["END"]) == ["x", "", "EN"]
    assert streamed(BYTES, [97], list(b"aab"), ["ab", "abc"]) == ["", "a", ""]


def test_a_tokenizer_that_joins_words_by_rules_gives_all_at_the_end():
    words = {w: i for i, w in enumerate(["[UNK]", "hello", "##s", "you", "don", "'", "t", "a"])}
    spec = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": None,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "vocab": words,
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
        },
    }
    tokenizer = HuggingFaceTokenizer(json.loads(json.dumps(spec)), title="words", allow_lossy=True)
    assert not tokenizer.decodes_by_bytes and BYTES.decodes_by_bytes
    new = [1, 2, 4, 5, 6]
    found = streamed(tokenizer, [3], new)
    assert found[:-1] == [""] * 4
    assert found[-1] == continuation(tokenizer, [3], new)


def step(n, token, done):
    return Streamed(n, [token], [True], [done])


def test_a_reader_that_leaves_ends_the_decode():
    ended = []

    def decode(stream):
        try:
            for n in range(10**6):
                stream(step(n, 97, False))
        finally:
            ended.append(n)

    found = pieces(decode, [TextStream(BYTES, [97])])
    assert next(found) == (0, "a")
    found.close()
    assert ended[0] < 10**6 - 1


def test_an_error_of_the_decode_is_the_readers():
    def decode(stream):
        stream(step(0, 97, False))
        raise ValueError("of the decode")

    found = pieces(decode, [TextStream(BYTES, [97])])
    assert next(found) == (0, "a")
    with pytest.raises(ValueError, match="of the decode"):
        next(found)
