import dataclasses
import json

import pytest

from tokjax.config import resolve, to_dict
from tokjax.errors import ConfigError
from tokjax.models import ModelConfig
from tokjax.models.huggingface import config_to_fields
from tokjax.models.parameters import count_parameters
from tokjax.models.zoo import ZOO

MILLIONS = {
    "nano": 0.8,
    "small": 25.3,
    "base": 85,
    "smollm2-135m": 106,
    "smollm2-360m": 315,
    "llama3-1b": 973,
    "llama3-8b": 6980,
    "llama3-70b": 68452,
}


@pytest.mark.parametrize("name", ZOO)
def test_sizes_are_what_their_comments_say(name):
    counts = count_parameters(dataclasses.replace(ZOO[name], vocab_size=1))
    total = sum(n for part, n in counts.items() if part not in ("embedding", "head"))
    assert total / 1e6 == pytest.approx(MILLIONS[name], rel=0.01)


def test_a_name_of_the_zoo_is_a_model_and_its_keys_can_be_changed():
    plain = resolve(ModelConfig, "smollm2-135m")
    assert dataclasses.replace(plain, base=None) == ZOO["smollm2-135m"]
    changed = resolve(ModelConfig, {"base": "llama3-8b", "n_layers": 2, "dtype": "bfloat16"})
    assert changed.rope_scaling == ZOO["llama3-8b"].rope_scaling
    assert (changed.n_layers, changed.d_model, changed.dtype) == (2, 4096, "bfloat16")
    partly = resolve(ModelConfig, {"base": "llama3-8b", "rope_scaling": {"factor": 2.0}})
    assert partly.rope_scaling == dataclasses.replace(ZOO["llama3-8b"].rope_scaling, factor=2.0)


def test_a_hugging_face_configuration_is_a_model(tmp_path):
    config = ModelConfig(vocab_size=50, d_model=24, n_heads=2, family="qwen3", qk_norm=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_to_fields(config)))
    for base in (path, tmp_path):
        found = resolve(ModelConfig, {"base": str(base), "n_layers": 1})
        assert (found.qk_norm, found.vocab_size, found.n_layers) == (True, 50, 1)
    # What was resolved once stands by itself.
    tree = to_dict(found)
    path.unlink()
    assert resolve(ModelConfig, tree) == found


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("smollm-135m", "no size of the zoo and no file or folder.*smollm2-135m"),
        ("{folder}", r"config\.json: No such file"),
        ("{folder}/config.json", "no size of the zoo"),
    ],
)
def test_a_base_that_is_nothing_is_refused(tmp_path, base, message):
    with pytest.raises(ConfigError, match=message) as error:
        resolve(ModelConfig, {"base": base.format(folder=tmp_path)}, path="config.model")
    assert "config.model.base" in str(error.value)
