"""Toucan: costly layers once a group of characters, a small last stack for each character.

Reference: Fleshman and Van Durme, "Toucan: Token-Aware Character Level Language Modeling"
(arXiv 2311.08620), and its released code.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.config import register
from tokjax.data.batch import Batch
from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.errors import ConfigError, nearest
from tokjax.models.parameters import Params
from tokjax.models.segments import Segments, first_of_documents, room_for
from tokjax.models.stack import StackConfig
from tokjax.models.transformer import Transformer
from tokjax.tokenization.scoring import Slots, scored
from tokjax.tokenization.toucan.boundaries import Boundaries, boundary_prior_loss
from tokjax.tokenization.toucan.expansion import Expansion, slot_targets
from tokjax.tokenization.toucan.parts import Parts
from tokjax.training.objective import HEADS, Aux, Loss, Materials, PerToken, WithoutState

_CONTROLS = ("none", "zero", "leak")


@struct.dataclass
class Groups:
    """A row in groups.

    Attributes:
        segments: the groups.
        boundaries: which characters begin one, those that begin a document left out.
        drawn: the same as numbers, with a gradient.
        vectors: what the backbone says to each character: of the groups before its own.
    """

    segments: Segments
    boundaries: Bool[Array, "B T"]
    drawn: Float[Array, "B T"]
    vectors: Float[Array, "B T D"]


@register("objective", "toucan")
@dataclass(frozen=True)
class Toucan(PerToken, WithoutState):
    """Negative log-likelihood of characters and of the ends of their groups, and boundary loss.

    The run's model is the stack over groups; the two stacks over characters belong to the
    objective. Characters are bytes. The loss is divided by the characters alone, so that every end
    is paid for. Held-out data are evaluated by the same loss, with no draws and no boundary loss.
    """

    before: StackConfig = StackConfig(n_layers=2)  # over characters, before pooling
    behind: StackConfig = StackConfig(n_layers=2)  # over characters and ends, which predicts
    boundaries: Boundaries = Boundaries()  # where groups begin: learned, or said by the text
    # False: the baseline whose characters predict the next character alone, and which therefore
    # runs all stacks for every character it generates
    ends: bool = True
    # groups of a row over its characters, at most: the backbone runs over so many, and so many
    # slots are added for ends. What lies beyond is left out (metric `left_out`)
    room: float = 0.5
    # as controls: the last stack is told nothing by the backbone; or each character what its own
    # group says, which leaks
    control: Literal["none", "zero", "leak"] = "none"
    draws: bool = True  # learned boundaries are drawn; False takes the likelier
    z_loss: float = 0.0  # coefficient of the squared log-sum-exp of the logits

    heads_write: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("before", "behind"):
            shape = getattr(self, name)
            if shape.n_layers < 1 or shape.d_model is not None:
                raise ConfigError(
                    f"objective 'toucan': {name}.n_layers={shape.n_layers} must be at least 1, and "
                    f"{name}.d_model={shape.d_model} None: states are added to the backbone's"
                )
        if not 0 < self.room <= 1:
            raise ConfigError(f"room={self.room} must be above 0 and at most 1")
        if self.control not in _CONTROLS:
            raise ConfigError(
                f"unknown control={self.control!r}.{nearest(str(self.control), _CONTROLS)}"
            )
        if self.z_loss < 0:
            raise ConfigError(f"z_loss={self.z_loss} must not be negative")

    @property
    def evaluates(self) -> Any:
        """What evaluates held-out data: this, without draws and boundary loss."""
        return dataclasses.replace(self, draws=False)

    def parts(self, model: Transformer) -> Parts:
        """Returns the stacks around a backbone.

        Raises:
            ConfigError: a shape is impossible, or the model cannot be used.
        """
        config = model.config
        if config.embedding_rows is not None or config.embedding_width is not None:
            raise ConfigError(
                "objective 'toucan' adds characters to the backbone's states: set "
                "model.embedding_rows=None and model.embedding_width=None"
            )
        if not config.causal:
            raise ConfigError("objective 'toucan' needs model.causal=True")
        return Parts.of(model, self.before, self.behind, self.boundaries)

    def prepared(self, materials: Materials) -> "Toucan":
        """Returns the objective itself.

        Raises:
            ConfigError: tokens are not bytes, or the model cannot be used.
        """
        if not isinstance(materials.tokenizer, ByteTokenizer):
            raise ConfigError(
                f"objective 'toucan' reads bytes, but the tokenizer is "
                f"{materials.tokenizer.title}: set data.tokenizer.name='bytes'"
            )
        self.parts(materials.model)
        return self

    def init_heads(self, key: jax.Array, model: Transformer) -> dict[str, Any]:
        """Returns the parameters of the stacks over characters.

        Raises:
            ConfigError: as `parts`.
        """
        return {"toucan": self.parts(model).init(key)}

    def grouped(
        self,
        model: Transformer,
        params: Params,
        tokens: Int[Array, "B T"],
        documents: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        key: jax.Array | None,
        boundaries: Bool[Array, "B T"] | None = None,
    ) -> Groups:
        """Returns the groups of a row and what the backbone says to each character.

        Args:
            model: the backbone.
            params: its parameters, with the objective's under "heads".
            tokens: the characters.
            documents: 1, 2, ... for the documents packed into a row; 0 is filling.
            positions: of the characters in their documents.
            key: of the draws; None takes what is likelier.
            boundaries: characters that begin a group; None: as the objective decides.

        Raises:
            ConfigError: as `parts`.
        """
        parts = self.parts(model)
        w = parts.ready(params[HEADS]["toucan"])
        x = parts.before.backbone(
            w["before"], model.embed(params, tokens), positions=positions, segments=documents
        ).x
        if boundaries is None:
            drawn = self.boundaries.drawn(w.get("boundaries", {}), x, tokens, key)
        else:
            drawn = boundaries.astype(jnp.float32)
        drawn = jnp.where((documents > 0) & ~first_of_documents(documents), drawn, 0.0)
        begins = drawn > 0.5
        groups = Segments.of(begins, documents, room_for(self.room, tokens.shape[1]))
        # The language model's loss reaches boundaries through the weights of the means: one more
        # boundary takes a character out of the group that it is counted in.
        counted = jnp.cumsum(drawn, axis=1)
        pooled = groups.pool(x, 1.0 - (counted - jax.lax.stop_gradient(counted)))
        null = w["null"].astype(pooled.dtype)
        given = pooled if self.control == "leak" else groups.shift(pooled, null)
        out = model.backbone(
            params,
            parts.entering(w, given),
            positions=groups.index,
            segments=groups.document,
        ).x
        vectors = groups.unpool(out)
        if self.control == "zero":
            vectors = jnp.zeros_like(vectors)
        return Groups(groups, begins, drawn, vectors)

    def predictions(
        self, model: Transformer, params: Params, batch: Batch, key: jax.Array
    ) -> Slots:
        """Returns what each slot of the expanded row predicts.

        Raises:
            ConfigError: as `parts`.
        """
        draws = self.draws and self.boundaries.kind == "learned"
        found = self.grouped(
            model,
            params,
            batch.tokens,
            batch.segment_ids,
            batch.positions,
            key if draws else None,
        )
        return self.spelled(model, params, batch, found)

    def spelled(self, model: Transformer, params: Params, batch: Batch, found: Groups) -> Slots:
        """Returns what each slot of the expanded row predicts, given the groups."""
        parts = self.parts(model)
        w = parts.ready(params[HEADS]["toucan"])
        tokens, documents, T = batch.tokens, batch.segment_ids, batch.tokens.shape[1]
        groups, vectors = found.segments, found.vectors
        marked = found.boundaries if self.ends else jnp.zeros_like(found.boundaries)
        marked, real = marked & groups.fits, jnp.where(groups.fits, documents, 0)
        # The first group of a document has no end before it.
        slots = T + groups.room - 1 if self.ends else T
        places = Expansion.of(marked, real, slots)
        earlier = jnp.pad(vectors, ((0, 0), (1, 0), (0, 0)))[:, :T]
        x = places.spread(vectors + model.embed(params, tokens), earlier + parts.end_vector(w))
        of_slots = places.spread(real, real)
        begins = first_of_documents(of_slots)
        numbers = jnp.arange(slots)
        positions = numbers - jax.lax.cummax(jnp.where(begins, numbers, 0), axis=1)
        x = parts.behind.backbone(w["behind"], x, positions=positions, segments=of_slots).x
        next_of, first_of = slot_targets(batch.targets, tokens, marked, documents, parts.end)
        weights = jnp.where(groups.fits, batch.weights, 0.0)
        # An end pays where the character behind it does; so does what predicts that end.
        of_ends = jnp.pad(weights, ((0, 0), (1, 0)))[:, :T]
        weight = weights.sum()
        return Slots(
            x=x,
            head=parts.head(params, w),
            targets=places.spread(next_of, first_of)[..., None],
            weights=places.spread(weights, of_ends)[..., None],
            weight=weight,
            metrics={
                "left_out": (batch.weights.sum() - weight, batch.weights.sum()),
                "characters_per_group": (
                    (documents > 0).sum().astype(jnp.float32),
                    groups.count.sum().astype(jnp.float32),
                ),
            },
        )

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns the sum of w * nll over characters and ends, with the boundary loss, and the sum
        of w over the characters.

        Raises:
            ConfigError: as `parts`.
        """
        learned = self.boundaries.kind == "learned"
        groups = self.grouped(
            model,
            params,
            batch.tokens,
            batch.segment_ids,
            batch.positions,
            key if self.draws and learned else None,
        )
        found = self.spelled(model, params, batch, groups)
        # Ends of groups and of texts are no text, but are paid for.
        targets = found.targets[..., 0]
        of_text = (targets < 256) & (targets != model.config.vocabulary)
        loss = scored(found, of_text, self.z_loss)
        if not (learned and self.draws):
            return loss
        characters = (batch.segment_ids > 0).sum(-1)
        prior = boundary_prior_loss(groups.drawn.sum(-1), characters, self.boundaries.prior)
        weighed = (prior * jnp.where(groups.segments.fits, batch.weights, 0.0).sum(-1)).sum()
        metrics = {**loss.metrics, "boundary_loss": (jax.lax.stop_gradient(weighed), loss.weight)}
        return dataclasses.replace(loss, total=loss.total + weighed, metrics=metrics)
