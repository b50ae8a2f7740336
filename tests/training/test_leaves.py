import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tokjax.errors import CheckpointError
from tokjax.training import leaves


class _TwoNames:
    """A pytree whose two leaves have the same path."""


_KEY = jax.tree_util.DictKey("1")
jax.tree_util.register_pytree_with_keys(
    _TwoNames, lambda _: (((_KEY, 1.0), (_KEY, 2.0)), None), lambda *_: _TwoNames()
)


def test_names_are_paths_and_cannot_collide():
    tree = {"params": {"a/b": jnp.zeros(2), "c": [jnp.zeros(1), jnp.zeros(3)]}, "": jnp.zeros(4)}
    named = leaves.name_leaves(tree)
    assert list(named) == ["%", "params/a%2Fb", "params/c/0", "params/c/1"]
    with pytest.raises(ValueError, match="both named '1'"):
        leaves.name_leaves(_TwoNames())


def test_optimiser_state_names_are_readable():
    state = optax.adam(1e-3).init({"w": jnp.zeros((2, 2))})
    assert set(leaves.name_leaves(state)) == {"0/count", "0/mu/w", "0/nu/w"}


def test_specs_print_and_parse():
    for leaf, text in [
        (jnp.zeros((2, 3), jnp.bfloat16), "bfloat16[2,3]"),
        (np.float64(1), "float64[]"),
        (jax.random.split(jax.random.key(0, impl="rbg"), 4), "key<rbg>[4]"),
        (jax.eval_shape(lambda: jax.random.key(0)), "key<threefry2x32>[]"),
        (jax.ShapeDtypeStruct((0,), jnp.float8_e4m3fn), "float8_e4m3fn[0]"),
    ]:
        spec = leaves.spec_of("x", leaf)
        assert str(spec) == text
        assert leaves.LeafSpec.parse(text) == spec


@pytest.mark.parametrize("leaf", [1, 2.0, "text", np.array([None])])
def test_what_is_no_array_is_refused_by_name(leaf):
    with pytest.raises(TypeError, match="leaf 'opt/step'"):
        leaves.to_storable(leaves.name_leaves({"opt": {"step": leaf}}))


def test_state_without_arrays_is_refused():
    with pytest.raises(ValueError, match="no arrays"):
        leaves.to_storable({"a": jnp.zeros((0, 3))})


def test_every_mismatch_is_listed_with_the_nearest_name():
    saved = {"params/wq": "float32[4,4]", "params/norm": "float32[4]", "ema": "bfloat16[2]"}
    wanted = {"params/wq": "float32[4,8]", "params/norms": "float32[4]", "ema": "float32[2]"}
    with pytest.raises(CheckpointError) as error:
        leaves.check_leaves(
            "/run/step-5",
            {name: leaves.LeafSpec.parse(text) for name, text in saved.items()},
            {name: leaves.LeafSpec.parse(text) for name, text in wanted.items()},
        )
    text = str(error.value)
    assert "/run/step-5" in text
    assert "params/wq: the checkpoint has float32[4,4], the model float32[4,8]" in text
    assert "ema: the checkpoint has bfloat16[2], the model float32[2]" in text
    assert "params/norms: not in the checkpoint. Did you mean 'params/norm'?" in text
    assert "params/norm: only in the checkpoint. Did you mean 'params/norms'?" in text


def test_a_thousand_mismatches_are_counted_not_printed():
    saved = {f"layer{n}": leaves.LeafSpec((n,), "float32") for n in range(1000)}
    with pytest.raises(CheckpointError, match="and 970 more") as error:
        leaves.check_leaves("here", saved, {})
    assert len(str(error.value).splitlines()) < 40
