"""Thinking tokens: copies of a special token between question and answer, for more computing.

In a run they are placed by the data (`kind="reasoned"`, `thinking` of a source), so that packing,
evaluation by answers and prompts have them too; here is the objective, and the same for ids. They
are supplied and never generated: `forbidden`, or `supplied` where they belong into what the model
writes. What becomes of their vectors is measured by `tokjax.signals.row_gradients`.

Reference: Vennam et al., "Rethinking Thinking Tokens: Understanding Why They Underperform in
Practice" (arXiv 2411.11371); Herel and Mikolov, "Thinking Tokens for Language Modeling"
(arXiv 2405.08644).
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from tokjax import struct
from tokjax.config import register
from tokjax.data.batch import Batch
from tokjax.data.thinking import THINKING_TOKEN, Thinking, run_of, special_ids, with_runs
from tokjax.decoding.context import Context
from tokjax.decoding.prompts import Prompts
from tokjax.decoding.transforms import Transform, suppress
from tokjax.errors import ConfigError
from tokjax.models.edits import Edits
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.pretraining.predictions import Predictions, scored
from tokjax.training.objective import Aux, Loss, Materials, PerToken, WithoutState

__all__ = [
    "Placed",
    "Thinking",
    "ThinkingTokens",
    "forbidden",
    "frozen_rows",
    "hidden_keys",
    "is_thinking",
    "place",
    "supplied",
]


@register("objective", "thinking_tokens")
@dataclass(frozen=True)
class ThinkingTokens(PerToken, WithoutState):
    """Weighted negative log-likelihood of the next token, where that is no thinking token.

    Without thinking tokens in the data it is the objective `next_token`, number for number. The
    last thinking token of a run predicts the token behind it, and that counts.
    """

    tokens: tuple[str, ...] = (THINKING_TOKEN,)  # special tokens of the tokenizer
    # control: their vectors stay as they were drawn; weight decay would still shrink them, so set
    # optimizer.weight_decay=0 or decay_embeddings=False
    freeze: bool = False
    # control: no other position attends to them, so that they compute nothing that is read but the
    # last one's prediction
    hide_keys: bool = False
    z_loss: float = 0.0  # coefficient of the squared log-sum-exp of the logits
    ids: tuple[int, ...] | None = None  # of the tokens; None: the tokenizer says

    def __post_init__(self):
        if self.z_loss < 0:
            raise ConfigError(f"z_loss={self.z_loss} must not be negative")
        if self.ids is None and not self.tokens:
            raise ConfigError("tokens is empty: name the special tokens that are thinking tokens")
        if self.ids is not None and (not self.ids or min(self.ids) < 0):
            raise ConfigError(f"ids={self.ids} must name some ids, none of them negative")

    def prepared(self, materials: Materials) -> "ThinkingTokens":
        """Returns the objective with the ids that the tokenizer decides.

        Raises:
            ConfigError: one of the tokens is no special token of it.
        """
        if self.ids is not None:
            return self
        return dataclasses.replace(self, ids=special_ids(materials.tokenizer, self.tokens))

    @property
    def evaluates(self) -> bool:
        """Whether held-out data are evaluated by this loss: if keys are hidden there too."""
        return self.hide_keys

    @property
    def heads_write(self) -> bool:
        """Whether a plain model must not write texts: its keys would not be hidden."""
        return self.hide_keys

    def predictions(
        self, model: Transformer, params: Params, batch: Batch, key: jax.Array
    ) -> Predictions:
        """Returns what each position predicts: the token behind it.

        Raises:
            ConfigError: the ids are not known, or are none of the model's.
        """
        ids = self._ids(model)
        params = frozen_rows(params, ids) if self.freeze else params
        edits = hidden_keys(batch.tokens, ids, model.config.n_layers) if self.hide_keys else None
        out = model.backbone(
            params,
            model.embed(params, batch.tokens),
            positions=batch.positions,
            segments=batch.segment_ids,
            edits=edits,
        )
        weights = jnp.where(is_thinking(batch.targets, ids), 0.0, batch.weights)
        there = batch.segment_ids > 0
        thinking = is_thinking(batch.tokens, ids) & there
        share = (thinking.sum().astype(jnp.float32), there.sum().astype(jnp.float32))
        return Predictions(
            x=out.x,
            head=model.head(params),
            targets=batch.targets[..., None],
            weights=weights[..., None],
            weight=weights.sum(),
            metrics={"thinking": share},
        )

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns the sum of w * nll and the sum of w over targets that are no thinking tokens.

        Raises:
            ConfigError: as `predictions`.
        """
        return scored(self.predictions(model, params, batch, key), self.z_loss, aux)

    def _ids(self, model: Transformer) -> tuple[int, ...]:
        if self.ids is None:
            raise ConfigError("the ids of the thinking tokens are not known: set ids, or prepare")
        if max(self.ids) >= model.config.vocabulary:
            raise ConfigError(
                f"ids={self.ids} are not among the model's {model.config.vocabulary} ids"
            )
        return self.ids


def is_thinking(tokens: Int[Array, "*B"], ids: Sequence[int] | Any) -> Bool[Array, "*B"]:
    """Returns which tokens are thinking tokens."""
    return (tokens[..., None] == jnp.asarray(ids, tokens.dtype)).any(-1)


def hidden_keys(tokens: Int[Array, "B T"], ids: Sequence[int], n_layers: int) -> Edits:
    """Returns the intervention by which thinking tokens are seen by none but themselves."""
    T = tokens.shape[1]
    seen = jnp.eye(T, dtype=bool) | ~is_thinking(tokens, ids)[:, None, :]
    bias = jnp.where(seen, 0.0, -jnp.inf).astype(jnp.float32)[None, :, None]
    return Edits(attention_bias=jnp.broadcast_to(bias, (n_layers, *bias.shape[1:])))


def frozen_rows(params: Params, ids: Sequence[int]) -> dict[str, Any]:
    """Returns the parameters with some rows of the embedding table cut off from gradients."""
    rows = jnp.asarray(ids, jnp.int32)
    table = params["embedding"]
    return {**params, "embedding": table.at[rows].set(jax.lax.stop_gradient(table[rows]))}


@struct.dataclass
class _Supplied:
    ids: Any  # [K]
    count: Any
    after: Any  # [A]

    def init(self, prompts: Prompts, vocab_size: int) -> Int[Array, "B"]:
        del vocab_size
        return jnp.zeros(prompts.lengths.shape, jnp.int32)  # tokens of a run that are still due

    def update(
        self, logits: Float[Array, "B V"], state: Int[Array, "B"], context: Context
    ) -> tuple[Float[Array, "B V"], Int[Array, "B"]]:
        ids, every = jnp.asarray(self.ids), jnp.arange(logits.shape[-1])
        due = jnp.where((context.last[:, None] == self.after).any(-1), self.count, state)
        own = ids[jnp.mod(self.count - due, len(ids))]
        only = jnp.where(every == own[:, None], 0.0, -jnp.inf)
        others = jnp.where(is_thinking(every, self.ids), -jnp.inf, logits)
        changed = jnp.where((due > 0)[:, None], only, others)
        return changed, jnp.maximum(due - 1, 0)


def forbidden(ids: Iterable[int]) -> Transform:
    """Returns the transform that keeps a model from generating thinking tokens.

    They are supplied by the prompt.

    Raises:
        ConfigError: an id is negative.
    """
    return suppress(ids)


def supplied(ids: Sequence[int], count: int, after: Sequence[int]) -> Transform:
    """Returns the transform that writes a run of thinking tokens behind some tokens, and only then.

    For places within what the model writes: the token that ends a rationale, or a word. A run is
    also due where the prompt ends in such a token.

    Args:
        ids: the thinking tokens, taken in turn within a run.
        count: length of a run; another number compiles nothing.
        after: tokens that a run follows.

    Raises:
        ConfigError: an id or the count is negative, there are no ids, or a run would follow itself.
    """
    if not ids or min([*ids, *after], default=0) < 0:
        raise ConfigError(
            f"supplied: ids={list(ids)} and after={list(after)} must not be negative, "
            f"and there must be a thinking token"
        )
    if count < 0:
        raise ConfigError(f"supplied: count={count} must not be negative")
    if set(ids) & set(after):
        raise ConfigError(f"supplied: a run behind {sorted(set(ids) & set(after))} would never end")
    return _Supplied(np.asarray(ids, np.int32), np.int32(count), np.asarray(after, np.int32))


@dataclass(frozen=True)
class Placed:
    """A record as ids.

    Attributes:
        tokens: all of it.
        weights: of each token as a target: 0 on the question and on thinking tokens.
        prompt: how many of the tokens are given at inference: the question and the thinking tokens
            behind it.
    """

    tokens: Int32[np.ndarray, " n"]
    weights: Float32[np.ndarray, " n"]
    prompt: int


def place(
    question: Sequence[int],
    rationale: Sequence[int],
    answer: Sequence[int],
    thinking: Thinking,
    ids: Sequence[int],
    *,
    keep_rationale: bool = True,
) -> Placed:
    """Returns a record of ids with its thinking tokens; each id is a word.

    Args:
        question: given, and no target.
        rationale: a target.
        answer: a target; an id that ends the text belongs to it.
        thinking: how many go where; its `tokens` are not read.
        ids: of the thinking tokens, taken in turn within a run.
        keep_rationale: leave the rationale out, though it may be what `matched` counts.

    Raises:
        ConfigError: thinking tokens should go behind a rationale that is left out, or there are no
            ids for them.

    >>> found = place([1, 2], [3], [4], Thinking(count=2), [9], keep_rationale=False)
    >>> found.tokens.tolist(), found.weights.tolist(), found.prompt
    ([1, 2, 9, 9, 4], [0.0, 0.0, 0.0, 0.0, 1.0], 4)
    """
    if thinking.used and not ids:
        raise ConfigError(f"thinking.count={thinking.count} needs the id of a thinking token")
    if not keep_rationale and thinking.used and thinking.place in ("rationale", "all_words"):
        raise ConfigError(f"thinking.place={thinking.place!r} needs the rationale to be kept")
    kept = [*rationale] if keep_rationale else []
    tokens = [*question, *kept, *answer]
    weights = [0.0] * len(question) + [1.0] * (len(tokens) - len(question))
    at = {
        "question": [len(question)],
        "rationale": [len(question) + len(kept)],
        "words": list(range(1, len(question) + 1)),
        "all_words": list(range(1, len(question) + len(kept) + 1)),
    }[thinking.place]
    count = len(rationale) if isinstance(thinking.count, str) else thinking.count
    run = run_of(ids, count) if count else []
    prompt = len(question) + len(run) * sum(i <= len(question) for i in at)
    return Placed(*with_runs(tokens, weights, at, run), prompt)
