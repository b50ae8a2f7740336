"""DoLa: a model's last layer against one of its earlier layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax import struct
from tokjax.decoding.contrast.combine import (
    IMPOSSIBLE,
    SCORED,
    log_probabilities,
    plausible,
    restrict,
    weighted_sum,
)
from tokjax.decoding.contrast.settings import of_rows, share_of_best
from tokjax.decoding.predictors import ModelPredictor, StepOutput
from tokjax.decoding.prompts import Prompts
from tokjax.errors import ConfigError
from tokjax.models.cache import Cache
from tokjax.models.layers import norm
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.signals.divergences import js_divergence

Divergence = Literal["definition", "dola_code"]
_HIGH = {32: (16, 32), 40: (20, 40), 60: (40, 60), 80: (60, 80)}


def candidate_layers(n_layers: int, bucket: Literal["low", "high"] = "low") -> tuple[int, ...]:
    """Returns DoLa's candidates: the even layers of the lower or upper part of the stack.

    Layer j is the residual stream that block j reads; 0 are the embeddings. Depths of 32, 40, 60
    and 80 have the paper's buckets; others take the lower or upper half of the stack, the low one
    of at most 20 layers (recommendation of tokjax).

    >>> candidate_layers(32, "high")
    (16, 18, 20, 22, 24, 26, 28, 30)

    Raises:
        ConfigError: an unknown bucket.
    """
    if bucket not in ("low", "high"):
        raise ConfigError(f"bucket={bucket!r} must be 'low' or 'high'")
    low_end = {32: 16, 40: 20, 60: 20, 80: 20}.get(n_layers, min(20, -(-n_layers // 2)))
    half = n_layers // 2
    start, end = (0, low_end) if bucket == "low" else _HIGH.get(n_layers, (half, n_layers))
    return tuple(range(start + start % 2, end, 2)) or (start,)


def select_layer(
    final: Float[Array, "B V"],
    candidates: Float[Array, "C B V"],
    divergence: Divergence = "definition",
) -> tuple[Int[Array, "B"], Float[Array, "B V"]]:
    """Returns each row's candidate farthest from the final prediction, and what that predicts.

    Args:
        final: log-probabilities of the last layer.
        candidates: log-probabilities of the earlier ones.
        divergence: Jensen-Shannon by its definition, or what the reference code computes.

    Reference: Chuang et al., "DoLa", arXiv 2309.03883.
    """
    apart = jax.vmap(lambda each: js_divergence(final, each, form=divergence))(candidates)
    chosen = jnp.argmax(apart, axis=0)
    return chosen, jnp.take_along_axis(candidates, chosen[None, :, None], axis=0)[0]


def dola_scores(
    final: Float[Array, "*B V"],
    premature: Float[Array, "*B V"],
    plausibility: Any = 0.1,
    *,
    scoring: bool = False,
) -> Float[Array, "*B V"]:
    """Returns log q_final - log q_premature where the final layer finds a token plausible.

    Args:
        final: log-probabilities of the last layer.
        premature: log-probabilities of the chosen one.
        plausibility: least probability over that of the likeliest.
        scoring: as answers are scored: log-softmax over the whole vocabulary, then the mask, with
            -1000 for what it excludes. Else -inf for that, and no log-softmax.

    Reference: Chuang et al., "DoLa", arXiv 2309.03883.
    """
    scores = weighted_sum([final, premature], [1.0, -1.0])
    kept = plausible(final, plausibility)
    if scoring:
        return restrict(log_probabilities(scores), kept, SCORED)
    return restrict(scores, kept, IMPOSSIBLE)


@struct.dataclass
class DoLaParams:
    """What DoLa decodes from.

    Attributes:
        model: parameters of the model.
        layers: the candidates; their number is part of the program, which they are is not.
        plausibility: least probability of a token over that of the likeliest, by the last layer.
    """

    model: Any
    layers: Int[Array, "C"]
    plausibility: Float[Array, "*B"]


@dataclass(frozen=True)
class DoLa:
    """The last layer against an earlier one, chosen anew at each token.

    Costs one forward pass a token, and the output head once more for each candidate.

    Attributes:
        model: the model.
        divergence: which Jensen-Shannon divergence chooses.
        final_norm: whether the final norm is applied to earlier layers too.
    """

    model: Transformer
    divergence: Divergence = "definition"
    final_norm: bool = False

    @property
    def _plain(self) -> ModelPredictor:
        return ModelPredictor(self.model)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._plain.vocab_size

    @property
    def max_positions(self) -> int:
        """Longest sequence, prompt and new tokens together."""
        return self._plain.max_positions

    def prepare(self, params: DoLaParams) -> DoLaParams:
        """Returns the parameters with the model's in the form that it reads fastest."""
        return params.replace(model=self._plain.prepare(params.model))  # type: ignore[attr-defined]

    def init(
        self, prepared: DoLaParams, prompts: Prompts, capacity: int
    ) -> tuple[Cache, StepOutput]:
        """Returns the filled cache and what is said of the first new token."""
        at = (prompts.lengths - 1)[:, None, None]
        of_last = lambda x: jnp.take_along_axis(x, at, axis=1)  # noqa: E731
        cache, out = self._plain.prefill(
            prepared.model, prompts, capacity, capture={"resid_pre": of_last}
        )
        return cache, self._contrasted(prepared, of_last(out.x), out.captured["resid_pre"])

    def step(
        self, prepared: DoLaParams, state: Cache, tokens: Int[Array, "B"]
    ) -> tuple[Cache, StepOutput]:
        """Returns the cache with one more token a row, and what is said of the next one."""
        embedded = self.model.embed(prepared.model, tokens[:, None])
        out = self.model.backbone(prepared.model, embedded, cache=state, capture={"resid_pre"})
        assert out.cache is not None
        return out.cache, self._contrasted(prepared, out.x, out.captured["resid_pre"])

    def _contrasted(
        self, prepared: DoLaParams, x: Float[Array, "B 1 D"], earlier: Float[Array, "L B 1 D"]
    ) -> StepOutput:
        states = earlier[prepared.layers, :, 0]
        final = log_probabilities(self._plain.logits(prepared.model, x)[:, 0])
        exits = early_exit_logits(self.model, prepared.model, states, final_norm=self.final_norm)
        _, premature = select_layer(final, log_probabilities(exits), self.divergence)
        plausibility = of_rows(prepared.plausibility, final.shape[0])
        return StepOutput(dola_scores(final, premature, plausibility))


def early_exit_logits(
    model: Transformer, params: Params, x: Float[Array, "B T D"], *, final_norm: bool
) -> Float[Array, "B T V"]:
    """Returns the output head's logits of an earlier layer's residual stream.

    Args:
        model: the model.
        params: its parameters.
        x: residual stream.
        final_norm: apply the model's final norm first, as the head was trained to expect.
    """
    if final_norm and model.config.final_norm:
        x = norm(model.config, params, x)
    if model.config.embedding_width is not None:
        x = x @ params["embedding_out"].astype(x.dtype)
    return model.unembed(params, x)


def dola(
    model: Transformer,
    params: Any,
    *,
    layers: Sequence[int] | Literal["low", "high"] = "low",
    plausibility: Any = 0.1,
    divergence: Divergence = "definition",
    final_norm: bool = False,
) -> tuple[DoLa, DoLaParams]:
    """Returns DoLa's predictor and its parameters, for `decode`.

    The logits are log q_last(x) - log q_j(x) where q_last(x) is at least `plausibility` of its
    maximum, -inf elsewhere; of the candidate layers, j is the one whose prediction is farthest from
    the last, chosen for each row at each token. One candidate is the paper's DoLa-static. The
    reference code adds `repetition_penalty(1.2)`. Costs one forward pass a token, and the output
    head once more for each candidate.

    Args:
        model: the model.
        params: its parameters.
        layers: candidates; j is the residual stream that block j reads, 0 the embeddings. Or the
            paper's "low" or "high" bucket (high for TruthfulQA, low for the rest).
        plausibility: 0 excludes no token.
        divergence: Jensen-Shannon by its definition, or "dola_code", what the reference code
            computes (arguments exchanged), which can choose other layers.
        final_norm: apply the final norm to earlier layers; the reference code does not.

    Raises:
        ConfigError: a setting is impossible, or there is no such layer.

    Reference: Chuang et al., "DoLa: Decoding by Contrasting Layers Improves Factuality in Large
    Language Models", arXiv 2309.03883.
    """
    depth = model.config.n_layers
    chosen = candidate_layers(depth, layers) if isinstance(layers, str) else tuple(layers)
    if not chosen or min(chosen) < 0 or max(chosen) >= depth:
        raise ConfigError(f"layers={chosen} must be some of 0 to {depth - 1}")
    if divergence not in ("definition", "dola_code"):
        raise ConfigError(f"divergence={divergence!r} must be 'definition' or 'dola_code'")
    return DoLa(model, divergence, final_norm), DoLaParams(
        model=params,
        layers=np.array(chosen, np.int32),  # type: ignore[arg-type]
        plausibility=share_of_best(plausibility),
    )
