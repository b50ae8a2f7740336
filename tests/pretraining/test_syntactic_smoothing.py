import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.config import resolve
from tokjax.data.batch import Batch
from tokjax.data.syntax.sources import Distributional, Treebank
from tokjax.data.syntax.tag_counts import TagCounts, write_tag_counts
from tokjax.errors import ConfigError
from tokjax.finetuning.sft import SFT
from tokjax.models import ModelConfig, Transformer
from tokjax.models.encoder import Encoder
from tokjax.pretraining.corruption import Corruption
from tokjax.pretraining.gates import Gate
from tokjax.pretraining.masked_lm import MaskedLM
from tokjax.pretraining.next_token import NextToken
from tokjax.pretraining.patch_training import Patch
from tokjax.pretraining.similarity import Similarity, similarities
from tokjax.pretraining.syntactic_smoothing import SyntacticSmoothing
from tokjax.training.config import TrainConfig
from tokjax.training.loop import train
from tokjax.training.run import build_run

V, ROWS, B, T = 17, 15, 2, 12  # the model has two ids more than the tokenizer
CONFIG = ModelConfig(
    vocab_size=V, d_model=16, n_layers=2, n_heads=2, d_ff=24, remat="none", init_scale=0.5
)
MODEL = Transformer(CONFIG)
ENCODER = Encoder(dataclasses.replace(CONFIG, causal=False, mlm_head="gelu"))
KEY = jax.random.key(7)
rng = np.random.default_rng(0)
COUNTS = rng.poisson(3.0, (ROWS, 4)) * rng.integers(0, 2, (ROWS, 4)).astype(float)
COUNTS[[0, 5, 6]] = 0  # a special token and two without counts
SPECIAL = np.arange(ROWS) == 0
TOKENS = rng.integers(1, ROWS, (B, T + 1)).astype(np.int32)
TOKENS[:, 3] = 5
TOKENS[:, -1] = 0
SEGMENTS = np.array([[1] * T, [1] * 7 + [0] * 5], np.int32)
WEIGHTS = (SEGMENTS * rng.uniform(0.5, 1.5, (B, T))).astype(np.float32)


def batch_of(tokens=TOKENS):
    ids = jnp.asarray(tokens)
    return Batch(
        tokens=ids[:, :-1],
        targets=ids[:, 1:],
        positions=jnp.broadcast_to(jnp.arange(T), (B, T)),
        segment_ids=jnp.asarray(SEGMENTS),
        weights=jnp.asarray(WEIGHTS),
        example_id=jnp.zeros((B, 1), jnp.int32),
    )


BATCH = batch_of()


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(1))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "counts.npz"
    write_tag_counts(path, TagCounts(COUNTS, ("N", "V", "A", "X"), SPECIAL))
    return str(path)


def smoothing(table, g=0.6, tau=0.5, **options):
    options = {"similarity": Similarity(temperature=tau), "gate": Gate("constant", g)} | options
    return SyntacticSmoothing(table=table, **options)


def measured(objective, params, batch=BATCH, model=MODEL, progress=None):
    """Total and gradient, and the whole loss."""
    aux = objective.init(KEY, model, params)
    if progress is not None:
        aux = objective.advance(aux, jnp.float32(progress))

    def total(params):
        loss = objective.loss(model, params, aux, batch, KEY)
        return loss.total, loss

    (_, loss), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    return loss, gradient


def dense_targets(g, tau, uncounted="spread", kind="cosine"):
    """Target distributions [V, V] by the formulas, special tokens and the model's own left out."""
    counts = np.zeros((V, 4))
    counts[:ROWS] = COUNTS
    allowed = (np.arange(V) < ROWS) & (np.arange(V) > 0)
    S = np.asarray(similarities(jnp.asarray(counts, jnp.float32), Similarity(kind)), float)
    e = np.exp(S / tau) * (1 - np.eye(V)) * allowed
    q = (1 - g) * e / e.sum(-1, keepdims=True) + g * np.eye(V)
    hard = ~allowed | ((counts.sum(-1) == 0) & (uncounted == "hard"))
    q[hard] = np.eye(V)[hard]
    return jnp.asarray(q, jnp.float32)


def dense_loss(q, weights, logits, targets):
    ce = -(q[targets] * jax.nn.log_softmax(logits)[:, :, None, :]).sum(-1)
    return (ce * weights).sum()


def alike(a, b, **options):
    options = {"rtol": 2e-5, "atol": 2e-5} | options
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **options), a, b)


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("uncounted", ["spread", "hard"])
def test_loss_and_gradient_are_those_of_the_dense_targets(table, params, uncounted):
    loss, gradient = measured(smoothing(table, uncounted=uncounted), params)
    q = dense_targets(0.6, 0.5, uncounted)

    def dense(params):
        logits, _ = MODEL(
            params, BATCH.tokens, positions=BATCH.positions, segments=BATCH.segment_ids
        )
        return dense_loss(q, BATCH.weights[..., None], logits, BATCH.targets[..., None])

    alike((loss.total, gradient), jax.jit(jax.value_and_grad(dense))(params))
    assert float(loss.weight) == pytest.approx(WEIGHTS.sum(), rel=1e-6)
    plain, _ = measured(NextToken(), params)
    alike(loss.metrics["nll"], plain.metrics["nll"])
    smoothed = np.isin(TOKENS[:, 1:], [0] if uncounted == "spread" else [0, 5, 6], invert=True)
    share = (WEIGHTS * smoothed).sum() / WEIGHTS.sum()
    found = loss.metrics["smoothed"]
    assert float(found[0] / found[1]) == pytest.approx(share, rel=1e-5)


@pytest.mark.parametrize("kind", ["kl", "js"])
def test_divergences_smooth_too(table, params, kind):
    similarity = Similarity(kind, 0.5)
    loss, _ = measured(smoothing(table, similarity=similarity), params)
    logits, _ = MODEL(params, BATCH.tokens, positions=BATCH.positions, segments=BATCH.segment_ids)
    q = dense_targets(0.6, 0.5, kind=kind)
    dense = dense_loss(q, BATCH.weights[..., None], logits, BATCH.targets[..., None])
    alike(loss.total, dense)


@pytest.mark.parametrize("gate", [Gate("constant", 1.0), Gate("linear", 0.5)], ids=["off", "end"])
def test_all_mass_on_the_true_token_is_plain_training_bit_for_bit(table, params, gate):
    plain = measured(NextToken(), params)
    found = measured(smoothing(table, gate=gate), params, progress=1.0)
    for a, b in zip(
        jax.tree.leaves((plain[0].total, plain[1])),
        jax.tree.leaves((found[0].total, found[1])),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_uniform_similarity_is_label_smoothing_over_the_other_tokens(table, params):
    loss, _ = measured(smoothing(table, similarity=Similarity("uniform")), params)
    logits, _ = MODEL(params, BATCH.tokens, positions=BATCH.positions, segments=BATCH.segment_ids)
    others = ROWS - 2  # without the special token and the true one
    q = np.full((V, V), 0.4 / others, np.float32)
    q[:, [0, *range(ROWS, V)]] = 0
    q[np.arange(V), np.arange(V)] = 0.6
    q[0] = np.eye(V)[0]
    dense = dense_loss(jnp.asarray(q), BATCH.weights[..., None], logits, BATCH.targets[..., None])
    alike(loss.total, dense)


def test_special_tokens_take_part_where_they_are_included(table, params):
    found = smoothing(table, special="include")
    aux = found.init(KEY, MODEL, params)
    assert aux.smoothed.all()
    excluded = smoothing(table).init(KEY, MODEL, params).smoothed
    assert np.flatnonzero(~np.asarray(excluded)).tolist() == [0, 15, 16]


def test_the_gate_follows_the_training(table, params):
    paced = smoothing(table, gate=Gate("linear", 0.2))
    for progress, g in ((0.0, 0.2), (0.5, 0.6)):
        loss, _ = measured(paced, params, progress=progress)
        constant, _ = measured(smoothing(table, g), params)
        alike(loss.total, constant.total, rtol=1e-6)
        assert float(loss.metrics["gate"][0]) == pytest.approx(g)


def test_later_tokens_move_no_earlier_prediction(table, params):
    """Of the gradient with respect to the inputs of a loss on the first targets."""
    objective = smoothing(table)
    aux = objective.init(KEY, MODEL, params)
    early = dataclasses.replace(BATCH, weights=BATCH.weights.at[:, 5:].set(0.0))
    changed = np.where(np.arange(T + 1) > 5, TOKENS % (ROWS - 1) + 1, TOKENS).astype(np.int32)
    other = dataclasses.replace(batch_of(changed), weights=early.weights)
    loss = jax.jit(lambda b: objective.loss(MODEL, params, aux, b, KEY).total)
    assert (changed != TOKENS)[:, 6:].all() and float(loss(early)) == float(loss(other))
    assert float(loss(BATCH)) != float(loss(batch_of(changed)))


def test_targets_without_weight_may_hold_any_id(table, params):
    objective = smoothing(table)
    aux = objective.init(KEY, MODEL, params)
    ids = jnp.where(BATCH.weights == 0, 10_000, BATCH.targets)
    found = objective.loss(MODEL, params, aux, dataclasses.replace(BATCH, targets=ids), KEY)
    plain = objective.loss(MODEL, params, aux, BATCH, KEY)
    alike((found.total, found.metrics["nll"]), (plain.total, plain.metrics["nll"]))


# ---------------------------------------------------------------- other bases


def test_patches_are_smoothed_target_by_target(table, params):
    base = Patch(k=3)
    loss, _ = measured(smoothing(table, base=base), params)
    found = base.predictions(MODEL, params, BATCH, KEY)
    logits = MODEL.unembed(params, found.x)
    dense = dense_loss(dense_targets(0.6, 0.5), found.weights, logits, found.targets)
    alike(loss.total, dense)
    assert smoothing(table, base=base).tokens_per_position == 3
    plain, _ = measured(base, params)
    for name in ("nll", "nll_offset_0", "nll_offset_2"):
        alike(loss.metrics[name], plain.metrics[name])


@pytest.mark.parametrize("count", ["bernoulli", "fixed"])
def test_masked_tokens_are_smoothed(table, count):
    params = ENCODER.init(jax.random.key(2))
    base = MaskedLM(Corruption(0.4, count=count, mask_id=V - 1, random_ids=ROWS), exempt=(0,))
    objective = smoothing(table, base=base)
    loss, _ = measured(objective, params, model=ENCODER)
    found = base.predictions(ENCODER, params, BATCH, KEY)
    logits = jnp.einsum("btd,vd->btv", found.x, found.head.table)
    if found.head.bias is not None:
        logits += found.head.bias
    dense = dense_loss(dense_targets(0.6, 0.5), found.weights, logits, found.targets)
    alike(loss.total, dense)
    assert objective.bidirectional and objective.evaluates == base
    assert not smoothing(table).bidirectional and smoothing(table).evaluates is False


# ---------------------------------------------------------------- sizes and refusals


def test_nothing_of_all_positions_by_all_ids_is_held(tmp_path):
    vocabulary, rows, tokens = 20_000, 4, 1024
    path = tmp_path / "large.npz"
    tags = rng.integers(0, 12, vocabulary)
    counts = np.eye(12)[tags]
    names = tuple("abcdefghijkl")
    write_tag_counts(path, TagCounts(counts, names, np.zeros(vocabulary, bool)))
    model = Transformer(dataclasses.replace(CONFIG, vocab_size=vocabulary, n_layers=1))
    objective = smoothing(str(path))
    ids = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
    batch = Batch(ids, ids, ids, ids, jax.ShapeDtypeStruct(ids.shape, jnp.float32), ids)
    params = model.abstract_params()
    aux = jax.eval_shape(lambda p: objective.init(KEY, model, p), params)
    step = jax.jit(jax.grad(lambda p, a, b: objective.loss(model, p, a, b, KEY).total))
    used = step.lower(params, aux, batch).compile().memory_analysis().temp_size_in_bytes
    assert used < rows * tokens * vocabulary * 4 / 2


def test_what_cannot_be_smoothed_is_refused(table, params):
    with pytest.raises(ConfigError, match="smooths the targets of next_token, masked_lm, patch"):
        SyntacticSmoothing(base=SFT())
    with pytest.raises(ConfigError, match="control of patches"):
        SyntacticSmoothing(base=Patch(targets="shuffled"))
    with pytest.raises(ConfigError, match="hard"):
        SyntacticSmoothing(uncounted="hrd")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no counts of tags yet"):
        SyntacticSmoothing().init(KEY, MODEL, params)
    small = Transformer(dataclasses.replace(CONFIG, vocab_size=8))
    with pytest.raises(ConfigError, match="counts 15 tokens, but the model has 8"):
        smoothing(table).init(KEY, small, params)


# ---------------------------------------------------------------- runs


def tree_of(corpus, objective, **more):
    source = lambda name: {"name": "text", "files": (str(corpus / f"{name}.txt"),)}  # noqa: E731
    data = {
        "tokenizer": {"name": "bytes"},
        "train": [{"source": source("train")}],
        "evals": {"validation": source("validation")},
        "seq_len": 64,
        "batch_size": 4,
        "cache_dir": str(corpus / "cache"),
    }
    tree = {
        "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_positions": 64},
        "data": data,
        "objective": objective,
        "steps": 4,
        "log_every": 1,
        "evaluation": {"every_steps": 4, "max_batches": 1},
    }
    model = tree["model"] | more.pop("model", {})
    return tree | more | {"model": model}


def run_of(tree):
    config = resolve(TrainConfig, tree)
    return build_run(config, devices=jax.devices()[:1], show_progress=False)


def test_a_run_makes_its_counts_paces_the_gate_and_evaluates_hard_targets(tiny_corpus, tmp_path):
    from tokjax.training.metrics import read_metrics

    tree = tree_of(tiny_corpus, {"name": "syntactic_smoothing", "gate": {"start": 0.2}})
    run = run_of(tree)
    objective = run.stages[0].objective
    assert objective.counts.covered > 0 and isinstance(objective.tags, Distributional)
    assert run.identity()["objective"]["tags"] == objective.counts.digest[:16]
    result = train(run, tmp_path / "run")
    assert result.finished and np.isfinite(result.metrics["eval/validation/loss"])
    gates = [g for g in read_metrics(tmp_path / "run")["gate"] if g is not None]
    np.testing.assert_allclose(gates, [0.2, 0.4, 0.6, 0.8], rtol=1e-6)
    plain = tree_of(tiny_corpus, {"name": "next_token"})
    assert run_of(plain).identity()["objective"] == {"name": "next_token", "z_loss": 0.0}


def test_a_run_of_a_masked_model_trains_evaluates_and_is_read_again(tiny_corpus, tmp_path):
    from tokjax.training.trained import load_trained

    masked = {"name": "masked_lm", "corruption": {"count": "fixed"}}
    objective = {"name": "syntactic_smoothing", "base": masked}
    bytes_and_mask = {"causal": False, "mlm_head": "gelu", "vocab_size": 258}
    run = run_of(tree_of(tiny_corpus, objective, model=bytes_and_mask))
    base = run.stages[0].objective.base
    assert base.corruption.mask_id == run.tokenizer.vocab_size
    result = train(run, tmp_path / "run")
    assert np.isfinite(result.metrics["eval/validation/nll"])
    assert isinstance(load_trained(tmp_path / "run").model, Encoder)
    from tokjax.loading import load

    with pytest.raises(ConfigError, match="continues no text"):
        load(str(tmp_path / "run"))


def test_directions_that_do_not_fit_are_refused(tiny_corpus):
    masked = {"name": "masked_lm"}
    with pytest.raises(ConfigError, match=r"set model\.causal=False"):
        run_of(tree_of(tiny_corpus, masked))
    encoder = {"causal": False, "vocab_size": 258}
    with pytest.raises(ConfigError, match=r"set model\.causal=True"):
        run_of(tree_of(tiny_corpus, {"name": "next_token"}, model=encoder))
    asked = {"prompts": ("a",), "max_new_tokens": 4}
    with pytest.raises(ConfigError, match="continues no text"):
        run_of(tree_of(tiny_corpus, masked, model=encoder, samples=asked))
    with pytest.raises(ConfigError, match="no id to spare"):
        run_of(tree_of(tiny_corpus, masked, model={"causal": False}))


def test_a_table_of_another_tokenizer_is_refused(tiny_corpus, table):
    tree = tree_of(tiny_corpus, {"name": "syntactic_smoothing", "table": table})
    with pytest.raises(ConfigError, match="counts 15 tokens, but the tokenizer has 257"):
        run_of(tree)


def test_a_treebank_can_be_chosen_in_a_configuration():
    tags = {"name": "treebank", "files": ("gold.conllu",)}
    objective = {"name": "syntactic_smoothing", "tags": tags, "base": {"name": "patch", "k": 2}}
    config = resolve(TrainConfig, {"objective": objective, "steps": 1})
    assert config.objective.tags == Treebank(("gold.conllu",))
    assert config.objective.base == Patch(k=2)
