import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.models import Edits, Transformer, parameters
from tokjax.models.transformer import SITES

L, B, T, D, H = 3, 2, 12, 24, 4
TOLERANCE = {"rtol": 3e-5, "atol": 3e-5}


@pytest.fixture(scope="module")
def random_edits():
    """Every edit at once, with random values; attention is also forbidden here and there."""
    rng = np.random.default_rng(1)
    bias = rng.normal(size=(L, B, H, T, T))
    bias[rng.random(bias.shape) < 0.2] = -np.inf
    bias[..., range(T), range(T)] = 0.0  # a query always keeps itself
    return {
        "attention_bias": bias.astype(np.float32),
        "layer_gate": rng.uniform(0, 1.5, (L, B, T)).astype(np.float32),
        "residual_add": rng.normal(size=(L, B, T, D)).astype(np.float32),
        "write": rng.normal(size=(L, B, T, D)).astype(np.float32),
        "write_mask": rng.random((L, B, T)) < 0.3,
    }


@pytest.fixture(scope="module")
def forward(tiny):
    """The compiled forward pass; one program for each set of edits that are present."""
    return jax.jit(lambda p, edits, tokens: tiny.model(p, tokens, edits=edits)[0])


def present(random_edits, *names):
    return {name: random_edits[name] for name in names}


@pytest.mark.parametrize(
    "names",
    [
        ("attention_bias",),
        ("layer_gate", "residual_add"),
        ("write", "write_mask"),
        ("attention_bias", "layer_gate", "residual_add", "write", "write_mask"),
    ],
)
def test_edits_equal_numpys(tiny, reference, forward, random_edits, names):
    edits = present(random_edits, *names)
    expected, _ = reference(tiny.config, tiny.params, tiny.tokens, edits=edits)
    np.testing.assert_allclose(
        forward(tiny.params, Edits(**edits), tiny.tokens), expected, **TOLERANCE
    )
    unedited = forward(tiny.params, None, tiny.tokens)
    assert np.abs(unedited - expected).max() > 0.1


def test_captures_show_the_edits_numpy_makes(tiny, reference, random_edits):
    expected = reference(tiny.config, tiny.params, tiny.tokens, edits=random_edits)[1]
    for site in ("attn_out", "mlp_out"):
        # What is added to the stream: the gate belongs to it.
        expected[site] = expected[site] * random_edits["layer_gate"][..., None]
    capture = jax.jit(
        lambda p, e: tiny.model(p, tiny.tokens, edits=e, capture=frozenset(SITES))[1].captured
    )
    captured = capture(tiny.params, Edits(**random_edits))
    for site in SITES:
        np.testing.assert_allclose(captured[site], expected[site], err_msg=site, **TOLERANCE)


def test_axes_of_size_one_stand_for_all_rows_tokens_and_heads(tiny, forward, random_edits):
    narrow = {
        "attention_bias": random_edits["attention_bias"][:, :1, :1],
        "layer_gate": random_edits["layer_gate"][:, :1, :1],
        "residual_add": random_edits["residual_add"][:, :1, :1],
        "write": random_edits["write"],
        "write_mask": random_edits["write_mask"][:, :1],
    }
    wide = {
        "attention_bias": np.broadcast_to(narrow["attention_bias"], (L, B, H, T, T)),
        "layer_gate": np.broadcast_to(narrow["layer_gate"], (L, B, T)),
        "residual_add": np.broadcast_to(narrow["residual_add"], (L, B, T, D)),
        "write": narrow["write"],
        "write_mask": np.broadcast_to(narrow["write_mask"], (L, B, T)),
    }
    np.testing.assert_allclose(
        forward(tiny.params, Edits(**narrow), tiny.tokens),
        forward(tiny.params, Edits(**wide), tiny.tokens),
        **TOLERANCE,
    )


def test_a_gate_of_zero_skips_exactly_that_layer(tiny, forward):
    gate = jnp.ones((L, 1, 1)).at[1].set(0.0)
    skipped = forward(tiny.params, Edits(layer_gate=gate), tiny.tokens)
    shorter = Transformer(dataclasses.replace(tiny.config, n_layers=2))
    layers = jax.tree.map(lambda a: a[np.array([0, 2])], tiny.params["layers"])
    without = jax.jit(lambda p: shorter(p, tiny.tokens)[0])({**tiny.params, "layers": layers})
    np.testing.assert_allclose(skipped, without, **TOLERANCE)


def test_a_query_without_any_key_left_attends_to_nothing(tiny):
    bias = jnp.zeros((L, 1, 1, T, T)).at[:, :, :, 5].set(-jnp.inf)
    capture = {"attn_probs", "attn_out"}
    forward = jax.jit(
        lambda t: tiny.model(tiny.params, t, edits=Edits(attention_bias=bias), capture=capture)
    )
    logits, out = forward(tiny.tokens)
    assert (out.captured["attn_probs"][:, :, :, 5] == 0).all()
    assert (out.captured["attn_out"][:, :, 5] == 0).all()
    # In particular it must not average over the future.
    changed = tiny.tokens.copy()
    changed[:, 6:] = (changed[:, 6:] + 7) % tiny.config.vocabulary
    np.testing.assert_array_equal(logits[:, :6], forward(changed)[0][:, :6])
    assert np.isfinite(logits).all()


def test_a_bias_does_not_lift_the_causal_mask(tiny, forward):
    bias = jnp.full((L, 1, 1, T, T), 50.0)
    edited = forward(tiny.params, Edits(attention_bias=bias), tiny.tokens)
    np.testing.assert_allclose(
        edited, forward(tiny.params, None, tiny.tokens), rtol=1e-3, atol=1e-3
    )


def test_unrolled_layers_take_the_same_edits(tiny, forward, random_edits):
    scanned = forward(tiny.params, Edits(**random_edits), tiny.tokens)
    unrolled = forward(parameters.unstack(tiny.params), Edits(**random_edits), tiny.tokens)
    np.testing.assert_allclose(unrolled, scanned, **TOLERANCE)


def test_edits_of_ones_own_in_a_batch_through_vmap(tiny, forward, random_edits):
    adds = jnp.stack([random_edits["residual_add"], -random_edits["residual_add"]])
    both = jax.jit(
        jax.vmap(lambda add: tiny.model(tiny.params, tiny.tokens, edits=Edits(residual_add=add))[0])
    )(adds)
    for one, add in zip(both, adds, strict=True):
        alone = forward(tiny.params, Edits(residual_add=add), tiny.tokens)
        np.testing.assert_allclose(one, alone, **TOLERANCE)


def test_gradients_reach_the_values_of_edits(tiny, random_edits):
    def loss(edits):
        return jnp.square(tiny.model(tiny.params, tiny.tokens, edits=edits)[0]).mean()

    loss = jax.jit(jax.value_and_grad(loss))
    names = ("attention_bias", "layer_gate", "residual_add")
    values = {k: np.maximum(v, -3.0) for k, v in present(random_edits, *names).items()}
    gradient = loss(Edits(**values))[1]
    for name in names:
        slopes = np.asarray(getattr(gradient, name))
        where = np.unravel_index(np.abs(slopes).argmax(), slopes.shape)
        step = np.zeros_like(slopes)
        step[where] = 1e-2
        up, down = (
            loss(Edits(**values | {name: values[name] + sign * step}))[0] for sign in (1, -1)
        )
        np.testing.assert_allclose((up - down) / 2e-2, slopes[where], rtol=0.03)
    # A key that the causal mask hides has no influence, whatever its bias.
    assert (np.triu(gradient.attention_bias, 1) == 0).all()


def test_new_values_never_recompile(tiny, forward, random_edits):
    programs = forward._cache_size
    gates = [np.full((L, 1, 1), value, np.float32) for value in (1.0, 0.0, 0.5, 2.0)]
    logits = [forward(tiny.params, Edits(layer_gate=gates[0]), tiny.tokens)]
    before = programs()
    logits += [forward(tiny.params, Edits(layer_gate=gate), tiny.tokens) for gate in gates[1:]]
    assert programs() == before
    assert len({float(x.sum()) for x in logits}) == len(gates)
    # What does: a field that was absent.
    forward(tiny.params, Edits(layer_gate=gates[0], residual_add=gates[0][..., None]), tiny.tokens)
    assert programs() == before + 1


def test_absent_edits_leave_no_trace_in_the_program(tiny):
    def text(**given):
        return jax.jit(lambda p, t: tiny.model(p, t, **given)[0]).lower(tiny.params, tiny.tokens)

    plain = text()
    assert text(edits=Edits()).as_text() == plain.as_text()
    gated = text(edits=Edits(layer_gate=jnp.ones((L, 1, 1))))
    assert gated.as_text() != plain.as_text()


def test_edits_work_in_cached_decoding(tiny, forward, random_edits):
    params = parameters.unstack(tiny.params)
    whole = forward(tiny.params, Edits(**random_edits), tiny.tokens)

    @jax.jit
    def step(cache, tokens, edits):
        logits, out = tiny.model(params, tokens, cache=cache, edits=edits)
        return logits, out.cache

    cache, logits = tiny.model.init_cache(B, T), []
    for t in range(3):
        # A step's queries are one token, its keys the whole cache.
        edits = {name: leaf[:, :, t : t + 1] for name, leaf in random_edits.items()}
        edits["attention_bias"] = random_edits["attention_bias"][:, :, :, t : t + 1]
        out, cache = step(cache, tiny.tokens[:, t : t + 1], Edits(**edits))
        logits.append(out[:, 0])
    np.testing.assert_allclose(np.stack(logits, 1), whole[:, :3], **TOLERANCE)


@pytest.mark.parametrize("name", ["write", "write_mask"])
def test_write_and_its_mask_go_together(tiny, random_edits, name):
    with pytest.raises(ValueError, match=r"write and Edits.write_mask go together"):
        tiny.model(tiny.params, tiny.tokens, edits=Edits(**present(random_edits, name)))


def test_edits_of_another_number_of_layers_are_refused(tiny):
    for layers in (1, 2, 4):
        edits = Edits(layer_gate=jnp.ones((layers, 1, 1)))
        with pytest.raises(ValueError, match=r"layer_gate has shape .* first axis must be .* 3"):
            tiny.model(parameters.unstack(tiny.params), tiny.tokens, edits=edits)
