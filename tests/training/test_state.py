import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tokjax.models import ModelConfig, Transformer
from tokjax.parallel.mesh import MeshConfig, build_mesh
from tokjax.pretraining.next_token import NextToken
from tokjax.training.optimizers import Adafactor, AdamW, Lion, Muon
from tokjax.training.state import init_state, state_shardings

CONFIG = ModelConfig(
    vocab_size=32, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=32, attention_bias=True
)
MODEL = Transformer(CONFIG)


def abstract_state(optimizer=AdamW(), ema=True, model=MODEL):  # noqa: B008
    transform = optimizer.build(model.config)
    return jax.eval_shape(lambda: init_state(model, NextToken(), transform, 0, ema))


@pytest.fixture(scope="module")
def mesh():
    return build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def specs(shardings):
    return {
        jax.tree_util.keystr(path): leaf.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(shardings)
    }


def test_parameters_lie_as_the_rules_say(mesh):
    params = state_shardings(abstract_state(), MODEL, mesh).params
    assert params["embedding"].spec == P("tensor", "fsdp")
    assert params["norm"].spec == P(None)
    attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
    assert attention["query"].spec == P(None, "fsdp", "tensor")
    assert attention["out"].spec == P(None, "tensor", "fsdp")
    assert attention["query_bias"].spec == P(None, "tensor")
    assert mlp["down"].spec == P(None, "tensor", "fsdp")


@pytest.mark.parametrize("optimizer", [AdamW(), Lion(), Muon()], ids=lambda o: type(o).__name__)
def test_whatever_mirrors_a_parameter_is_laid_out_like_it(mesh, optimizer):
    state = abstract_state(optimizer)
    found = specs(state_shardings(state, MODEL, mesh))
    params = specs(state_shardings(state, MODEL, mesh).params)
    shapes = {
        jax.tree_util.keystr(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    for path, spec in params.items():
        assert found[f".ema{path}"] == spec
        moments = [p for p in found if p.startswith(".opt_state") and p.endswith(path)]
        if path == "['norm']":
            moments = [p for p in moments if "layers" not in p]
        assert moments, path
        for moment in moments:
            assert shapes[moment] == shapes[f".params{path}"]
            assert found[moment] == spec, moment


def test_everything_else_is_replicated(mesh):
    state = abstract_state(Adafactor(), ema=False)
    layout = state_shardings(state, MODEL, mesh)
    assert layout.step.spec == layout.key.spec == P()
    assert layout.ema is None
    # Factored moments have other shapes than their parameter.
    params = specs(layout.params)
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(state.opt_state),
        jax.tree.leaves(layout.opt_state),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        if leaf.ndim == 0 or leaf.shape == (1,):
            assert sharding.spec == P(), name
        else:
            assert any(name.endswith(p) and sharding.spec == s for p, s in params.items()), name


def test_a_dimension_that_does_not_divide_is_replicated(mesh):
    model = Transformer(ModelConfig(vocab_size=33, d_model=16, n_layers=1, n_heads=4))
    layout = state_shardings(abstract_state(model=model), model, mesh)
    assert layout.params["embedding"].spec == P(None, "fsdp")
    assert layout.ema["embedding"].spec == P(None, "fsdp")


def test_the_state_starts_from_the_seed_alone():
    make = jax.jit(lambda seed: init_state(MODEL, NextToken(), Lion().build(CONFIG), seed, True))
    one, same, other = make(3), make(3), make(4)
    data = lambda s: jax.tree.map(np.asarray, (s.params, jax.random.key_data(s.key)))  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, data(one), data(same))
    assert not np.array_equal(one.params["embedding"], other.params["embedding"])
    assert not np.array_equal(jax.random.key_data(one.key), jax.random.key_data(other.key))
    assert int(one.step) == 0


def test_the_moving_average_is_a_float32_copy():
    model = Transformer(
        ModelConfig(vocab_size=8, d_model=8, n_layers=1, n_heads=2, param_dtype="bfloat16")
    )
    state = init_state(model, NextToken(), Lion().build(model.config), 0, True)
    for p, e in zip(jax.tree.leaves(state.params), jax.tree.leaves(state.ema), strict=True):
        assert (p.dtype, e.dtype) == (jnp.bfloat16, jnp.float32)
        np.testing.assert_array_equal(np.asarray(p, np.float32), e)


def test_donating_a_fresh_state_is_safe():
    # Parameters and their average must not share a buffer, or donation would free it twice.
    state = init_state(MODEL, NextToken(), Lion().build(CONFIG), 0, True)
    leaves = [*jax.tree.leaves(state.params), *jax.tree.leaves(state.ema)]
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
