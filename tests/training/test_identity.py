from pathlib import Path

import pytest

from tokjax.config import defaults_of, to_dict
from tokjax.errors import CheckpointError
from tokjax.models import ModelConfig
from tokjax.models.lora import LoraConfig
from tokjax.training.identity import check_identity, flatten_identity

PLACE = Path("run/checkpoints/step-1")


def identities(config, without=()):
    """(of a checkpoint made before some keys existed, of a run, the run's defaults)."""
    mine = flatten_identity({"model": to_dict(config)})
    saved = {key: value for key, value in mine.items() if not key.startswith(without)}
    return saved, mine, flatten_identity({"model": defaults_of(config)})


def test_a_key_younger_than_the_checkpoint_must_have_its_default():
    check_identity(PLACE, *identities(ModelConfig(), ("model.qk_norm", "model.lora")))
    with pytest.raises(CheckpointError, match=r"model\.qk_norm: absent .*, true in this run"):
        check_identity(PLACE, *identities(ModelConfig(qk_norm=True), ("model.qk_norm",)))


def test_a_part_that_is_absent_by_default_has_no_defaults():
    adapted = ModelConfig(lora=LoraConfig())
    with pytest.raises(CheckpointError, match=r"model\.lora\.rank: absent .*, 8 in this run"):
        check_identity(PLACE, *identities(adapted, ("model.lora",)))


def test_a_key_that_the_run_does_not_know_is_a_difference():
    saved, mine, defaults = identities(ModelConfig())
    with pytest.raises(CheckpointError, match=r"model\.odd: 1 in the checkpoint, absent"):
        check_identity(PLACE, saved | {"model.odd": 1}, mine, defaults)


def test_lists_of_parts_are_told_key_by_key():
    flat = flatten_identity({"stages": [{"k": 1}, {"k": 2}], "ids": [1, 2], "none": []})
    assert flat == {"stages.0.k": 1, "stages.1.k": 2, "ids": [1, 2], "none": []}
