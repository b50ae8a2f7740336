import gzip
import json
import re

import pytest

from tokjax.config import resolve, to_dict
from tokjax.config.describe import field_comments
from tokjax.config.schema import choices
from tokjax.data.config import DataConfig, MixtureEntry
from tokjax.data.encoding import Encoder, token_weights
from tokjax.data.files import expand_files, file_digest
from tokjax.data.reading import SeenKeys, record_error
from tokjax.data.sources import (
    Document,
    JsonlSource,
    ParquetSource,
    Problem,
    SeqioSource,
    StdlibSource,
    TextSource,
    TfdsSource,
    make_key,
    read_documents,
)
from tokjax.data.tokenizers import TokenizerConfig, build_tokenizer
from tokjax.errors import ConfigError, DataError


def jsonl(tmp_path, *records, name="data.jsonl", **settings):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    (tmp_path / name).write_text("".join(line + "\n" for line in lines))
    return JsonlSource(files=(str(tmp_path / name),), **settings)


def only(source):
    (item,) = read_documents(source)
    return item


def problem(source):
    item = only(source)
    assert isinstance(item, Problem), item
    return item


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    return build_tokenizer(TokenizerConfig(name="bytes"), tmp_path_factory.mktemp("cache"))


@pytest.fixture
def encoder(byte_tokenizer):
    return Encoder(byte_tokenizer, (256,), (256,))


# ---- text


def test_a_file_is_one_document_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\ntwo \xc3\xa9\n")
    document = only(TextSource(files=(str(tmp_path / "a.txt"),)))
    assert document.text == "one\r\n\ntwo é\n"
    assert document.name == str(tmp_path / "a.txt")
    assert document.weights is None


def test_lines_and_paragraphs_carry_their_first_line_number(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n \n\nthree\n  four\n")
    files = (str(tmp_path / "a.txt"),)
    lines = list(read_documents(TextSource(files=files, per="line")))
    assert [d.text for d in lines] == ["one", "two", "three", "  four"]
    assert [d.name.rpartition(":")[2] for d in lines] == ["1", "2", "6", "7"]
    paragraphs = list(read_documents(TextSource(files=files, per="paragraph")))
    assert [d.text for d in paragraphs] == ["one\r\ntwo", "three\n  four"]
    assert [d.name.rpartition(":")[2] for d in paragraphs] == ["1", "6"]


def test_gzip_is_read_and_a_torn_one_is_an_error(tmp_path):
    data = gzip.compress(b"one\ntwo\n" * 1000)
    (tmp_path / "a.txt.gz").write_bytes(data)
    source = TextSource(files=(str(tmp_path / "a.txt.gz"),), per="line")
    assert [d.text for d in read_documents(source)] == ["one", "two"] * 1000
    for broken in (data[:-9], b"one\ntwo\n"):
        (tmp_path / "a.txt.gz").write_bytes(broken)
        with pytest.raises(DataError, match=r"cannot read .*a\.txt\.gz"):
            list(read_documents(source))


@pytest.mark.parametrize(("per", "line"), [("file", 3), ("line", 3), ("paragraph", 3)])
def test_invalid_utf8_is_named_by_its_line(tmp_path, per, line):
    (tmp_path / "a.txt").write_bytes(b"good\n\nbad \xff\n\ngood\n")
    items = list(read_documents(TextSource(files=(str(tmp_path / "a.txt"),), per=per)))
    (bad,) = [item for item in items if isinstance(item, Problem)]
    assert bad.reason == "invalid UTF-8"
    assert f"0xff in line {line}" in bad.detail
    assert len(items) == (1 if per == "file" else 3)


def test_content_that_is_not_what_the_name_says_is_told_with_its_remedy(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b'{"text": "a"}'))
    bad = problem(JsonlSource(files=(str(tmp_path / "a.jsonl"),)))
    assert "its name must end in .gz" in bad.detail
    (tmp_path / "a.parquet").write_bytes(b"no Parquet at all")
    with pytest.raises(DataError, match=r"[^.]\. Fetch or write it again\.$"):
        list(read_documents(ParquetSource(files=(str(tmp_path / "a.parquet"),))))


@pytest.mark.parametrize("per", ["file", "line", "paragraph"])
def test_a_file_without_records_is_a_problem(tmp_path, per):
    (tmp_path / "a.txt").write_text(" \n\n")
    bad = problem(TextSource(files=(str(tmp_path / "a.txt"),), per=per))
    assert (bad.name, bad.reason) == (str(tmp_path / "a.txt"), "no records in the file")


# ---- files


def test_patterns_expand_in_order_and_once(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", "odd[1].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = expand_files([f"{tmp_path}/b.txt", f"{tmp_path}/*.txt", f"{tmp_path}/**/c.txt"])
    assert [f.removeprefix(f"{tmp_path}/") for f in found] == [
        "b.txt",
        "a.txt",
        "odd[1].txt",
        "sub/c.txt",
    ]
    assert expand_files([f"{tmp_path}/odd[1].txt"]) == [f"{tmp_path}/odd[1].txt"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("trian.txt", r"no file .*trian\.txt.*Did you mean 'train\.txt'"),
        ("*.jsonl", r"matches no file .*looked from"),
        ("none/x.txt", r"no file .*none does not exist"),
        ("", r"is a folder; write .*\*"),
    ],
)
def test_a_missing_file_is_an_error_with_a_remedy(tmp_path, pattern, message):
    (tmp_path / "train.txt").write_text("x")
    with pytest.raises(ConfigError, match=message):
        expand_files([f"{tmp_path}/{pattern}"])


def test_a_pipe_is_refused_since_it_can_be_read_only_once():
    with pytest.raises(ConfigError, match="/dev/null is a pipe or device"):
        expand_files(["/dev/null"])


def test_the_digest_of_a_large_file_is_remembered_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr("tokjax.data.files._REMEMBER_FROM", 3)
    file = tmp_path / "a"
    file.write_text("abc")
    first = file_digest(str(file), tmp_path / "cache")
    (memory,) = (tmp_path / "cache" / "digests").iterdir()
    facts = json.loads(memory.read_text())
    memory.write_text(json.dumps({**facts, "sha256": "remembered"}))
    assert file_digest(str(file), tmp_path / "cache") == "remembered"
    file.write_text("abd")
    assert file_digest(str(file), tmp_path / "cache") not in (first, "remembered")
    memory.write_text("torn")
    file.write_text("abc")
    assert file_digest(str(file), tmp_path / "cache") == first


# ---- records


def test_the_key_of_a_record_is_its_own(tmp_path):
    records = [{"text": "a"}, {"text": "b", "id": 7}, {"text": "c", "id": "7"}]
    forward = {d.text: d.key for d in read_documents(jsonl(tmp_path, *records))}
    backward = jsonl(tmp_path, *records[::-1], {"text": "d"}, name="other.jsonl")
    again = {d.text: d.key for d in read_documents(backward)}
    assert forward == {text: again[text] for text in forward}
    assert len(set(again.values())) == 4
    assert make_key("jsonl/text", "a") == forward["a"]
    changed = only(jsonl(tmp_path, {"text": "new words", "id": 7}))
    assert changed.key == forward["b"]
    unnamed = only(jsonl(tmp_path, {"text": "b", "id": 7}, id=""))
    assert unnamed.key == make_key("jsonl/text", "b")


def test_weights_do_not_change_the_key(tmp_path):
    plain = only(jsonl(tmp_path, {"text": "abc"}))
    weighted = only(jsonl(tmp_path, {"text": "abc", "weights": [[0, 1, 0.5]]}))
    assert plain.key == weighted.key
    assert plain.weights is None
    assert weighted.weights == ((0, 3, 1.0), (0, 1, 0.5))
    assert weighted.end_weight == 1.0


def test_a_response_carries_the_weight(tmp_path, encoder):
    source = jsonl(
        tmp_path,
        {"q": "ab", "a": "cd", "topic": "T"},
        kind="response",
        prompt="q",
        response="a",
        template="{topic}: {prompt} {{x}} {response}!",
    )
    (example,) = encoder.encode([only(source)])
    text = "T: ab {x} cd!"
    assert bytes(example.tokens[1:-1].tolist()).decode() == text
    start = 1 + text.index("cd")
    expected = [0.0] * len(example.tokens)
    expected[start] = expected[start + 1] = expected[-1] = 1.0
    assert example.weights.tolist() == expected
    assert example.num_bytes == len(text)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([[0, 1, 0.25]], [0, 0, 0, 0.25, 1, 1]),
        ([[1, 2, 0.5]], [0, 0, 0, 1, 0.5, 0.5]),
        ([[1, 2, -2], [0.0, 1.0, 0]], [0, 0, 0, 0, -2, -2]),
        ([], [0, 0, 0, 1, 1, 1]),
    ],
)
def test_ranges_of_weights_count_from_the_response(tmp_path, encoder, weights, expected):
    record = {"prompt": "ab", "response": "cd", "weights": weights}
    (example,) = encoder.encode([only(jsonl(tmp_path, record, kind="response"))])
    assert example.weights.tolist() == expected


def test_an_empty_response_still_teaches_to_end(tmp_path, encoder):
    source = jsonl(tmp_path, {"prompt": "ab", "response": ""}, kind="response")
    (example,) = encoder.encode([only(source)])
    assert example.weights.tolist() == [0, 0, 0, 1]


def test_a_token_weighs_what_its_last_character_weighs():
    offsets = [(0, 2), (2, 5), (4, 5), (5, 5), (5, 8)]
    ranges = ((3, 5, 1.0), (4, 5, 0.5))
    assert token_weights(8, ranges, offsets).tolist() == [0, 0.5, 0.5, 0, 0]


BAD = [
    ('{"text": "a"', {}, "broken JSON", "column 13"),
    ("[" * 100_000, {}, "broken JSON", "recursion"),
    ('[{"text": "a"}, 5', {}, "broken JSON", "one JSON array"),
    ("[1]", {}, "not an object", r"\[1\]"),
    ('"text"', {}, "not an object", "'text'"),
    ({"txt": "a"}, {}, "field 'text' is missing", "Did you mean 'txt'"),
    ({}, {}, "field 'text' is missing", "empty"),
    ({"text": None}, {}, "field 'text' is null", "^$"),
    ('{"text": "a", "id": 1, "text": "b"}', {}, "a key occurs twice", "'text'"),
    ({"text": 5}, {}, "field 'text' is not text", "5"),
    ({"text": ["a"]}, {}, "field 'text' is not text", "a"),
    ('{"text": "a\\ud800"}', {}, "field 'text' is no valid Unicode", r"U\+D800"),
    ({"text": "a", "id": 1.5}, {}, "the id in 'id' is neither", "id=''"),
    ({"text": "a", "id": True}, {}, "the id in 'id' is neither", "True"),
    ({"prompt": "a"}, {"kind": "response"}, "field 'response' is missing", ""),
    ({"prompt": 1, "response": "b"}, {"kind": "response"}, "field 'prompt' is not text", "1"),
    ({"text": "ab", "weights": 5}, {}, "field 'weights' is no list", "weights=''"),
    ({"text": "ab", "weights": [0.5, [1]]}, {}, "field 'weights' is no list", r"weights\[0\]"),
    ({"text": "ab", "weights": [[0, 1]]}, {}, "field 'weights' is no list", r"\[0, 1\]"),
    ({"text": "ab", "weights": [[0, True, 1]]}, {}, "field 'weights' is no list", "range 0 to"),
    ({"text": "ab", "weights": [[0, 0.5, 1]]}, {}, "field 'weights' is no list", "0.5"),
    ({"text": "ab", "weights": [[0, 3, 1]]}, {}, "a weight's range lies outside", "2 characters"),
    ({"text": "ab", "weights": [[1, 1, 1]]}, {}, "a weight's range lies outside", "1 to 1"),
    ({"text": "ab", "weights": [[0, 1, "x"]]}, {}, "a weight is no number", "'x'"),
    ('{"text": "ab", "weights": [[0, 1, NaN]]}', {}, "a weight is not finite", "nan"),
    ({"text": "ab", "weights": [[0, 1, 1e39]]}, {}, "a weight is not finite", "1e.39"),
    ({"text": "ab", "weights": [[0, 1, 10**400]]}, {}, "a weight is not finite", "100"),
    ({"text": "abc", "weights": [[0, 2, 1], [1, 3, 1]]}, {}, "ranges of weights overlap", "0 to 2"),
    ({"messages": "hi"}, {"kind": "messages"}, "field 'messages' is no list", "hi"),
    ({"messages": []}, {"kind": "messages"}, "field 'messages' is no list", ""),
    ({"messages": ["hi"]}, {"kind": "messages"}, "a message is not an object", r"messages\[0\]"),
    (
        {"messages": [{"role": "assistant", "content": "x", "weight": "1"}]},
        {"kind": "messages"},
        "a weight is no number",
        r"messages\[0\].weight",
    ),
]


@pytest.mark.parametrize(("record", "settings", "reason", "detail"), BAD)
def test_a_bad_record_is_named_with_place_and_reason(tmp_path, record, settings, reason, detail):
    item = problem(jsonl(tmp_path, record, **settings))
    assert item.name == f"{tmp_path}/data.jsonl:1"
    assert item.reason.startswith(reason)
    assert re.search(detail, item.detail), item.detail
    assert str(record_error(item)).startswith(f"{item.name}: {item.reason}")


def test_bad_lines_do_not_hide_good_ones(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n\n\xff\n{"text": "b"}')
    items = list(read_documents(JsonlSource(files=(str(tmp_path / "a.jsonl"),))))
    assert [type(item) for item in items] == [Document, Problem, Document]
    assert [item.name.rpartition(":")[2] for item in items] == ["1", "3", "4"]


def test_an_id_may_occur_once(tmp_path):
    source = jsonl(tmp_path, {"text": "a", "id": 1}, {"text": "b", "id": 2}, {"text": "c", "id": 1})
    *_, last = read_documents(source)
    assert isinstance(last, Problem)
    assert last.name.endswith(":3")
    assert "second time" in last.reason


def test_seen_keys_find_what_was_merged(monkeypatch):
    keys = [(7919 * i) % 200_003 + 2**63 for i in range(200_003)]
    seen = SeenKeys()
    assert all(seen.add(key) for key in keys)
    assert len(seen._recent) < len(keys)
    assert not any(seen.add(key) for key in keys[::1000])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: JsonlSource(files=()), "files is empty"),
        (lambda: JsonlSource(files=("a",), template="{prompt}"), r"has \{response\} 0 times"),
        (lambda: JsonlSource(files=("a",), template="{response}{response}"), "2 times"),
        (lambda: JsonlSource(files=("a",), template="{response"), "literal braces"),
        (lambda: JsonlSource(files=("a",), template="{response:>3}"), "nothing else"),
        (lambda: JsonlSource(files=("a",), text=""), "text is empty"),
        (lambda: StdlibSource(parts=()), "parts is empty"),
        (lambda: StdlibSource(validation_share=1.5), "within 0 and 1"),
        (lambda: SeqioSource(task=""), "name of a task"),
        (lambda: SeqioSource(task="t", examples=0), "at least 1"),
        (lambda: TfdsSource(dataset=""), "dataset"),
        (lambda: MixtureEntry(StdlibSource(), rate=0.0), "rate is 0.0"),
        (lambda: MixtureEntry(StdlibSource(), rate=float("nan")), "rate is nan"),
        (lambda: DataConfig(train=()), "no entry"),
        (lambda: DataConfig(seq_len=0), "seq_len is 0"),
        (lambda: DataConfig(batch_size=-1), "batch_size is -1"),
        (lambda: DataConfig(max_tokens=1), "max_tokens is 1"),
        (lambda: DataConfig(seed=-1), "seed is -1"),
        (lambda: DataConfig(evals={"a b": StdlibSource()}), "'a b'"),
    ],
)
def test_impossible_settings_are_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_a_data_section_survives_its_plain_form():
    tree = {
        "train": [
            {"source": {"name": "text", "files": ["a.txt"], "per": "line"}, "rate": 2},
            {"source": {"name": "jsonl", "files": ["a.jsonl"], "kind": "messages"}},
            {"source": {"name": "tfds", "dataset": "x", "split": "train[:1%]"}},
            {"source": {"name": "seqio", "task": "t"}},
            {"source": {"name": "parquet", "files": ["a.parquet"]}},
        ],
        "evals": {"held_out": {"name": "stdlib", "split": "validation"}},
    }
    data = resolve(DataConfig, tree)
    assert data.train[0] == MixtureEntry(TextSource(files=("a.txt",), per="line"), 2.0)
    assert resolve(DataConfig, to_dict(data)) == data
    assert hash(data) == hash(resolve(DataConfig, tree))


def test_every_field_explains_itself():
    for cls in (*choices("source").values(), DataConfig, MixtureEntry):
        comments = field_comments(cls)
        assert all(comments.values()), (cls, comments)
        assert not any("noqa" in comment for comment in comments.values())


# ---- parquet, stdlib, chats


def test_parquet_rows_are_records(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"question": "a", "answer": "b", "other": 1, "weights": None},
        {"question": "c", "answer": "de", "other": 2, "weights": [[0.0, 1.0, 0.5]]},
        {"question": "f", "answer": None, "other": 3, "weights": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    settings = {"kind": "response", "prompt": "question"}
    files = (str(tmp_path / "a.parquet"),)
    first, second, third = read_documents(ParquetSource(files=files, response="answer", **settings))
    assert (first.text, first.name) == ("ab", f"{tmp_path}/a.parquet#0")
    assert second.weights == ((1, 3, 1.0), (1, 2, 0.5))
    assert third.reason == "field 'answer' is null"
    with pytest.raises(ConfigError, match=r"no column 'anwser'.*'answer'"):
        list(read_documents(ParquetSource(files=files, response="anwser", **settings)))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match=r"cannot read .*a\.parquet"):
        list(read_documents(ParquetSource(files=files, response="answer", **settings)))


def test_chats_come_out_of_jsonl_and_parquet_alike(tmp_path, encoder):
    import pyarrow
    import pyarrow.parquet

    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    rows = [{"messages": chat}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    table = only(ParquetSource(files=(str(tmp_path / "a.parquet"),), kind="messages"))
    line = only(jsonl(tmp_path, *rows, kind="messages"))
    assert table.messages == line.messages
    (example,) = encoder.encode([line])
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    assert bytes(example.tokens[1:-1].tolist()).decode() == text
    weighted = "".join(
        chr(t) for t, w in zip(example.tokens[1:-1], example.weights[1:-1], strict=True) if w
    )
    assert weighted == "yo<|im_end|>"
    assert set(example.weights.tolist()) == {0.0, 1.0}
    assert example.weights[-1] == 1.0


def test_messages_weigh_what_they_say(tmp_path, encoder):
    chat = [
        {"role": "user", "content": "Q", "weight": 0.25},
        {"role": "assistant", "content": "bad", "weight": 0},
        {"role": "user", "content": "R"},
        {"role": "assistant", "content": "good", "weight": 2},
    ]
    (example,) = encoder.encode([only(jsonl(tmp_path, {"messages": chat}, kind="messages"))])
    found = {}
    for token, weight in zip(example.tokens[1:-1], example.weights[1:-1], strict=True):
        found[weight] = found.get(weight, "") + chr(token)
    assert found[0.25] == "Q"
    assert found[2.0] == "good<|im_end|>"
    assert set(found) == {0.0, 0.25, 2.0}
    assert example.weights[-1] == 2.0


def test_a_chat_that_cannot_be_rendered_is_a_problem(tmp_path, encoder):
    source = jsonl(tmp_path, {"messages": [{"role": "boss", "content": "x"}]}, kind="messages")
    (item,) = encoder.encode([only(source)])
    assert isinstance(item, Problem)
    assert "'boss'" in item.detail


def test_end_tokens_that_the_template_wrote_are_not_repeated(tmp_path, byte_tokenizer):
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    encoder = Encoder(byte_tokenizer, (256,), (256,), chat_template=template)
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (example,) = encoder.encode([only(jsonl(tmp_path, record, kind="messages"))])
    assert example.tokens.tolist() == [256, 97, 256, 98, 256]
    assert example.weights.tolist() == [0, 0, 0, 1, 1]


def test_the_encoder_refuses_what_is_empty_or_too_long(byte_tokenizer):
    encoder = Encoder(byte_tokenizer, (256,), (256,), max_tokens=5)
    documents = [Document("a", "0" * 16, text) for text in ("abc", "", "abcd", "ab")]
    fits, empty, long, after = encoder.encode(documents)
    assert fits.tokens.tolist() == [256, 97, 98, 99, 256]
    assert fits.weights is None
    assert (empty.reason, long.reason) == ("empty", "too long")
    assert "6 tokens, max_tokens is 5" in long.detail
    assert after.tokens.tolist() == [256, 97, 98, 256]


def test_one_text_that_cannot_be_encoded_spares_the_others(byte_tokenizer):
    documents = [Document("x", "0" * 16, text) for text in ("a", "\ud800", "b")]
    first, bad, last = Encoder(byte_tokenizer).encode(documents)
    assert (first.tokens.tolist(), last.tokens.tolist()) == ([97], [98])
    assert bad.reason == "cannot be encoded"
    assert "D800" in bad.detail


def test_the_splits_of_the_embedded_corpus_share_nothing():
    def names(split):
        return {d.name for d in read_documents(StdlibSource(parts=("topics",), split=split))}

    train, validation, everything = names("train"), names("validation"), names("all")
    assert train
    assert train | validation == everything
    assert not train & validation
