"""Shared set-up: CPU with eight virtual devices, a compilation cache, the real-data folder."""

import gc
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
    "jax_compilation_cache_dir",
    os.path.join(tempfile.gettempdir(), "tokjax-test-compilation-cache"),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

_NO_DATA = "set TOKJAX_TEST_DATA to the folder of real data to run this test"


_MOST_MAPS = 20_000


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps():
    """Forgets compiled programs behind a module when there are many.

    Each holds a dozen memory maps, of which Linux allows a process 65,530: a worker that runs a
    few thousand tests would be killed by its next compilation.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real models, tokenizers and data sets; the test skips where there is none."""
    folder = os.environ.get("TOKJAX_TEST_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip(_NO_DATA)
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.txt, validation.txt and a cache that tests share."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, seed in (("train", 0), ("validation", 1)):
        words = [f"{i * 7919 % 97 + seed} tokens and {i * i % 89} more" for i in range(400)]
        lines = [". ".join(words[i : i + 1 + i % 7]) for i in range(0, 400, 4)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def tiny_tree(tiny_corpus: Path):
    """A function giving the configuration tree of a run that takes a second, with changes.

    `tiny_tree(optimizer__peak_lr=0.1)` sets `optimizer.peak_lr`.
    """

    def source(name: str) -> dict:
        return {"name": "text", "files": [str(tiny_corpus / f"{name}.txt")], "per": "line"}

    def tree(**changes):
        base = {
            "title": "tiny",
            "model": {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_positions": 64},
            "data": {
                "tokenizer": {"name": "bytes"},
                "train": [{"source": source("train")}],
                "evals": {"validation": source("validation")},
                "seq_len": 64,
                "batch_size": 4,
                "cache_dir": str(tiny_corpus / "cache"),
            },
            "steps": 12,
            "optimizer": {"name": "adamw", "peak_lr": 1e-2},
            "schedule": {"name": "cosine", "warmup_steps": 2},
            "evaluation": {"every_steps": 6},
            "checkpoints": {"every_steps": 4},
            "log_every": 1,
        }
        for key, value in changes.items():
            node = base
            *parents, last = key.split("__")
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        return base

    return tree
