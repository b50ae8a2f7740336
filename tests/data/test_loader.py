"""The batch of step n is a function of (configuration, seed, n), and loses nothing."""

import dataclasses
from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokjax.data.batch import Batch
from tokjax.data.loader import EvalLoader, Loader, StageSlice
from tokjax.data.store import StoreWriter, TokenStore
from tokjax.errors import ConfigError, DataError

_OTHERS = ("channels", "values", "group")
FIELDS = [field.name for field in dataclasses.fields(Batch) if field.name not in _OTHERS]


class FakeStore:
    """Token t of example e is 1000 (e + 1) + t, and its weight as a target is t / 1000 + e."""

    def __init__(self, lengths, fingerprint="fake"):
        self.lengths = np.asarray(lengths, np.int64)
        self.num_examples = len(self.lengths)
        self.fingerprint = fingerprint
        self.reads = 0

    def tokens(self, i, start=0, stop=None):
        self.reads += 1
        stop = int(self.lengths[i]) if stop is None else stop
        assert 0 <= start <= stop <= self.lengths[i]
        return (1000 * (i + 1) + np.arange(start, stop)).astype(np.int32)

    def weights(self, i, start=0, stop=None):
        stop = int(self.lengths[i]) if stop is None else stop
        assert 0 <= start <= stop <= self.lengths[i]
        return (np.arange(start, stop) / 1000 + i).astype(np.float32)

    sequences, channels, value_names = 1, (), ()

    def cuts(self, i):
        return ()

    def values(self, name, i):
        raise KeyError(name)

    def channel(self, name, i, start=0, stop=None):
        raise KeyError(name)

    def example_key(self, i):
        return f"{self.fingerprint}-{i:04x}"

    def example_name(self, i):
        return f"{self.fingerprint}.jsonl:{i + 1}"


def same(a, b):
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in FIELDS)


def joined(batches):
    return Batch(**{n: np.concatenate([getattr(b, n) for b in batches]) for n in FIELDS})


def targets_of(batch):
    """(example, index of target token) of every target, checking the batch on the way."""
    found = []
    for r in range(batch.tokens.shape[0]):
        segments = batch.segment_ids[r]
        used = int(segments.max(initial=0))
        assert (batch.example_id[r, used:] == -1).all()
        empty = segments == 0
        for name in ("tokens", "targets", "positions", "weights"):
            assert (getattr(batch, name)[r][empty] == 0).all()
        first = -1
        for s in range(1, used + 1):
            (where,) = np.nonzero(segments == s)
            assert (np.diff(where) == 1).all()
            assert where[0] > first
            first = where[-1]
            example = int(batch.example_id[r, s - 1])
            np.testing.assert_array_equal(batch.positions[r, where], np.arange(len(where)))
            tokens, targets = batch.tokens[r, where], batch.targets[r, where]
            np.testing.assert_array_equal(targets, tokens + 1)
            np.testing.assert_array_equal(tokens // 1000, example + 1)
            index = targets % 1000
            weights = batch.weights[r, where]
            np.testing.assert_array_equal(weights, (index / 1000 + example).astype(np.float32))
            found += [(example, int(t)) for t in index]
    return found


def all_targets(lengths):
    return [(e, t) for e, n in enumerate(lengths) for t in range(1, n)]


LENGTHS = [30, 2, 1, 17, 9, 9, 64, 5, 0, 33, 12, 3, 3, 70, 28]


def loader(stores=None, **options):
    defaults = {
        "rates": None,
        "seq_len": 16,
        "batch_size": 4,
        "seed": 0,
        "stages": [StageSlice(50)],
    }
    return Loader(stores or [FakeStore(LENGTHS)], **{**defaults, **options})


# --- training ------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 80), min_size=1, max_size=25).filter(lambda x: max(x) > 1),
    packing=st.sampled_from(["best_fit", "concat", "none"]),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**63),
    k=st.sampled_from([1, 2, 4]),
)
def test_every_target_comes_exactly_once_per_epoch(lengths, packing, shuffle, seed, k):
    store = FakeStore(lengths)
    options = {"packing": packing, "shuffle": shuffle, "seed": seed, "seq_len": 8, "batch_size": 1}
    rows = loader([store], stages=[StageSlice(1, k)], **options).describe()["rows"]
    epoch = loader([store], stages=[StageSlice(rows, k)], **options)
    batch = joined([epoch.batch(n) for n in range(rows)])
    assert batch.tokens.shape == (rows, 8 * k)
    assert sorted(targets_of(batch)) == all_targets(lengths)
    assert epoch.describe()["epochs"] == 1


def test_arrays_have_the_types_and_shapes_of_the_batch():
    batch = loader().batch(3)
    for name in FIELDS:
        array = getattr(batch, name)
        assert array.dtype == (np.float32 if name == "weights" else np.int32)
        assert array.shape == ((4, 16) if name != "example_id" else (4, loader().shape(3)[2]))


def test_equal_seeds_agree_and_others_differ():
    first, again, other = loader(), loader(), loader(seed=1)
    assert all(same(first.batch(n), again.batch(n)) for n in range(50))
    assert not all(same(first.batch(n), other.batch(n)) for n in range(5))


def test_a_batch_does_not_depend_on_what_was_asked_before():
    fresh, used = loader(), loader()
    for n in (49, 0, 13, 13, 7):
        used.batch(n)
    assert same(used.batch(14), fresh.batch(14))


def test_order_differs_between_epochs():
    rows = loader().describe()["rows"]
    run = loader(batch_size=rows, stages=[StageSlice(2)])
    assert sorted(targets_of(run.batch(0))) == sorted(targets_of(run.batch(1)))
    assert not same(run.batch(0), run.batch(1))


@pytest.mark.parametrize("stages", [[StageSlice(6)], [StageSlice(3, 2), StageSlice(3)]])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_any_split_over_hosts_gives_the_same_batch(stages, hosts):
    run = loader(stages=stages)
    share = 4 // hosts
    for n in range(6):
        parts = [run.batch(n, slice(h * share, (h + 1) * share)) for h in range(hosts)]
        assert same(joined(parts), run.batch(n))
    assert run.batch(0, slice(2, 2)).tokens.shape[0] == 0


def test_hosts_joining_and_leaving_mid_run_see_the_same_examples():
    whole = [loader().batch(n) for n in range(12)]
    seen = []
    for n in range(12):
        hosts = 2 if 4 <= n < 8 else 1
        run = loader()  # every restart makes a new loader, which knows nothing but the step
        seen += [run.batch(n, slice(h * 4 // hosts, (h + 1) * 4 // hosts)) for h in range(hosts)]
    assert same(joined(seen), joined(whole))


def test_a_late_step_of_a_large_store_reads_only_its_own_rows():
    store = FakeStore(np.random.default_rng(0).integers(2, 200, 20_000))
    run = loader([store, FakeStore(LENGTHS)], rates=[1, 1], stages=[StageSlice(2_000_000)])
    assert store.reads == 0
    batch = run.batch(1_000_000)
    pieces = int((batch.example_id >= 0).sum())
    assert 0 < store.reads <= pieces < 4 * 17


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_stages_share_no_data_and_lose_none(packing):
    rng = np.random.default_rng(1)
    lengths = rng.integers(2, 90, 300).tolist()
    store = FakeStore(lengths)
    options = {"packing": packing, "batch_size": 4, "seq_len": 8}
    rows = loader([store], stages=[StageSlice(1, 4)], **options).describe()["rows"]
    steps = (rows // 4) // 2
    # 4-token positions for half of the data, then 2, then 1, the last until a whole epoch is over.
    rest = rows - 4 * steps - 2 * 10
    stages = [StageSlice(steps, 4), StageSlice(10, 2), StageSlice(rest, 1)]
    assert stages[1].steps * 4 // 2 == 20
    run = loader([store], stages=stages, **options)
    assert run.total_steps == steps + 10 + rest
    assert [run.shape(n)[1] for n in (0, steps, steps + 10)] == [32, 16, 8]
    found = [targets_of(run.batch(n)) for n in range(run.total_steps)]
    assert sorted(target for targets in found for target in targets) == all_targets(lengths)
    facts = run.describe()
    assert facts["epochs"] == 1
    assert [stage["unused_windows"] for stage in facts["stages"]] == [0, 0, 0]
    assert facts["stages"][0]["border_cuts"] == 0 < facts["stages"][2]["border_cuts"]
    assert facts["places_used"] == rows * 32


@pytest.mark.parametrize(("coarse", "fine"), [(4, 1), (4, 2), (3, 2)])
def test_pieces_start_at_whole_positions_in_every_stage(coarse, fine):
    run = loader(stages=[StageSlice(5, coarse), StageSlice(5, fine)])
    for n in range(10):
        batch, k = run.batch(n), coarse if n < 5 else fine
        starts = np.nonzero((batch.positions == 0) & (batch.segment_ids > 0))[1]
        assert len(starts)
        assert (starts % k == 0).all()


def test_windows_of_one_plan_row_are_spread_over_the_stage():
    lengths = [129] * 64  # one plan row each, of eight windows
    stages = [StageSlice(64, 1), StageSlice(1, 8)]
    run = loader([FakeStore(lengths)], batch_size=8, stages=stages)
    distinct = [len(set(run.batch(n).example_id[:, 0].tolist())) for n in range(64)]
    assert np.mean(distinct) > 6
    ordered = loader([FakeStore(lengths)], batch_size=8, stages=stages, shuffle=False)
    assert [len(set(ordered.batch(n).example_id[:, 0].tolist())) for n in range(64)] == [1] * 64


def test_the_seed_decides_the_order_of_windows():
    stages = [
        StageSlice(4, 1),
        StageSlice(1, 16),
    ]  # one plan row, so only its windows have an order
    orders = set()
    for seed in range(5):
        run = loader([FakeStore([257])], seed=seed, batch_size=4, stages=stages)
        found = [run.batch(n) for n in range(4)]
        orders.add(tuple(joined(found).tokens[:, 0].tolist()))
        assert sorted(targets_of(joined(found))) == all_targets([257])
    assert len(orders) > 1


def test_a_stage_that_ends_inside_a_plan_row_leaves_the_rest_of_it():
    lengths = [33] * 10
    stages = [StageSlice(1, 1), StageSlice(1, 2)]
    run = loader([FakeStore(lengths)], batch_size=3, stages=stages, shuffle=False)
    assert sorted({e for e, _ in targets_of(run.batch(0))}) == [0, 1]
    assert sorted({e for e, _ in targets_of(run.batch(1))}) == [2, 3, 4]
    assert run.describe()["stages"][0]["unused_windows"] == 1
    assert run.describe()["rows_used"] == 5


def test_stores_are_mixed_by_rows_at_their_rates():
    stores = [FakeStore([17] * 40, "a"), FakeStore([17] * 3, "b")]
    run = loader(stores, rates=[3, 1], batch_size=16, stages=[StageSlice(128)])
    seen = Counter()
    for n in range(run.total_steps):
        seen.update(run.batch(n).example_id[:, 0].tolist())
    assert sum(seen[e] for e in range(40)) == 1536
    assert sum(seen[e] for e in range(40, 43)) == 512
    assert max(seen[e] for e in range(40)) - min(seen[e] for e in range(40)) <= 1
    facts = run.describe()
    assert [source["rate"] for source in facts["sources"]] == [0.75, 0.25]
    assert [source["epochs"] for source in facts["sources"]] == [1536 / 40, 512 / 3]
    assert facts["epochs"] == 512 / 3


def test_example_ids_number_the_concatenated_stores():
    run = loader([FakeStore([17] * 4, "a"), FakeStore([17] * 3, "b")])
    assert run.example_key(3) == "a-0003"
    assert run.example_key(4) == "b-0000"
    assert run.example_name(6) == "b.jsonl:3"
    for outside in (-1, 7):
        with pytest.raises(IndexError):
            run.example_key(outside)
    batch = run.batch(0)
    for row in range(4):
        number = int(batch.example_id[row, 0])
        assert batch.tokens[row, 0] == 1000 * (number % 4 + 1)


def test_facts_count_what_is_cut_short_and_filled():
    facts = loader().describe()
    assert facts["examples"] == 13
    assert facts["short_examples"] == 2
    assert facts["tokens"] == len(all_targets(LENGTHS))
    assert facts["cuts"] == sum((n - 2) // 16 for n in LENGTHS if n > 1)
    assert facts["waste"] == pytest.approx(1 - facts["tokens"] / (16 * facts["rows"]))
    assert facts["row_tokens"] == 16
    assert facts["epochs"] == pytest.approx(200 / facts["rows"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stages": []}, ConfigError, "at least one stage"),
        ({"batch_size": 0}, ConfigError, "batch_size must be at least 1"),
        ({"seq_len": 0}, ConfigError, "seq_len"),
        ({"packing": "best-fit"}, ConfigError, "'best_fit'"),
        ({"rates": [1.0, 2.0]}, ConfigError, "1 sources need 2 rates|1 sources need 1 rates"),
        ({"long_examples": "error"}, DataError, r"fake\.jsonl:1 \(30 tokens\)"),
        ({"stores": [FakeStore([1, 0])]}, DataError, "none of the 2 examples"),
    ],
)
def test_impossible_loaders_are_refused_before_the_first_batch(options, error, message):
    with pytest.raises(error, match=message):
        loader(**options)


def test_impossible_stages_and_missing_stores_are_refused():
    with pytest.raises(ConfigError, match="at least 1 step"):
        StageSlice(0)
    with pytest.raises(ConfigError, match="token per position"):
        StageSlice(1, 0)
    with pytest.raises(ConfigError, match="at least one token store"):
        EvalLoader([], seq_len=8, batch_size=2)


def test_steps_and_rows_outside_the_run_are_refused():
    run = loader()
    for step in (-1, 50):
        with pytest.raises(IndexError, match="50 steps"):
            run.batch(step)
    for rows in (slice(0, 5), slice(-1, 2), slice(0, 4, 2)):
        with pytest.raises(IndexError, match="batch of 4"):
            run.batch(0, rows)


# --- evaluation ----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=25).filter(lambda x: max(x) > 1),
    batch_size=st.integers(1, 7),
    packing=st.sampled_from(["best_fit", "concat", "none"]),
)
def test_evaluation_sees_every_target_exactly_once(lengths, batch_size, packing):
    run = EvalLoader([FakeStore(lengths)], seq_len=8, batch_size=batch_size, packing=packing)
    batches = [run.batch(i) for i in range(len(run))]
    assert {b.tokens.shape for b in batches} == {(batch_size, 8)}
    assert {b.example_id.shape for b in batches} == {(batch_size, run.shape(0)[2])}
    whole = joined(batches)
    assert sorted(targets_of(whole)) == all_targets(lengths)
    empty = (whole.segment_ids == 0).all(axis=1)
    assert empty.sum() == len(whole.tokens) - run.describe()["rows"] < batch_size
    assert empty[len(whole.tokens) - int(empty.sum()) :].all()
    half = batch_size // 2
    parts = [run.batch(len(run) - 1, slice(0, half)), run.batch(len(run) - 1, slice(half, None))]
    assert same(joined(parts), batches[-1])
    with pytest.raises(IndexError, match=f"of {len(run)}"):
        run.batch(len(run))


def test_evaluation_of_several_stores_is_one_after_the_other():
    run = EvalLoader(
        [FakeStore([9] * 3, "a"), FakeStore([9] * 2, "b")],
        seq_len=4,
        batch_size=4,
        tokens_per_position=2,
    )
    assert len(run) == 2
    assert run.shape(0) == (4, 8, 1)
    ids = np.concatenate([run.batch(i).example_id[:, 0] for i in range(2)])
    assert ids.tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
    assert run.example_name(4) == "b.jsonl:2"
    assert run.example_key(0) == "a-0000"
    assert run.describe()["batches"] == 2


def test_batches_are_trees_of_arrays():
    assert len(jax.tree.leaves(loader().batch(0))) == len(FIELDS)


# --- with the token store ------------------------------------------------------------------------


def written_store(directory, lengths, tokenizer="t"):
    fake = FakeStore(lengths)
    with StoreWriter(directory, vocab_size=65536, tokenizer={"fingerprint": tokenizer}) as writer:
        for e in range(len(lengths)):
            writer.add(fake.tokens(e), fake.weights(e), key=f"{e:016x}", name=f"a.jsonl:{e + 1}")
    return TokenStore.open(directory)


def test_token_stores_are_read_and_keep_their_plans(tmp_path):
    lengths = [n for n in LENGTHS if n]
    store = written_store(tmp_path / "store", lengths)
    run, expected = loader([store]), loader([FakeStore(lengths)])
    assert all(same(run.batch(n), expected.batch(n)) for n in range(20))
    plans = sorted((tmp_path / "store" / "packing").iterdir())
    assert len(plans) == 1
    again = loader([TokenStore.open(tmp_path / "store", verify=True)])
    assert same(again.batch(3), run.batch(3))
    assert sorted((tmp_path / "store" / "packing").iterdir()) == plans
    assert run.example_name(2) == "a.jsonl:3"
    assert run.example_key(2) == f"{2:016x}"
    held_out = EvalLoader([store], seq_len=16, batch_size=4)
    whole = joined([held_out.batch(i) for i in range(len(held_out))])
    assert sorted(targets_of(whole)) == all_targets(lengths)


def test_stores_of_different_tokenizers_are_not_mixed(tmp_path):
    stores = [written_store(tmp_path / name, [5, 6], tokenizer=name) for name in ("a", "b")]
    with pytest.raises(DataError, match="different tokenizers"):
        loader(stores)
    loader([stores[0], stores[0]])
