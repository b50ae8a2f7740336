"""Working ahead in a thread changes nothing, hides nothing and leaves nothing behind."""

import gc
import threading
import traceback

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from tokjax.data.batch import Batch
from tokjax.data.feed import prefetch, to_device
from tokjax.errors import ConfigError

FIELDS = ("tokens", "targets", "positions", "segment_ids", "weights", "example_id")


def threads():
    return [t for t in threading.enumerate() if t.name == "prefetch"]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert not threads()


@pytest.mark.parametrize("depth", [0, 1, 3, 100])
def test_items_come_in_order_and_once(depth):
    with prefetch(lambda n: n * n, 3, 20, depth, put=lambda x: -x) as items:
        assert list(items) == [-n * n for n in range(3, 20)]
        assert next(items, "over") == "over"


def test_an_empty_range_has_no_items():
    assert list(prefetch(lambda n: n, 5, 5, 2)) == []
    assert list(prefetch(lambda n: n, 6, 5, 2)) == []


def test_the_work_is_done_in_another_thread_unless_depth_is_zero():
    me = threading.get_ident()
    with prefetch(lambda _: threading.get_ident(), 0, 2, 1) as items:
        assert me not in list(items)
    assert list(prefetch(lambda _: threading.get_ident(), 0, 2, 0)) == [me, me]


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_no_more_than_depth_items_wait(depth):
    made, full = [], threading.Event()

    def make(step):
        made.append(step)
        if len(made) == depth:
            full.set()
        return step

    with prefetch(make, 0, 1000, depth) as items:
        assert full.wait(30)
        next(items)
        next(items)
    assert depth <= len(made) <= depth + 2


@pytest.mark.parametrize("depth", [0, 1, 4])
@pytest.mark.parametrize("stage", ["make", "put"])
def test_an_error_reaches_the_consumer_after_the_items_before_it(depth, stage):
    def broken_function(step):
        if step == 3:
            raise KeyError("row 3")
        return step

    functions = {
        "make": (broken_function, None),
        "put": (lambda step: step, broken_function),
    }
    make, put = functions[stage]
    items = prefetch(make, 0, 10, depth, put)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="row 3") as caught:
        next(items)
    assert "broken_function" in "".join(traceback.format_exception(caught.value))
    assert next(items, "over") == "over"


@pytest.mark.parametrize("depth", [0, 2])
def test_stop_iteration_inside_is_not_taken_for_the_end(depth):
    def make(step):
        return next(iter(()))

    with pytest.raises(RuntimeError, match="StopIteration"):
        list(prefetch(make, 0, 5, depth))


def test_leaving_early_ends_the_thread():
    with prefetch(lambda n: n, 0, 10**9, 2) as items:
        assert next(items) == 0
        assert len(threads()) == 1
        assert threads()[0].daemon
    assert not threads()
    assert next(items, "over") == "over"
    items.close()


def test_an_iterator_nobody_holds_ends_its_thread():
    items = prefetch(lambda n: n, 0, 10**9, 2)
    assert next(items) == 0
    (thread,) = threads()
    del items
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()


def test_the_time_waited_is_measured():
    release = threading.Event()

    def make(step):
        release.wait(30)
        return step

    with prefetch(make, 0, 2, 1) as items:
        timer = threading.Timer(0.05, release.set)
        timer.start()
        next(items)
        timer.join()
        assert 0 < items.waited_s < 30


def test_a_negative_depth_is_refused():
    with pytest.raises(ConfigError, match="depth"):
        prefetch(lambda n: n, 0, 1, -1)


# --- to the devices ------------------------------------------------------------------------------


def whole_batch():
    rng = np.random.default_rng(0)
    arrays = {n: rng.integers(0, 100, (8, 12)).astype(np.int32) for n in FIELDS[:4]}
    weights = rng.random((8, 12)).astype(np.float32)
    return Batch(**arrays, weights=weights, example_id=rng.integers(0, 9, (8, 5)).astype(np.int32))


class Recorder:
    def __init__(self):
        self.asked = []

    def __call__(self, rows):
        self.asked.append((rows.start, rows.stop))
        return jax.tree.map(lambda array: array[rows], whole_batch())


def mesh(*shape):
    names = ("data", "fsdp", "sequence", "tensor")[: len(shape)]
    return Mesh(np.array(jax.devices("cpu")[: int(np.prod(shape))]).reshape(shape), names)


@pytest.mark.parametrize(
    ("sharding", "ranges"),
    [
        (lambda: SingleDeviceSharding(jax.devices("cpu")[0]), [(0, 8)]),
        (lambda: NamedSharding(mesh(8), PartitionSpec()), [(0, 8)]),
        (lambda: NamedSharding(mesh(4), PartitionSpec("data")), [(0, 2), (2, 4), (4, 6), (6, 8)]),
        (
            lambda: NamedSharding(mesh(2, 1, 2, 2), PartitionSpec(("data", "fsdp"), "sequence")),
            [(0, 4), (4, 8)],
        ),
        (lambda: NamedSharding(mesh(1, 1, 4), PartitionSpec(None, "sequence")), [(0, 8)]),
    ],
)
def test_every_needed_range_of_rows_is_built_once(sharding, ranges):
    sharding, build = sharding(), Recorder()
    batch = to_device(build, sharding, 8)
    assert build.asked == ranges
    for name in FIELDS:
        array = getattr(batch, name)
        np.testing.assert_array_equal(np.asarray(array), getattr(whole_batch(), name))
        assert array.dtype == getattr(whole_batch(), name).dtype
        if name != "example_id":
            assert array.sharding.is_equivalent_to(sharding, 2)


def test_a_batch_that_does_not_divide_among_the_devices_is_refused():
    by_rows = NamedSharding(mesh(3), PartitionSpec("data"))
    with pytest.raises(ConfigError, match=r"batch of 8 rows.*multiple"):
        to_device(Recorder(), by_rows, 8)
    by_tokens = NamedSharding(mesh(1, 1, 5), PartitionSpec(None, "sequence"))
    with pytest.raises(ConfigError, match=r"\(8, 12\) does not divide"):
        to_device(Recorder(), by_tokens, 8)
