import jax
import jax.numpy as jnp
import pytest

from tokjax import struct
from tokjax.decoding import categorical, greedy, temperature, top_p


@struct.dataclass
class One:
    x: jax.Array
    name: str = struct.field(pytree_node=False, default="a")


@struct.dataclass
class Other:
    x: jax.Array
    name: str = struct.field(pytree_node=False, default="a")


def test_equal_fields_of_another_class_are_another_structure():
    """What a compiled function's cache compares: flax's dataclasses fail this."""
    x = jnp.zeros(2)
    assert jax.tree.structure(One(x)) != jax.tree.structure(Other(x))
    assert jax.tree.structure(One(x)) == jax.tree.structure(One(x + 1))
    assert jax.tree.structure(One(x)) != jax.tree.structure(One(x, "b"))


@pytest.mark.parametrize(
    "pair", [(greedy(), categorical()), (temperature(0.5), top_p(0.5))], ids=["samplers", "chains"]
)
def test_parts_of_decoding_are_told_apart(pair):
    assert jax.tree.structure(pair[0]) != jax.tree.structure(pair[1])


def test_fields_name_the_leaves_and_come_back():
    value = One(jnp.arange(2), "b")
    ((path, leaf),) = jax.tree_util.tree_leaves_with_path(value)
    assert jax.tree_util.keystr(path) == ".x"
    doubled = jax.tree.map(lambda a: 2 * a, value)
    assert isinstance(doubled, One) and doubled.name == "b" and doubled.x.tolist() == [0, 2]
    assert value.replace(name="c") == One(value.x, "c")
    with pytest.raises(AttributeError):
        value.x = leaf
