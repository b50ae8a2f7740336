"""Low-rank adapters: what they add, how they come off, and the library peft."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.errors import CheckpointError, ConfigError
from tokjax.models import ModelConfig, Transformer, lora, parameters
from tokjax.models.huggingface import load as load_model
from tokjax.models.huggingface import save as save_model
from tokjax.models.lora import LoraConfig

LORA = LoraConfig(rank=3, alpha=12.0, targets=("query", "value", "gate", "down"))
TOLERANCE = {"rtol": 3e-5, "atol": 3e-5}


@pytest.fixture(scope="module")
def adapted(tiny):
    """(model, parameters) with adapters that say something."""
    model, params = lora.on(tiny.model, tiny.params, LORA, jax.random.key(1))
    base, adapters = lora.split(params)
    noise = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda a: jnp.asarray(noise.normal(size=a.shape, scale=0.3), a.dtype), adapters
    )
    return model, lora.join(base, adapters)


def logits_of(model, params, tokens):
    return jax.jit(lambda p: model(p, tokens)[0])(params)


def test_new_adapters_add_nothing(tiny):
    model, params = lora.on(tiny.model, tiny.params, LORA, jax.random.key(1))
    np.testing.assert_allclose(
        logits_of(model, params, tiny.tokens),
        logits_of(tiny.model, tiny.params, tiny.tokens),
        **TOLERANCE,
    )
    a = np.asarray(params["layers"]["mlp"]["down_lora_a"])
    assert a.shape == (3, 40, 3)
    assert abs(a.std() / (3 * 40) ** -0.5 - 1) < 0.1
    assert (params["layers"]["attention"]["query_lora_b"] == 0).all()


def test_off_is_the_base_model_on_the_same_parameters(tiny, adapted):
    model, params = adapted
    plain = logits_of(tiny.model, tiny.params, tiny.tokens)
    np.testing.assert_array_equal(logits_of(lora.off(model), params, tiny.tokens), plain)
    assert np.abs(logits_of(model, params, tiny.tokens) - plain).max() > 0.1


def test_adapters_add_scale_times_a_b(tiny, adapted):
    model, params = adapted
    merged = jax.tree.map(np.asarray, tiny.params)
    for part, name in (
        ("attention", "query"),
        ("attention", "value"),
        ("mlp", "gate"),
        ("mlp", "down"),
    ):
        own = params["layers"][part]
        a, b = (np.asarray(own[f"{name}{s}"], np.float64) for s in ("_lora_a", "_lora_b"))
        merged["layers"][part][name] = merged["layers"][part][name] + 12.0 / 3 * a @ b
    expected = logits_of(tiny.model, jax.tree.map(jnp.float32, merged), tiny.tokens)
    np.testing.assert_allclose(logits_of(model, params, tiny.tokens), expected, rtol=0, atol=2e-4)


def test_merge_and_unmerge(tiny, adapted):
    model, params = adapted
    plain, merged = lora.merge(model, params)
    assert plain.config == tiny.config
    np.testing.assert_allclose(
        logits_of(plain, merged, tiny.tokens),
        logits_of(model, params, tiny.tokens),
        rtol=0,
        atol=2e-4,
    )
    again = lora.unmerge(model, merged, lora.split(params)[1])
    for one, two in zip(jax.tree.leaves(again), jax.tree.leaves(tiny.params), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-6)
    unstacked = lora.merge(model, parameters.unstack(params))[1]
    assert isinstance(unstacked["layers"], tuple)
    jax.tree.map(np.testing.assert_array_equal, parameters.stack(unstacked), merged)


def test_training_the_adapters_alone_leaves_the_base_alone(tiny, adapted):
    model, params = adapted
    base, adapters = lora.split(params)

    def loss(adapters):
        return jnp.square(model(lora.join(base, adapters), tiny.tokens)[0]).mean()

    gradient = jax.jit(jax.grad(loss))(adapters)
    assert jax.tree.structure(gradient) == jax.tree.structure(adapters)
    assert len(jax.tree.leaves(gradient)) == 8
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))


def test_rank_stabilised_scale():
    assert LoraConfig(rank=16, alpha=8.0).scale == 0.5
    assert LoraConfig(rank=16, alpha=8.0, rank_stabilised=True).scale == 2.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"targets": ()}, "targets is empty"),
        ({"targets": ("querry",)}, "unknown target 'querry'.*query"),
        ({"targets": ("query", "query")}, "twice"),
    ],
)
def test_impossible_adapters_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**changes)


def test_misuse_is_refused(tiny, adapted, tmp_path):
    model, params = adapted
    with pytest.raises(ConfigError, match="adapters already"):
        lora.on(model, params, LORA, jax.random.key(0))
    with pytest.raises(ConfigError, match="no adapters"):
        lora.merge(tiny.model, tiny.params)
    with pytest.raises(ConfigError, match="merge them"):
        save_model(tmp_path / "no", model, params)
    with pytest.raises(ConfigError, match="gated=False"):
        dataclasses.replace(tiny.config, gated=False, lora=LORA)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A Llama checkpoint and adapters of it, both on disk: (folders, model, parameters)."""
    folder = tmp_path_factory.mktemp("lora")
    sizes = {"vocab_size": 50, "d_model": 32, "n_layers": 2, "d_ff": 48}
    base = Transformer(ModelConfig(**sizes, n_heads=4, n_kv_heads=2))
    params = base.init(jax.random.key(0))
    save_model(folder / "base", base, params)
    model, params = lora.on(base, params, LORA, jax.random.key(1))
    halves = lora.split(params)
    noise = np.random.default_rng(0)
    grown = jax.tree.map(lambda a: a + 0.3 * noise.normal(size=a.shape).astype("f4"), halves[1])
    params = lora.join(halves[0], grown)
    lora.save(folder / "adapter", model, params, base="base")
    return folder, model, params


def test_what_is_saved_is_loaded_again(saved):
    folder, _, params = saved
    base, base_params = load_model(folder / "base")
    again, loaded = lora.load(folder / "adapter", base, base_params)
    assert again.config.lora == LORA
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.filterwarnings("ignore")
def test_peft_reads_ours_and_we_read_pefts(saved, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    folder, model, params = saved
    tokens = np.random.default_rng(1).integers(0, 50, (2, 9)).astype(np.int32)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    theirs = peft.PeftModel.from_pretrained(base, folder / "adapter")
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    ours = logits_of(model, params, tokens)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)
    assert np.abs(ours - logits_of(lora.off(model), params, tokens)).max() > 0.1

    theirs.save_pretrained(tmp_path)
    again, loaded = lora.load(tmp_path, *load_model(folder / "base"))
    np.testing.assert_array_equal(logits_of(again, loaded, tokens), ours)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"peft_type": "IA3"}, ConfigError, "peft_type='IA3'"),
        ({"use_dora": True}, ConfigError, "use_dora=True"),
        ({"target_modules": ["q_prj"]}, ConfigError, "'q_prj'.*q_proj"),
        ({"r": 4}, CheckpointError, r"has shape \[3, 32\].*\[4, 32\]"),
        ({"target_modules": ["q_proj"]}, CheckpointError, "has no place"),
        ({"target_modules": ["q_proj", "k_proj"]}, CheckpointError, r"no tensor .*k_proj\.lora_A"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(saved, tmp_path, change, error, message):
    folder, _, _ = saved
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((folder / "adapter" / name).read_bytes())
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(described | change))
    with pytest.raises(error, match=message):
        lora.load(tmp_path, *load_model(folder / "base"))


def test_a_fused_matrix_has_no_place_in_pefts_form(tmp_path):
    config = ModelConfig(family="phi3", vocab_size=9, d_model=8, n_heads=2, n_layers=1)
    base = Transformer(config)
    model, params = lora.on(base, base.init(jax.random.key(0)), LORA, jax.random.key(1))
    with pytest.raises(ConfigError, match=r"keeps 'query' in the fused .*lora\.merge"):
        lora.save(tmp_path, model, params)
