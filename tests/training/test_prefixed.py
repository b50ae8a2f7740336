"""Training on text behind frames: rows, gradients, and what the penalty of sinks sees of them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.data.feature_batch import FeatureExample, feature_batch
from tokjax.decoding import decode, on_tokens
from tokjax.decoding.prefixed import prefixed, slotted_prompts
from tokjax.errors import ConfigError
from tokjax.models import ModelConfig, Transformer
from tokjax.models.feature_prefix import FeaturePrefix
from tokjax.models.views import placed
from tokjax.pretraining.mae_lm import MaeLM
from tokjax.pretraining.masked_lm import MaskedLM
from tokjax.pretraining.next_token import NextToken
from tokjax.pretraining.patch_training import Patch
from tokjax.pretraining.sink_decorrelation import SinkDecorrelation
from tokjax.training.objective import init_heads
from tokjax.training.optimizers import AdamW, Constant
from tokjax.training.prefixed import Prefixed
from tokjax.training.state import init_state
from tokjax.training.step import StepConfig, make_train_step

BOS, ASK, END = 0, 1, 2
MODEL = Transformer(
    ModelConfig(
        vocab_size=9, d_model=16, n_layers=2, n_heads=2, d_ff=24, max_positions=48, remat="none"
    )
)
PREFIX = FeaturePrefix(3, factor=2)
PLAIN = Prefixed(NextToken(), PREFIX)
DECORRELATED = Prefixed(SinkDecorrelation(coefficient=5.0), PREFIX)
KEY = jax.random.key(0)


def example(frames, text, seed=0):
    made = np.random.default_rng(seed).normal(size=(frames, 3)).astype(np.float32)
    return FeatureExample(made, [*text, END], before=[BOS], prompt=[ASK])


EXAMPLES = [example(5, [4, 5], 1), example(2, [6], 2)]
BATCH = feature_batch(EXAMPLES, 2)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(1)) | init_heads(PLAIN, jax.random.key(2), MODEL)


@pytest.fixture(scope="module")
def measured():
    def make(objective):
        def total(params, batch):
            aux = objective.init(KEY, MODEL, params)
            found = objective.loss(MODEL, params, aux, batch, KEY)
            return found.total, found

        return jax.jit(jax.value_and_grad(total, has_aux=True))

    found = {"plain": make(PLAIN), "penalised": make(DECORRELATED)}

    def find(name, params, batch=BATCH):
        (_, loss), gradient = found[name](params, batch)
        return loss, gradient

    return find


def test_the_loss_is_that_of_the_text_behind_the_vectors(params, measured):
    found, gradient = measured("plain", params)

    @jax.jit
    def written_out(params):
        vectors = PREFIX(params["heads"]["prefix"], BATCH.frames, BATCH.frame_counts)
        x = placed(MODEL.embed(params, BATCH.tokens), vectors, BATCH.slots)
        out = MODEL.backbone(params, x, segments=BATCH.segment_ids)
        logprobs = jax.nn.log_softmax(MODEL.unembed(params, out.x))
        nll = -jnp.take_along_axis(logprobs, BATCH.targets[..., None], -1)[..., 0]
        return (nll * BATCH.weights).sum()

    assert float(found.total) == pytest.approx(float(written_out(params)), rel=1e-5)
    assert float(found.weight) == 5
    # The projector learns; ids in the gaps do not matter; frames that are not a row's own neither.
    for name, leaf in gradient["heads"]["prefix"].items():
        assert np.abs(leaf).max() > 0, name
    tokens = np.where(BATCH.slots >= 0, 8, BATCH.tokens)
    frames = BATCH.frames.copy()
    frames[1, 2:] = 7.0
    other, _ = measured("plain", params, dataclasses.replace(BATCH, tokens=tokens, frames=frames))
    assert float(other.total) == float(found.total)
    frames[1, 1] += 1.0
    other, _ = measured("plain", params, dataclasses.replace(BATCH, frames=frames))
    assert float(other.total) != float(found.total)


def test_the_penalty_is_of_vectors_and_prompt_and_the_text_does_not_move_it(params, measured):
    found, gradient = measured("penalised", params)
    plain, without = measured("plain", params)
    penalty, count = found.metrics["decorrelation"]
    assert float(count) == 4 + 2  # vectors and the prompt's id, not BOS
    total = float(plain.total) + 5 * 5 * float(penalty / count)
    assert float(penalty) > 0 and float(found.total) == pytest.approx(total, rel=1e-5)
    assert np.abs(gradient["heads"]["prefix"]["leave"] - without["heads"]["prefix"]["leave"]).max()
    texts = [example(5, [7, 7], 1), example(2, [3], 2)]
    other, _ = measured("penalised", params, feature_batch(texts, 2))
    assert float(other.metrics["decorrelation"][0]) == float(penalty)
    assert float(other.metrics["nll"][0]) != float(found.metrics["nll"][0])


def test_a_model_learns_to_transcribe_and_writes_what_it_learnt():
    symbols = np.eye(3, dtype=np.float32) * 3
    texts = [[a, b] for a in (4, 5, 6) for b in (4, 5, 6)]
    examples = [
        FeatureExample(
            np.repeat(symbols[np.array(text) - 4], 2, axis=0), [*text, END], [BOS], [ASK]
        )
        for text in texts
    ]
    batch = feature_batch(examples, 2)
    optimizer = AdamW(weight_decay=0.0).build(MODEL.config)
    config = StepConfig(1e-2, Constant(), 0, 80, clip_norm=1.0)
    step: Any = jax.jit(make_train_step(MODEL, DECORRELATED, optimizer, config))

    def trained(coefficient):
        state: Any = init_state(MODEL, DECORRELATED, optimizer, 0, False)
        state = state.replace(aux=state.aux.replace(coefficient=jnp.float32(coefficient)))
        for _ in range(80):
            state, metrics = step(state, batch)
        return state, metrics

    _, plain = trained(0.0)
    state, metrics = trained(5.0)
    assert step._cache_size() == 1
    assert float(metrics["nll"]) < 0.1 and float(plain["nll"]) < 0.1
    assert float(metrics["decorrelation"]) < 0.3 * float(plain["decorrelation"])
    vectors = PLAIN.vectors(state.params, batch.frames, batch.frame_counts)
    prompts, slots = slotted_prompts([2] * 9, [BOS], [ASK])
    written = decode(
        *prefixed(MODEL, state.params, vectors, slots), prompts, max_new_tokens=4,
        stop=on_tokens([END]),
    )  # fmt: skip
    assert written.rows() == [[*text, END] for text in texts]


def test_bases_and_batches_that_do_not_go_with_a_prefix_are_refused(params):
    for base, said in (
        (Patch(k=2), "several tokens"),
        (MaskedLM(), "restores tokens"),
        (MaeLM(), "init_heads"),
    ):
        with pytest.raises(ConfigError, match=said):
            Prefixed(base, PREFIX)
    from tokjax.data.batch import Batch

    without = Batch(*(getattr(BATCH, f.name) for f in dataclasses.fields(Batch)))
    with pytest.raises(ConfigError, match="needs batches with frames"):
        PLAIN.loss(MODEL, params, (), without, KEY)
