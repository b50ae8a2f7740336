"""MEXMA: its three losses, what reaches what, and what a run leaves behind."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.config import load, resolve
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError
from tokjax.models import ModelConfig, Transformer
from tokjax.models.encoder import Encoder
from tokjax.models.stack import StackConfig
from tokjax.pretraining.corruption import Corrupted, Corruption
from tokjax.pretraining.koleo import koleo
from tokjax.pretraining.mexma import Mexma, first_tokens, sentence_vectors
from tokjax.training.config import TrainConfig
from tokjax.training.objective import init_heads

V, MASK, T = 19, 18, 16
MODEL = Encoder(
    ModelConfig(
        vocab_size=V, d_model=16, n_layers=1, n_heads=2, d_ff=24, remat="none", causal=False,
        init_scale=0.5,
    )
)  # fmt: skip
KEY = jax.random.key(4)
OBJECTIVE = Mexma(
    Corruption(rate=0.5, masked=0.8, random=0.1, mask_id=MASK, random_ids=MASK),
    head=StackConfig(n_layers=1),
    exempt=(0,),
)


def batch_of(pairs, rows):
    """A batch of pairs of texts; `rows` says which pairs share a row."""
    S = 4
    tokens, segments, positions = (np.zeros((len(rows), T), np.int32) for _ in range(3))
    examples = np.full((len(rows), S), -1, np.int32)
    for r, row in enumerate(rows):
        at = 0
        for n, i in enumerate(row):
            for side, text in enumerate(pairs[i]):
                own, column = slice(at, at + len(text)), 2 * n + side
                tokens[r, own], segments[r, own] = text, column + 1
                positions[r, own], examples[r, column] = np.arange(len(text)), i
                at += len(text)
    side = np.where(examples >= 0, np.arange(S) % 2, 0)
    return Batch(
        tokens=jnp.asarray(tokens),
        targets=jnp.roll(jnp.asarray(tokens), -1, 1),
        positions=jnp.asarray(positions),
        segment_ids=jnp.asarray(segments),
        weights=jnp.asarray(segments > 0, jnp.float32),
        example_id=jnp.asarray(examples),
        values={"side": jnp.asarray(side, jnp.float32)},
        group=2,
    )


# Every text begins with 0; the third pair has a row of its own, with a place for a pair more.
PAIRS = [
    ([0, 3, 5, 7], [0, 11, 13, 4]),
    ([0, 4, 6], [0, 12, 14, 15, 9]),
    ([0, 8, 2, 1, 3], [0, 16, 10]),
]
BATCH = batch_of(PAIRS, [[0, 1], [2]])
SWAPPED = batch_of([pair[::-1] for pair in PAIRS], [[0, 1], [2]])
CHOSEN = {(0, 0): [1, 3], (0, 1): [2], (1, 0): [2], (1, 1): [1, 4], (2, 0): [3], (2, 1): [1]}


def masked_of(batch, swapped=False):
    """The same tokens masked in whatever order the texts stand."""
    chosen = np.zeros((2, T), bool)
    examples, segments = np.asarray(batch.example_id), np.asarray(batch.segment_ids)
    for (pair, side), places in CHOSEN.items():
        row, column = np.argwhere(examples == pair)[side ^ swapped]
        chosen[row, np.flatnonzero(segments[row] == column + 1)[places]] = True
    return Corrupted(jnp.where(chosen, MASK, batch.tokens), jnp.asarray(chosen))


MASKED = masked_of(BATCH)


@pytest.fixture(scope="module")
def params():
    heads = init_heads(OBJECTIVE, jax.random.key(2), MODEL)
    return MODEL.init(jax.random.key(1)) | heads


@pytest.fixture(scope="module")
def losses():
    """A function giving the loss and its gradient, compiled once for each objective."""

    def compiled(objective):
        def total(params, batch, masked):
            found = objective.of_masked(MODEL, params, batch, masked)
            return found.total / jnp.maximum(found.weight, 1), found

        return jax.jit(jax.value_and_grad(total, has_aux=True))

    programs = {}

    def find(params, batch=BATCH, masked=MASKED, **changes):
        objective = dataclasses.replace(OBJECTIVE, **changes)
        if objective not in programs:
            programs[objective] = compiled(objective)
        (value, found), gradient = programs[objective](params, batch, masked)
        return float(value), gradient, found

    return find


@pytest.fixture(scope="module")
def vectors(params):
    """The vector of each text by itself, [pairs, 2, D]."""
    return jnp.stack(
        [
            jnp.stack([MODEL.encode(params, jnp.array([text])).x[0, 0] for text in pair])
            for pair in PAIRS
        ]
    )


def test_vectors_are_those_of_each_clean_text_alone(params, vectors):
    x = MODEL.backbone(
        params, MODEL.embed(params, BATCH.tokens), positions=BATCH.positions,
        segments=BATCH.segment_ids,
    ).x  # fmt: skip
    found = np.asarray(sentence_vectors(x, BATCH)).reshape(4, 2, -1)
    np.testing.assert_allclose(found[:3], vectors, atol=1e-5)
    assert (found[3] == 0).all()


def test_the_mean_squared_difference_of_known_vectors():
    a, b = np.array([1.0, 2, 3]), np.array([0.0, 2, 5])
    assert np.square(a - b).mean() == pytest.approx(1.666667, abs=1e-6)


def test_the_loss_is_the_sum_of_its_parts(params, vectors, losses):
    value, _, found = losses(params)
    alignment = float(jnp.square(vectors[:, 0] - vectors[:, 1]).mean())
    spread = float(koleo(vectors[:, 0]) + koleo(vectors[:, 1])) / 2
    w, nll = params["heads"]["unmask"], {0: [], 1: []}
    for (pair, side), places in CHOSEN.items():
        text = np.array([PAIRS[pair][side]])
        read = text.copy()
        read[0, places] = MASK
        states = MODEL.encode(params, jnp.asarray(read)).x
        states = states.at[0, 0].set(vectors[pair, 1 - side])
        shape = OBJECTIVE.head.of(MODEL.config)
        layers = tuple(w["stack"]["layers"].values())
        x = Encoder(shape).backbone({**w["stack"], "layers": layers}, states).x
        logits = x[0] @ params["embedding"].T + w["bias"]
        nll[side] += [-float(jax.nn.log_softmax(logits)[p, text[0, p]]) for p in places]
    unmasking = (np.mean(nll[0]) + np.mean(nll[1])) / 2
    assert value == pytest.approx(alignment + unmasking + 0.01 * spread, rel=1e-4)
    assert float(found.weight) == 3
    ratios = {name: float(total / size) for name, (total, size) in found.metrics.items()}
    assert ratios["alignment"] == pytest.approx(alignment, rel=1e-4)
    assert ratios["koleo"] == pytest.approx(spread, rel=1e-4)
    assert ratios["nll"] == pytest.approx(np.mean(nll[0] + nll[1]), rel=1e-4)
    unit = vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    assert ratios["cosine"] == pytest.approx(float((unit[:, 0] * unit[:, 1]).sum(-1).mean()), 1e-4)
    others = float((unit[:, 0] * unit[jnp.array([1, 2, 0]), 1]).sum(-1).mean())
    assert ratios["unrelated_cosine"] == pytest.approx(others, abs=1e-5)


def test_swapping_the_languages_changes_nothing(params, losses):
    value = losses(params)[0]
    assert value == pytest.approx(losses(params, SWAPPED, masked_of(SWAPPED, True))[0], rel=1e-5)


def scored(params, states, context, batch=BATCH):
    x = OBJECTIVE.unmask_states(MODEL, params, states, context, batch)
    return x @ OBJECTIVE.output_head(MODEL, params).table.T


@pytest.fixture(scope="module")
def parts(params):
    """States of the masked texts, a vector for each segment, and the logits."""
    rng = np.random.default_rng(5)
    states = jnp.asarray(rng.normal(size=(2, T, 16)), jnp.float32)
    context = jnp.asarray(rng.normal(size=(2, 4, 16)), jnp.float32)
    return states, context, jax.jit(lambda s, c: scored(params, s, c))


def test_logits_depend_on_the_translation_through_its_vector_alone(parts):
    states, context, score = parts
    segments = np.asarray(BATCH.segment_ids)
    before = np.asarray(score(states, context))
    # Other states of the second texts, with their vectors as they were.
    second = (segments > 0) & (segments % 2 == 0)
    moved = score(jnp.where(second[..., None], 3 - states, states), context)
    first = segments % 2 == 1
    np.testing.assert_array_equal(np.asarray(moved)[first], before[first])
    assert np.abs(np.asarray(moved) - before)[second].max() > 1e-2
    changed = np.asarray(score(states, context.at[0, 0].add(1.0)))
    assert np.abs(changed - before)[segments == 1].max() > 1e-2
    others = (segments > 1) | (np.arange(2) > 0)[:, None]
    np.testing.assert_array_equal(changed[others], before[others])


def test_logits_do_not_depend_on_the_masked_texts_own_first_state(parts):
    states, context, score = parts
    first = np.asarray(first_tokens(BATCH))
    assert first.sum() == 6
    moved = score(jnp.where(first[..., None], 7.0, states), context)
    np.testing.assert_array_equal(moved, score(states, context))


def test_the_unmasking_loss_reaches_first_states_of_the_clean_texts_alone(params):
    """Its gradient in the clean pass is of the other text's first token, and of nothing else."""
    clean = MODEL.backbone(
        params, MODEL.embed(params, BATCH.tokens), positions=BATCH.positions,
        segments=BATCH.segment_ids,
    ).x  # fmt: skip
    there = (BATCH.example_id >= 0).reshape(-1, 2)[:, 0]
    one_side = dataclasses.replace(MASKED, chosen=MASKED.chosen & (BATCH.segment_ids % 2 == 1))

    def unmasking(x):
        pairs = sentence_vectors(x, BATCH).reshape(-1, 2, x.shape[-1])
        return OBJECTIVE._unmasked(MODEL, params, BATCH, one_side, pairs, there)[0]

    gradient = np.abs(np.asarray(jax.grad(unmasking)(clean))).max(-1)
    first = np.asarray(first_tokens(BATCH)) & (np.asarray(BATCH.segment_ids) % 2 == 0)
    assert (gradient[first] > 1e-6).all() and (gradient[~first] == 0).all()


def test_without_the_other_weights_only_alignment_is_left(params, losses):
    off = {"unmasking_weight": 0.0, "koleo_weight": 0.0}
    value, gradient, _ = losses(params, **off)

    def alignment(params):
        x = MODEL.backbone(
            params, MODEL.embed(params, BATCH.tokens), positions=BATCH.positions,
            segments=BATCH.segment_ids,
        ).x  # fmt: skip
        pairs = sentence_vectors(x, BATCH).reshape(-1, 2, 16)[:3]
        return jnp.square(pairs[:, 0] - pairs[:, 1]).mean()

    expected, wanted = jax.value_and_grad(alignment)(params)
    assert value == pytest.approx(float(expected), rel=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_alignment_grows_with_the_square_of_the_vectors_and_koleo_does_not(params, losses):
    """The last norm's weights scale all states."""
    wide = {**params, "norm": 3 * params["norm"]}
    off = {"unmasking_weight": 0.0, "koleo_weight": 0.0}
    _, _, before = losses(params, **off)
    _, _, after = losses(wide, **off)
    ratio = {
        name: float(after.metrics[name][0] / before.metrics[name][0]) for name in after.metrics
    }
    assert ratio["alignment"] == pytest.approx(9, rel=1e-4)
    assert ratio["koleo"] == pytest.approx(1, rel=1e-4)


def test_each_path_of_the_unmasking_loss_is_stopped_by_itself(params, losses):
    only = {"alignment_weight": 0.0, "koleo_weight": 0.0}
    found = {stop: losses(params, stop=stop, **only)[1] for stop in ("none", "sentence", "all")}
    # Stopped everywhere, the table included, it changes nothing but its own head.
    for path, leaf in jax.tree_util.tree_leaves_with_path(found["all"]):
        own = "heads" in jax.tree_util.keystr(path)
        assert (np.abs(leaf).max() > 0) == own, path
    tokens = losses(params, stop="tokens", **only)[1]
    query = {
        stop: np.asarray(gradient["layers"]["attention"]["query"])
        for stop, gradient in (*found.items(), ("tokens", tokens))
    }
    assert min(np.abs(query["sentence"]).max(), np.abs(query["tokens"]).max()) > 1e-6
    np.testing.assert_allclose(query["sentence"] + query["tokens"], query["none"], atol=1e-5)


def test_the_contexts_are_other_vectors():
    pairs = jnp.arange(8.0).reshape(4, 2, 1)
    there = jnp.array([True, False, True, True])
    given = {
        context: dataclasses.replace(OBJECTIVE, context=context)._context(pairs, there)[..., 0]
        for context in ("other", "own", "unrelated")
    }
    assert given["own"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert given["other"].tolist() == [[1, 0], [3, 2], [5, 4], [7, 6]]
    assert given["unrelated"][there].tolist() == [[5, 4], [7, 6], [1, 0]]


def test_first_tokens_and_special_ones_are_never_masked_and_filling_is_not(params):
    everything = dataclasses.replace(
        OBJECTIVE, corruption=dataclasses.replace(OBJECTIVE.corruption, rate=1.0), exempt=()
    )
    chosen = np.asarray(everything.corrupted(BATCH, KEY).chosen)
    inner = (np.asarray(BATCH.segment_ids) > 0) & ~np.asarray(first_tokens(BATCH))
    np.testing.assert_array_equal(chosen, inner)
    spared = dataclasses.replace(everything, exempt=(0, 5))
    assert not np.asarray(spared.corrupted(BATCH, KEY).chosen)[np.asarray(BATCH.tokens) == 5].any()


def test_nothing_masked_one_pair_and_duplicates_are_finite(params, losses):
    nothing = Corrupted(BATCH.tokens, jnp.zeros((2, T), bool))
    value, gradient, found = losses(params, masked=nothing)
    assert np.isfinite(value) and float(found.metrics["nll"][1]) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    # Duplicates in one row differ by rounding, by which KoLeo is a little below its largest value.
    for pairs, rows, low, high in (
        (PAIRS[:1], [[0], []], 0, 0),
        ([PAIRS[0], PAIRS[0]], [[0, 1], []], 10, -np.log((4 + 1) * 1e-8) + 1e-3),
        (PAIRS[:1], [[], []], 0, 0),
    ):
        batch = batch_of(pairs, rows)
        value, gradient, found = losses(params, batch, OBJECTIVE.corrupted(batch, KEY))
        assert np.isfinite(value), rows
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
        total, size = found.metrics["koleo"]
        assert low * float(size) <= float(total) <= high * float(size)


def test_a_fixed_count_scores_only_what_is_masked(params, losses):
    spec = dataclasses.replace(OBJECTIVE.corruption, count="fixed", rate=0.3)
    objective = dataclasses.replace(OBJECTIVE, corruption=spec)
    masked = objective.corrupted(BATCH, KEY)
    found = objective.of_masked(MODEL, params, BATCH, masked)
    free = losses(params, masked=masked)[0]
    assert float(found.total / found.weight) == pytest.approx(free, rel=1e-5)
    assert float(found.metrics["nll"][1]) == float(masked.chosen.sum()) > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"context": "othr"}, "Did you mean 'other'"),
        ({"stop": "token"}, "Did you mean 'tokens'"),
        ({"koleo_weight": -1.0}, "koleo_weight=-1.0"),
        ({"head": StackConfig(1, d_model=8)}, "head.d_model=8 must be None"),
    ],
)
def test_impossible_settings_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        dataclasses.replace(OBJECTIVE, **changes)


def test_causal_models_and_single_texts_are_refused(params):
    with pytest.raises(ConfigError, match="kind 'translation'"):
        OBJECTIVE.loss(MODEL, params, (), dataclasses.replace(BATCH, values={}), KEY)
    causal = Transformer(dataclasses.replace(MODEL.config, causal=True))
    with pytest.raises(ConfigError, match=r"set model\.causal=False"):
        OBJECTIVE.loss(causal, params, (), BATCH, KEY)


@pytest.fixture
def tree(tiny_corpus, tiny_tree):
    lines = [{"en": f"number {i}", "de": f"Zahl {i * 7 % 10}"} for i in range(40)]
    path = tiny_corpus / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"name": "jsonl", "files": (str(path),), "kind": "translation"}
    source |= {"prompt": "en", "response": "de"}
    return tiny_tree(
        objective={"name": "mexma", "head": {"n_layers": 1}},
        model__causal=False,
        model__vocab_size=258,
        model__n_layers=1,
        data__train=[{"source": source}],
        data__evals={"validation": source},
        steps=4,
        evaluation__every_steps=4,
    )


def test_a_run_trains_and_its_encoder_finds_translations(tree, tmp_path):
    from tokjax.retrieval.mining import mining_accuracy
    from tokjax.retrieval.sentences import load_sentence_encoder
    from tokjax.training.loop import train
    from tokjax.training.run import build_run

    run = build_run(resolve(TrainConfig, tree), devices=jax.devices()[:1], show_progress=False)
    result = train(run, tmp_path / "run")
    assert np.isfinite(result.metrics["eval/validation/alignment"])
    encoder = load_sentence_encoder(tmp_path / "run")
    texts = ["number 3", "a", "a much longer sentence than the others are"]
    found = encoder.embed(texts, batch_size=2)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(encoder.embed(texts[1:2])[0], found[1], atol=1e-5)
    ids = [*encoder.before, *encoder.tokenizer.encode("a"), *encoder.after]
    state = encoder.model.encode(encoder.params, jnp.array([ids])).x[0, 0]
    np.testing.assert_allclose(found[1], state / jnp.linalg.norm(state), atol=1e-5)
    assert 0 <= mining_accuracy(found, found).mean <= 1
    with pytest.raises(ConfigError, match="cut it first"):
        encoder.embed(["x" * 99])
    assert encoder.embed([]).shape == (0, 32)
    assert set(encoder.params) == set(encoder.model.abstract_params())


def test_runs_of_other_kinds_of_records_are_refused(tree, tiny_tree):
    from tokjax.training.run import build_run

    def build(tree):
        return build_run(resolve(TrainConfig, tree), devices=jax.devices()[:1], show_progress=False)

    with pytest.raises(ConfigError, match=r"reads single examples, but data\.train\.0 holds tr"):
        build({**tree, "objective": {"name": "masked_lm"}})
    model = {"causal": False, "vocab_size": 258}
    single = tiny_tree(objective={"name": "mexma"})
    with pytest.raises(ConfigError, match=r"reads translations, but data\.train\.0 holds single"):
        build({**single, "model": {**single["model"], **model}})


def test_the_config_has_a_warm_up_and_the_method():
    found = resolve(TrainConfig, load("configs/mexma.py:data=a.jsonl,first=en,second=de"))
    assert type(found.objective).__name__ == "Mexma"
    assert found.data.train[0].source.kind == "translation"
    found = resolve(TrainConfig, load("configs/mexma.py:data=a.jsonl,first=en,warm_up=True"))
    assert type(found.objective).__name__ == "MaskedLM" and len(found.data.train) == 2
