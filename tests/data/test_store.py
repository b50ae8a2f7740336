import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.data import store_writer
from tokjax.data.sources import make_key
from tokjax.data.store import StoreWriter, TokenStore
from tokjax.data.store_writer import count_repeats, remove_unfinished
from tokjax.errors import DataError, StorageError

EXAMPLES = [
    ([5, 1, 2], None, "a"),
    ([7], [0.0], "b"),
    ([0, 299, 3, 3], [0.0, 0.5, -1.0, 1.0], "c é"),
    ([5, 1, 2], None, "a"),
]


def write(directory, examples=EXAMPLES, vocab_size=300):
    with StoreWriter(directory, vocab_size=vocab_size, task={"of": "test"}) as writer:
        for tokens, weights, text in examples:
            key = make_key("test", text)
            writer.add(tokens, weights, key=key, name=f"place {text}", num_bytes=len(text))
    return TokenStore.open(directory, verify=True)


def test_everything_written_is_read(tmp_path):
    store = write(tmp_path / "s")
    assert (store.num_examples, store.num_tokens) == (4, 11)
    assert store.lengths.tolist() == [3, 1, 4, 3]
    for i, (tokens, weights, text) in enumerate(EXAMPLES):
        assert store.tokens(i).tolist() == tokens
        assert store.tokens(i).dtype == np.int32
        assert store.weights(i).tolist() == (weights or [1.0] * len(tokens))
        assert store.weights(i).dtype == np.float32
        assert store.example_name(i) == f"place {text}"
    assert (
        store.unigram_counts.tolist()
        == np.bincount([t for tokens, _, _ in EXAMPLES for t in tokens], minlength=300).tolist()
    )
    counts = store.manifest["counts"]
    assert counts["bytes"] == 6
    assert counts["weighted_targets"] == 2 + 0 + 3 + 2
    assert counts["examples_without_weight"] == 1
    assert counts["repeated_examples"] == 1
    assert store.manifest["task"] == {"of": "test"}


def test_ranges_lie_inside_one_example(tmp_path):
    store = write(tmp_path / "s")
    assert store.tokens(2, 1, 3).tolist() == [299, 3]
    assert store.weights(2, 1).tolist() == [0.5, -1.0, 1.0]
    assert store.tokens(0, 3, 3).size == 0
    for call in (
        lambda: store.tokens(2, 1, 5),
        lambda: store.tokens(2, -1),
        lambda: store.weights(4),
        lambda: store.tokens(-1),
        lambda: store.example_key(4),
        lambda: store.example_name(4),
    ):
        with pytest.raises(IndexError):
            call()


def test_what_is_read_can_be_changed_without_changing_the_store(tmp_path):
    store = write(tmp_path / "s")
    for read in (store.tokens, store.weights):
        read(2)[:] = 0
    assert store.tokens(2).tolist() == [0, 299, 3, 3]
    assert store.weights(2).tolist() == [0.0, 0.5, -1.0, 1.0]


def test_equal_keys_are_told_apart_by_their_order(tmp_path):
    store = write(tmp_path / "s")
    keys = [store.example_key(i) for i in range(4)]
    assert keys[3] == keys[0] + "-1"
    assert keys[0] == make_key("test", "a")
    assert len(set(keys)) == 4


@pytest.mark.parametrize(("vocab_size", "width"), [(1 << 16, 2), ((1 << 16) + 1, 4)])
def test_ids_take_the_smallest_type_that_holds_them(tmp_path, vocab_size, width):
    store = write(tmp_path / "s", [([vocab_size - 1, 0], None, "a")], vocab_size)
    assert (tmp_path / "s" / "tokens.bin").stat().st_size == 2 * width
    assert store.tokens(0).tolist() == [vocab_size - 1, 0]


def test_weights_take_no_room_when_all_are_one(tmp_path):
    store = write(tmp_path / "s", [([1, 2], [1.0, 1.0], "a"), ([3], None, "b")])
    assert not (tmp_path / "s" / "weights.bin").exists()
    assert not store.has_weights
    assert store.weights(0).tolist() == [1.0, 1.0]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 9), min_size=1, max_size=9),
            st.booleans(),
            st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 20),
)
def test_any_examples_survive_any_size_of_buffer(tmp_path_factory, drawn, buffer):
    examples = [
        (tokens, [t / 4 for t in tokens] if weighted else None, name)
        for tokens, weighted, name in drawn
    ]
    old = store_writer._BUFFERED_TOKENS
    store_writer._BUFFERED_TOKENS = buffer
    try:
        store = write(tmp_path_factory.mktemp("store") / "s", examples, 10)
    finally:
        store_writer._BUFFERED_TOKENS = old
    assert [store.tokens(i).tolist() for i in range(len(examples))] == [e[0] for e in examples]
    assert [store.weights(i).tolist() for i in range(len(examples))] == [
        weights or [1.0] * len(tokens) for tokens, weights, _ in examples
    ]
    assert [store.example_name(i) for i in range(len(examples))] == [
        f"place {name}" for _, _, name in examples
    ]


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    first, again = write(tmp_path / "a"), write(tmp_path / "b")
    other = write(tmp_path / "c", EXAMPLES[::-1])
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_unigram_entropy_of_two_equally_frequent_ids(tmp_path):
    store = write(tmp_path / "s", [([1, 2, 1, 2], None, "a")])
    assert store.unigram_entropy == pytest.approx(np.log(2))


@pytest.mark.parametrize(
    ("tokens", "weights", "key", "message"),
    [
        ([], None, "0" * 16, "at least one token"),
        ([300], None, "0" * 16, "token id 300 is outside the vocabulary of 300"),
        ([-1], None, "0" * 16, "token id -1"),
        ([1, 2], [1.0], "0" * 16, "1 weights for 2 tokens"),
        ([1], [float("nan")], "0" * 16, "not a finite number"),
        ([1], None, "abc", "16 hexadecimal digits"),
        ([1], None, "x" * 16, "16 hexadecimal digits"),
    ],
)
def test_an_impossible_example_is_refused_by_name(tmp_path, tokens, weights, key, message):
    with StoreWriter(tmp_path / "s", vocab_size=300) as writer:
        with pytest.raises(DataError, match=f"this one: .*{message}"):
            writer.add(tokens, weights, key=key, name="this one")
        writer.add([1], key="0" * 16, name="good")
    assert TokenStore.open(tmp_path / "s").num_examples == 1


def test_a_failure_leaves_nothing_behind(tmp_path):
    def fail():
        with StoreWriter(tmp_path / "s", vocab_size=9) as writer:
            writer.add([1], key="0" * 16, name="x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_store_without_examples_is_refused(tmp_path):
    with (
        pytest.raises(DataError, match="no example"),
        StoreWriter(tmp_path / "s", vocab_size=9) as writer,
    ):
        writer.skip("a:1", "empty")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["adding", "finishing"])
def test_a_full_disk_is_a_storage_error_and_leaves_nothing(tmp_path, monkeypatch, when):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    name = "append" if when == "adding" else "finish"
    monkeypatch.setattr(store_writer._Column, name, full)
    if when == "adding":
        monkeypatch.setattr(store_writer, "_BUFFERED_TOKENS", 1)
    with pytest.raises(StorageError, match=r"s\..*No space left"):
        write(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        write(tmp_path / "file" / "s")


def test_the_second_of_two_equal_writers_keeps_the_first_store(tmp_path):
    write(tmp_path / "s")
    inode = os.stat(tmp_path / "s").st_ino
    assert write(tmp_path / "s").num_examples == 4
    assert os.stat(tmp_path / "s").st_ino == inode
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_store_with_other_examples_is_never_replaced(tmp_path):
    write(tmp_path / "s")
    with pytest.raises(DataError, match="holds other examples"):
        write(tmp_path / "s", EXAMPLES[:2])
    assert TokenStore.open(tmp_path / "s", verify=True).num_examples == 4


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path):
    write(tmp_path / "s")
    write(tmp_path / "s2")
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    host = store_writer._host()
    mine, killed = f".s.{host}-{os.getpid()}.a", f".s.{host}-{dead.pid}.b"
    elsewhere, forgotten = ".s.other-host-1.c", ".s.other-host-1.d"
    for name in (mine, killed, elsewhere, forgotten):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens.bin").write_bytes(b"half")
    for path in (tmp_path / forgotten / "tokens.bin", tmp_path / forgotten):
        os.utime(path, (1e9, 1e9))
    (tmp_path / ".s.lock").touch()
    remove_unfinished(tmp_path / "s")
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {mine, elsewhere, ".s.lock", "s", "s2"}


def test_left_out_records_are_counted_and_listed(tmp_path):
    with StoreWriter(tmp_path / "s", vocab_size=9) as writer:
        writer.add([1], key="0" * 16, name="x")
        writer.skip("f:2", "empty")
        writer.skip("f:3", "too long", "9 tokens")
        writer.skip("f:4", "too long", "8 tokens")
    store = TokenStore.open(tmp_path / "s")
    assert store.manifest["skipped"] == {"too long": 2, "empty": 1}
    assert store.manifest["counts"]["skipped"] == 3
    lines = (tmp_path / "s" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"name": "f:3", "reason": "too long", "detail": "9 tokens"}


FILES = [
    "tokens",
    "weights",
    "offsets",
    "lengths",
    "keys",
    "repeats",
    "names",
    "name_offsets",
    "unigram",
]


@pytest.mark.parametrize("name", FILES)
def test_damage_is_named(tmp_path, name):
    write(tmp_path / "s")
    path = tmp_path / "s" / f"{name}.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(DataError, match=rf"{name}.bin has {len(data) - 1} bytes instead of"):
        TokenStore.open(tmp_path / "s")
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DataError, match=rf"{name}.bin does not have the SHA-256"):
        TokenStore.open(tmp_path / "s", verify=True)
    path.unlink()
    with pytest.raises(DataError, match=rf"{name}.bin is missing"):
        TokenStore.open(tmp_path / "s")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: None, "no JSON"),
        (lambda m: {**m, "format": "other"}, "does not describe a token store"),
        (lambda m: {**m, "version": 99}, "version 99"),
        (lambda m: {k: v for k, v in m.items() if k != "counts"}, "counts"),
        (lambda m: {**m, "token_dtype": "<u4"}, "own fingerprint"),
        (lambda m: {**m, "counts": {**m["counts"], "tokens": 12}}, "tokens.bin"),
        (lambda m: {**m, "counts": {**m["counts"], "examples": "4"}}, "own fingerprint"),
        (lambda m: {**m, "files": []}, "lacks or mangles"),
    ],
)
def test_a_manifest_that_is_wrong_is_refused(tmp_path, change, message):
    write(tmp_path / "s")
    path = tmp_path / "s" / "manifest.json"
    changed = change(json.loads(path.read_text()))
    path.write_text(json.dumps(changed) if changed is not None else "{")
    with pytest.raises(DataError, match=message):
        TokenStore.open(tmp_path / "s")


def test_a_directory_that_is_no_store_is_refused(tmp_path):
    with pytest.raises(DataError, match="is no token store"):
        TokenStore.open(tmp_path)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_repeats_count_the_equal_keys_before(keys):
    expected = [keys[:i].count(key) for i, key in enumerate(keys)]
    assert count_repeats(np.array(keys, np.uint64)).tolist() == expected
