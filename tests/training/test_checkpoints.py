import logging
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tokjax.errors import CheckpointError, ConfigError, StorageError
from tokjax.training import checkpoints as c
from tokjax.training.checkpoints import CheckpointConfig, Checkpointer

IDENTITY = {"model": {"width": 4, "layers": 2}, "tokenizer": "abc"}


def make_state(value):
    """A state with every kind of leaf, all of whose numbers depend on `value`."""
    return {
        "params": {
            "w": jnp.arange(32, dtype=jnp.float32).reshape(8, 4) + value,
            "b": (jnp.arange(8) + value).astype(jnp.bfloat16),
        },
        "optimizer": (jnp.int32(value), {"q": jnp.arange(16, dtype=jnp.uint8) + value}),
        "rng": jax.random.key(value),
        "keys": jax.random.split(jax.random.key(value, impl="rbg"), 2),
        "counts": np.arange(3, dtype=np.int64) + (value << 40),
        "none": jnp.zeros((0, 4)),
    }


def abstract(state):
    """The template that a fresh process has: shapes and dtypes, NumPy leaves as they are."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x, state
    )


def bits(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), leaf.shape, np.asarray(jax.random.key_data(leaf)).tobytes()
    return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert jax.tree.map(bits, found) == jax.tree.map(bits, expected)


def opened(directory, *, identity=IDENTITY, read_only=False, **config):
    return Checkpointer(
        directory, CheckpointConfig(**config), identity=identity, read_only=read_only
    )


@pytest.fixture
def run(tmp_path):
    """A directory with steps 1, 2 and 3."""
    with opened(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step), metadata={"position": step * 10})
    return tmp_path


def data_file(directory, step):
    """The largest file of a step: array data."""
    files = (path for path in (directory / f"step-{step:08d}" / "state").rglob("*"))
    return max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path, where=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if where is None else where] ^= 1
    path.write_bytes(content)


def test_a_part_is_restored_alone_whatever_the_configuration(tmp_path):
    state = make_state(3)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state, metadata={"a": 1})
    with opened(tmp_path, identity={}, read_only=True) as checkpoints:
        part = {"params": abstract(state)["params"]}
        restored = checkpoints.restore(part, partial=True)
        assert restored.step == 1 and restored.metadata == {"a": 1}
        assert_same(restored.state, {"params": state["params"]})
        with pytest.raises(CheckpointError, match="params/c: not in the checkpoint"):
            checkpoints.restore({"params": {"c": part["params"]["w"]}}, partial=True)


def test_everything_comes_back_bit_for_bit(tmp_path):
    state = make_state(5)
    state["params"]["w"] = state["params"]["w"].at[0].set(jnp.array([jnp.nan, -0.0, jnp.inf, 1]))
    metadata = {"data": {"epoch": 1, "record": 2**60}, "config": {"seed": 0}, "note": "é"}
    with opened(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract(state)) is None
        assert (checkpoints.steps(), checkpoints.latest(), checkpoints.best()) == ([], None, None)
        checkpoints.save(7, state, metadata=metadata, metrics={"loss": 1.5})
    with opened(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract(state))
        assert (checkpoints.steps(), checkpoints.latest()) == ([7], 7)
    assert_same(restored.state, state)
    assert (restored.step, restored.metadata, restored.lost_steps) == (7, metadata, ())
    assert isinstance(restored.state["counts"], np.ndarray)
    assert jax.random.uniform(restored.state["rng"]) == jax.random.uniform(state["rng"])


def test_arrays_may_be_donated_and_changed_as_soon_as_save_returns(tmp_path):
    shape = (1 << 20,)
    bump = jax.jit(lambda x: x + 1, donate_argnums=0)
    state = {"w": jnp.zeros(shape), "n": np.zeros(shape, np.float32)}
    metadata = {"position": [1]}
    with opened(tmp_path, keep=9) as checkpoints:
        for step in range(3):
            checkpoints.save(step, state, metadata=metadata)
            metadata["position"].append(step)
            state["n"] += 1
            for _ in range(5):
                state["w"] = bump(state["w"])
        for step in range(3):
            restored = checkpoints.restore(state, step)
            assert np.all(np.asarray(restored.state["w"]) == 5 * step)
            assert np.all(restored.state["n"] == step)
            assert restored.metadata["position"] == [1, *range(step)]


def test_a_state_saved_on_one_mesh_restores_on_another(tmp_path):
    devices = np.asarray(jax.devices())
    fsdp = NamedSharding(jax.sharding.Mesh(devices, ("fsdp",)), P("fsdp"))
    grid = jax.sharding.Mesh(devices.reshape(2, 4), ("data", "tensor"))
    key = jax.random.split(jax.random.key(1), 8)
    plain = {"w": make_state(3)["params"]["w"], "b": make_state(3)["params"]["b"], "key": key}
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, jax.device_put(plain, fsdp), metadata={})
        for shardings in (
            {"w": NamedSharding(grid, P("data", "tensor")), "b": NamedSharding(grid, P("tensor"))},
            {"w": NamedSharding(grid, P(None, "data")), "b": NamedSharding(grid, P())},
            {name: jax.sharding.SingleDeviceSharding(devices[0]) for name in "wb"},
        ):
            shardings["key"] = shardings["b"]
            template = {
                name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
                for name, leaf in plain.items()
            }
            state = checkpoints.restore(template).state
            assert_same(state, plain)
            for name, leaf in state.items():
                assert leaf.sharding.is_equivalent_to(shardings[name], leaf.ndim)


def test_template_may_depend_on_the_step_that_is_found(tmp_path):
    with opened(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"w": jnp.full(step, step)}, metadata={})
        checkpoints.wait()
        flip(data_file(tmp_path, 2))
        restored = checkpoints.restore(lambda step: {"w": jnp.zeros(step, jnp.int32)})
    assert_same(restored.state, {"w": jnp.full(1, 1)})


def test_nothing_is_cast_and_every_mismatch_is_named(run):
    template = abstract(make_state(0))
    template["params"]["w"] = jax.ShapeDtypeStruct((8, 4), jnp.bfloat16)
    template["params"]["bias"] = template["params"].pop("b")
    template["rng"] = abstract(jax.random.key(0, impl="rbg"))
    with opened(run) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.restore(template)
    text = str(error.value)
    assert "params/w: the checkpoint has float32[8,4], the model bfloat16[8,4]" in text
    assert "rng: the checkpoint has key<threefry2x32>[], the model key<rbg>[]" in text
    assert "params/bias: not in the checkpoint." in text
    assert "params/b: only in the checkpoint." in text


def test_another_configuration_is_refused_with_both_values(run):
    identity = {"model": {"width": 8, "layers": 2}, "seed": 1}
    with opened(run, identity=identity) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.restore(abstract(make_state(0)))
    text = str(error.value)
    assert "model.width: 4 in the checkpoint, 8 in this run" in text
    assert 'tokenizer: "abc" in the checkpoint, absent in this run' in text
    assert "seed: absent in the checkpoint, 1 in this run" in text
    assert "layers" not in text
    assert "another workdir" in text


def no_pointer(run):
    (run / "pointer.json").write_bytes(b"\x00" * 60)


def move_state(run):
    shutil.rmtree(run / "step-00000003" / "state")


def add_file(run):
    (run / "step-00000003" / "state" / "extra").write_text("?")


def empty_step(run):
    shutil.rmtree(run / "step-00000003")
    (run / "step-00000003").mkdir()


DAMAGE = {
    "flipped bit": (lambda run: flip(data_file(run, 3)), "does not have the bytes", 2),
    "truncated": (lambda run: os.truncate(data_file(run, 3), 9), "has 9 bytes, the manifest", 2),
    "deleted file": (lambda run: data_file(run, 3).unlink(), "is missing", 2),
    "deleted state": (move_state, "is missing", 2),
    "added file": (add_file, "state/extra was not written by the save", 2),
    "metadata": (lambda run: flip(run / "step-00000003/metadata.json"), "metadata.json does", 2),
    "manifest": (lambda run: flip(run / "step-00000003/manifest.json"), "manifest.json", 2),
    "no manifest": (lambda r: (r / "step-00000003/manifest.json").unlink(), "manifest.json is", 2),
    "empty directory": (empty_step, "the directory is empty", 2),
    "no directory": (lambda run: shutil.rmtree(run / "step-00000003"), "directory is missing", 2),
    "no pointer": (lambda run: (run / "pointer.json").unlink(), "pointer.json is missing", 3),
    "bad pointer": (no_pointer, "pointer.json is no whole JSON", 3),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_newest_good_step_is_used(run, caplog, kind):
    damage, said, good = DAMAGE[kind]
    damage(run)
    template = abstract(make_state(0))
    with opened(run, strict=True) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.restore(template)
    assert said in str(error.value)
    assert "strict" in str(error.value)

    caplog.clear()
    with opened(run) as checkpoints:
        restored = checkpoints.restore(template)
        assert said in caplog.text
        assert all(record.levelno == logging.WARNING for record in caplog.records)
        assert_same(restored.state, make_state(good))
        assert (restored.step, restored.metadata) == (good, {"position": good * 10})
        assert [lost.step for lost in restored.lost_steps] == ([3] if good == 2 else [])
        # The run goes on and saves the same number again; that one is then the latest.
        checkpoints.save(3, make_state(33), metadata={})
    caplog.clear()
    with opened(run, strict=True) as checkpoints:
        assert_same(checkpoints.restore(template).state, make_state(33))
        assert checkpoints.steps() == [1, 2, 3]
    assert caplog.records == []


def test_damaged_step_is_set_aside_not_deleted_when_the_run_goes_past_it(run):
    flip(data_file(run, 3))
    content = data_file(run, 3).read_bytes()
    with opened(run, keep=2) as checkpoints:
        checkpoints.restore(abstract(make_state(0)))
        checkpoints.save(4, make_state(4), metadata={})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 4]  # the damaged one takes no place of a good one
    aside = run / "damaged-00000003-1"
    assert content in [path.read_bytes() for path in aside.rglob("*") if path.is_file()]


def test_when_all_are_damaged_the_error_lists_them_all(run):
    for step in (1, 2, 3):
        flip(data_file(run, step))
    with opened(run) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.restore(abstract(make_state(0)))
    for step in (1, 2, 3):
        assert f"step {step} in {run} is damaged" in str(error.value)


def test_unreadable_pointer_and_no_step_is_not_taken_for_a_fresh_start(run):
    no_pointer(run)
    for step in (1, 2, 3):
        shutil.rmtree(run / f"step-{step:08d}")
    with opened(run) as checkpoints, pytest.raises(CheckpointError, match="can be used"):
        checkpoints.restore(abstract(make_state(0)))


def test_a_step_asked_for_is_restored_or_refused_never_replaced_by_another(run):
    template = abstract(make_state(0))
    flip(data_file(run, 3))
    with opened(run) as checkpoints:
        assert_same(checkpoints.restore(template, 1).state, make_state(1))
        with pytest.raises(CheckpointError, match=r"step 3 .* is damaged"):
            checkpoints.restore(template, 3)
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 9.*1, 2, 3"):
            checkpoints.restore(template, 9)


def test_after_a_rewind_the_run_continues_from_its_new_course(run):
    template = abstract(make_state(0))
    with opened(run, keep=5) as checkpoints:
        checkpoints.restore(template, 1)
        checkpoints.save(2, make_state(22), metadata={})
    with opened(run, keep=5) as checkpoints:
        restored = checkpoints.restore(template)
        assert restored.step == checkpoints.latest() == 2
    assert_same(restored.state, make_state(22))


def test_retention_keeps_the_newest_the_multiples_and_the_best(tmp_path):
    config = {"keep": 1, "keep_every": 4, "best_metric": "loss"}
    with opened(tmp_path, **config) as checkpoints:
        for step, loss in enumerate([9.0, 3.0, 5.0, float("nan"), 7.0, 8.0], 1):
            checkpoints.save(step, make_state(step), metrics={"loss": loss}, metadata={})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 4, 6]
        assert (checkpoints.best(), checkpoints.latest()) == (2, 6)
        assert_same(checkpoints.restore(abstract(make_state(0)), 2).state, make_state(2))


def test_when_a_save_is_due():
    checkpoints = Checkpointer.__new__(Checkpointer)
    checkpoints._config = CheckpointConfig(every_steps=5)
    assert [step for step in range(12) if checkpoints.due(step)] == [5, 10]


# Orbax closes its event loop at the first failed write; the others then complain to nobody.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_full_disk_is_said_at_the_next_call_once_and_what_was_saved_stays(run, caplog):
    big = make_state(0) | {"w": jax.random.normal(jax.random.key(0), (1 << 18,))}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    pointer = (run / "pointer.json").read_bytes()
    with opened(run) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
        try:
            checkpoints.save(4, big, metadata={})
            with pytest.raises(StorageError, match=r"saving-00000004.*File too large"):
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        checkpoints.wait()  # said once
        assert caplog.text == ""  # and not by pages of tracebacks from the background
        assert (run / "pointer.json").read_bytes() == pointer
        assert not list(run.glob("saving-*"))  # which gives the room back
        assert_same(checkpoints.restore(abstract(make_state(0))).state, make_state(3))
        checkpoints.save(4, big, metadata={})
        checkpoints.wait()
        assert checkpoints.latest() == 4


@pytest.mark.parametrize("name", ["manifest.json", "pointer.json", "metadata.json"])
def test_failure_to_write_any_of_our_files_leaves_the_last_checkpoint(run, monkeypatch, name):
    replace = os.replace

    def fail(source, target):
        if Path(target).name == name:
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    with opened(run) as checkpoints, monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        checkpoints.save(4, make_state(4), metadata={})
        with pytest.raises(StorageError, match=f"{name}: No space left"):
            checkpoints.close()
    with opened(run) as checkpoints:
        restored = checkpoints.restore(abstract(make_state(0)))
    # A step that is whole but for the pointer is as good as committed.
    assert restored.step == (4 if name == "pointer.json" else 3)
    assert_same(restored.state, make_state(restored.step))


def test_files_that_another_process_writes_beside_the_arrays_are_not_waited_for(
    tmp_path, monkeypatch
):
    """Its checksums go through a temporary file, which is gone a moment later."""
    passing = tmp_path / "saving-00000001" / "..share-1.1-1.tmp"
    really = c.list_files

    def list_files(directory):
        passing.write_text("{}")
        found = really(directory)
        passing.unlink()
        return found

    monkeypatch.setattr(c, "list_files", list_files)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), metadata={})
        checkpoints.wait()
        assert checkpoints.latest() == 1


def test_directory_that_cannot_be_made_is_said_at_once_with_its_path(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/checkpoints"):
        opened(tmp_path / "file" / "checkpoints")
    with pytest.raises(ConfigError, match="gs://bucket/run is a URL"):
        opened("gs://bucket/run")


def test_error_in_the_with_block_is_not_hidden_by_a_failed_save(run, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    with pytest.raises(ZeroDivisionError) as error, opened(run) as checkpoints:  # noqa: PT012
        monkeypatch.setattr(c.CheckpointFolder, "commit", fail)
        checkpoints.save(4, make_state(4), metadata={})
        raise ZeroDivisionError
    assert "No space left on device" in error.value.__notes__[0]


def test_state_and_metadata_that_cannot_be_stored_are_refused_before_anything_is_written(run):
    with opened(run) as checkpoints:
        with pytest.raises(TypeError, match="leaf 'lr' of the state is a float"):
            checkpoints.save(4, {"lr": 0.1}, metadata={})
        with pytest.raises(ValueError, match="step is -1"):
            checkpoints.save(-1, make_state(4), metadata={})
        with pytest.raises(TypeError, match="metadata of a checkpoint must be JSON"):
            checkpoints.save(4, make_state(4), metadata={"path": Path()})
        assert checkpoints.steps() == [1, 2, 3]


def test_reader_changes_nothing_and_reads_while_a_run_saves(run):
    with opened(run) as writer:
        writing = writer._folder.begin(4)
        with opened(run, read_only=True) as reader:
            assert reader.restore(abstract(make_state(0))).step == 3
            with pytest.raises(CheckpointError, match="read-only"):
                reader.save(5, make_state(5), metadata={})
        assert writing.exists()


def test_closed_checkpointer_refuses_to_save(tmp_path):
    checkpoints = opened(tmp_path)
    checkpoints.close()
    checkpoints.close()
    with pytest.raises(CheckpointError, match="closed"):
        checkpoints.save(1, make_state(1), metadata={})


SAVE_FOR_EVER = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, numpy as np
from tokjax.training.checkpoints import Checkpointer, CheckpointConfig
with Checkpointer(sys.argv[1], CheckpointConfig(keep=2), identity={}) as checkpoints:
    values = np.zeros((5, 4000), np.int32)
    restored = checkpoints.restore({"values": values, "key": jax.random.key(0)})
    step = 0
    if restored is not None:
        step = restored.step
        assert restored.metadata == {"step": step}, restored.metadata
        assert (restored.state["values"] == step).all()
        assert not restored.lost_steps, restored.lost_steps
    start = step
    for step in range(step + 1, 10**9):
        state = {"values": values + step, "key": jax.random.key(step)}
        checkpoints.save(step, state, metadata={"step": step})
        if step == start + 2:  # the one before is committed: the kill may come
            print("from", start, flush=True)
"""


def test_killed_while_saving_it_always_finds_its_last_good_step(tmp_path):
    rng = random.Random(0)
    starts = []
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        line = process.stdout.readline()
        try:
            process.wait(timeout=rng.random() * 0.5)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        _, complaints = process.communicate()
        assert process.returncode == -signal.SIGKILL, complaints
        assert line.startswith("from "), complaints
        starts.append(int(line.split()[1]))
    assert starts[0] == 0
    assert starts == sorted(set(starts))  # every start had got further


TWO_PROCESSES = """
import os, sys, json
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
port, process, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, process)
from pathlib import Path
from tokjax.errors import CheckpointError, StorageError
from tokjax.training.checkpoints import Checkpointer, CheckpointConfig
from tokjax.training.checkpoint_folder import CheckpointFolder
mesh = Mesh(np.asarray(jax.devices()), ("fsdp",))
def state(value):
    def put(array, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    words = np.asarray([[0, value]], np.uint32).repeat(4, 0)
    return {
        "w": put(np.arange(64, dtype=np.float32).reshape(8, 8) + value, P("fsdp")),
        "b": put(np.full(4, value, np.int32), P()),
        "keys": jax.random.wrap_key_data(put(words, P("fsdp"))),
        "n": np.asarray([value]),
    }
def check(restored, value):
    expected = state(value)
    for name in ("w", "b", "n"):
        found, wanted = restored.state[name], expected[name]
        shards = getattr(found, "addressable_shards", None)
        assert found.dtype == wanted.dtype
        if shards is None:
            assert (found == wanted).all()
        else:
            assert found.sharding == wanted.sharding
            for a, b in zip(shards, wanted.addressable_shards):
                assert (np.asarray(a.data) == np.asarray(b.data)).all(), name
    keys = jax.random.key_data(restored.state["keys"])
    assert (np.asarray(keys.addressable_shards[0].data)[:, 1] == value).all()
with Checkpointer(directory, CheckpointConfig(keep=2), identity={"seed": 1}) as checkpoints:
    assert checkpoints.restore(state(0)) is None
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), metadata={"position": step})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3]
    check(checkpoints.restore(state(0)), 3)
    # A failure of process 0 is an error everywhere.
    try:
        checkpoints.restore(state(0), 9)
    except CheckpointError as error:
        assert "no checkpoint of step 9" in str(error)
    else:
        raise AssertionError("no error")
    commit = CheckpointFolder.commit
    def fail(*args):
        raise StorageError("disk full")
    CheckpointFolder.commit = fail
    checkpoints.save(4, state(4), metadata={})
    try:
        checkpoints.wait()
    except StorageError as error:
        assert "disk full" in str(error)
    else:
        raise AssertionError("no error")
    CheckpointFolder.commit = commit
    if process == 0:
        files = [p for p in Path(directory, "step-00000003").rglob("*") if p.is_file()]
        path = max((p for p in files if "/d/" in str(p)), key=lambda p: p.stat().st_size)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    from jax.experimental import multihost_utils
    multihost_utils.sync_global_devices("damaged")
    restored = checkpoints.restore(state(0))
    check(restored, 2)
    assert [lost.step for lost in restored.lost_steps] == [3]
    checkpoints.save(3, state(33), metadata={"position": 33})
with Checkpointer(directory, CheckpointConfig(), identity={"seed": 1}) as checkpoints:
    check(checkpoints.restore(state(0)), 33)
print("done", process, flush=True)
"""


def test_two_processes_save_together_and_agree(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(port), str(index), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for index, output in enumerate(outputs):
        assert f"done {index}" in output, "\n".join(outputs)
    # One process on one device reads what two have written.
    template = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
    template |= {"b": jax.ShapeDtypeStruct((4,), jnp.int32), "n": np.zeros(1, np.int64)}
    template["keys"] = abstract(jax.random.split(jax.random.key(0), 4))
    with opened(tmp_path, identity={"seed": 1}, read_only=True) as checkpoints:
        restored = checkpoints.restore(template)
    assert np.array_equal(restored.state["w"], np.arange(64.0).reshape(8, 8) + 33)
    assert restored.metadata == {"position": 33}
