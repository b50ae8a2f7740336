"""Syntactic smoothing: a part of each target's mass goes to tokens of the same syntactic role.

Rare tokens so receive gradient whenever a frequent one with their part of speech occurs. The target
distribution over the vocabulary is computed where the logits are, from two rows of a few numbers;
neither [B, T, V] nor V x V is ever held.

Reference: Diehl Martinez et al., "Mitigating Frequency Bias and Anisotropy in Language Model
Pre-Training with Syntactic Smoothing", arXiv 2410.11462.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tokjax import struct
from tokjax.config import Choice, register
from tokjax.config.values import to_dict
from tokjax.data.batch import Batch
from tokjax.data.syntax.sources import Distributional, tag_counts_file
from tokjax.data.syntax.tag_counts import TagCounts, read_tag_counts
from tokjax.errors import ConfigError, nearest
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.pretraining import masked_lm, patch_training
from tokjax.pretraining.gates import Gate
from tokjax.pretraining.next_token import NextToken
from tokjax.pretraining.predictions import scored
from tokjax.pretraining.similarity import Similarity, SmoothingTable, smoothing_table
from tokjax.signals.soft_targets import Kernel, SoftTargets
from tokjax.training.objective import Loss, Materials

BASES = ("next_token", "masked_lm", "patch")
_MODULES = (masked_lm, patch_training)  # importing an objective offers it as a base


@struct.dataclass
class Smoothing:
    """What the objective carries.

    Attributes:
        table: features of targets and keys of tokens.
        smoothed: the targets that are smoothed; others stay hard.
        progress: share of the stage's steps that are done.
    """

    table: SmoothingTable
    smoothed: Bool[Array, "V"]
    progress: Float[Array, ""]


@register("objective", "syntactic_smoothing")
@dataclass(frozen=True)
class SyntacticSmoothing:
    """Cross entropy with g on the true token and 1 - g spread by similarity of tags.

    The targets are those of another objective: next tokens, masked tokens or patches. Held-out data
    are evaluated by that one, with hard targets.
    """

    # whose targets are smoothed: next_token, masked_lm or patch, with its own options
    base: Annotated[Any, Choice("objective")] = NextToken()
    # where tags come from: treebank, tagger (a Python function) or distributional (classes of the
    # training data's tokens)
    tags: Annotated[Any, Choice("tags")] = Distributional()
    # file of a table of counts that is taken in their place (`tokjax.data.syntax.tag_counts`)
    table: str | None = None
    similarity: Similarity = Similarity()  # how alike tokens are, by their counts of tags
    gate: Gate = Gate()  # mass g on the true token; a constant, or rising in the training
    # targets without any count of tags: spread over all tokens that have none either, as in the
    # paper's code; or left hard
    uncounted: Literal["spread", "hard"] = "spread"
    # tokens that stand for no text: never given mass, their own targets hard; or, as the code has
    # it, treated as tokens without counts
    special: Literal["exclude", "include"] = "exclude"

    def __post_init__(self):
        name = to_dict(self.base).get("name")
        if name not in BASES:
            raise ConfigError(
                f"objective 'syntactic_smoothing' smooths the targets of {', '.join(BASES)}, not "
                f"of base={name!r}.{nearest(str(name), BASES)}"
            )
        if name == "patch" and self.base.targets == "shuffled":
            raise ConfigError(
                "base.targets='shuffled' is a control of patches: smooth real targets"
            )
        for field, choices in (("uncounted", ("spread", "hard")), ("special", _SPECIAL)):
            value = getattr(self, field)
            if value not in choices:
                raise ConfigError(f"unknown {field}={value!r}.{nearest(str(value), choices)}")

    # ---------------------------------------------------------------- what the base decides

    @property
    def tokens_per_position(self) -> int:
        """Data tokens that one position of the model consumes."""
        return self.base.tokens_per_position

    @property
    def bidirectional(self) -> bool:
        """Whether the base restores tokens."""
        return getattr(self.base, "bidirectional", False)

    @property
    def evaluates(self) -> Any:
        """The base, where held-out data are evaluated by it and not by the next token."""
        return self.base if getattr(self.base, "evaluates", False) else False

    # ---------------------------------------------------------------- the table

    def prepared(self, materials: Materials) -> "SyntacticSmoothing":
        """Returns the objective with the file of its counts, which are made where they are not yet.

        Raises:
            ConfigError: a file is missing, or the table is one of another tokenizer.
            DataError: tags cannot be read or not be counted.
        """
        base = self.base
        if hasattr(base, "prepared"):
            base = base.prepared(materials)
        path = self.table
        if path is None:
            path = str(
                tag_counts_file(
                    self.tags,
                    materials.tokenizer,
                    materials.stores,
                    materials.cache,
                    materials.show_progress,
                )
            )
        found = dataclasses.replace(self, base=base, table=path)
        rows, ids = len(found.counts.special), materials.tokenizer.vocab_size
        if rows != ids:
            raise ConfigError(
                f"table={path!r} counts {rows} tokens, but the tokenizer has {ids}: make it with "
                f"this tokenizer, or leave it out"
            )
        return found

    @cached_property
    def counts(self) -> TagCounts:
        """The table of counts.

        Raises:
            ConfigError: the objective has none yet.
        """
        if self.table is None:
            raise ConfigError(
                "objective 'syntactic_smoothing' has no counts of tags yet: name a file by table, "
                "or call prepared(), which a training run does"
            )
        return read_tag_counts(self.table)

    @property
    def content(self) -> Mapping[str, str]:
        """Digests of what stands in files."""
        digest = self.counts.digest
        return {"tags": digest, "table": digest}

    def init(self, key: jax.Array, model: Transformer, params: Params) -> Smoothing:
        """Returns the table of the vocabulary, at the beginning of the training.

        Raises:
            ConfigError: the model has fewer ids than the table, or there is nothing to spread over.
        """
        found, V = self.counts, model.config.vocabulary
        rows = len(found.special)
        if rows > V:
            raise ConfigError(
                f"table={self.table!r} counts {rows} tokens, but the model has {V}: make it with "
                f"the model's tokenizer"
            )
        counts = np.zeros((V, len(found.tags)), np.float32)
        counts[:rows] = found.counts
        # Ids behind the tokenizer's last (a mask, filling) stand for no text either.
        special = np.ones(V, bool)
        special[:rows] = found.special
        allowed = ~special if self.special == "exclude" else np.ones(V, bool)
        if allowed.sum() < 2:
            raise ConfigError("fewer than two tokens have a text: there is nothing to spread over")
        counted = counts.sum(-1) > 0
        smoothed = allowed & (counted if self.uncounted == "hard" else True)
        table = smoothing_table(jnp.asarray(counts), jnp.asarray(allowed), self.similarity)
        return Smoothing(table, jnp.asarray(smoothed), jnp.zeros((), jnp.float32))

    # ---------------------------------------------------------------- the loss

    def advance(self, aux: Smoothing, progress: Float[Array, ""]) -> Smoothing:
        """Returns the state with how much of the training is done."""
        return dataclasses.replace(aux, progress=progress)

    def loss(
        self, model: Transformer, params: Params, aux: Smoothing, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns the weighted sum of the smoothed cross entropies; `nll` is of hard targets.

        Raises:
            ConfigError: as the base.
        """
        found = self.base.predictions(model, params, batch, key)
        z_loss = self.base.z_loss
        if self.gate.always_one:
            return scored(found, z_loss, aux)
        gate = self.gate.at(aux.progress)
        # Targets without weight may hold any id.
        targets = jnp.clip(found.targets, 0, aux.smoothed.shape[0] - 1)
        smoothed = aux.smoothed[targets]
        keep = jnp.where(smoothed, gate, 1.0)
        kernel = Kernel(
            features=aux.table.features[targets],
            keys=aux.table.keys,
            mass=(1.0 - keep) * found.weights,
            omitted=targets,
            log_prob=aux.table.log_prob,
        )
        loss = scored(found, z_loss, aux, keep=keep, soft=SoftTargets(kernel=kernel))
        size = jnp.abs(found.weights)
        told = {
            "gate": (gate, jnp.float32(1)),
            "smoothed": (jnp.where(smoothed, size, 0.0).sum(), size.sum()),
        }
        return dataclasses.replace(loss, metrics=loss.metrics | told)


_SPECIAL = ("exclude", "include")
