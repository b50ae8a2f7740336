"""Topologies are known by name, and what cannot be meant is told."""

import importlib.util

import jax
import pytest

from tokjax.ahead.chips import CHIPS, topology
from tokjax.errors import ConfigError

LIBTPU = importlib.util.find_spec("libtpu") is not None


def test_the_devices_of_this_machine_are_a_topology_without_figures():
    here = topology("cpu")
    assert here.chip is None
    assert list(here.devices) == jax.devices("cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5x:4x4", "unknown topology 'v5x:4x4'"),
        ("v5e", "has no shape such as v5e:4x4"),
        ("v5e:4", "TPU v5e has 2 axes, as in v5e:4x4"),
        ("v5p:4x4", "TPU v5p has 3 axes, as in v5p:4x4x4"),
        ("v5e:0x4", "no shape"),
    ],
)
def test_a_name_that_is_no_topology_is_told(name, message):
    with pytest.raises(ConfigError, match=message):
        topology(name)


@pytest.mark.skipif(LIBTPU, reason="libtpu is installed")
def test_without_the_compiler_the_remedy_is_told():
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[tpu\]'"):
        topology("v5e:4x4")


@pytest.mark.skipif(not LIBTPU, reason="needs libtpu, the compiler for TPUs")
def test_slices_are_told_apart():
    found = topology("v5e:2x2", slices=2)
    assert {device.slice_index for device in found.devices} == {0, 1}
    assert found.chip is CHIPS["v5e"]
