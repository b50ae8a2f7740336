import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.models import Edits, Steer, Suppression, Transformer, Write, parameters
from tokjax.models.attention import Scores, dense_attention
from tokjax.models.edits import SITES
from tokjax.parallel.mesh import MeshConfig, build_mesh
from tokjax.parallel.rules import parameter_shardings

L, B, T, D, H = 3, 2, 12, 24, 4
TOLERANCE = {"rtol": 3e-5, "atol": 3e-5}


SHAPES = {
    "resid_pre": (D,),
    "q": (H, 8),
    "k": (2, 8),
    "v": (2, 8),
    "attn_heads": (H, 8),
    "attn_out": (D,),
    "resid_mid": (D,),
    "mlp_hidden": (40,),
    "mlp_out": (D,),
    "resid_post": (D,),
}


@pytest.fixture(scope="module")
def random_edits():
    """Every kind of edit with random values; attention is also forbidden here and there."""
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    bias = normal(L, B, H, T, T)
    bias[rng.random(bias.shape) < 0.2] = -np.inf
    bias[..., range(T), range(T)] = 0.0  # a query always keeps itself
    add = {site: 0.3 * normal(L, B, T, *shape) for site, shape in SHAPES.items()}
    write = {
        site: Write(normal(L, B, T, *shape), rng.random((L, B, T)) < 0.3)
        for site, shape in SHAPES.items()
    }
    add["attn_probs"] = 0.1 * np.tril(normal(L, B, H, T, T))
    write["attn_probs"] = Write(np.tril(normal(L, B, H, T, T)), rng.random((L, B, H, T, T)) < 0.2)
    assert set(add) == set(write) == set(SITES)
    return SimpleNamespace(
        bias=Edits(attention_bias=bias),
        gate=Edits(layer_gate=rng.uniform(0, 1.5, (L, B, T)).astype(np.float32)),
        add=Edits(add=add),
        write=Edits(write=write),
        steer=Edits(add={"resid_post": add["resid_post"]}),
        by_row=Edits(suppression=(suppression(rng, "row", 0.25),)),
        by_column=Edits(suppression=(suppression(rng, "column", 0.3),)),
        by_both=Edits(
            suppression=(
                suppression(rng, "row", 0.2, score=-3.0),
                suppression(rng, "column", 0.15, score=-1.0),
            )
        ),
    )


def suppression(rng, by, threshold, score=-100.0):
    return Suppression(
        columns=rng.random((L, B, T)) < 0.4,
        rows=rng.random((L, B, T)) < 0.7,
        threshold=np.array([threshold, 2.0, -1.0], np.float32),  # partly, never, always
        score=np.full(L, score, np.float32),
        by=by,
    )


def together(*edits):
    """Several edits as one."""
    merged = {}
    for edit in edits:
        merged |= {name: value for name, value in vars(edit).items() if jax.tree.leaves(value)}
    return Edits(**merged)


@pytest.fixture(scope="module")
def forward(tiny):
    """The compiled forward pass; one program for each set of edits that are present."""
    return jax.jit(lambda p, edits, tokens: tiny.model(p, tokens, edits=edits)[0])


@pytest.mark.parametrize(
    "names",
    [
        ("bias",),
        ("gate", "steer"),
        ("add",),
        ("write",),
        ("by_row",),
        ("by_column",),
        ("by_both",),
        ("gate", "add", "write", "by_row"),
    ],
)
def test_edits_equal_numpys(tiny, reference, forward, random_edits, names):
    edits = together(*(getattr(random_edits, name) for name in names))
    expected, _ = reference(tiny.config, tiny.params, tiny.tokens, edits=edits)
    np.testing.assert_allclose(forward(tiny.params, edits, tiny.tokens), expected, **TOLERANCE)
    unedited = forward(tiny.params, None, tiny.tokens)
    assert np.abs(unedited - expected).max() > 0.05


def test_captures_show_the_edits_numpy_makes(tiny, reference, random_edits):
    edits = together(random_edits.gate, random_edits.add, random_edits.write)
    expected = reference(tiny.config, tiny.params, tiny.tokens, edits=edits)[1]
    capture = jax.jit(
        lambda p, e: tiny.model(p, tiny.tokens, edits=e, capture=frozenset(SITES))[1].captured
    )
    captured = capture(tiny.params, edits)
    for site in SITES:
        np.testing.assert_allclose(captured[site], expected[site], err_msg=site, **TOLERANCE)


def test_suppression_never_takes_a_rows_every_key_nor_shows_the_future(tiny, forward):
    everything = Suppression(
        columns=jnp.ones((L, 1, T), bool),
        rows=jnp.ones((L, 1, 1), bool),
        threshold=jnp.full(L, -1.0),
        score=jnp.full(L, -100.0),
    )
    edited = forward(tiny.params, Edits(suppression=(everything,)), tiny.tokens)
    intact = forward(tiny.params, Edits(), tiny.tokens)
    np.testing.assert_allclose(edited, intact, **TOLERANCE)
    # Nor do two that take half of the keys each.
    half = jnp.arange(T) % 2 == 0
    halves = tuple(everything.replace(columns=everything.columns & each) for each in (half, ~half))
    edited = forward(tiny.params, Edits(suppression=halves), tiny.tokens)
    np.testing.assert_allclose(edited, intact, **TOLERANCE)
    but_the_first = everything.replace(columns=everything.columns.at[:, :, 0].set(False))
    changed = np.array(tiny.tokens)
    changed[:, 6:] = (changed[:, 6:] + 7) % tiny.config.vocabulary
    one, two = (
        forward(tiny.params, Edits(suppression=(but_the_first,)), t) for t in (tiny.tokens, changed)
    )
    np.testing.assert_array_equal(one[:, :6], two[:, :6])
    assert (one[:, 6:] != two[:, 6:]).any()


def test_suppression_gives_layercakes_numbers():
    # One row of scores (2, 1, 0, 1, 0) with concept tokens 1 and 3.
    scores = np.log(np.exp([2.0, 1.0, 0.0, 1.0, 0.0]))
    mask = jnp.ones((1, 1, 1, 5), bool)

    def damaged(threshold):
        given = Suppression(
            columns=jnp.array([[False, True, False, True, False]]),
            rows=jnp.ones((1, 1), bool),
            threshold=jnp.float32(threshold),
            score=jnp.float32(-100.0),
        )
        q, k = jnp.ones((1, 1, 1, 1)), jnp.asarray(scores, jnp.float32).reshape(1, 5, 1, 1)
        edits = Edits(suppression=(given,))
        return dense_attention(q, k, k, mask, Scores(1.0), edits)[1][0, 0, 0]

    intact = [0.4984, 0.1834, 0.0675, 0.1834, 0.0675]
    np.testing.assert_allclose(damaged(0.3669), intact, atol=5e-5)
    np.testing.assert_allclose(damaged(0.3667), [0.7870, 0, 0.1065, 0, 0.1065], atol=5e-5)


def test_axes_of_size_one_stand_for_all_rows_tokens_and_heads(tiny, forward, random_edits):
    steer, write = random_edits.steer.add["resid_post"], random_edits.write.write["resid_post"]
    narrow = Edits(
        attention_bias=random_edits.bias.attention_bias[:, :1, :1],
        layer_gate=random_edits.gate.layer_gate[:, :1, :1],
        add={"resid_post": steer[:, :1, :1]},
        write={"resid_post": Write(write.value, write.mask[:, :1])},
    )
    wide = Edits(
        attention_bias=np.broadcast_to(narrow.attention_bias, (L, B, H, T, T)),
        layer_gate=np.broadcast_to(narrow.layer_gate, (L, B, T)),
        add={"resid_post": np.broadcast_to(narrow.add["resid_post"], (L, B, T, D))},
        write={"resid_post": Write(write.value, np.broadcast_to(write.mask[:, :1], (L, B, T)))},
    )
    np.testing.assert_allclose(
        forward(tiny.params, narrow, tiny.tokens),
        forward(tiny.params, wide, tiny.tokens),
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


@pytest.mark.parametrize("name", ["bias", "add", "write", "by_row", "by_column"])
def test_unrolled_layers_take_the_same_edits(tiny, forward, random_edits, name):
    edits = getattr(random_edits, name)
    scanned = forward(tiny.params, edits, tiny.tokens)
    unrolled = forward(parameters.unstack(tiny.params), edits, tiny.tokens)
    np.testing.assert_allclose(unrolled, scanned, **TOLERANCE)


def test_edits_of_ones_own_in_a_batch_through_vmap(tiny, forward, random_edits):
    other = jax.tree.map(jnp.negative, random_edits.steer)
    both = jax.jit(jax.vmap(lambda edits: tiny.model(tiny.params, tiny.tokens, edits=edits)[0]))(
        jax.tree.map(lambda *a: jnp.stack(a), random_edits.steer, other)
    )
    for one, edits in zip(both, (random_edits.steer, other), strict=True):
        alone = forward(tiny.params, edits, tiny.tokens)
        np.testing.assert_allclose(one, alone, **TOLERANCE)


def test_edits_are_the_same_on_a_mesh(tiny, random_edits):
    edits = together(random_edits.gate, random_edits.add, random_edits.by_row)
    tokens = np.concatenate([tiny.tokens] * 2)
    wide = jax.tree.map(lambda a: np.concatenate([a, a], axis=1) if a.ndim > 1 else a, edits)

    @jax.jit
    def forward(params, edits, tokens):
        return tiny.model(params, tokens, edits=edits)[0]

    alone = forward(tiny.params, wide, tokens)
    mesh = build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = parameter_shardings(
        parameters.logical_axes(tiny.config), tiny.model.abstract_params(), mesh
    )
    with jax.set_mesh(mesh):
        sharded = forward(jax.device_put(tiny.params, shardings), wide, tokens)
    np.testing.assert_allclose(sharded, alone, **TOLERANCE)


def test_gradients_reach_the_values_of_edits(tiny, random_edits):
    @jax.jit
    @jax.value_and_grad
    def loss(edits):
        return jnp.square(tiny.model(tiny.params, tiny.tokens, edits=edits)[0]).mean()

    given = together(random_edits.bias, random_edits.gate, random_edits.add)
    given = dataclasses.replace(given, attention_bias=np.maximum(given.attention_bias, -3.0))
    gradient = loss(given)[1]
    leaves, tree = jax.tree.flatten(given)
    for i, slopes in enumerate(map(np.asarray, jax.tree.leaves(gradient))):
        where = np.unravel_index(np.abs(slopes).argmax(), slopes.shape)
        step = np.zeros_like(slopes)
        step[where] = 1e-2
        up, down = (
            loss(tree.unflatten([*leaves[:i], leaves[i] + sign * step, *leaves[i + 1 :]]))[0]
            for sign in (1, -1)
        )
        np.testing.assert_allclose((up - down) / 2e-2, slopes[where], rtol=0.04)
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
    edits = Edits(layer_gate=gates[0], add={"resid_post": gates[0][..., None]})
    forward(tiny.params, edits, tiny.tokens)
    assert programs() == before + 1


def test_absent_edits_leave_no_trace_in_the_program(tiny):
    def text(**given):
        return jax.jit(lambda p, t: tiny.model(p, t, **given)[0]).lower(tiny.params, tiny.tokens)

    plain = text()
    assert text(edits=Edits()).as_text() == plain.as_text()
    gated = text(edits=Edits(layer_gate=jnp.ones((L, 1, 1))))
    assert gated.as_text() != plain.as_text()


@pytest.mark.parametrize("name", ["bias", "gate", "add", "write", "by_row"])
def test_edits_work_in_cached_decoding(tiny, forward, random_edits, name):
    params, edits = parameters.unstack(tiny.params), getattr(random_edits, name)
    whole = forward(tiny.params, edits, tiny.tokens)

    @jax.jit
    def step(cache, tokens, edits):
        logits, out = tiny.model(params, tokens, cache=cache, edits=edits)
        return logits, out.cache

    def at_token(leaf, t):
        """A step's queries are one token, its keys the whole cache."""
        if leaf.shape[2:] == (H, T, T):
            return leaf[:, :, :, t : t + 1]
        return leaf[:, :, t : t + 1]

    cache, logits = tiny.model.init_cache(B, T), []
    for t in range(3):
        if name == "by_row":
            (given,) = edits.suppression
            now = Edits(suppression=(given.replace(rows=given.rows[:, :, t : t + 1]),))
        else:
            now = jax.tree.map(lambda leaf, t=t: at_token(leaf, t), edits)
        out, cache = step(cache, tiny.tokens[:, t : t + 1], now)
        logits.append(out[:, 0])
    np.testing.assert_allclose(np.stack(logits, 1), whole[:, :3], **TOLERANCE)


def test_unknown_sites_and_bare_writes_are_refused(tiny):
    with pytest.raises(ValueError, match=r"add: unknown site 'resid_past'.*resid_post"):
        tiny.model(
            tiny.params, tiny.tokens, edits=Edits(add={"resid_past": jnp.ones((L, 1, 1, D))})
        )
    with pytest.raises(ValueError, match=r"write\['q'\] must be a Write"):
        tiny.model(tiny.params, tiny.tokens, edits=Edits(write={"q": jnp.ones((L, 1, 1, 1, 1))}))


def test_a_bare_suppression_is_refused(tiny, random_edits):
    (given,) = random_edits.by_row.suppression
    with pytest.raises(ValueError, match="must be a tuple of Suppressions"):
        tiny.model(tiny.params, tiny.tokens, edits=Edits(suppression=given))


def test_edits_of_another_number_of_layers_are_refused(tiny):
    for layers in (1, 2, 4):
        edits = Edits(layer_gate=jnp.ones((layers, 1, 1)))
        with pytest.raises(ValueError, match=r"layer_gate.* has shape .* first axis must be .* 3"):
            tiny.model(parameters.unstack(tiny.params), tiny.tokens, edits=edits)


def test_steering_gives_grains_numbers():
    def steered(h, vector, scale, **options):
        h, vector = jnp.array(h, jnp.float32), jnp.array(vector, jnp.float32)
        steer = Steer(vector, jnp.array(scale, jnp.float32), **options)
        return steer.applied(h[None])[0]

    found = steered([[3, 4]], [1, 0], [[5.0]])
    np.testing.assert_allclose(found, [[4.4721, 2.2361]], atol=5e-5)
    assert float(jnp.linalg.norm(found)) == pytest.approx(5)
    # Lengths are those of the features, not of the tokens.
    found = steered([[3, 4], [0, 2]], [2, 0], [[1.0]])
    np.testing.assert_allclose(found, [[3.9043, 3.1235], [1.4142, 1.4142]], atol=5e-5)
    np.testing.assert_allclose(steered([[3, 4]], [1, 0], [[5.0]], keep_norm=False), [[8, 4]])
    # Nothing is left to give a length to, or no length to give.
    np.testing.assert_array_equal(steered([[3, 4]], [-3, -4], [[1.0]]), [[3, 4]])
    np.testing.assert_array_equal(steered([[0, 0]], [1, 0], [[5.0]]), [[0, 0]])
    slope = jax.grad(lambda h: steered(h, [1, 0], [[5.0]]).sum())
    assert jnp.isfinite(slope(jnp.zeros((1, 2)))).all()


def test_steering_in_the_model_is_the_formula_at_its_site(tiny, forward):
    rng = np.random.default_rng(4)
    vector = rng.normal(size=(L, 1, 1, D)).astype(np.float32)
    scale = (rng.uniform(-2, 2, (L, B, T)) * (rng.random((L, B, T)) < 0.5)).astype(np.float32)
    edits = Edits(steer={"resid_post": Steer(vector, scale)})

    @jax.jit
    def states(edits):
        capture = {"resid_mid", "mlp_out", "resid_post"}
        return tiny.model(tiny.params, tiny.tokens, edits=edits, capture=capture)[1].captured

    found = states(edits)
    h = np.asarray(found["resid_mid"] + found["mlp_out"], np.float64)
    moved = h + scale[..., None] * vector
    lengths = [np.linalg.norm(a, axis=-1, keepdims=True) for a in (h, moved)]
    expected = np.where(scale[..., None] != 0, moved * lengths[0] / lengths[1], h)
    np.testing.assert_allclose(found["resid_post"], expected, **TOLERANCE)
    # A scale of zero everywhere changes nothing; unrolled layers do the same as scanned ones.
    still = Edits(steer={"resid_post": Steer(vector, 0 * scale)})
    intact = forward(tiny.params, None, tiny.tokens)
    np.testing.assert_array_equal(forward(tiny.params, still, tiny.tokens), intact)
    unrolled = forward(parameters.unstack(tiny.params), edits, tiny.tokens)
    np.testing.assert_allclose(unrolled, forward(tiny.params, edits, tiny.tokens), **TOLERANCE)
    assert np.abs(unrolled - intact).max() > 0.1


def test_impossible_steering_is_refused(tiny):
    steer = Steer(jnp.ones((L, 1, 1, D)), jnp.ones((L, 1, 1)))
    with pytest.raises(ValueError, match=r"steer: unknown site 'resid_past'"):
        tiny.model(tiny.params, tiny.tokens, edits=Edits(steer={"resid_past": steer}))
    bare = Edits(steer={"resid_post": jnp.ones((L, 1, 1, D))})
    with pytest.raises(ValueError, match=r"steer\['resid_post'\] must be a Steer"):
        tiny.model(tiny.params, tiny.tokens, edits=bare)
    with pytest.raises(ValueError, match="'attn_probs' holds no vectors"):
        tiny.model(tiny.params, tiny.tokens, edits=Edits(steer={"attn_probs": steer}))
