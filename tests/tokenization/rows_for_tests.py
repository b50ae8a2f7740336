"""Batches of given rows, and log-probabilities of every slot."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.data.batch import Batch
from tokjax.models.head import logits


def batch_of(rows, T):
    """A batch whose rows pack the given sequences, filled up to T slots."""
    B = len(rows)
    columns = {name: np.zeros((B, T), np.int32) for name in ("tokens", "targets", "at", "doc")}
    for b, documents in enumerate(rows):
        start = 0
        for number, ids in enumerate(documents, 1):
            span = slice(start, start + len(ids) - 1)
            columns["tokens"][b, span] = ids[:-1]
            columns["targets"][b, span] = ids[1:]
            columns["at"][b, span] = np.arange(len(ids) - 1)
            columns["doc"][b, span] = number
            start = span.stop
        assert start <= T
    return Batch(
        tokens=jnp.asarray(columns["tokens"]),
        targets=jnp.asarray(columns["targets"]),
        positions=jnp.asarray(columns["at"]),
        segment_ids=jnp.asarray(columns["doc"]),
        weights=jnp.asarray(columns["doc"] > 0, jnp.float32),
        example_id=jnp.zeros((B, 1), jnp.int32),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def slots(model, objective, params, batch):
    """(log-probabilities [B N V], targets [B N], weights [B N]) of an objective's predictions."""
    found = objective.predictions(model, params, batch, jax.random.key(0))
    return scored_slots(found)


def scored_slots(found):
    B, N, D = found.x.shape
    z = logits(found.head, found.x.reshape(B * N, D)).reshape(B, N, -1)
    return jax.nn.log_softmax(z), found.targets[..., 0], found.weights[..., 0]


def noisy(params, scale=0.2, seed=1):
    """Parameters with noise on all of them: zeros would hide a part left out."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    moved = [a + jnp.asarray(scale * rng.normal(size=a.shape), a.dtype) for a in leaves]
    return jax.tree.unflatten(tree, moved)


@functools.partial(jax.jit, static_argnums=(0, 1))
def loss_of(model, objective, params, batch, seed=0):
    return objective.loss(model, params, (), batch, jax.random.key(seed))


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradient_of(model, objective, params, batch, seed=0):
    def total(params):
        return objective.loss(model, params, (), batch, jax.random.key(seed)).total

    return jax.grad(total)(params)
