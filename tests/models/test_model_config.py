import dataclasses

import pytest

from tokjax.errors import ConfigError
from tokjax.models import ModelConfig


def test_open_sizes_follow_from_the_others():
    config = ModelConfig(d_model=256, n_heads=4)
    assert (config.kv_heads, config.head_width, config.ff_width) == (4, 64, 704)
    config = ModelConfig(d_model=256, n_heads=4, n_kv_heads=1, head_dim=32, d_ff=100)
    assert (config.kv_heads, config.head_width, config.ff_width) == (1, 32, 100)


@pytest.mark.parametrize("d_model", [32, 48, 96, 576, 2048])
def test_the_open_feed_forward_width_is_the_next_multiple_of_32(d_model):
    width = ModelConfig(d_model=d_model, n_heads=2).ff_width
    assert width % 32 == 0
    assert 0 <= width - 8 * d_model / 3 < 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 0}, "n_layers=0 must be at least 1"),
        ({"vocab_size": -5}, "vocab_size=-5 must be positive, or None"),
        ({"n_kv_heads": 0}, "n_kv_heads=0 must be positive"),
        ({"unroll": 0}, "unroll=0 must be at least 1"),
        ({"d_model": 250}, "d_model=250 is not divisible by n_heads=4.*set head_dim"),
        ({"n_kv_heads": 3}, "n_heads=4 is not divisible by n_kv_heads=3"),
        ({"head_dim": 7}, "7 wide.*even"),
        ({"n_layers": 4, "unroll": 3}, "n_layers=4 is not divisible by unroll=3"),
        ({"norm_eps": 0.0}, "norm_eps=0.0"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0"),
        ({"init_scale": -0.1}, "init_scale=-0.1"),
        ({"activation": "silo"}, "unknown activation='silo'.*silu"),
        ({"dtype": "bfloat"}, "unknown dtype='bfloat'.*bfloat16"),
        ({"param_dtype": "f32"}, "unknown param_dtype='f32'"),
        ({"remat": "blocks"}, "unknown remat='blocks'.*block"),
        ({"attention": "flash"}, "unknown attention='flash'"),
        ({"attention": "cudnn"}, "computes in bfloat16 only"),
    ],
)
def test_impossible_values_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**changes)


def test_a_head_wider_than_its_share_of_the_model_is_possible():
    assert ModelConfig(d_model=250, head_dim=64).head_width == 64


def test_an_open_vocabulary_is_an_error_only_when_it_is_needed():
    config = ModelConfig()
    with pytest.raises(ConfigError, match=r"model\.vocab_size is None"):
        _ = config.vocabulary
    assert dataclasses.replace(config, vocab_size=7).vocabulary == 7
