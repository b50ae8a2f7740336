"""Checkpoints in pieces, damaged, or laid out on a mesh."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from tokjax.errors import CheckpointError, StorageError
from tokjax.models import ModelConfig, Transformer
from tokjax.models.huggingface import load, save
from tokjax.parallel.mesh import MeshConfig, build_mesh

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def model():
    sizes = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "d_ff": 48}
    model = Transformer(ModelConfig(**sizes, n_heads=4, n_kv_heads=2, head_dim=8))
    return model, model.init(jax.random.key(0))


@pytest.fixture
def folder(model, tmp_path):
    save(tmp_path / "checkpoint", *model)
    return tmp_path / "checkpoint"


def rewrite_header(path, change):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_loading_gives_back_the_same_bits(model, folder):
    ours, params = load(folder)
    assert ours.config == model[0].config
    jax.tree.map(np.testing.assert_array_equal, params, model[1])


def test_shards_give_back_the_same_bits_and_an_index_that_others_read(model, tmp_path):
    save(tmp_path / "many", *model, max_shard_bytes=20_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in jax.tree.leaves(model[1]))
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "many")[1], model[1])
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    np.testing.assert_array_equal(theirs.lm_head.weight.detach(), model[1]["embedding"])


def test_a_mesh_gets_its_shards(model, folder):
    mesh = build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    _, params = load(folder, mesh=mesh)
    up = params["layers"]["mlp"]["up"]
    assert up.sharding.mesh == mesh
    assert up.addressable_shards[0].data.shape == (2, 16, 24)
    jax.tree.map(np.testing.assert_array_equal, params, model[1])


def test_dtypes_are_kept_or_changed_when_asked(model, folder, tmp_path):
    half = load(folder, dtype="bfloat16")
    assert {a.dtype.name for a in jax.tree.leaves(half[1])} == {"bfloat16"}
    assert (half[0].config.param_dtype, half[0].config.dtype) == ("bfloat16", "bfloat16")
    save(tmp_path / "half", *half)
    again = load(tmp_path / "half")
    jax.tree.map(np.testing.assert_array_equal, again[1], half[1])
    assert again[0].config == half[0].config
    save(tmp_path / "mixed", half[0], {**half[1], "norm": model[1]["norm"]})
    mixed = load(tmp_path / "mixed")[1]
    assert (mixed["norm"].dtype.name, mixed["embedding"].dtype.name) == ("float32", "bfloat16")


def test_a_backbone_without_prefix_is_read(model, folder):
    def bare(header):
        for name in [n for n in header if n.startswith("model.")]:
            header[name.removeprefix("model.")] = header.pop(name)

    rewrite_header(folder / "model.safetensors", bare)
    jax.tree.map(np.testing.assert_array_equal, load(folder)[1], model[1])


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file_is_named(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(folder)


def test_the_cut_off_tensor_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"is cut off: tensor '\S+' should end at byte"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.pop(NAME), f"there is no tensor '{NAME}'"),
        (lambda h: h.update({"model.odd": h[NAME]}), "tensor 'model.odd' has no place"),
        (lambda h: h[NAME].update(shape=[32, 48]), rf"'{NAME}' has shape \[32, 48\].*\[48, 32\]"),
        (lambda h: h[NAME].update(shape=[47, 32]), f"'{NAME}' .* should take"),
        (lambda h: h[NAME].update(dtype="I32"), f"'{NAME}' holds I32"),
        (lambda h: h[NAME].update(dtype="F8_E4M3"), f"'{NAME}' has the dtype F8_E4M3"),
        (lambda h: h[NAME].pop("shape"), "damaged header"),
    ],
)
def test_what_is_wrong_with_a_tensor_is_said_with_its_name_and_file(folder, change, message):
    rewrite_header(folder / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder)
    assert str(folder) in str(error.value)


def test_more_layers_than_the_configuration_has_are_refused(folder):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"layers\.1\.\S+ has no place .*\(1 layers\)"):
        load(folder)


def test_a_head_that_should_be_tied_must_be_the_embedding(model, folder):
    path = folder / "model.safetensors"

    def head_from(name):
        return lambda h: h.update({"lm_head.weight": dict(h[name])})

    rewrite_header(path, head_from("model.embed_tokens.weight"))
    load(folder)

    def differs(header):
        own = header["lm_head.weight"]
        own["data_offsets"] = [own["data_offsets"][0] - 4, own["data_offsets"][1] - 4]
        if own["data_offsets"][0] < 0:
            own["data_offsets"] = [4, own["data_offsets"][1] + 8]

    rewrite_header(path, differs)
    with pytest.raises(
        CheckpointError, match=r"'lm_head.weight' differs from .*tie_word_embeddings"
    ):
        load(folder)


def test_missing_shards_and_wrong_indices_are_named(model, tmp_path):
    folder = tmp_path / "many"
    save(folder, *model, max_shard_bytes=20_000)
    first = min(folder.glob("model-*.safetensors"))
    first.rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=rf"{first.name} is missing"):
        load(folder)
    (tmp_path / "away").rename(first)
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for change, message in (
        ({"model.more": first.name}, "has no tensor 'model.more'"),
        ({"model.more": "../outside.safetensors"}, "outside its folder"),
    ):
        index.write_text(json.dumps({"weight_map": good["weight_map"] | change}))
        with pytest.raises(CheckpointError, match=message):
            load(folder)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        load(folder)


def test_a_pickle_is_never_opened(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, a pickle.*safetensors"):
        load(folder)


def test_folders_that_are_no_checkpoints_are_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="name the folder"):
        load(folder / "model.safetensors")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is no valid JSON"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: No such file"):
        load(folder)


def test_a_folder_is_only_replaced_when_asked_and_then_whole(model, folder):
    (folder / "old").write_text("")
    with pytest.raises(StorageError, match="exists already"):
        save(folder, *model)
    assert (folder / "old").exists()
    save(folder, *model, overwrite=True)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_save_that_fails_leaves_nothing(model, tmp_path, monkeypatch):
    from tokjax.models.huggingface import saving

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_tensors", full)
    with pytest.raises(StorageError, match="No space left"):
        save(tmp_path / "new", *model)
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_generation_settings_and_ids_are_carried_along(model, folder, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"temperature": 0.2}')
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"eos_token_id": [2, 7]}))
    save(tmp_path / "copy", *model, source=folder)
    assert (tmp_path / "copy/tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "copy/generation_config.json").read_text())["temperature"] == 0.2
    assert json.loads((tmp_path / "copy/config.json").read_text())["eos_token_id"] == [2, 7]


_PEAK = """
import resource, sys
from tokjax.models.huggingface import load
import jax
jax.numpy.zeros(3).block_until_ready()
load(sys.argv[2], dtype=None)  # a tiny one, so that what is loaded lazily is there
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model, params = load(sys.argv[1])
jax.block_until_ready(params)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024, sum(a.nbytes for a in jax.tree.leaves(params)))
"""


def test_loading_takes_little_more_memory_than_the_parameters(folder, tmp_path):
    config = ModelConfig(vocab_size=4096, d_model=512, n_layers=12, n_heads=8, d_ff=2048)
    model = Transformer(config)
    save(tmp_path / "large", model, jax.jit(model.init)(jax.random.key(0)))
    run = subprocess.run(
        [sys.executable, "-c", _PEAK, str(tmp_path / "large"), str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, size = map(int, run.stdout.split())
    assert size > 200e6
    assert peak < 1.2 * size
    shutil.rmtree(tmp_path / "large")
