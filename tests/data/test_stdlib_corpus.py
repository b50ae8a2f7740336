import collections
import hashlib
import itertools
import subprocess
import sys

import pytest

from tokjax.data import stdlib_corpus
from tokjax.data.stdlib_corpus import documents, identity, missing, split_of
from tokjax.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def corpus():
    return list(documents())


def test_parts_hold_what_they_promise(corpus):
    texts = dict(corpus)
    assert len(texts) == len(corpus)  # names are unique
    assert "assert" in texts["topic:assert"]
    assert texts["docstring:json.decoder"] == "Implementation of JSONDecoder"
    assert "Join two or more pathname components" in texts["docstring:posixpath:join"]
    assert texts["docstring:json.decoder:JSONDecoder.decode"].startswith("Return the Python")
    assert "class JSONDecoder" in texts["source:json/decoder.py"]
    kinds = collections.Counter(name.partition(":")[0] for name in texts)
    assert kinds["topic"] > 50
    assert kinds["docstring"] > 3000
    assert kinds["source"] > 300


def test_tests_foreign_packages_and_generated_files_are_left_out(corpus):
    for name, _ in corpus:
        parts = set(name.partition(":")[2].split("/"))
        assert not parts & {"test", "tests", "idle_test", "site-packages", "pydoc_data"}
        assert not name.startswith(("source:_sysconfigdata", "source:encodings/cp1252"))


def test_no_text_is_empty_or_occurs_twice_in_a_part(corpus):
    seen = collections.Counter((name.partition(":")[0], text) for name, text in corpus)
    assert max(seen.values()) == 1
    assert all(text.strip() for _, text in corpus)


def test_order_and_identity_are_the_same_in_another_process(corpus):
    code = (
        "import hashlib; from tokjax.data.stdlib_corpus import documents, identity\n"
        "digest = hashlib.sha256()\n"
        "for pair in documents(): digest.update(repr(pair).encode())\n"
        "print(digest.hexdigest(), identity())"
    )
    digest = hashlib.sha256()
    for pair in corpus:
        digest.update(repr(pair).encode())
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PATH": ""},
    )
    assert ran.stdout.split() == [digest.hexdigest(), identity()]


def test_parts_can_be_chosen_and_keep_their_order(corpus):
    topics = list(documents(["topics"]))
    assert topics == corpus[: len(topics)]
    both = documents(["docstrings", "topics"])
    assert list(itertools.islice(both, len(topics))) == topics
    assert len({identity(), identity(["topics"]), identity(["sources"])}) == 3
    assert identity(["sources", "topics", "docstrings"]) == identity()


def test_a_docstring_shares_the_split_of_its_source(corpus):
    split = {}
    for name, _ in corpus:
        kind, _, rest = name.partition(":")
        if kind == "source":
            module = rest.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            split[module] = split_of(name)
    checked = 0
    for name, _ in corpus:
        kind, module, *_ = name.split(":")
        if kind == "docstring" and module in split:
            assert split_of(name) == split[module]
            checked += 1
    assert checked > 3000
    assert set(split.values()) == {"train", "validation"}


def test_validation_holds_near_two_percent_of_every_part(corpus):
    size, held_out = collections.Counter(), collections.Counter()
    for name, text in corpus:
        kind = name.partition(":")[0]
        size[kind] += len(text)
        held_out[kind] += len(text) * (split_of(name) == "validation")
    for kind in size:
        assert 0.005 < held_out[kind] / size[kind] < 0.05


def test_share_moves_documents_only_towards_validation():
    names = [f"topic:{k}" for k in range(500)]
    small = {name for name in names if split_of(name, 0.1) == "validation"}
    large = {name for name in names if split_of(name, 0.5) == "validation"}
    assert small < large
    assert 20 < len(small) < 90
    assert {split_of(name, 0.0) for name in names} == {"train"}
    assert {split_of(name, 1.0) for name in names} == {"validation"}


def test_impossible_arguments_are_explained():
    with pytest.raises(ConfigError, match="Did you mean 'sources'"):
        list(documents(["source"]))
    with pytest.raises(ConfigError, match="must list one or more of topics"):
        identity("topics")
    with pytest.raises(ConfigError, match="not within 0 to 1"):
        split_of("topic:assert", 2.0)
    for name in ("readme.md", "source:a.txt", "topic:"):
        with pytest.raises(ConfigError, match="names no document"):
            split_of(name)


def library(tmp_path, monkeypatch):
    monkeypatch.setattr(stdlib_corpus, "_library", lambda: tmp_path)
    return tmp_path


def test_odd_files_of_an_installation_do_no_harm(tmp_path, monkeypatch):
    root = library(tmp_path, monkeypatch)
    (root / "pkg" / "tests").mkdir(parents=True)
    (root / "pkg" / "tests" / "x.py").write_text("'''Test.'''")
    (root / "pkg" / "__init__.py").write_text('"""Package."""\nclass A:\n  """A."""\n')
    (root / "bad.py").write_text("def f(:\n")
    (root / "latin.py").write_bytes(b'# -*- coding: latin-1 -*-\n"""caf\xe9"""\n')
    (root / "raw.py").write_bytes(b'"""\xff"""\n')
    (root / "empty.py").write_text("\n")
    (root / "crlf.py").write_bytes(b'"""Two\r\nlines."""\r\n')
    found = dict(documents(["docstrings", "sources"]))
    assert found["docstring:latin"] == "café"
    assert found["docstring:pkg"] == "Package."
    assert found["docstring:pkg:A"] == "A."
    assert found["source:crlf.py"] == '"""Two\nlines."""\n'
    sources = sorted(name for name in found if name.startswith("source"))
    assert sources == [
        "source:bad.py",
        "source:crlf.py",
        "source:latin.py",
        "source:pkg/__init__.py",
    ]


def test_an_installation_without_sources_is_told_apart(tmp_path, monkeypatch):
    root = library(tmp_path / "none", monkeypatch)
    assert next(documents(["topics"]))[0].startswith("topic:")
    with pytest.raises(DataError, match=f"no sources of the standard library: none under {root}"):
        list(documents(["sources"]))


def test_missing_names_what_is_not_installed(monkeypatch):
    assert not [line for line in missing() if "json" in line]
    names = sys.stdlib_module_names | {"no_such_module_of_python"}
    monkeypatch.setattr(sys, "stdlib_module_names", names)
    assert any("no_such_module_of_python" in line for line in missing())
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert any("pydoc_data.topics" in line for line in missing())
