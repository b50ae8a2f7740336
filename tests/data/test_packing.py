"""Every target is in exactly one row, rows are well filled, and plans survive on disk."""

import dataclasses
import errno
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.data import plan_cache
from tokjax.data.packing import PackingConfig, compute_plan, total_stats
from tokjax.data.plan_cache import plan_packing
from tokjax.errors import ConfigError, DataError, StorageError


@dataclasses.dataclass
class Lengths:
    lengths: np.ndarray
    fingerprint: str = "f"

    def example_name(self, i):
        return f"file.jsonl:{i + 1}"


CONFIGS = st.builds(
    lambda units, align, mode: PackingConfig(units * align, align, mode),
    st.integers(1, 30),
    st.integers(1, 4),
    st.sampled_from(["best_fit", "concat", "none"]),
)
LENGTHS = st.lists(st.integers(0, 90), min_size=1, max_size=60).filter(lambda x: max(x) > 1)


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, config=CONFIGS)
def test_every_target_occurs_exactly_once_and_pieces_never_overlap(lengths, config):
    plan = compute_plan(Lengths(np.array(lengths)), config)
    seen = set()
    for row in range(plan.stats.rows):
        end = 0
        pieces = plan.pieces(row)
        assert pieces
        for example, start, stop, offset in pieces:
            assert offset % config.align == 0
            assert offset >= end
            assert 0 <= start < stop
            end = offset + stop - start
            targets = {(example, t) for t in range(start + 1, stop + 1)}
            assert not targets & seen
            seen |= targets
        assert end <= config.row_len
    assert seen == {(e, t) for e, n in enumerate(lengths) for t in range(1, n)}
    assert plan.short_examples.tolist() == [e for e, n in enumerate(lengths) if n < 2]
    stats = plan.stats
    assert stats.tokens == len(seen)
    assert stats.examples + stats.short_examples == len(lengths)
    assert stats.cuts == stats.pieces - stats.examples
    assert stats.max_segments == max(len(plan.pieces(r)) for r in range(stats.rows))
    assert stats.waste == pytest.approx(1 - len(seen) / (stats.rows * config.row_len))
    assert 0 <= stats.waste < 1


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, config=CONFIGS, data=st.data())
def test_windows_cut_rows_without_losing_a_target(lengths, config, data):
    plan = compute_plan(Lengths(np.array(lengths)), config)
    units = config.row_len // config.align
    parts = data.draw(st.sampled_from([n for n in range(1, units + 1) if units % n == 0]))
    length = config.row_len // parts
    seen, most, pieces = [], 0, 0
    for row in range(plan.stats.rows):
        for w in range(parts):
            inside = plan.pieces(row, slice(w * length, (w + 1) * length))
            most, pieces = max(most, len(inside)), pieces + len(inside)
            for example, start, stop, offset in inside:
                assert 0 <= offset < offset + stop - start <= length
                seen += [(example, t) for t in range(start + 1, stop + 1)]
    assert sorted(seen) == [(e, t) for e, n in enumerate(lengths) for t in range(1, n)]
    assert plan.window_facts(length) == (most, pieces - plan.stats.pieces)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, row_len=st.integers(2, 60))
def test_best_fit_equals_the_textbook_algorithm(lengths, row_len):
    plan = compute_plan(Lengths(np.array(lengths)), PackingConfig(row_len))
    sizes = []
    for pairs in (n - 1 for n in lengths if n > 1):
        sizes += [row_len] * (pairs // row_len) + ([pairs % row_len] if pairs % row_len else [])
    room: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [r for r in room if r >= size]
        if fitting:
            room.remove(min(fitting))
            room.append(min(fitting) - size)
        else:
            room.append(row_len - size)
    filled = [
        sum(stop - start for _, start, stop, _ in plan.pieces(r)) for r in range(plan.stats.rows)
    ]
    assert sorted(filled) == sorted(row_len - r for r in room)


def test_concat_keeps_the_stored_order_and_wastes_nothing_but_the_end():
    plan = compute_plan(Lengths(np.array([6, 1, 10, 3])), PackingConfig(8, mode="concat"))
    assert plan.pieces(0) == [(0, 0, 5, 0), (2, 0, 3, 5)]
    assert plan.pieces(1) == [(2, 3, 9, 0), (3, 0, 2, 6)]
    assert plan.stats.waste == 0
    assert plan.stats.cuts == 1


def test_none_puts_one_piece_in_each_row():
    plan = compute_plan(Lengths(np.array([6, 1, 12, 3])), PackingConfig(8, mode="none"))
    rows = [plan.pieces(r) for r in range(plan.stats.rows)]
    assert rows == [[(0, 0, 5, 0)], [(2, 0, 8, 0)], [(2, 8, 11, 0)], [(3, 0, 2, 0)]]


@pytest.mark.parametrize("mode", ["best_fit", "concat", "none"])
def test_long_examples_can_be_refused(mode):
    config = PackingConfig(8, mode=mode, long_examples="error")
    compute_plan(Lengths(np.array([9, 3])), config)  # nine tokens are eight pairs: they fit
    with pytest.raises(DataError, match=r"file\.jsonl:2 \(10 tokens\).*long_examples='split'"):
        compute_plan(Lengths(np.array([9, 10])), config)


def test_a_store_without_targets_is_refused():
    with pytest.raises(DataError, match="none of the 3 examples"):
        compute_plan(Lengths(np.array([0, 1, 1])), PackingConfig(8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row_len": 10, "align": 4}, "rows of 10 tokens"),
        ({"row_len": 0}, "rows of 0 tokens"),
        ({"row_len": 8, "mode": "bestfit"}, "'best_fit'"),
        ({"row_len": 8, "long_examples": "cut"}, "'split'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        PackingConfig(**options)


def test_a_hundred_thousand_examples_are_packed_tightly():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.5, 1.2, 100_000).astype(np.int64), 2, 20_000)
    plan = compute_plan(Lengths(lengths), PackingConfig(2048))
    assert plan.stats.waste < 0.001
    assert plan.stats.tokens == (lengths - 1).sum()


def test_facts_of_several_plans_add_up():
    plans = [compute_plan(Lengths(np.array(x)), PackingConfig(8)) for x in ([6, 1], [20, 2, 2])]
    total = total_stats(plans)
    assert (total.rows, total.examples, total.short_examples) == (1 + 3, 4, 1)
    assert total.tokens == 5 + 21
    assert total.waste == pytest.approx(1 - 26 / 32)
    assert total.max_segments == 3


# --- on disk -----------------------------------------------------------------------------------

STORE = Lengths(np.array([6, 1, 12, 3, 40]))
CONFIG = PackingConfig(8)


def equal(a, b):
    arrays = ("row_offsets", "example", "start", "stop", "offset", "short_examples")
    return a.stats == b.stats and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in arrays)


def forbid_computing(monkeypatch):
    def fail(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(plan_cache, "compute_plan", fail)


def test_a_kept_plan_is_mapped_and_not_computed_again(tmp_path, monkeypatch):
    first = plan_packing(STORE, CONFIG, tmp_path / "packing")
    forbid_computing(monkeypatch)
    again = plan_packing(STORE, CONFIG, tmp_path / "packing")
    assert isinstance(again.example, np.memmap)
    assert equal(first, again)
    assert equal(first, compute_plan(STORE, CONFIG))


@pytest.mark.parametrize(
    ("store", "config"),
    [
        (dataclasses.replace(STORE, fingerprint="g"), CONFIG),
        (STORE, PackingConfig(16)),
        (STORE, PackingConfig(8, 2)),
        (STORE, PackingConfig(8, mode="concat")),
    ],
)
def test_other_data_or_options_have_a_plan_of_their_own(tmp_path, store, config):
    plan_packing(STORE, CONFIG, tmp_path)
    assert equal(plan_packing(store, config, tmp_path), compute_plan(store, config))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "facts", "empty"])
def test_a_damaged_plan_is_made_again(tmp_path, monkeypatch, damage):
    expected = compute_plan(STORE, CONFIG)
    plan_packing(STORE, CONFIG, tmp_path)
    (folder,) = tmp_path.iterdir()
    file = folder / "stop.npy"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-4])
    elif damage == "delete":
        file.unlink()
    elif damage == "facts":
        (folder / "plan.json").write_text("{")
    else:
        for path in folder.iterdir():
            path.unlink()
    assert equal(plan_packing(STORE, CONFIG, tmp_path), expected)
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    forbid_computing(monkeypatch)
    assert equal(plan_packing(STORE, CONFIG, tmp_path), expected)


def test_a_plan_made_meanwhile_by_another_process_is_kept(tmp_path, monkeypatch):
    def overtaken(store, config):
        with monkeypatch.context() as patch:
            patch.setattr(plan_cache, "compute_plan", compute_plan)
            plan_packing(store, config, tmp_path)
        return compute_plan(store, config)

    monkeypatch.setattr(plan_cache, "compute_plan", overtaken)
    assert equal(plan_packing(STORE, CONFIG, tmp_path), compute_plan(STORE, CONFIG))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_is_an_error_and_a_read_only_one_is_not(tmp_path, monkeypatch, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(plan_cache.os, "fsync", fail)
    if number == errno.ENOSPC:
        with pytest.raises(StorageError, match=str(tmp_path)):
            plan_packing(STORE, CONFIG, tmp_path)
    else:
        assert equal(plan_packing(STORE, CONFIG, tmp_path), compute_plan(STORE, CONFIG))
    assert list(tmp_path.iterdir()) == []


def test_facts_beside_the_plan_are_readable(tmp_path):
    plan = plan_packing(STORE, CONFIG, tmp_path)
    (folder,) = tmp_path.iterdir()
    facts = json.loads((folder / "plan.json").read_text())
    assert facts["stats"] == dataclasses.asdict(plan.stats)
