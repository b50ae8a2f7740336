import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.models import ModelConfig, Transformer, lora, parameters
from tokjax.models.cost import forward_flops, training_flops, tree_bytes
from tokjax.models.lora import LoraConfig
from tokjax.models.quantized import quantize

SMALL = ModelConfig(vocab_size=500, d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=96)


@pytest.fixture(scope="module")
def params():
    return parameters.init_parameters(SMALL, jax.random.key(0))


def flat(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def test_shapes_dtypes_and_axes_come_from_one_table(params):
    axes = parameters.logical_axes(SMALL)
    assert jax.tree.structure(params) == jax.tree.structure(
        axes, is_leaf=lambda x: isinstance(x, tuple)
    )
    for path, leaf in flat(params).items():
        assert leaf.dtype == jnp.float32, path
    assert params["layers"]["attention"]["key"].shape == (3, 64, 32)
    assert axes["layers"]["attention"]["key"] == ("layers", "embed", "kv_heads")
    assert params["layers"]["mlp"]["down"].shape == (3, 96, 64)
    assert axes["embedding"] == ("vocab", "embed")


def test_matrices_start_with_the_deviations_of_the_table(params):
    layers, fan_in = params["layers"], {"down": 96}
    for part, names in (
        ("attention", ("query", "key", "value", "out")),
        ("mlp", ("gate", "up", "down")),
    ):
        for name in names:
            expected = fan_in.get(name, 64) ** -0.5
            if name in ("out", "down"):
                expected /= np.sqrt(2 * SMALL.n_layers)
            for layer in np.asarray(layers[part][name]):
                assert abs(layer.mean()) < 5 * expected / np.sqrt(layer.size)
                assert abs(layer.std() / expected - 1) < 5 / np.sqrt(2 * layer.size)
    assert abs(float(params["embedding"].std()) / 0.02 - 1) < 0.02
    assert (layers["attention"]["norm"] == 1).all()
    assert (params["norm"] == 1).all()


def test_no_two_layers_or_parameters_start_alike(params):
    matrices = [np.asarray(m) for m in jax.tree.leaves(params["layers"]) if m.ndim == 3]
    starts = [tuple((layer / layer.std()).reshape(-1)[:4]) for m in matrices for layer in m]
    assert len(set(starts)) == len(starts) == 7 * SMALL.n_layers


def test_a_parameters_start_depends_on_the_key_and_its_own_path_only(params):
    # The same start although the model has more parameters, before and behind it in order.
    richer = dataclasses.replace(SMALL, attention_bias=True, tie_embeddings=False)
    other = flat(parameters.init_parameters(richer, jax.random.key(0)))
    assert len(other) == len(flat(params)) + 4
    for path, leaf in flat(params).items():
        np.testing.assert_array_equal(leaf, other[path], err_msg=path)
    moved = flat(parameters.init_parameters(SMALL, jax.random.key(1)))
    assert (moved["['embedding']"] != params["embedding"]).any()


def test_parameters_start_in_their_own_dtype():
    low = dataclasses.replace(SMALL, param_dtype="bfloat16", dtype="bfloat16")
    shapes = jax.eval_shape(lambda: parameters.init_parameters(low, jax.random.key(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("bfloat16")}


def test_counts_by_part_add_up_to_the_arrays(params):
    counts = parameters.count_parameters(SMALL)
    assert counts == {
        "embedding": 500 * 64,
        "attention": 3 * (64 * 64 + 2 * 64 * 32 + 64 * 64),
        "mlp": 3 * 3 * 64 * 96,
        "norms": 3 * 2 * 64 + 64,
    }
    assert sum(counts.values()) == sum(leaf.size for leaf in jax.tree.leaves(params))
    untied = dataclasses.replace(SMALL, tie_embeddings=False)
    assert parameters.count_parameters(untied)["head"] == 500 * 64


def test_stack_undoes_unstack(params):
    unstacked = parameters.unstack(params)
    assert len(unstacked["layers"]) == SMALL.n_layers
    np.testing.assert_array_equal(
        unstacked["layers"][2]["mlp"]["up"], params["layers"]["mlp"]["up"][2]
    )
    assert parameters.unstack(unstacked)["layers"] is unstacked["layers"]
    back = parameters.stack(unstacked)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert parameters.stack(back)["layers"] is back["layers"]


def test_flops_equal_the_count_by_hand_and_the_compilers():
    T = 32
    matrices = 3 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 96) + 500 * 64
    expected = 2 * matrices + 3 * 4 * T * 64
    assert forward_flops(SMALL, T) == expected
    assert training_flops(SMALL, T) == 3 * expected
    from tokjax.models import Transformer

    model = Transformer(dataclasses.replace(SMALL, attention="dense", unroll=3))
    tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)
    cost = jax.jit(lambda p, t: model(p, t)[0]).lower(model.abstract_params(), tokens).compile()
    # The compiler counts norms, softmax and the like too.
    assert 1.0 <= cost.cost_analysis()["flops"] / (T * expected) < 1.1


def test_bytes_of_a_tree_leave_keys_of_random_numbers_out():
    tree = {"a": jnp.zeros((3, 4)), "b": jnp.zeros(5, jnp.bfloat16), "key": jax.random.key(0)}
    assert tree_bytes(tree) == 3 * 4 * 4 + 5 * 2
    assert tree_bytes(jax.eval_shape(lambda: tree)) == 3 * 4 * 4 + 5 * 2


FORMS = {
    "plain": {},
    "biases": {"attention_bias": True, "out_bias": True, "mlp_bias": True},
    "no bias of keys": {"attention_bias": True, "key_bias": False},
    "no gate": {"gated": False, "activation": "gelu"},
    "norms of heads": {"qk_norm": True},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("apart", [False, True], ids=["stacked", "unstacked"])
def test_joined_matrices_compute_what_they_do_apart(form, apart):
    model = Transformer(dataclasses.replace(SMALL, **FORMS[form]))
    params = jax.jit(model.init)(jax.random.key(0))
    # Biases begin at 0, which would hide where they go.
    params = jax.tree.map(
        lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params
    )
    params = parameters.unstack(params) if apart else params
    fused = parameters.fuse(params)
    attention = (fused["layers"][0] if apart else fused["layers"])["attention"]
    assert "query_key_value" in attention and "query" not in attention
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, 500)
    run = jax.jit(lambda p: model(p, tokens)[0])
    np.testing.assert_allclose(run(fused), run(params), rtol=2e-5, atol=2e-5)
    assert jax.tree.structure(parameters.fuse(fused)) == jax.tree.structure(fused)


def test_adapted_matrices_stay_apart_and_quantised_ones_are_joined():
    model = Transformer(SMALL)
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, 500)
    adapted, with_adapters = lora.on(model, params, LoraConfig(), jax.random.key(2))
    fused = parameters.fuse(with_adapters)
    assert "query" in fused["layers"]["attention"] and "gate_up" in fused["layers"]["mlp"]
    np.testing.assert_allclose(
        adapted(fused, tokens)[0], adapted(with_adapters, tokens)[0], rtol=2e-5, atol=2e-5
    )
    quantised = quantize(params)
    fused = parameters.fuse(quantised)
    assert fused["layers"]["attention"]["query_key_value"].values.shape == (3, 64, 128)
    np.testing.assert_allclose(
        model(fused, tokens)[0], model(quantised, tokens)[0], rtol=2e-5, atol=2e-5
    )
