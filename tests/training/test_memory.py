import os
import platform
import subprocess
import sys

import pytest

from tokjax.training import memory

# What it gains is measured by benchmarks/train_step.py; how often the system is asked varies.
_KEPT = """
import sys
from tokjax.training.memory import keep_freed_memory
assert keep_freed_memory() and "jax" not in sys.modules
import jax.numpy as jnp
assert float((jnp.ones((3000, 3000)) @ jnp.ones(3000))[0]) == 3000
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_the_setting_is_taken_before_jax_is_there():
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", _KEPT], env=env, check=True)


def test_a_host_with_an_accelerator_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr(memory, "_ACCELERATORS", (str(tmp_path),))
    assert not memory.keep_freed_memory()
