"""Lexinvariant models: equivariance, what is random and what learned, and what they learn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixers_for_tests import config_with, random_params

import tokjax
from tokjax.config import load, resolve
from tokjax.data.batch import Batch
from tokjax.decoding import Prompts, decode
from tokjax.errors import ConfigError
from tokjax.models import ModelConfig, Transformer
from tokjax.pretraining.lexinvariant import Lexinvariant, head_of
from tokjax.pretraining.next_token import NextToken
from tokjax.pretraining.syntactic_smoothing import SyntacticSmoothing
from tokjax.pretraining.wavelet_gpt import Wavelet
from tokjax.reproduction.small_runs import fitted
from tokjax.reproduction.tasks.symbols import periodic
from tokjax.training.config import TrainConfig
from tokjax.training.loop import train
from tokjax.training.run import build_run

B, T, V = 3, 12, 61
KEY = jax.random.key(5)


def model_with(**changes):
    return Transformer(config_with(None, **changes))


@pytest.fixture(scope="module")
def model():
    return model_with()


@pytest.fixture(scope="module")
def params(model):
    return random_params(model)


def batch_of(tokens, segments=None, examples=1):
    tokens = np.asarray(tokens, np.int32)
    rows, length = tokens.shape
    segments = np.ones((rows, length), np.int32) if segments is None else segments
    positions = np.zeros((rows, length), np.int32)
    for t in range(1, length):
        same = segments[:, t] == segments[:, t - 1]
        positions[:, t] = np.where(same, positions[:, t - 1] + 1, 0)
    targets = np.roll(tokens, -1, axis=1)
    behind = np.roll(segments, -1, axis=1) == segments
    behind[:, -1] = False
    ids = np.arange(rows * examples, dtype=np.int32).reshape(rows, examples)
    return Batch(tokens, targets, positions, segments, behind.astype(np.float32), ids)


def some_batch(**more):
    return batch_of(np.random.default_rng(0).integers(0, V, (B, T)), **more)


def packed_batch():
    segments = np.repeat([[1, 2, 3]], 4, axis=1).repeat(B, 0).astype(np.int32)
    return some_batch(segments=segments, examples=3)


@functools.cache
def compiled(objective, model, method="token_nll"):
    if method == "loss":
        return jax.jit(lambda params, batch, key: objective.loss(model, params, (), batch, key))
    return jax.jit(lambda params, batch, key: objective.token_nll(model, params, batch, key))


# -------------------------------------------------------------------- what must hold


def test_relabelled_text_under_the_relabelled_table_has_relabelled_logits(model, params):
    drawn, tables = Lexinvariant(keep=()).drawn(model, params, KEY)
    pi = np.random.default_rng(1).permutation(V)
    back = np.argsort(pi)
    moved = {**tables, "embedding": tables["embedding"][back], "head": tables["head"][back]}
    run = jax.jit(lambda params, tokens: drawn(params, tokens)[0])
    tokens = some_batch().tokens
    one, two = run(tables, tokens), run(moved, pi[tokens])
    np.testing.assert_array_equal(two[..., pi], one)


def test_with_nothing_random_it_is_the_tied_model_bit_for_bit(model, params):
    batch = some_batch()
    ours = compiled(Lexinvariant(p=0.0), model, "loss")(params, batch, KEY)
    plain = jax.jit(lambda p, b: NextToken().loss(model, p, (), b, KEY))(params, batch)
    np.testing.assert_array_equal(ours.total, plain.total)
    # So is the mixture itself, where the draw makes no symbol random.
    rare = compiled(Lexinvariant(p=1e-12, keep=()), model)(params, batch, KEY)
    total = np.where(batch.weights == 0, 0.0, rare * batch.weights).sum()
    np.testing.assert_allclose(total, plain.total, rtol=1e-6)


def test_vectors_do_not_depend_on_how_many_symbols_are_random(model, params):
    ids = jnp.arange(V)[None]
    whole = Lexinvariant(keep=()).draw(model, params, KEY[None], ids)
    part = Lexinvariant(p=0.4, keep=()).draw(model, params, KEY[None], ids)
    assert whole.random.all() and 0.1 < part.random.mean() < 0.8
    at = np.asarray(part.random)[0]
    for name in ("inputs", "outputs"):
        one, two = (np.asarray(getattr(tables, name))[0] for tables in (whole, part))
        np.testing.assert_array_equal(one[at], two[at])
        # The same choice at both ends.
        np.testing.assert_array_equal(two[~at], np.asarray(params["embedding"])[~at])


def test_the_share_of_random_symbols_is_p(model, params):
    keys = jax.random.split(KEY, 200)
    ids = jnp.broadcast_to(jnp.arange(V), (200, V))
    found = Lexinvariant(p=0.2, keep=(3,)).draw(model, params, keys, ids).random
    assert not found[:, 3].any()
    assert abs(float(jnp.delete(found, 3, axis=1).mean()) - 0.2) < 0.015


def test_rows_and_steps_have_tables_of_their_own(model, params):
    tokens = np.tile(np.random.default_rng(0).integers(0, V, (1, T)), (B, 1))
    nll = compiled(Lexinvariant(keep=()), model)(params, batch_of(tokens), KEY)[:, :-1]
    assert (nll[0] != nll[1]).all()
    again = compiled(Lexinvariant(keep=()), model)(params, batch_of(tokens), jax.random.key(6))
    assert (nll[0] != again[0, :-1]).all()
    fixed = compiled(Lexinvariant(keep=(), tables="fixed"), model)(params, batch_of(tokens), KEY)
    np.testing.assert_allclose(fixed[0], fixed[1], rtol=1e-5)


def test_rows_of_another_batch_have_other_tables_under_the_same_key(model, params):
    one = some_batch()
    two = dataclasses.replace(one, example_id=one.example_id + B)
    run = compiled(Lexinvariant(keep=()), model)
    assert (run(params, one, KEY)[:, :-1] != run(params, two, KEY)[:, :-1]).all()


def test_documents_of_a_row_have_tables_of_their_own(model, params):
    document = np.random.default_rng(0).integers(0, V, 4)
    segments = np.repeat([1, 2, 3], 4)[None].repeat(B, 0).astype(np.int32)
    batch = batch_of(np.tile(document, (B, 3)), segments, examples=3)
    own = compiled(Lexinvariant(keep=()), model)(params, batch, KEY).reshape(B, 3, 4)[..., :3]
    assert (own[:, 0] != own[:, 1]).all() and (own[:, 1] != own[:, 2]).all()
    shared = compiled(Lexinvariant(keep=(), documents="shared"), model)(params, batch, KEY)
    shared = shared.reshape(B, 3, 4)[..., :3]
    np.testing.assert_allclose(shared[:, 0], shared[:, 1], rtol=1e-4)


def test_a_document_of_a_row_is_scored_by_its_table_at_both_ends(model, params):
    """Turned states times the row's table are the states times the document's own table."""
    objective, batch = Lexinvariant(p=0.5, keep=(7,)), packed_batch()
    found = np.asarray(compiled(objective, model)(params, batch, KEY))
    keys = objective._row_keys(batch, KEY)
    ids = jnp.broadcast_to(jnp.arange(V), (B, V))
    tables = objective.draw(model, params, keys, ids)
    signs = np.asarray(objective._signs(model, batch, keys))
    for b, s in ((0, 2), (1, 3), (2, 1)):
        at = np.flatnonzero(batch.segment_ids[b] == s)
        turn = np.where(np.asarray(tables.random)[b][:, None], signs[b, at[0]], 1.0)
        by_hand = Transformer(dataclasses.replace(model.config, tie_embeddings=False))
        given = {**params, "embedding": tables.inputs[b] * turn, "head": tables.outputs[b] * turn}
        logits = by_hand(given, batch.tokens[b, at][None])[0][0]
        nll = -jax.nn.log_softmax(logits)[np.arange(4), batch.targets[b, at]]
        np.testing.assert_allclose(found[b, at][:3], nll[:3], rtol=2e-4)


def test_the_future_moves_nothing(model, params):
    batch = packed_batch()
    changed = dataclasses.replace(batch, tokens=batch.tokens.copy())
    changed.tokens[:, 6:] = (changed.tokens[:, 6:] + 9) % V
    for objective in (Lexinvariant(keep=()), Lexinvariant(p=0.5, keep=(1,))):
        run = compiled(objective, model)
        one, two = run(params, batch, KEY), run(params, changed, KEY)
        np.testing.assert_array_equal(one[:, :6], two[:, :6])
        assert (one[:, 6:] != two[:, 6:]).any()


def test_unseen_symbols_are_alike_on_average_over_tables(model, params):
    objective = Lexinvariant(keep=())

    @jax.jit
    def mean_and_error(keys):
        def one(key):
            drawn, given = objective.drawn(model, params, key)
            return drawn(given, jnp.array([[4]]))[0][0, 0]

        logits = jax.lax.map(one, keys, batch_size=50)
        return logits.mean(0), logits.std(0) / len(keys) ** 0.5

    mean, error = map(np.asarray, mean_and_error(jax.random.split(KEY, 1000)))
    unseen = np.delete(np.arange(V), 4)
    middle = mean[unseen].mean()
    assert (np.abs(mean[unseen] - middle) < 4.5 * error[unseen]).all()
    assert abs(mean[4] - middle) > 20 * error[4]  # the symbol seen is another matter


def test_no_gradient_reaches_vectors_and_no_parameter_is_as_large_as_the_vocabulary(params, model):
    bare = model_with(embedding_rows=0)
    shapes = jax.tree.leaves(bare.abstract_params())
    assert not any(V in leaf.shape for leaf in shapes)
    mine = {name: value for name, value in params.items() if name != "embedding"}
    batch = packed_batch()
    whole = compiled(Lexinvariant(keep=()), model)(params, batch, KEY)
    np.testing.assert_array_equal(compiled(Lexinvariant(keep=()), bare)(mine, batch, KEY), whole)

    def gradient_of(objective):
        return jax.jit(jax.grad(lambda p: objective.loss(model, p, (), batch, KEY).total))(params)

    found = gradient_of(Lexinvariant(keep=()))
    assert not found["embedding"].any() and found["layers"]["mlp"]["up"].any()
    kept = np.asarray(gradient_of(Lexinvariant(keep=(2, 5)))["embedding"]).any(-1)
    assert np.flatnonzero(kept).tolist() == [2, 5]


def test_kept_ids_have_one_row_each(model, params):
    small = model_with(embedding_rows=2)
    keep, batch = (9, 30), packed_batch()
    mine = {**params, "embedding": params["embedding"][jnp.array(keep)]}
    whole = compiled(Lexinvariant(keep=keep), model)(params, batch, KEY)
    few = compiled(Lexinvariant(keep=keep), small)(mine, batch, KEY)
    np.testing.assert_array_equal(whole, few)


def test_symbols_present_have_the_same_logits_as_among_all(model, params):
    """Differences of log-likelihoods within a position are those of the whole softmax."""
    tokens = np.random.default_rng(0).integers(0, 6, (B, T))
    batch = batch_of(tokens)
    objective = Lexinvariant(keep=(), candidates="present")
    loss = compiled(objective, model, "loss")(params, batch, KEY)
    counts = [len(set(row)) for row in tokens]
    assert float(loss.metrics["candidates"][0]) == sum(counts)
    nll = np.asarray(compiled(objective, model)(params, batch, KEY))
    keys = objective._row_keys(batch, KEY)
    for b in range(B):
        drawn, given = Lexinvariant(keep=()).drawn(model, params, keys[b])
        logits = np.asarray(drawn(given, batch.tokens[b][None])[0][0])
        present = np.array(sorted(set(tokens[b])))
        by_hand = -jax.nn.log_softmax(logits[:, present])
        at = np.searchsorted(present, batch.targets[b])
        np.testing.assert_allclose(nll[b, :-1], by_hand[np.arange(T), at][:-1], rtol=2e-4)


def test_scaled_logits_have_a_standard_deviation_of_one(model, params):
    plain = {**params, "norm": jnp.ones_like(params["norm"])}
    for scaled, expected in ((True, 1.0), (False, 32**0.5)):
        drawn, given = Lexinvariant(keep=(), scaled=scaled).drawn(model, plain, KEY)
        logits = drawn(given, some_batch().tokens)[0]
        assert abs(float(logits.std()) / expected - 1) < 0.3


def test_a_draw_decodes_beside_a_cache_as_it_scores(model, params):
    drawn, given = Lexinvariant(keep=()).drawn(model, params, KEY)
    row = decode(drawn, given, Prompts.of([[3, 4, 3]]), max_new_tokens=3).rows()[0]
    ids = [3, 4, 3]
    for _ in range(3):
        ids.append(int(drawn(given, jnp.array([ids]))[0][0, -1].argmax()))
    assert ids[3:] == list(row)


def test_a_mixer_stands_between_the_blocks_all_the_same():
    model = Transformer(config_with(Wavelet(8)))
    params = random_params(model)
    whole = compiled(Lexinvariant(keep=()), model)(params, packed_batch(), KEY)
    assert np.isfinite(np.asarray(whole)[:, :3]).all()


def test_evaluation_takes_the_share_that_it_is_told():
    assert Lexinvariant().evaluates.p == 1
    assert Lexinvariant(p=0.2).evaluates is False
    assert Lexinvariant(p=0.2, evaluation_p=0.2).evaluates.p == 0.2
    assert Lexinvariant(p=1.0, evaluation_p=0.0).evaluates is False


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Lexinvariant(p=1.5), "p=1.5"),
        (lambda: Lexinvariant(tables="rows"), "unknown tables='rows'"),
        (lambda: Lexinvariant(keep=(1, 1)), "keep"),
        (lambda: Lexinvariant(std=0.0), "std=0"),
        (lambda: Lexinvariant(keep=(V,)).check(model_with()), "names ids"),
        (lambda: Lexinvariant().check(model_with(tie_embeddings=False)), "tie_embeddings=True"),
        (lambda: Lexinvariant().check(model_with(head_bias=True)), "head_bias=False"),
        (lambda: Lexinvariant(keep=(1,)).check(model_with(embedding_rows=0)), "embedding_rows=1"),
        (lambda: Lexinvariant(p=0.5).check(model_with(embedding_rows=0)), "embedding_rows=None"),
        (
            lambda: Lexinvariant(evaluation_p=0.0).check(model_with(embedding_rows=0)),
            "embedding_rows=None",
        ),
        (
            lambda: Lexinvariant(candidates="present").check(model_with(logit_softcap=5.0)),
            "softcap",
        ),
        (lambda: model_with(embedding_rows=0).embed({}, jnp.zeros((1, 1), int)), "Draw a table"),
        (lambda: ModelConfig(embedding_rows=2, tie_embeddings=False), "tie_embeddings"),
        (lambda: SyntacticSmoothing(base=Lexinvariant()), "lexinvariant"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


def test_tables_that_are_too_large_are_refused(model, params):
    objective = Lexinvariant(keep=(), table_gib=1e-6)
    with pytest.raises(ConfigError, match="candidates='present'"):
        jax.eval_shape(lambda: objective.loss(model, params, (), some_batch(), KEY))


def test_the_head_has_the_models_scale_and_softcap():
    model = model_with(logit_softcap=3.0, logit_scale=0.5, embedding_rows=0)
    head = head_of(model, jnp.ones((4, 32)))
    assert (head.softcap, head.scale, head.table.shape) == (3.0, 0.5, (4, 32))


# -------------------------------------------------------------------- runs


def test_a_run_of_it_is_evaluated_resumed_and_loaded(tiny_tree, tmp_path):
    tree = tiny_tree(
        objective={"name": "lexinvariant"},
        model__embedding_rows=1,
        steps=4,
        checkpoints__every_steps=4,
        evaluation__every_steps=4,
        evaluation__max_batches=1,
    )
    run = build_run(resolve(TrainConfig, tree), devices=jax.devices()[:1], show_progress=False)
    assert run.stages[0].objective.keep == (256,)
    assert train(run, tmp_path / "run").finished
    lm = tokjax.load(tmp_path / "run")
    assert lm.params["embedding"].shape == (1, 32)
    with pytest.raises(ConfigError, match="Draw a table"):
        lm.logits([[1, 2]])
    drawn, given = run.stages[0].objective.drawn(lm.model, lm.params, KEY)
    logits = drawn(given, jnp.array([[256, 5, 5]]))[0]
    assert logits.shape == (1, 3, 257) and np.isfinite(logits).all()


def test_samples_are_refused_where_ids_have_no_vectors(tiny_tree):
    tree = tiny_tree(
        objective={"name": "lexinvariant"}, model__embedding_rows=1, samples={"prompts": ["a"]}
    )
    with pytest.raises(ConfigError, match=r"samples\.prompts"):
        build_run(resolve(TrainConfig, tree), devices=jax.devices()[:1], show_progress=False)


@pytest.mark.parametrize("p", ["1", "0.2", "0"])
def test_the_config_takes_each_share(p):
    found = resolve(TrainConfig, load(f"configs/lexinvariant.py:p={p}"))
    assert found.objective.p == float(p)


def test_it_learns_to_repeat_symbols_it_has_never_had_vectors_for():
    """Periodic sequences of random symbols: on a, b, a, b, ... the right one stands far above the
    31 others (chance: 0.03) from the third period on.
    """
    symbols, length = 32, 24
    # Without a matrix between vectors and blocks each state begins as the symbol it was read from;
    # positions must be as large as these vectors, whose coordinates have a variance of 1.
    model = Transformer(
        ModelConfig(
            vocab_size=symbols,
            d_model=64,
            embedding_width=64,
            n_layers=2,
            n_heads=1,
            max_positions=32,
            positions="learned",
            init_scale=0.5,
        )
    )
    objective, rng = Lexinvariant(keep=()), np.random.default_rng(0)
    batches = (batch_of(periodic(rng, 32, length, symbols, (2, 6))) for _ in range(800))
    params, told = fitted(model, objective, None, batches, 1e-3)
    assert told["nll"][-50:].mean() < told["nll"][:50].mean() / 2

    text = jnp.array([[3, 17] * 9])

    @jax.jit
    def probabilities(keys):
        def one(key):
            drawn, given = objective.drawn(model, params, key)
            return jax.nn.softmax(drawn(given, text)[0][0])

        return jax.lax.map(one, keys, batch_size=20)

    found = np.asarray(probabilities(jax.random.split(KEY, 200)))
    right = found[:, np.arange(17), np.asarray(text)[0, 1:]]
    assert right[:, 3:].mean(0).min() > 0.9  # from the third period on
    # Symbols that never occurred share the rest equally, on average over tables only.
    rest = np.delete(found[:, 1], [3, 17], axis=1)
    assert (np.abs(rest.mean(0) / rest.mean() - 1) < 0.6).all()
    assert (rest[0].std() / rest[0].mean()) > 0.2
