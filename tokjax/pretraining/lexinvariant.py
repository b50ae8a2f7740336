"""Lexinvariant language models: in every sequence each symbol gets a fresh random vector.

Input and read-out share that vector. What a symbol means must so be inferred from where it occurs
in the sequence, and predictions do not depend on how symbols are named.

Reference: Huang et al., "Lexinvariant Language Models", arXiv 2305.16349.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.config import register
from tokjax.data.batch import Batch
from tokjax.errors import ConfigError, nearest
from tokjax.models.head import Head
from tokjax.models.parameters import Params
from tokjax.models.random_tables import random_choice, random_rows, random_signs
from tokjax.models.transformer import Transformer
from tokjax.pretraining.next_token import NextToken
from tokjax.signals import weighted_nll
from tokjax.training.objective import Aux, Loss, Materials, PerToken, WithoutState

_CHOICES = {
    "tables": ("sequence", "fixed", "position"),
    "documents": ("own", "shared"),
    "candidates": ("all", "present"),
}
# What is drawn for a row.
_CHOICE, _VECTORS, _SIGNS, _PLACES = range(4)


@struct.dataclass
class Tables:
    """The vectors of each row's candidates.

    Attributes:
        ids: the candidates in rising order; the size of the vocabulary where there is none.
        inputs: what the model reads for each.
        outputs: what its states are multiplied with.
        random: which vectors are random; the others are learned.
    """

    ids: Int[Array, "B C"]
    inputs: Float[Array, "B C E"]
    outputs: Float[Array, "B C E"]
    random: Bool[Array, "B C"]


@register("objective", "lexinvariant")
@dataclass(frozen=True)
class Lexinvariant(PerToken, WithoutState):
    """Next-token prediction with random vectors for a share p of the symbols of each sequence.

    Held-out data are evaluated with fresh tables, the same in each evaluation of a run.
    """

    # probability that a symbol is random in a sequence: 1 is lexinvariant, less semi-lexinvariant
    # (a regularisation of the vectors), 0 the ordinary model with tied vectors
    p: float = 1.0
    # the same in evaluation; None: 1 of a lexinvariant model, otherwise 0 (learned vectors alone)
    evaluation_p: float | None = None
    std: float = 1.0  # standard deviation of random numbers
    # logits of random vectors are divided by the root of their width: without it they begin with
    # that standard deviation, behind a final norm, and saturate the softmax
    scaled: bool = True
    # ids that keep their meaning: their vectors are learned. None: the tokenizer's special ones
    keep: tuple[int, ...] | None = None
    # documents packed into a row: each a table of its own (the row's, with signs of its
    # coordinates turned: exactly as random, and a document sees no other), or all the row's
    documents: Literal["own", "shared"] = "own"
    # ids that compete in the softmax: all; or for large vocabularies those that occur in the row,
    # which makes losses incomparable with those of all
    candidates: Literal["all", "present"] = "all"
    # whose the tables are; as controls one for all sequences, or a new one at every position
    tables: Literal["sequence", "fixed", "position"] = "sequence"
    table_gib: float = 4.0  # largest size of a micro-batch's tables; larger ones are refused
    z_loss: float = 0.0  # coefficient of the squared log-sum-exp of the logits

    def __post_init__(self):
        for name in ("p", "evaluation_p"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{name}={value} must lie within 0 and 1")
        for name in ("std", "table_gib"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0")
        if self.z_loss < 0:
            raise ConfigError(f"z_loss={self.z_loss} must not be negative")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"unknown {name}={value!r}.{nearest(str(value), choices)}")
        if len(set(self.keep or ())) != len(self.keep or ()) or min(self.keep or (0,)) < 0:
            raise ConfigError(f"keep={self.keep} must name ids of 0 or more, each once")

    @property
    def evaluates(self) -> Any:
        """What evaluates held-out data: this with `evaluation_p`, or False for the next token."""
        p = (1.0 if self.p == 1 else 0.0) if self.evaluation_p is None else self.evaluation_p
        return dataclasses.replace(self, p=p, evaluation_p=p) if p > 0 else False

    def prepared(self, materials: Materials) -> "Lexinvariant":
        """Returns the objective with the ids that keep their meaning.

        Raises:
            ConfigError: as `check`.
        """
        keep = self.keep
        if keep is None:
            keep = tuple(sorted(materials.tokenizer.special_tokens.values()))
        found = dataclasses.replace(self, keep=keep)
        found.check(materials.model)
        return found

    def check(self, model: Transformer) -> None:
        """Refuses models that this objective cannot train.

        Raises:
            ConfigError: says what to change.
        """
        config, keep = model.config, self.keep or ()
        if self.p == 0 and config.embedding_rows is None:
            return
        if not config.tie_embeddings or config.head_bias:
            raise ConfigError(
                "objective 'lexinvariant' reads and predicts by one table: set "
                "model.tie_embeddings=True and model.head_bias=False"
            )
        if max(keep, default=-1) >= config.vocabulary:
            raise ConfigError(f"keep={keep} names ids that a model of {config.vocabulary} has not")
        if self.candidates == "present" and config.logit_softcap is not None:
            raise ConfigError(
                "candidates='present' makes the other tokens impossible, which "
                "model.logit_softcap does not allow: set it to None, or candidates='all'"
            )
        rows = config.embedding_rows
        if rows is None:
            return
        if self.p < 1 or self.evaluation_p not in (None, 1):
            raise ConfigError(
                f"model.embedding_rows={rows} has no vectors for the symbols that are not random "
                f"with p={self.p}, evaluation_p={self.evaluation_p}: set embedding_rows=None"
            )
        if rows != len(keep):
            raise ConfigError(
                f"model.embedding_rows={rows}, but {len(keep)} ids keep learned vectors (keep="
                f"{keep}): set embedding_rows={len(keep)}, or None for a table of all ids"
            )

    # ---------------------------------------------------------------- the loss

    def init(self, key: jax.Array, model: Transformer, params: Params) -> Aux:
        """Returns nothing: there is no state.

        Raises:
            ConfigError: as `check`.
        """
        self.check(model)
        return ()

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns the sum of w * nll and the sum of w over the batch.

        Raises:
            ConfigError: as `check`, or the tables of the micro-batch are too large.
        """
        self.check(model)
        if self.p == 0:
            return NextToken(self.z_loss).loss(model, params, aux, batch, key)
        total, nll, tables = self._scored(model, params, batch, key)
        sums = jnp.where(batch.weights == 0, 0.0, nll * batch.weights).sum()
        weight = batch.weights.sum()
        metrics = {"nll": (sums, weight)}
        if self.candidates == "present":
            competing = (tables.ids < model.config.vocabulary).sum().astype(jnp.float32)
            metrics["candidates"] = (competing, jnp.float32(len(tables.ids)))
        return Loss(total, weight, metrics, aux)

    def token_nll(
        self, model: Transformer, params: Params, batch: Batch, key: jax.Array
    ) -> Float[Array, "B T"]:
        """Returns the negative log-likelihood of each target, in nats.

        Raises:
            ConfigError: as `loss`.
        """
        self.check(model)
        return self._scored(model, params, batch, key)[1]

    def _scored(self, model: Transformer, params: Params, batch: Batch, key: jax.Array) -> Any:
        """Returns the loss, each target's negative log-likelihood, and the tables."""
        keys = self._row_keys(batch, key)
        # Targets without weight may hold any id.
        targets = jnp.where(batch.weights == 0, batch.tokens, batch.targets)
        tables = self.draw(model, params, keys, self._candidates(model, batch, targets))
        signs = self._signs(model, batch, keys)
        x = model_of_vectors(model).backbone(
            params,
            embedded(model, params, self._inputs(batch, keys, tables, signs)),
            positions=batch.positions,
            segments=batch.segment_ids,
        )
        states, outputs = x.x, tables.outputs
        if signs is not None:
            states, outputs = _turned(states, signs, tables, self.p < 1 or bool(self.keep))
        bias = None
        if self.candidates == "present":
            bias = jnp.where(tables.ids < model.config.vocabulary, 0.0, -jnp.inf)

        def row(x, table, bias, target, weight):
            head = dataclasses.replace(head_of(model, table), bias=bias)
            return weighted_nll(
                x[None], head, target[None, :, None], weight[None, :, None], self.z_loss
            )

        at = self._places(tables, targets)
        totals, nll = jax.vmap(row)(states, outputs, bias, at, batch.weights)
        return totals.sum(), nll[:, 0, :, 0], tables

    # ---------------------------------------------------------------- what is drawn

    def _row_keys(self, batch: Batch, key: jax.Array) -> jax.Array:
        """Returns the key of each row."""
        B = batch.tokens.shape[0]
        if self.tables == "fixed":
            return jnp.broadcast_to(jax.random.key(0), (B,))
        # Batches of an evaluation share a key: the examples tell their rows apart.
        first = batch.example_id[:, 0].astype(jnp.uint32)
        fold = jax.vmap(jax.random.fold_in)
        return fold(fold(jnp.broadcast_to(key, (B,)), jnp.arange(B)), first)

    def _candidates(
        self, model: Transformer, batch: Batch, targets: Int[Array, "B T"]
    ) -> Int[Array, "B C"]:
        """Returns the ids that compete in each row, in rising order."""
        (B, T), V = batch.tokens.shape, model.config.vocabulary
        if self.candidates == "all":
            return jnp.broadcast_to(jnp.arange(V), (B, V))
        keep = self.keep or ()
        # Of every document the last target may be no token of the row.
        size = min(V, T + batch.example_id.shape[1] + len(keep))
        kept = jnp.broadcast_to(jnp.asarray(keep, jnp.int32), (B, len(keep)))
        present = jnp.concatenate([batch.tokens, targets, kept], axis=1)
        return jax.vmap(lambda ids: jnp.unique(ids, size=size, fill_value=V))(present)

    def _places(self, tables: Tables, ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """Returns where ids stand among the candidates."""
        return ids if self.candidates == "all" else jax.vmap(jnp.searchsorted)(tables.ids, ids)

    def draw(
        self, model: Transformer, params: Params, keys: jax.Array, ids: Int[Array, "B C"]
    ) -> Tables:
        """Returns the vectors of each row's candidates.

        Args:
            model: that reads and predicts by them.
            params: its parameters; of random vectors nothing is read there.
            keys: one for each row.
            ids: candidates of each row, in rising order.

        Raises:
            ConfigError: they are larger than `table_gib`.
        """
        config, (B, C) = model.config, ids.shape
        gib = 4.0 * B * C * config.table_width / 2**30
        if gib > self.table_gib:
            raise ConfigError(
                f"a table for each of {B} rows, of {C} vectors of {config.table_width} numbers, "
                f"takes {gib:.1f} GiB, more than table_gib={self.table_gib}: raise micro_batches, "
                f"set candidates='present', or raise table_gib"
            )

        def row(key, ids):
            chosen = random_choice(jax.random.fold_in(key, _CHOICE), ids, self.p)
            vectors = random_rows(
                jax.random.fold_in(key, _VECTORS), ids, config.table_width, self.std
            )
            return chosen, vectors

        chosen, vectors = jax.vmap(row)(keys, ids)
        chosen &= ~self._kept(ids)
        outputs = vectors * config.table_width**-0.5 if self.scaled else vectors
        if self.p == 1 and not self.keep:
            return Tables(ids, vectors, outputs, chosen)
        learned = self._learned(model, params, ids)
        at = chosen[..., None]
        inputs, outputs = (jnp.where(at, each, learned) for each in (vectors, outputs))
        return Tables(ids, inputs, outputs, chosen)

    def _kept(self, ids: Int[Array, "B C"]) -> Bool[Array, "B C"]:
        if not self.keep:
            return jnp.zeros(ids.shape, bool)
        return jnp.isin(ids, jnp.asarray(self.keep, ids.dtype))

    def _learned(self, model: Transformer, params: Params, ids: jax.Array) -> Float[Array, "..."]:
        """Returns learned vectors of ids; of ids that have none, those of some other."""
        rows = np.arange(model.config.vocabulary)
        if model.config.embedding_rows is not None:
            rows = np.zeros(model.config.vocabulary, int)
            rows[list(self.keep or ())] = np.arange(len(self.keep or ()))
        places = jnp.asarray(rows, jnp.int32)[jnp.minimum(ids, len(rows) - 1)]
        return jnp.take(params["embedding"], places, axis=0).astype(jnp.float32)

    def _signs(
        self, model: Transformer, batch: Batch, keys: jax.Array
    ) -> Float[Array, "B T E"] | None:
        """Returns what turns the row's table into that of each position's document, or None."""
        documents = batch.example_id.shape[1] * batch.group
        if self.documents == "shared" or documents == 1 or self.tables == "fixed":
            return None
        width = model.config.table_width

        def row(key, segments):
            key = jax.random.fold_in(key, _SIGNS)
            return random_signs(key, documents + 1, width)[segments]

        return jax.vmap(row)(keys, batch.segment_ids)

    def _inputs(
        self, batch: Batch, keys: jax.Array, tables: Tables, signs: jax.Array | None
    ) -> Float[Array, "B T E"]:
        """Returns the vector of each token."""
        at = self._places(tables, batch.tokens)
        vectors = jnp.take_along_axis(tables.inputs, at[..., None], axis=1)
        random = jnp.take_along_axis(tables.random, at, axis=1)[..., None]
        if self.tables == "position":
            width = vectors.shape[-1]

            def token(key, place, token):
                key = jax.random.fold_in(jax.random.fold_in(key, _PLACES), place)
                return random_rows(key, token[None], width, self.std)[0]

            places = jnp.arange(batch.tokens.shape[1])
            of_row = jax.vmap(token, in_axes=(None, 0, 0))
            drawn = jax.vmap(of_row, in_axes=(0, None, 0))(keys, places, batch.tokens)
            vectors = jnp.where(random, drawn, vectors)
        elif signs is not None:
            vectors = jnp.where(random, vectors * signs, vectors)
        return vectors

    # ---------------------------------------------------------------- one table for all rows

    def drawn(
        self, model: Transformer, params: Params, key: jax.Array
    ) -> tuple[Transformer, dict[str, Any]]:
        """Returns an ordinary model with one draw of the table, which decodes and scores texts.

        Its head is a table of its own, for logits of random vectors are scaled. All texts share the
        draw: average over several.

        Args:
            model: that was trained.
            params: its parameters.
            key: of the draw.

        Raises:
            ConfigError: as `check`.
        """
        self.check(model)
        ids = jnp.arange(model.config.vocabulary)[None]
        tables = self.draw(model, params, key[None], ids)
        dtype = jnp.dtype(model.config.param_dtype)
        config = dataclasses.replace(model.config, embedding_rows=None, tie_embeddings=False)
        found = {
            **params,
            "embedding": tables.inputs[0].astype(dtype),
            "head": tables.outputs[0].astype(dtype),
        }
        return dataclasses.replace(model, config=config), found


def model_of_vectors(model: Transformer) -> Transformer:
    """Returns the model as one whose table may have any rows."""
    if model.config.embedding_rows is None:
        return model
    return dataclasses.replace(model, config=dataclasses.replace(model.config, embedding_rows=None))


def embedded(
    model: Transformer, params: Params, vectors: Float[Array, "B T E"]
) -> Float[Array, "B T D"]:
    """Returns what `model.embed` makes of tokens with these vectors."""
    B, T, width = vectors.shape
    of_places = {**params, "embedding": vectors.reshape(B * T, width)}
    return model_of_vectors(model).embed(of_places, jnp.arange(B * T).reshape(B, T))


def head_of(model: Transformer, table: Float[Array, "C E"]) -> Head:
    """Returns the model's output head with this table."""
    return model_of_vectors(model).head({"embedding": table})


def _turned(
    x: Float[Array, "B T E"], signs: Float[Array, "B T E"], tables: Tables, mixed: bool
) -> tuple[Float[Array, "B T _"], Float[Array, "B C _"]]:
    """Returns states and tables whose products are those with each document's own table.

    To turn the signs of a vector or those of the state it is multiplied with is the same. Learned
    vectors are never turned: their products stand in further coordinates.
    """
    turned = x * signs.astype(x.dtype)
    if not mixed:
        return turned, tables.outputs
    random = tables.random[..., None]
    parts = jnp.where(random, tables.outputs, 0.0), jnp.where(random, 0.0, tables.outputs)
    return jnp.concatenate([turned, x], axis=-1), jnp.concatenate(parts, axis=-1)
