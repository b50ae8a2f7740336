"""A translation model as the making of synthetic data needs it: it translates, and it ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from tokjax.decoding.predictors import Conditioned
from tokjax.decoding.prompts import Prompts, bucket
from tokjax.decoding.search.attraction import attraction
from tokjax.decoding.search.beam import beam_search
from tokjax.decoding.stops import on_tokens
from tokjax.decoding.transforms import chain, min_new_tokens, suppress
from tokjax.errors import ConfigError
from tokjax.models.encdec import EncoderDecoder
from tokjax.models.transformer import Transformer
from tokjax.signals import token_stats

Rows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class ReferencedSearch:
    """How a generator translates beside a reference; see `attraction`.

    With `model_share=1` it is a plain beam search. The defaults are the authors'.
    """

    beams: int = 5  # of the search
    model_share: float = 0.2  # of the model's own probabilities where the reference attracts
    threshold: float = 0.05  # probability of the reference's token above which it attracts
    temperature: float = 0.2  # of the attraction
    more_tokens: int = 10  # how much longer than its reference a translation may become

    def __post_init__(self):
        if self.beams < 1 or self.more_tokens < 0:
            raise ConfigError(
                f"beams={self.beams} must be at least 1, and more_tokens={self.more_tokens} 0 or "
                f"more"
            )


@dataclass(frozen=True, eq=False)
class Translator:
    """A translation model; sources and targets are ids of its vocabulary.

    Attributes:
        model: a causal model that reads each source, with whatever marks its end, as a prompt; or
            an encoder-decoder.
        params: of the model.
        end: id that ends a target.
        start: id before a target's first token; an encoder-decoder's.
        never: ids that no translation holds, such as padding.
    """

    model: Transformer | EncoderDecoder
    params: Any = field(repr=False)
    end: int
    start: int | None = None
    never: tuple[int, ...] = ()

    def __post_init__(self):
        if isinstance(self.model, EncoderDecoder) != (self.start is not None):
            raise ConfigError(
                f"start={self.start}: an encoder-decoder needs the id before a target's first "
                f"token, another model needs none"
            )

    def translate(
        self, sources: Rows, references: Rows, search: ReferencedSearch
    ) -> list[list[int] | None]:
        """Returns a translation of each source, drawn to its reference, without the end token.

        None stands for one that did not end in time. One program is compiled for each number of
        rows and bucket of lengths.

        Args:
            sources: ids.
            references: ids, without the end token.
            search: how to translate.
        """
        params: Any = self.params
        if isinstance(self.model, EncoderDecoder):
            tokens, mask = _rectangle(sources)
            memory = _encoded(self.model, self.params, tokens, mask)
            params = Conditioned(self.params, memory)
            prompts = Prompts.of(self._begun([()] * len(sources)))
        else:
            plain = Prompts.of(sources)
            room = bucket(plain.tokens.shape[1]) - plain.tokens.shape[1]
            prompts = plain.replace(tokens=np.pad(plain.tokens, ((0, 0), (0, room))))  # type: ignore[attr-defined]
        ended = [[*row, self.end] for row in references]
        pull = attraction(
            ended,
            model_share=search.model_share,
            threshold=search.threshold,
            temperature=search.temperature,
        )
        limits = np.array([len(row) + search.more_tokens for row in ended], np.int32)
        found = beam_search(
            self.model,
            params,
            prompts,
            max_new_tokens=limits,
            beams=search.beams,
            transform=chain(pull, suppress(self.never), min_new_tokens(1, [self.end])),
            stop=on_tokens([self.end]),
            num_return=1,
        )
        stopped = np.asarray(found.stopped)[:, 0]
        return [
            best[:-1] if done else None for (best,), done in zip(found.rows(), stopped, strict=True)
        ]

    def ranks(self, sources: Rows, targets: Rows) -> list[Int[np.ndarray, "T"]]:
        """Returns the rank of each token of targets and of the end behind them; 0 is the best.

        Args:
            sources: ids.
            targets: ids, without the end token.
        """
        ended = [[*row, self.end] for row in targets]
        if isinstance(self.model, EncoderDecoder):
            tokens, mask = _rectangle(sources)
            inputs, _ = _rectangle(self._begun(targets))
            wanted, _ = _rectangle(ended)
            found = _ranks_beside(self.model, self.params, tokens, mask, inputs, wanted)
            firsts = [0] * len(ended)
        else:
            whole = [[*source, *row] for source, row in zip(sources, ended, strict=True)]
            inputs, _ = _rectangle([row[:-1] for row in whole])
            wanted, _ = _rectangle([row[1:] for row in whole])
            found = _ranks(self.model, self.params, inputs, wanted)
            firsts = [len(source) - 1 for source in sources]
        found = np.asarray(found)
        return [
            own[first : first + len(row)]
            for own, first, row in zip(found, firsts, ended, strict=True)
        ]

    def _begun(self, targets: Rows) -> list[list[int]]:
        """Returns the targets behind the encoder-decoder's start token."""
        assert self.start is not None
        return [[self.start, *row] for row in targets]


def _rectangle(rows: Rows) -> tuple[Any, Any]:
    """Returns ids in a bucket's width, and where they are."""
    width = bucket(max(len(row) for row in rows))
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for b, row in enumerate(rows):
        tokens[b, : len(row)], mask[b, : len(row)] = row, True
    return tokens, mask


@partial(jax.jit, static_argnums=0)
def _encoded(model: EncoderDecoder, params: Any, tokens: Any, mask: Any) -> Any:
    return model.encode(params, tokens, mask)


@partial(jax.jit, static_argnums=0)
def _ranks(model: Transformer, params: Any, inputs: Any, wanted: Any) -> Array | None:
    x = model.backbone(params, model.embed(params, inputs)).x
    return token_stats(x, model.head(params), jnp.asarray(wanted), ["rank"]).rank


@partial(jax.jit, static_argnums=0)
def _ranks_beside(
    model: EncoderDecoder, params: Any, tokens: Any, mask: Any, inputs: Any, wanted: Any
) -> Array | None:
    _, out = model.decode(params, inputs, model.encode(params, tokens, mask))
    return token_stats(out.x, model.head(params), jnp.asarray(wanted), ["rank"]).rank
