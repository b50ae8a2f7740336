"""Checkpoints of every family, made by transformers."""

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parent))
import families


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Returns (transformers model, folder of its checkpoint) of a family; each is made once."""
    made = {}

    def make(name):
        if name not in made:
            model = families.build(name)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = (model, folder)
        return made[name]

    return make


@pytest.fixture(scope="session")
def tokens():
    """Random ids, [2, 20]."""
    return np.random.default_rng(0).integers(3, 97, (2, 20)).astype(np.int32)
