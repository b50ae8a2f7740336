"""Where drafts come from: a smaller model, the first layers of the same one, or the text itself."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import struct
from tokjax.decoding.prompts import Prompts
from tokjax.decoding.speculative.blocks import (
    BlockPredictor,
    ModelBlocks,
    Written,
    as_blocks,
    read,
)
from tokjax.errors import ConfigError
from tokjax.models.transformer import Transformer

# What a model that drafted does not know yet when all its tokens stand: the last of them, and the
# target's own.
LAG = 2

Take = Callable[[Float[Array, "B V"], Any], tuple[Int[Array, "B"], Float[Array, "B V"]]]


@struct.dataclass
class Draft:
    """Tokens to be verified.

    Attributes:
        tokens: the drafted ones.
        proposed: how many of a row's tokens count.
        logprobs: of the distributions from which they were drawn; None if they were not drawn.
    """

    tokens: Int[Array, "B G"]
    proposed: Int[Array, "B"]
    logprobs: Float[Array, "B G V"] | None = None


class Drafter(Protocol):
    """A hashable value without arrays; every leaf of its state leads with the axis of rows."""

    def check(self, target: BlockPredictor, longest: int) -> None:
        """Refuses, with a `ConfigError`, to draft for a target, or so many tokens a row."""
        ...

    def prepare(self, params: Any, target: Any) -> Any:
        """Returns its parameters in the form that is read fastest.

        Args:
            params: its own.
            target: the target's, prepared.
        """
        ...

    def start(self, prepared: Any, prompts: Prompts, capacity: int, chunk: int) -> Any:
        """Returns the state behind the prompts; see `BlockPredictor.start`."""
        ...

    def propose(
        self, prepared: Any, state: Any, written: Written, gamma: int, take: Take
    ) -> tuple[Any, Draft]:
        """Returns the state and a draft of `gamma` tokens behind what is written.

        Args:
            prepared: parameters.
            state: of the block before; tokens drafted then may have been rejected since.
            written: each row's text.
            gamma: number of tokens.
            take: (logits, index in the block) -> (tokens, the log-probabilities they were drawn
                with); it filters and draws as the target does.
        """
        ...


@dataclass(frozen=True)
class ModelDrafter:
    """Drafts by a model, with a cache of its own.

    Attributes:
        model: which drafts.
        layers: of the target's, whose parameters it then shares; None has parameters of its own.
    """

    model: BlockPredictor
    layers: int | None = None

    def check(self, target: BlockPredictor, longest: int) -> None:
        """Refuses another vocabulary, and rows longer than the model's positions.

        Raises:
            ConfigError: one of these.
        """
        sizes = self.model.vocab_size, target.vocab_size
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"the draft has {sizes[0]} token ids and the target {sizes[1]}: both must have the "
                f"same tokenizer; prompt_lookup and early_exit need no second model"
            )
        if longest > self.model.max_positions:
            raise ConfigError(
                f"rows of up to {longest} tokens, but the draft has max_positions="
                f"{self.model.max_positions}: shorten the prompts or lower max_new_tokens"
            )

    def prepare(self, params: Any, target: Any) -> Any:
        """Returns per-layer parameters."""
        if self.layers is None:
            return self.model.prepare(params)
        return {**target, "layers": target["layers"][: self.layers]}

    def start(self, prepared: Any, prompts: Prompts, capacity: int, chunk: int) -> Any:
        """Returns the state behind the prompts."""
        return self.model.start(prepared, prompts, capacity, chunk)

    def propose(
        self, prepared: Any, state: Any, written: Written, gamma: int, take: Take
    ) -> tuple[Any, Draft]:
        """Returns the state and a draft; takes `gamma` passes."""
        rows = written.new.shape[0]
        nothing = jnp.zeros((rows, 0), jnp.int32)
        state, logits = read(self.model, prepared, state, written, nothing, LAG)
        first, logprobs = take(logits[:, 0], 0)

        def step(carry, index):
            state, tokens = carry
            state, logits = self.model.extend(
                prepared, state, tokens[:, None], jnp.zeros(rows, jnp.int32), 1
            )
            tokens, logprobs = take(logits[:, 0], index)
            return (state, tokens), (tokens, logprobs)

        (state, _), more = jax.lax.scan(step, (state, first), jnp.arange(1, gamma))
        tokens, logprobs = (
            jnp.concatenate([one[:, None], jnp.moveaxis(others, 0, 1)], axis=1)
            for one, others in zip((first, logprobs), more, strict=True)
        )
        return state, Draft(tokens, jnp.full(rows, gamma), logprobs)


@dataclass(frozen=True)
class EarlyExit:
    """Drafts by the target's own first layers."""

    layers: int

    def of(self, target: BlockPredictor) -> ModelDrafter:
        """Returns the drafter for a target.

        Raises:
            ConfigError: the target is no model, or does not have more layers.
        """
        if not isinstance(target, ModelBlocks):
            raise ConfigError("early_exit needs a target with layers: a Transformer")
        config = target.model.config
        if not 1 <= self.layers < config.n_layers:
            raise ConfigError(
                f"early_exit({self.layers}): layers must be 1 to {config.n_layers - 1}, the "
                f"target has {config.n_layers}"
            )
        pattern = config.window_pattern[: self.layers]
        config = dataclasses.replace(config, n_layers=self.layers, window_pattern=pattern)
        model = Transformer(config)
        return ModelDrafter(ModelBlocks(model, target.cache_dtype), self.layers)


@dataclass(frozen=True)
class PromptLookup:
    """Drafts what followed the text's latest tokens where they stood before."""

    ngram: int = 3

    def check(self, target: BlockPredictor, longest: int) -> None:
        """Refuses nothing: any text can be searched."""
        del target, longest

    def prepare(self, params: Any, target: Any) -> tuple[()]:
        """Returns nothing."""
        del params, target
        return ()

    def start(self, prepared: Any, prompts: Prompts, capacity: int, chunk: int) -> tuple[()]:
        """Returns nothing."""
        del prepared, prompts, capacity, chunk
        return ()

    def propose(
        self, prepared: Any, state: Any, written: Written, gamma: int, take: Take
    ) -> tuple[Any, Draft]:
        """Returns a draft; rows without a match propose nothing."""
        del prepared, take
        tokens, found = lookup(written, self.ngram, gamma)
        return state, Draft(tokens, jnp.where(found, gamma, 0))


def lookup(written: Written, ngram: int, gamma: int) -> tuple[Int[Array, "B G"], Bool[Array, "B"]]:
    """Returns what followed the latest tokens where most of them stood before, and where any did.

    Of several places with as many of the last `ngram` tokens, the latest counts. A copy that
    reaches the text's end goes on from where it began, so that a period is continued.
    """
    ends = written.lengths[:, None]
    size = written.prompts.tokens.shape[1] + written.generated.shape[1]
    places = jnp.broadcast_to(jnp.arange(size), (ends.shape[0], size))
    tokens = written.at(places)
    same, length = places < ends - 1, jnp.zeros(places.shape, jnp.int32)
    for back in range(ngram):
        wanted = written.at(ends - 1 - back)
        there = jnp.pad(tokens, ((0, 0), (back, 0)), constant_values=-1)[:, :size]
        same &= there == wanted
        length += same
    best = jnp.argmax(length * size + places, axis=1, keepdims=True)
    found = jnp.take_along_axis(length, best, axis=1) > 0
    period = jnp.maximum(ends - 1 - best, 1)
    copied = written.at(best + 1 + jnp.arange(gamma) % period)
    return copied, found[:, 0]


def early_exit(layers: int) -> EarlyExit:
    """Returns the draft by the target's first layers, with its final norm and output head.

    It shares the target's parameters and has a cache of its own.

    Args:
        layers: how many; few are cheap, many agree more often.
    """
    return EarlyExit(layers)


def prompt_lookup(ngram: int = 3) -> PromptLookup:
    """Returns the draft by what followed the latest tokens earlier in prompt and text.

    It costs nothing, and serves texts that repeat their prompt: summaries, edits, code.

    Args:
        ngram: most tokens that are compared; the place with the longest match is taken, a single
            token suffices.

    Raises:
        ConfigError: it is below 1.

    Reference: Saxena 2023, "Prompt Lookup Decoding" (the choice among equal matches and the
    continued period are recommendations of tokjax).
    """
    if ngram < 1:
        raise ConfigError(f"ngram={ngram} must be at least 1")
    return PromptLookup(ngram)


def as_drafter(draft: Any, target: BlockPredictor) -> tuple[Drafter, Any]:
    """Returns a drafter and its parameters of what `speculative_decode` takes as `draft`.

    Raises:
        ConfigError: it is nothing that drafts.
    """
    if isinstance(draft, EarlyExit):
        return draft.of(target), None
    has_params = isinstance(draft, tuple) and len(draft) == 2
    drafter: Any = draft[0] if has_params else draft
    if isinstance(drafter, Transformer) or hasattr(drafter, "extend"):
        drafter = ModelDrafter(as_blocks(drafter))
    if not hasattr(drafter, "propose"):
        raise ConfigError(
            f"draft={type(drafter).__name__} must be (model, params), early_exit(layers) or "
            f"prompt_lookup()"
        )
    return drafter, draft[1] if has_params else None
