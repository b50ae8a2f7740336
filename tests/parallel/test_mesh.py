import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokjax.errors import ConfigError
from tokjax.parallel.mesh import MeshConfig, build_mesh


def test_by_default_every_device_is_a_replica():
    assert MeshConfig().sizes(8) == {"data": 8, "fsdp": 1, "tensor": 1, "sequence": 1}


def test_the_axis_of_minus_one_takes_what_remains():
    config = MeshConfig(data=2, fsdp=-1, tensor=2)
    assert config.sizes(8) == {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}
    assert config.sizes(4)["fsdp"] == 1


@given(*[st.integers(1, 4)] * 4, st.sampled_from([None, "data", "fsdp", "tensor", "sequence"]))
def test_sizes_always_multiply_to_the_devices(data, fsdp, tensor, sequence, free):
    given_sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "sequence": sequence}
    devices = data * fsdp * tensor * sequence
    sizes = MeshConfig(**(given_sizes | ({free: -1} if free else {}))).sizes(devices)
    assert sizes == given_sizes


@pytest.mark.parametrize(
    "sizes", [{"data": 3}, {"data": 4}, {"data": 16}, {"fsdp": 3}, {"data": -1, "tensor": 16}]
)
def test_sizes_that_do_not_fit_the_devices_are_refused(sizes):
    with pytest.raises(ConfigError, match=r"mesh .* does not fit 8 devices"):
        MeshConfig(**sizes).sizes(8)


@pytest.mark.parametrize("size", [0, -2])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ConfigError, match=f"tensor={size} must be at least 1, or -1"):
        MeshConfig(tensor=size)


def test_only_one_axis_may_take_what_remains():
    with pytest.raises(ConfigError, match="only one mesh axis may be -1"):
        MeshConfig(data=-1, fsdp=-1)


def test_a_mesh_holds_each_device_once_under_the_four_axes():
    mesh = build_mesh(MeshConfig(fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in jax.devices())


def test_a_mesh_of_some_of_the_devices():
    mesh = build_mesh(MeshConfig(tensor=2), jax.devices()[4:8])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 2, "sequence": 1}
    assert {d.id for d in mesh.devices.flat} == {4, 5, 6, 7}


def test_an_axis_may_take_part_of_a_torus_side(monkeypatch):
    def make_mesh(*_, **__):
        raise NotImplementedError("no subset of the sides has this product")

    monkeypatch.setattr(jax, "make_mesh", make_mesh)
    mesh = build_mesh(MeshConfig(data=-1, fsdp=2, tensor=2), jax.devices()[:8])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}
    assert len(set(mesh.devices.flat)) == 8
