"""Interactions from files, their core, and leave-one-out."""

import gzip
import json

import pytest

from tokjax.errors import ConfigError, DataError
from tokjax.recsys import Interactions, leave_one_out, read_interactions, read_texts


def test_the_last_item_tests_the_one_before_validates_and_all_prefixes_train():
    split = leave_one_out([[1, 2, 3, 4, 5], [6, 7]], longest=2)
    assert split.test.items.tolist() == [[3, 4]] and split.test.targets.tolist() == [5]
    assert split.validation.items.tolist() == [[2, 3]] and split.validation.targets.tolist() == [4]
    assert split.train.items.tolist() == [[-1, 1], [1, 2], [-1, 6]]
    assert split.train.targets.tolist() == [2, 3, 7]
    assert split.train.users.tolist() == [0, 0, 1]


def test_too_few_items_are_refused():
    with pytest.raises(DataError, match="no user has enough items"):
        leave_one_out([[1, 2]])
    with pytest.raises(ConfigError, match="longest=0"):
        leave_one_out([[1, 2, 3, 4]], longest=0)


def test_the_core_has_no_rare_user_or_item():
    data = Interactions(("a", "b", "c"), ("x", "y", "z"), ((0, 1, 0), (1, 0, 1), (2, 0)))
    core = data.core(3)
    assert core.users == ("a", "b") and core.items == ("x", "y")
    assert core.sequences == ((0, 1, 0), (1, 0, 1))
    with pytest.raises(DataError, match="occurs 4 times"):
        data.core(4)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "jsonl.gz"])
def test_files_are_read_in_order_of_time(tmp_path, kind):
    rows = [("u1", "film, one", 5), ("u2", "two", 1), ("u1", "two", 3)]
    path = tmp_path / f"data.{kind}"
    if kind == "csv":
        text = "user,item,when\n" + "".join(f'{u},"{i}",{t}\n' for u, i, t in rows)
    else:
        text = "".join(json.dumps({"user": u, "item": i, "when": t}) + "\n" for u, i, t in rows)
    path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    found = read_interactions(path, time="when")
    assert found.users == ("u1", "u2") and found.items == ("film, one", "two")
    assert found.sequences == ((1, 0), (1,))
    assert read_interactions(path).sequences == ((0, 1), (1,))
    assert read_texts(path, item="user", text="item") == {"u1": "two", "u2": "two"}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[1]", "x.jsonl:1: write one object a line"),
        ("{", "x.jsonl:1: no valid JSON"),
        ('{"user": "a"}', "x.jsonl:1: no 'item' among the fields 'user'"),
        ('{"user": "a", "item": "b", "when": "noon"}', "x.jsonl:1: when='noon' is no number"),
        ("", "holds no interaction"),
    ],
)
def test_errors_name_the_place(tmp_path, line, told):
    path = tmp_path / "x.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=told):
        read_interactions(path, time="when")
