import os
import subprocess
import sys

import pytest

from tokjax.training import memory

_FAULTS = """
import resource, sys
from tokjax.training.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
import jax, jax.numpy as jnp
work = jax.jit(lambda x: (x[:, None] * x[None]).T @ (x[:, None] + x[None]))
x = jnp.ones(3000)
for _ in range(3):
    work(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    work(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_kept_memory_brings_no_page_faults():
    def faults(how):
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", _FAULTS, how]
        run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        return int(run.stdout)

    assert faults("keep") < 0.1 * faults("return")


def test_a_host_with_an_accelerator_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr(memory, "_ACCELERATORS", (str(tmp_path),))
    assert not memory.keep_freed_memory()
