import concurrent.futures
import gzip
import json
import os
import socket
import subprocess
import sys

import pytest

from tokjax import errors
from tokjax import prepare as command
from tokjax.config import to_dict
from tokjax.data import prepare as module
from tokjax.data.config import DataConfig
from tokjax.data.prepare import ensure_store, prepare
from tokjax.data.sources import JsonlSource, StdlibSource, TextSource
from tokjax.data.store import TokenStore
from tokjax.data.tokenizers import TokenizerConfig
from tokjax.errors import ConfigError, DataError, StorageError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

BYTES = TokenizerConfig(name="bytes")
DATA = DataConfig(tokenizer=BYTES)


def text(tmp_path, content="ab\nc\n", name="a.txt"):
    (tmp_path / name).write_text(content)
    return TextSource(files=(str(tmp_path / name),), per="line")


def records(tmp_path, *lines):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return JsonlSource(files=(str(tmp_path / "a.jsonl"),))


def make(source, tmp_path, data=DATA, progress=False):
    return TokenStore.open(
        prepare(source, data, cache_dir=tmp_path / "cache", progress=progress), verify=True
    )


def stores(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache" / "stores").iterdir() if p.is_dir())


def test_a_store_holds_every_document_between_its_end_tokens(tmp_path):
    store = make(text(tmp_path), tmp_path)
    assert [store.tokens(i).tolist() for i in range(2)] == [[256, 97, 98, 256], [256, 99, 256]]
    assert store.directory.name.startswith("text-all-")
    assert store.manifest["tokenizer"]["vocab_size"] == 257
    assert store.manifest["task"]["source"] == to_dict(text(tmp_path))
    assert store.manifest["counts"]["bytes"] == 3
    assert not store.has_weights


def test_any_text_comes_through_unchanged(tmp_path):
    texts = ["\0 nul \0", "\0", "é\r\n", " x ", "<|endoftext|>", "日本" * 500]
    store = make(records(tmp_path, *({"text": t} for t in texts)), tmp_path)
    stored = [bytes(store.tokens(i)[1:-1].tolist()).decode() for i in range(len(texts))]
    assert stored == texts


def test_a_store_that_is_there_is_found_without_work(tmp_path, monkeypatch):
    source = text(tmp_path)
    made = make(source, tmp_path)
    monkeypatch.setattr(module, "_make", None)
    monkeypatch.setattr(module, "_run_worker", None)
    assert make(source, tmp_path).fingerprint == made.fingerprint
    assert ensure_store(source, DATA, cache_dir=tmp_path / "cache") == made.directory


def test_whatever_changes_the_examples_changes_the_name(tmp_path):
    def name(source=None, cache="cache", **settings):
        data = DataConfig(**{"tokenizer": BYTES, **settings})
        request = module.Request.of(source or text(tmp_path), data, tmp_path / cache)
        return request.directory(request.encoder()).name

    first = name()
    assert first == name() == name(cache="elsewhere") == name(seq_len=7)
    os.utime(tmp_path / "a.txt")
    assert name() == first
    others = [
        name(text(tmp_path, "ab\nd\n")),
        name(text(tmp_path, name="b.txt")),
        name(TextSource(files=(str(tmp_path / "a.txt"),))),
        name(tokenizer=TokenizerConfig(name="bytes", add_bos=False)),
        name(tokenizer=TokenizerConfig(name="bytes", add_eos=False)),
        name(max_tokens=9),
        name(on_error="skip"),
    ]
    assert len({first, *others}) == 8


def test_the_chat_template_is_part_of_the_name(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    names = set()
    for template in ("{{ messages[0].content }}", "{{ messages[0]['content'] }}!"):
        (tmp_path / "chat.jinja").write_text(template)
        source = JsonlSource(
            files=(str(tmp_path / "a.jsonl"),),
            kind="messages",
            chat_template=str(tmp_path / "chat.jinja"),
        )
        request = module.Request.of(source, DATA, tmp_path)
        names.add(request.directory(request.encoder()).name)
    assert len(names) == 2


def test_keys_do_not_depend_on_order_file_or_compression(tmp_path):
    lines = ["one", "two", "three", "two"]
    forward = make(text(tmp_path, "\n".join(lines)), tmp_path)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("\n".join(lines[::-1]).encode()))
    backward = make(TextSource(files=(f"{tmp_path}/b.txt.gz",), per="line"), tmp_path)

    def keys(store):
        return {store.example_key(i) for i in range(store.num_examples)}

    assert len(keys(forward)) == 4
    assert keys(forward) == keys(backward)


def test_bad_records_stop_or_are_counted_and_listed(tmp_path, capfd):
    source = records(tmp_path, {"text": "ab"}, {"text": 5}, {}, {"text": ""}, {"text": "abcdef"})
    with pytest.raises(DataError, match=r"a\.jsonl:2: field 'text' is not text"):
        make(source, tmp_path)
    assert stores(tmp_path) == []
    skipping = DataConfig(tokenizer=BYTES, on_error="skip", max_tokens=7)
    store = make(source, tmp_path, skipping, progress=True)
    assert store.num_examples == 1
    assert store.manifest["counts"]["skipped"] == 4
    assert store.manifest["skipped"] == {
        "field 'text' is not text": 1,
        "field 'text' is missing": 1,
        "empty": 1,
        "too long": 1,
    }
    listed = (store.directory / "skipped.jsonl").read_text().splitlines()
    assert {json.loads(line)["name"].rpartition(":")[2] for line in listed} == {"2", "3", "4", "5"}
    printed = capfd.readouterr().err
    assert "1 example, 4 tokens, 0.50 bytes per token" in printed
    assert "left out 4 bad records: 1 field 'text' is" in printed
    assert str(store.directory / "skipped.jsonl") in printed


def test_when_every_record_is_bad_there_is_no_store(tmp_path):
    data = DataConfig(tokenizer=BYTES, on_error="skip")
    with pytest.raises(DataError, match=r"all 2 records are bad.*a\.jsonl:1: field 'text' is"):
        make(records(tmp_path, {}, {}), tmp_path, data)
    assert stores(tmp_path) == []


def test_a_damaged_store_is_an_error_and_not_used(tmp_path):
    source = text(tmp_path)
    directory = make(source, tmp_path).directory
    (directory / "tokens.bin").write_bytes(b"short")
    for call in (prepare, ensure_store):
        with pytest.raises(DataError, match=r"tokens\.bin has 5 bytes.*Delete the directory"):
            call(source, DATA, cache_dir=tmp_path / "cache")


def test_what_a_killed_preparation_left_is_removed(tmp_path):
    source = text(tmp_path)
    directory = make(source, tmp_path).directory
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    left = f".{directory.name}.{socket.gethostname()}-{dead.pid}.x"
    directory.rename(directory.with_name(left))
    make(source, tmp_path)
    assert stores(tmp_path) == [directory.name]


def test_an_unwritable_cache_is_a_storage_error(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "stores").write_text("in the way")
    with pytest.raises(StorageError, match="stores"):
        make(text(tmp_path), tmp_path)


def test_a_missing_file_is_known_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_run_worker", None)
    source = TextSource(files=(str(tmp_path / "none.txt"),))
    for call in (prepare, ensure_store):
        with pytest.raises(ConfigError, match=r"none\.txt"):
            call(source, DATA, cache_dir=tmp_path)


def test_weights_reach_the_store(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "ab", "response": "cd", "weights": [[0, 1, 0.5]]}\n'
        '{"prompt": "ab", "response": "e", "weights": [[0, 1, 0]]}\n'
    )
    source = JsonlSource(files=(str(tmp_path / "a.jsonl"),), kind="response")
    store = make(source, tmp_path)
    assert store.weights(0).tolist() == [0, 0, 0, 0.5, 1, 1]
    assert store.weights(1).tolist() == [0, 0, 0, 0, 0]
    assert store.manifest["counts"]["examples_without_weight"] == 1


SCRIPT = """
import sys
from tokjax.data.config import DataConfig
from tokjax.data.prepare import ensure_store
from tokjax.data.sources import TextSource
from tokjax.data.store import TokenStore
from tokjax.data.tokenizers import TokenizerConfig

source = TextSource(files=(sys.argv[1],), per="line")
data = DataConfig(tokenizer=TokenizerConfig(name="bytes"), cache_dir=sys.argv[2])
store = TokenStore.open(ensure_store(source, data))
assert store.num_examples == 2
heavy = {"tensorflow", "seqio", "matplotlib", "rich", "jax"} & set(sys.modules)
print(store.directory.name, sorted(heavy - {"jax"}))
"""


def test_two_processes_share_one_preparation_and_import_no_tensorflow(tmp_path):
    source = text(tmp_path)
    command_line = [sys.executable, "-c", SCRIPT, source.files[0], str(tmp_path / "cache")]

    def start():
        return subprocess.run(command_line, capture_output=True, text=True, check=False)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: start(), range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    (name,) = stores(tmp_path)
    assert first.stdout == second.stdout == f"{name} []\n"
    assert (first.stderr + second.stderr).count("prepared text all") == 1
    assert "WARNING" not in first.stderr + second.stderr


def test_an_error_of_the_other_process_is_the_same_error_here(tmp_path):
    source = records(tmp_path, {"text": "a"}, {"txt": "a"})
    with pytest.raises(DataError) as there:
        ensure_store(source, DATA, cache_dir=tmp_path / "cache", progress=False)
    with pytest.raises(DataError) as here:
        make(source, tmp_path)
    assert str(there.value) == str(here.value)
    assert there.type is errors.DataError
    assert stores(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [(-9, DataError, "killed by signal 9"), (1, RuntimeError, "exit code 1")],
)
def test_a_process_that_dies_without_an_answer_is_reported(
    tmp_path, monkeypatch, code, kind, message
):
    monkeypatch.setattr(module, "_run_worker", lambda order: code)
    with pytest.raises(kind, match=message):
        ensure_store(text(tmp_path), DATA, cache_dir=tmp_path / "cache")


def test_the_command_prepares_every_source(tmp_path, capfd):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
    (tmp_path / "config.py").write_text(
        f"""
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(dict(steps=3, data=dict(
        tokenizer=dict(name="bytes"),
        cache_dir={str(tmp_path / "cache")!r},
        train=[dict(source=dict(name="text", files=[{str(tmp_path / "a.txt")!r}]))],
        evals=dict(held_out=dict(name="text", files=[{str(tmp_path / "b.txt")!r}])),
    )))
"""
    )
    path = f"--config={tmp_path}/config.py"
    assert command.main([path]) == 0
    lines = dict(line.split(": ") for line in capfd.readouterr().out.splitlines())
    assert list(lines) == ["train.0", "evals.held_out"]
    assert TokenStore.open(lines["evals.held_out"]).tokens(0).tolist() == [256, 98, 10, 256]
    with pytest.raises(ConfigError, match=r"config\.data\.on_eror.*on_error"):
        command.main([path, "--config.data.on_eror=skip"])
    assert command.main(["--help"]) == 0
    assert "python -m tokjax.prepare" in capfd.readouterr().out


def test_the_embedded_corpus_keeps_its_splits_apart(tmp_path):
    def keys(split):
        source = StdlibSource(parts=("topics",), split=split, validation_share=0.2)
        store = make(source, tmp_path)
        assert f"stdlib-{split}-" in store.directory.name
        return {store.example_key(i) for i in range(store.num_examples)}

    train, validation = keys("train"), keys("validation")
    assert train
    assert validation
    assert not train & validation


@pytest.mark.real_data
def test_instructions_prepare_as_they_are(real_data, tmp_path):
    path = real_data / "gsm8k" / "test_part1.jsonl.gz"
    source = JsonlSource(files=(str(path),), kind="response", prompt="question", response="answer")
    store = make(source, tmp_path)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert store.num_examples == len(rows)
    for i in (0, len(rows) - 1):
        question, answer = (rows[i][f].encode() for f in ("question", "answer"))
        assert bytes(store.tokens(i)[1:-1].tolist()) == question + answer
        assert store.weights(i).sum() == len(answer) + 1
