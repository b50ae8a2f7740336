import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tokjax.errors import ConfigError
from tokjax.models import ModelConfig, Transformer, parameters
from tokjax.parallel.mesh import MeshConfig, build_mesh
from tokjax.parallel.rules import (
    RULES,
    constrain,
    current_mesh_shape,
    fit_spec,
    parameter_shardings,
    partition_spec,
)


@pytest.fixture(scope="module")
def mesh():
    """Two replicas of two shards of two tensor halves."""
    return build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def test_logical_axes_become_mesh_axes():
    assert partition_spec(("batch", "tokens", None)) == P(("data", "fsdp"), "sequence", None)
    assert partition_spec(("layers", "embed", "mlp")) == P(None, "fsdp", "tensor")
    assert partition_spec(()) == P()


@pytest.mark.parametrize(
    ("axes", "rules", "message"),
    [
        (("heads", "mlp"), RULES, "'heads' and 'mlp' of one array both claim mesh axis 'tensor'"),
        (("batch", "embed"), RULES, "'batch' and 'embed' .* mesh axis 'fsdp'"),
        (("a", "a"), {"a": "data"}, "'a' and 'a' .* mesh axis 'data'"),
        (("a",), {"a": ("data", "data")}, "'a' and 'a' .* mesh axis 'data'"),
    ],
)
def test_two_logical_axes_that_claim_one_mesh_axis_are_refused(axes, rules, message):
    with pytest.raises(ConfigError, match=message):
        partition_spec(axes, rules)


def test_a_logical_axis_without_a_rule_is_refused():
    with pytest.raises(ConfigError, match=r"no sharding rule for logical axis 'width'.*'embed'"):
        partition_spec(("width",))


def test_every_parameter_of_a_model_has_a_rule_without_collision():
    config = ModelConfig(vocab_size=10, attention_bias=True, tie_embeddings=False)
    axes = parameters.logical_axes(config)
    specs = jax.tree.map(partition_spec, axes, is_leaf=lambda x: isinstance(x, tuple))
    assert specs["layers"]["attention"]["query_bias"] == P(None, "tensor")
    assert specs["head"] == P("tensor", "fsdp")


@pytest.mark.parametrize(
    ("spec", "shape", "expected"),
    [
        (P("fsdp", "tensor"), (6, 4), P("fsdp", "tensor")),
        (P("fsdp", "tensor"), (5, 4), P(None, "tensor")),
        (P(("data", "fsdp"), None), (4, 3), P(("data", "fsdp"), None)),
        (P(("data", "fsdp"), None), (6, 3), P(None, None)),
        (P("sequence"), (7,), P("sequence")),
        (P("fsdp"), (4, 3, 2), P("fsdp", None, None)),
        (P(), (), P()),
    ],
)
def test_mesh_axes_that_do_not_divide_are_left_out(mesh, spec, shape, expected):
    assert fit_spec(spec, shape, mesh) == expected


def test_axes_that_the_mesh_does_not_have_count_for_nothing():
    small = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    assert fit_spec(P(("data", "fsdp"), "tensor"), (4, 6), small) == P("data", None)
    assert fit_spec(P(("data", "fsdp"), "tensor"), (3, 6), small) == P(None, None)
    with jax.set_mesh(small):
        laid = jax.jit(lambda x: constrain(x, ("batch", "tokens")))(jnp.zeros((4, 6)))
    assert {s.data.shape for s in laid.addressable_shards} == {(2, 6)}


def test_parameters_are_split_over_fsdp_and_tensor_and_copied_over_data(mesh):
    config = ModelConfig(vocab_size=61, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=24)
    shapes = Transformer(config).abstract_params()
    shardings = parameter_shardings(parameters.logical_axes(config), shapes, mesh)
    shard = jax.tree.map(lambda s, shape: s.shard_shape(shape.shape), shardings, shapes)
    assert shard["layers"]["mlp"]["up"] == (2, 8, 12)
    assert shard["layers"]["mlp"]["down"] == (2, 12, 8)
    # 61 token ids cannot be halved: that axis is whole everywhere, the other one is split.
    assert shard["embedding"] == (61, 8)
    assert shard["norm"] == (16,)


def test_parameters_start_alike_whatever_the_mesh(mesh):
    parameter = parameters.Parameter((16, 24), ("embed", "mlp"), 0.5)
    sharding = parameter_shardings(
        parameter.axes, jax.ShapeDtypeStruct((16, 24), jnp.float32), mesh
    )
    start = jax.jit(lambda key: parameter.initialise(key, jnp.float32), out_shardings=sharding)
    placed = start(jax.random.key(0))
    assert {s.data.shape for s in placed.addressable_shards} == {(8, 12)}
    np.testing.assert_allclose(
        placed, parameter.initialise(jax.random.key(0), jnp.float32), rtol=1e-6
    )


def test_the_mesh_in_force_is_seen_and_none_is_empty(mesh):
    assert current_mesh_shape() == {}
    with jax.set_mesh(mesh):
        assert current_mesh_shape() == {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}
    assert current_mesh_shape() == {}


def test_constrain_lays_out_under_a_mesh_and_is_nothing_without(mesh):
    x = jnp.arange(24.0).reshape(4, 6)
    assert constrain(x, ("batch", None)) is x
    with jax.set_mesh(mesh):
        laid = jax.jit(lambda x: constrain(x, ("batch", None)))(x)
        odd = jax.jit(lambda x: constrain(x, ("batch", None)))(x[:3])
    assert {s.data.shape for s in laid.addressable_shards} == {(1, 6)}
    assert {s.data.shape for s in odd.addressable_shards} == {(3, 6)}
    np.testing.assert_array_equal(laid, x)
    with jax.set_mesh(build_mesh(MeshConfig(), jax.devices()[:1])):
        assert constrain(x, ("batch", None)) is x
