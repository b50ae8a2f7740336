import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tokjax.models import Edits, Transformer, parameters
from tokjax.parallel.mesh import MeshConfig, build_mesh
from tokjax.parallel.rules import parameter_shardings

MESHES = {
    "data, fsdp, tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "sequence, tensor": MeshConfig(data=2, sequence=2, tensor=2),
}


@pytest.fixture(scope="module")
def rows(tiny):
    """Four packed rows, an edit, and the function (params, tokens, gate) -> (loss, logits)."""
    repeat = lambda a: np.concatenate([a, a[::-1]])  # noqa: E731
    packed = {name: repeat(a) for name, a in tiny.packed.items()}
    tokens = np.concatenate([tiny.tokens, tiny.tokens[:, ::-1]])

    def function(attention):
        model = Transformer(dataclasses.replace(tiny.config, attention=attention))

        def loss(params, tokens, gate):
            logits, _ = model(params, tokens, edits=Edits(layer_gate=gate), **packed)
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 3]), logits

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 2), has_aux=True))

    return function, tokens, np.linspace(0.5, 1.5, 3, dtype=np.float32).reshape(3, 1, 1)


@pytest.fixture(scope="module")
def alone(tiny, rows):
    """Loss, logits and gradients on one device."""
    function, tokens, gate = rows
    return function("dense")(tiny.params, tokens, gate)


@pytest.mark.parametrize("name", MESHES)
def test_logits_and_gradients_equal_one_devices(tiny, rows, alone, name):
    mesh = build_mesh(MESHES[name])
    shapes = tiny.model.abstract_params()
    shardings = parameter_shardings(parameters.logical_axes(tiny.config), shapes, mesh)
    function, tokens, gate = rows
    placed = jax.device_put(tiny.params, shardings)
    tokens = jax.device_put(tokens, NamedSharding(mesh, P(("data", "fsdp"), "sequence")))
    with jax.set_mesh(mesh):
        (loss, logits), (grads, gate_grad) = function("blockwise")(placed, tokens, gate)
    (expected_loss, expected_logits), (expected, expected_gate_grad) = alone
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_allclose(logits, expected_logits, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(gate_grad, expected_gate_grad, rtol=1e-4, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, expected
    )
