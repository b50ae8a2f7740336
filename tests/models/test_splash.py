"""The fused kernel of TPUs, in Pallas's interpreter, beside attention that keeps all scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from tokjax.errors import ConfigError
from tokjax.models import attention, splash
from tokjax.models.attention import Scores, dense_attention, visible_keys
from tokjax.parallel.mesh import MeshConfig, build_mesh

B, T, H, K, d = 2, 256, 4, 2, 16
SCORES = Scores(scale=d**-0.5)


@pytest.fixture(scope="module")
def arrays():
    """Queries, keys, values, weights of a loss, and segments whose ends are no block ends."""
    rng = np.random.default_rng(0)
    q, w = (rng.normal(size=(B, T, H, d)).astype(np.float32) for _ in range(2))
    k, v = (rng.normal(size=(B, T, K, d)).astype(np.float32) for _ in range(2))
    segments = np.stack([np.repeat([1, 2, 0], [100, 120, 36]), np.repeat([1, 2], [1, 255])])
    return q, k, v, w, segments.astype(np.int32)


@pytest.fixture
def several_blocks(monkeypatch):
    monkeypatch.setattr(splash, "_BLOCK", 128)


def by_dense(q, k, v, segments, *, window=None, scores):
    places = jnp.broadcast_to(jnp.arange(T), q.shape[:2])
    mask = visible_keys(
        *(places, places, window),
        causal=scores.causal,
        query_segments=segments,
        key_segments=segments,
    )
    return dense_attention(q, k, v, mask, scores)[0]


def gradients(attend):
    def loss(q, k, v, w, segments):
        out = attend(q, k, v, segments)
        return (out * w).sum(), out

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


def close(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("scores", "window"),
    [(SCORES, None), (Scores(0.5, softcap=2.0), 65), (Scores(d**-0.5, causal=False), 9)],
)
def test_it_equals_dense_in_values_and_gradients(several_blocks, arrays, scores, window):
    options = {"window": window, "scores": scores}
    attend = functools.partial(splash.splash_attention, interpret=True, **options)
    expected = gradients(functools.partial(by_dense, **options))(*arrays)
    close(gradients(attend)(*arrays), expected)


def test_devices_attend_to_their_own_rows_and_heads(several_blocks, arrays):
    attend = functools.partial(splash.splash_attention, interpret=True, scores=SCORES)
    mesh = build_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        found = gradients(functools.partial(attention._sharded, attend))(*arrays)
    close(jax.device_get(found), gradients(functools.partial(by_dense, scores=SCORES))(*arrays))


def for_tpus(sequence: int = 1):
    """A mesh of TPUs that are not there, in force."""
    names = ("fsdp", "sequence")
    mesh = AbstractMesh(
        (4 // sequence, sequence),
        names,
        axis_types=(AxisType.Auto,) * 2,
        abstract_device=AbstractDevice("TPU v5e", 1, "tpu"),
    )
    return jax.sharding.use_abstract_mesh(mesh)


def test_auto_takes_it_for_long_rows_of_a_tpu():
    choose = functools.partial(
        attention.choose_kernel, plain=True, softcap=True, dtype=jnp.bfloat16, length=2048
    )
    with for_tpus():
        assert choose("auto") == choose("splash") == choose("auto", window=9) == "splash"
        assert choose("auto", length=256) == "dense"
        assert choose("splash", length=256) == "splash"
        assert choose("splash", length=200) == choose("auto", length=2000) == "dense"
        # The layers of a scan whose windows differ.
        assert choose("auto", window=jnp.int32(9)) == "dense"
        assert choose("splash", plain=False) == "dense"
    with for_tpus(sequence=2):
        assert choose("splash") == "dense"
    with pytest.raises(ConfigError, match="attention='splash' needs a TPU, this is cpu"):
        choose("splash")


def test_it_is_written_for_tpus_without_one():
    shapes = [jax.ShapeDtypeStruct((4, 1024, n, 64), jnp.bfloat16) for n in (4, 2, 2)]
    segments = jax.ShapeDtypeStruct((4, 1024), jnp.int32)

    def loss(q, k, v, segments):
        kernel = attention.choose_kernel(
            "auto", plain=True, softcap=False, dtype=q.dtype, length=1024
        )
        out = attention.self_attention(q, k, v, segments, None, SCORES, kernel)
        return out.astype(jnp.float32).sum()

    with for_tpus():
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*shapes, segments)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    for phase in ("fwd", "dq", "dkv"):
        assert f"splash_mha_{phase}_segmented" in text
