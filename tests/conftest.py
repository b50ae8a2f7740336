"""Shared set-up: CPU with eight virtual devices, a compilation cache, the real-data folder."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update(
    "jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), "tokjax-test-compilation-cache")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

_NO_DATA = "set TOKJAX_TEST_DATA to the folder of real data to run this test"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real models, tokenizers and data sets; the test skips where there is none."""
    folder = os.environ.get("TOKJAX_TEST_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip(_NO_DATA)
    return Path(folder)
