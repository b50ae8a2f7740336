"""A graph of tokens along whose edges a signal passes."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.decoding import Prompts, categorical, decode
from tokjax.decoding.engine import _run
from tokjax.errors import CheckpointError, ConfigError, DataError
from tokjax.pretraining.brillm import (
    BriLLM,
    BriLLMFit,
    Sampled,
    brillm,
    evaluate_brillm,
    fit_brillm,
    follower_lists,
    load_brillm,
    parameter_count,
    save_brillm,
    seen_edges,
    windows,
)
from tokjax.pretraining.brillm import graph as graphs
from tokjax.pretraining.brillm.candidates import sampled_loss
from tokjax.training.optimizers import Cosine

V, D, L = 7, 4, 8
MODEL = BriLLM(V, width=D, max_length=L)


@pytest.fixture(scope="module")
def params():
    found = MODEL.init(jax.random.key(0))
    history = jax.random.normal(jax.random.key(1), (L,))
    return {**found, "history": history}


@pytest.fixture(scope="module")
def tokens():
    rows = np.random.default_rng(0).integers(0, V, (3, L)).astype(np.int32)
    rows[0, 3] = rows[0, 2]  # a token that follows itself
    return rows


energies = jax.jit(MODEL.energies)
nll = jax.jit(MODEL.nll)


def gelu(x):
    return np.array([[0.5 * a * (1 + math.erf(a / math.sqrt(2))) for a in row] for row in x])


def straight_forward(params, row):
    """The energies of one row, by the definition, in float64."""
    p = {name: np.asarray(a, np.float64) for name, a in params.items()}
    weight, bias = p["edge_weight"].reshape(V, V, D, D), p["edge_bias"].reshape(V, V, D)
    codes = MODEL.codes().astype(np.float64)
    x = gelu(np.ones((1, D)) / D + p["node_bias"][row[0]] + codes[0])[0]
    store, found = [], []
    for i, (u, v) in enumerate(itertools.pairwise(row)):
        if i:
            a = np.exp(p["history"][:i])
            x = (a / a.sum()) @ np.array(store)
        z = gelu(np.einsum("d,vde->ve", x, weight[u]) + bias[u] + codes[i + 1])
        found.append(np.sqrt((z**2).sum(-1)))
        store.append(z[v])
    return np.array(found)


def test_position_codes_are_the_published_ones():
    code = BriLLM(2, width=4, max_length=3, positions="multiplied").codes()
    expected = [[0, 1, 0, 1], [0.841471, 0.540302, -0.506366, 0.862319]]
    np.testing.assert_allclose(code[:2], expected, atol=1e-6)
    np.testing.assert_allclose(code[2], [0.909297, -0.416147, -0.873297, 0.487188], atol=1e-6)
    usual = BriLLM(2, width=4, max_length=3).codes()
    np.testing.assert_allclose(usual[1], [0.841471, 0.540302, 0.01, 0.99995], atol=1e-6)


def test_codes_of_large_arguments_are_exact():
    code = BriLLM(2, width=4, max_length=512, positions="multiplied").codes()
    assert code[511, 2] == pytest.approx(math.sin(51100.0), abs=1e-7)


def test_one_transition_has_the_energies_of_the_example():
    model = BriLLM(3, width=2, max_length=2)
    weight = np.zeros((3, 3, 2, 2), np.float32)
    weight[0] = [[[0.5, 0], [0, 0.5]], [[0, 1], [1, 0]], [[-0.5, 0.2], [0.1, -0.4]]]
    params = {
        "edge_weight": jnp.asarray(weight.reshape(9, 2, 2)),
        "edge_bias": jnp.zeros((9, 2)),
        "node_bias": jnp.array([[0.1, -0.2], [9.0, 9.0], [9.0, 9.0]]),
        "history": jnp.ones(2),
    }
    tokens = jnp.array([[0, 0]])
    np.testing.assert_allclose(
        model.first(params, tokens[:, 0])[0], [0.435448, 1.174159], atol=1e-6
    )
    found = model.energies(params, tokens)[0, 0]
    np.testing.assert_allclose(found, [1.335319, 2.133325, 0.578069], atol=1e-6)
    np.testing.assert_allclose(jax.nn.softmax(found), [0.270998, 0.601916, 0.127086], atol=1e-6)
    assert float(model.nll(params, tokens)[0, 0]) == pytest.approx(1.305643, abs=1e-6)


def test_energies_are_those_of_the_definition(params, tokens):
    found = energies(params, tokens)
    for row, own in zip(tokens, found, strict=True):
        np.testing.assert_allclose(own, straight_forward(params, row), atol=2e-6)


def test_large_history_weights_leave_numbers(params, tokens):
    graded = jax.jit(jax.value_and_grad(lambda p: MODEL.nll(p, tokens).mean()))
    for scale in (1e3, -1e3):
        wild = {**params, "history": scale * jnp.arange(L, dtype=jnp.float32)}
        loss, gradient = graded(wild)
        assert np.isfinite(loss)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_equal_edges_predict_all_tokens_alike(params, tokens):
    same = {
        **params,
        "edge_weight": jnp.broadcast_to(params["edge_weight"][:1], (V * V, D, D)),
        "edge_bias": jnp.broadcast_to(params["edge_bias"][:1], (V * V, D)),
    }
    np.testing.assert_allclose(nll(same, tokens), math.log(V), atol=1e-6)


def test_the_order_of_candidates_permutes_energies_only(params, tokens):
    order = np.random.default_rng(1).permutation(V)
    candidates = np.broadcast_to(order, (3, L - 1, V))
    found = MODEL.energies(params, tokens, candidates)
    np.testing.assert_allclose(found, energies(params, tokens)[..., order], atol=1e-6)


def test_renamed_nodes_have_the_same_loss(params, tokens):
    order = np.random.default_rng(2).permutation(V)  # new name of each node
    back = np.argsort(order)
    edge = (back[:, None] * V + back).reshape(-1)
    renamed = {
        **params,
        "edge_weight": params["edge_weight"][edge],
        "edge_bias": params["edge_bias"][edge],
        "node_bias": params["node_bias"][back],
    }
    np.testing.assert_allclose(nll(renamed, order[tokens]), nll(params, tokens), atol=1e-6)


def test_parameters_are_counted_and_depend_on_length_by_a_scalar_a_token(params):
    assert sum(a.size for a in params.values()) == parameter_count(MODEL)
    assert parameter_count(MODEL) == L + V * D + V**2 * (D**2 + D)
    longer = BriLLM(V, width=D, max_length=L + 5)
    assert parameter_count(longer) - parameter_count(MODEL) == 5
    table = seen_edges(np.array([[0, 1, 1, 2]]), V)
    shared = MODEL.init(jax.random.key(0), table)
    trained = sum(a.size for name, a in shared.items() if name != "table")
    assert trained == parameter_count(MODEL, edges=4)


def test_later_tokens_change_nothing(params, tokens):
    changed = tokens.copy()
    changed[:, 5:] = (changed[:, 5:] + 1) % V
    before, after = energies(params, tokens), energies(params, changed)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert not np.array_equal(before[:, 5:], after[:, 5:])


def test_an_early_token_reaches_late_energies_through_the_history_only(params, tokens):
    changed = tokens.copy()
    changed[:, 0] = (changed[:, 0] + 1) % V
    assert not np.allclose(energies(params, tokens)[:, -1], energies(params, changed)[:, -1])
    bigram = BriLLM(V, width=D, max_length=L, history="none")
    before, after = (bigram.energies(params, t) for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, 1:], after[:, 1:])


def test_the_latest_signal_alone_is_a_history_of_one(params, tokens):
    latest = BriLLM(V, width=D, max_length=L, history="latest")
    steep = {**params, "history": 200.0 * jnp.arange(L, dtype=jnp.float32)}
    np.testing.assert_allclose(latest.energies(params, tokens), energies(steep, tokens), atol=1e-6)


def test_parts_give_the_energies_and_gradients_of_the_whole(params, tokens, monkeypatch):
    loss = lambda p: MODEL.nll(p, tokens).mean()  # noqa: E731
    whole = jax.jit(jax.value_and_grad(loss))(params)
    monkeypatch.setattr(graphs, "_FLOATS", 4 * V * D * D)  # 21 transitions in parts of 4
    parts = jax.jit(jax.value_and_grad(lambda p: loss(p)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, parts)


def test_a_table_of_all_edges_is_the_dense_graph(params, tokens):
    table = jnp.arange(V * V, dtype=jnp.int32).reshape(V, V)
    found = MODEL.energies({**params, "table": table}, tokens)
    np.testing.assert_allclose(found, energies(params, tokens), atol=1e-6)


def test_unseen_pairs_share_an_edge():
    table = seen_edges(np.array([[0, 1, 1], [2, 0, 1]]), 3)
    assert table.tolist() == [[0, 1, 0], [0, 2, 0], [3, 0, 0]]
    model = BriLLM(3, width=D, max_length=3)
    params = model.init(jax.random.key(0), table)
    first = model.energies(params, jnp.array([[0, 1]]))[0, 0]
    assert first[0] == first[2] != first[1]


def test_all_candidates_by_sampling_are_the_full_softmax(params, tokens):
    sampled = Sampled(V - 1, "vocabulary")
    candidates, counts = sampled.candidates(jax.random.key(3), tokens, V)
    assert counts.all()
    assert (np.sort(candidates, axis=-1) == np.arange(V)).all()
    found = sampled_loss(MODEL, params, tokens, candidates, counts)
    assert float(found) == pytest.approx(float(nll(params, tokens).mean()), abs=1e-6)


@pytest.mark.parametrize("among", ["vocabulary", "targets", "followers"])
def test_negatives_are_different_and_never_the_true_token(among, tokens):
    followers = follower_lists(tokens, V, 4) if among == "followers" else None
    sampled = Sampled(3, among)
    sampled.check(MODEL, followers)
    candidates, counts = sampled.candidates(jax.random.key(0), tokens, V, followers)
    assert (candidates[..., 0] == tokens[:, 1:]).all()
    for row, counted in zip(
        np.asarray(candidates).reshape(-1, candidates.shape[-1]),
        np.asarray(counts).reshape(-1, candidates.shape[-1]),
        strict=True,
    ):
        kept = row[counted].tolist()
        assert len(kept) == len(set(kept)) == 4
        if among == "targets":
            assert set(kept) <= set(tokens[:, 1:].reshape(-1).tolist())


def test_too_few_targets_are_fewer_candidates(params):
    tokens = np.array([[0, 1, 2, 1, 2, 1]], np.int32)
    candidates, counts = Sampled(4, "targets").candidates(jax.random.key(0), tokens, V)
    assert counts.sum(-1).tolist() == [[2] * 5]
    assert np.isfinite(sampled_loss(MODEL, params, tokens, candidates, counts))


def test_followers_are_the_most_frequent_ones():
    rows = np.array([[0, 1, 0, 2, 0, 2]])
    assert follower_lists(rows, 3, 2)[0].tolist() == [2, 1]


def test_walking_along_a_text_has_the_energies_of_training(params, tokens):
    predictor, _ = brillm(MODEL, params)
    prompts = Prompts(jnp.asarray(tokens[:, :3]), jnp.array([3, 1, 2]))
    walk, said = predictor.init(params, prompts, L)
    full = energies(params, tokens)
    step = jax.jit(predictor.step)
    for t in range(3):
        for b, start in enumerate((2, 0, 1)):
            np.testing.assert_allclose(said.logits[b], full[b, start + t], atol=2e-6)
        following = jnp.array([tokens[0, 3 + t], tokens[1, 1 + t], tokens[2, 2 + t]])
        walk, said = step(params, walk, following)


def test_greedy_decoding_takes_the_largest_energy_of_ragged_prompts(params, tokens):
    rows = [tokens[0, :3].tolist(), tokens[1, :1].tolist()]
    generation = decode(*brillm(MODEL, params), Prompts.of(rows), max_new_tokens=4)
    for row, new in zip(rows, generation.rows(), strict=True):
        text = [*row]
        for token in new:
            filled = np.zeros((1, L), np.int32)
            filled[0, : len(text)] = text
            assert token == int(energies(params, filled)[0, len(text) - 1].argmax())
            text.append(token)
        assert len(new) == 4
    logp = -nll(params, np.array([[*rows[0], *generation.rows()[0], 0]], np.int32))[0, 2:6]
    np.testing.assert_allclose(generation.logprobs[0, :4], logp, atol=2e-6)


def test_without_self_loops_no_token_follows_itself(params):
    loops = {**params, "edge_bias": params["edge_bias"].at[jnp.arange(V) * (V + 1)].add(5.0)}
    prompts = Prompts.of([[1], [2]])
    kept = decode(*brillm(MODEL, loops), prompts, max_new_tokens=5).rows()
    assert kept == [[1] * 5, [2] * 5]
    left = decode(*brillm(MODEL, loops, self_loops=False), prompts, max_new_tokens=5).rows()
    for first, row in zip((1, 2), left, strict=True):
        assert all(a != b for a, b in itertools.pairwise([first, *row]))


def test_late_codes_are_those_of_the_place_before(params):
    prompts = Prompts.of([[1]])
    late, _ = brillm(MODEL, params, late_codes=True)
    _, said = late.init(params, prompts, L)
    x = MODEL.first(params, jnp.array([1]))
    expected = MODEL.arriving(params, x, jnp.array([1]), MODEL.code(jnp.array([0])))
    np.testing.assert_allclose(said.logits, expected, atol=1e-6)
    clean, _ = brillm(MODEL, params)
    assert not np.allclose(clean.init(params, prompts, L)[1].logits, said.logits)


def test_samples_differ_other_parameters_compile_nothing(params):
    prompts = Prompts.of([[1]])
    options = {"max_new_tokens": 5, "samples": 8, "sampler": categorical()}
    first = decode(*brillm(MODEL, params), prompts, key=jax.random.key(0), **options)
    assert len(set(map(tuple, first.rows()))) > 1
    before = _run._cache_size()
    other = {**params, "history": params["history"] + 1.0}
    decode(*brillm(MODEL, other), prompts, key=jax.random.key(1), **options)
    assert _run._cache_size() == before


def test_rows_do_not_depend_on_one_another(params, tokens):
    together = energies(params, tokens)
    for b in range(len(tokens)):
        alone = energies(params, np.repeat(tokens[b : b + 1], 3, axis=0))
        np.testing.assert_allclose(alone[0], together[b], atol=1e-6)


@pytest.fixture(scope="module")
def copies():
    """Texts whose token is the one two back: order-2, where the last token alone says nothing."""
    rng = np.random.default_rng(0)
    starts = rng.integers(0, 4, (256, 2))
    return np.tile(starts, (1, 3)).astype(np.int32)


def test_training_learns_what_the_history_alone_tells(copies):
    config = BriLLMFit(steps=120, batch_size=64, peak_lr=0.03, schedule=Cosine(5))
    found = {}
    for history in ("mix", "none"):
        model = BriLLM(4, width=8, max_length=6, history=history)
        params, losses = fit_brillm(model, copies, config, progress=False)
        assert len(losses) == 120
        found[history] = evaluate_brillm(model, params, copies)[:, 1:].mean()
    # ln 4 is 1.39: what a bigram model is left with.
    assert found["none"] > 1.2
    assert found["mix"] < 0.5


def test_a_stopped_training_goes_on_with_the_same_numbers(copies, tmp_path):
    model = BriLLM(4, width=4, max_length=6)
    table = seen_edges(copies[:2], 4)
    config = BriLLMFit(steps=6, batch_size=32, sampled=Sampled(2, "vocabulary"))
    told = {"table": table, "progress": False}
    whole, losses = fit_brillm(model, copies, config, **told)
    file = tmp_path / "fit.safetensors"
    again, kept = fit_brillm(model, copies, config, checkpoint=file, **told)
    np.testing.assert_array_equal(losses, kept)
    found, once_more = fit_brillm(model, copies, config, checkpoint=file, **told)
    np.testing.assert_array_equal(losses, once_more)
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    jax.tree.map(np.testing.assert_array_equal, whole, found)
    np.testing.assert_array_equal(whole["table"], table)
    other = BriLLMFit(steps=7, batch_size=32)
    with pytest.raises(ConfigError, match="fit="):
        fit_brillm(model, copies, other, checkpoint=file, **told)


def test_a_graph_comes_back_from_its_file(params, tokens, tmp_path):
    file = tmp_path / "graph.safetensors"
    save_brillm(file, MODEL, params)
    model, found = load_brillm(file)
    assert model == MODEL
    jax.tree.map(np.testing.assert_array_equal, dict(params), found)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="no whole graph"):
        load_brillm(file)


def test_an_evaluation_in_batches_is_that_of_all_rows(params, tokens):
    np.testing.assert_allclose(
        evaluate_brillm(MODEL, params, tokens, batch_size=2), nll(params, tokens), atol=1e-6
    )


def test_texts_are_cut_so_that_each_transition_occurs_once():
    rows = windows(range(20), 4)
    pairs = [(a, b) for row in rows for a, b in itertools.pairwise(row.tolist())]
    assert pairs == [(i, i + 1) for i in range(18)]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: BriLLM(1), "vocab_size=1"),
        (lambda: BriLLM(5, width=3), "even"),
        (lambda: BriLLM(5, history="mixed"), "mix"),
        (lambda: BriLLM(5, positions="divide"), "divided"),
        (lambda: BriLLM(50_000).init(jax.random.key(0)), "seen_edges"),
        (lambda: MODEL.init(jax.random.key(0), np.zeros((2, 2), np.int32)), "shape"),
        (lambda: BriLLMFit(steps=0), "steps=0"),
        (lambda: BriLLMFit(peak_lr=0.0), "peak_lr"),
        (lambda: Sampled(0), "negatives=0"),
        (lambda: Sampled(3, "target"), "targets"),
        (lambda: Sampled(V).check(MODEL, None), "sampled=None"),
        (lambda: Sampled(2, "followers").check(MODEL, None), "follower_lists"),
        (lambda: follower_lists(np.zeros((1, 2), int), V, V + 1), "k=8"),
        (lambda: windows([1, 2, 3], 1), "length=1"),
        (lambda: fit_brillm(MODEL, np.zeros((2, 1), int)), "needs 2"),
        (lambda: evaluate_brillm(MODEL, {}, np.zeros((2, L + 1), int)), "max_length=8"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


@pytest.mark.parametrize("tokens", [np.zeros((0, 4), int), np.full((1, 4), V), np.zeros(4, int)])
def test_data_that_are_no_rows_of_nodes_are_refused(tokens):
    with pytest.raises(DataError, match=r"ids from|shape"):
        fit_brillm(MODEL, tokens)


def test_a_text_longer_than_the_graph_is_refused(params):
    with pytest.raises(ConfigError, match="max_positions=8"):
        decode(*brillm(MODEL, params), Prompts.of([[1, 2, 3]]), max_new_tokens=6)
