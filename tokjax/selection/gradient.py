"""Gradient similarity: examples whose gradients point where the target's do.

The gradient of each example's mean loss is taken with respect to adapters (LoRA, at their start,
where only their second matrices have one), projected to a few numbers, and compared by its cosine
with the mean direction of the target's gradients. This is the first-order
influence of LESS for plain gradient descent at one checkpoint, without Adam's second moments and
without the sum over checkpoints: what scoring by gradients costs at least. Rank, adapted matrices
and dimensions are those of LESS; its dense random projection is a count sketch here.

Reference: Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning",
arXiv 2402.04333, section 3.
"""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tokjax.config import register
from tokjax.errors import ConfigError, DataError
from tokjax.models import lora
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.selection.rows import Rows, Scope
from tokjax.selection.scoring import Found, RowScorer, Target
from tokjax.signals.hidden import l2_norm


@register("selector", "gradient")
@dataclass(frozen=True)
class Gradient:
    """Cosine of an example's projected gradient with the target's (LESS, without Adam)."""

    needs_target: ClassVar[bool] = True
    memory: ClassVar[int] = 8

    rank: int = 128  # of the adapters
    targets: tuple[str, ...] = ("query", "key", "value", "out")  # matrices that have adapters
    dimensions: int = 8192  # numbers that a gradient is projected to
    seed: int = 0  # of the adapters' start and the projection
    scope: Scope = "response"  # tokens whose loss counts: with a weight in training, others, all

    def __post_init__(self):
        for name in ("rank", "dimensions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        lora.LoraConfig(rank=self.rank, targets=self.targets)  # says what is wrong with targets

    def prepare(self, model: Transformer, params: Params, target: Target | None) -> RowScorer:
        """Returns what scores rows by the gradients of a target.

        Raises:
            ConfigError: the model has adapters already.
            DataError: no token of the target counts.
        """
        assert target is not None  # as `needs_target` says
        settings = (self.dimensions, self.seed)
        adapters = lora.LoraConfig(rank=self.rank, targets=self.targets)
        model, params = lora.on(model, params, adapters, jax.random.key(self.seed))

        def directions(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
            scope = rows.scope(self.scope)
            found = _directions(model, params, rows.tokens, scope, settings)
            return np.asarray(found), scope.sum(1) > 0

        of_target = [found[real] for found, real in map(directions, target.batches(self.memory))]
        mean = np.concatenate(of_target)
        if not len(mean):
            raise DataError(f"no token of the target counts (scope={self.scope!r})")
        mean = mean.mean(0)
        mean /= max(float(np.linalg.norm(mean)), 1e-8)

        def score(rows: Rows) -> Found:
            found, real = directions(rows)
            return np.where(real, found @ mean, -np.inf), {}

        return score


@functools.partial(jax.jit, static_argnames=("model", "settings"))
def _directions(model, params, tokens, scope, settings) -> Float[Array, "B P"]:
    """Returns the direction of each row's projected gradient."""
    dimensions, seed = settings
    base, adapters = lora.split(params)
    # The gradients of the first matrices are 0 as long as the second ones are.
    first, second = _halves(adapters)

    def loss(second, tokens, scope):
        params = lora.join(base, _joined(first, second))
        x = model.backbone(params, model.embed(params, tokens[None, :-1])).x
        # Not `token_stats`: its backward pass would give each row a gradient of the head.
        logprobs = jax.nn.log_softmax(model.unembed(params, x)[0])
        own = jnp.take_along_axis(logprobs, tokens[1:, None], axis=-1)[:, 0]
        return -jnp.where(scope[1:], own, 0.0).sum() / jnp.maximum(scope.sum(), 1)

    def project(tokens, scope):
        found = jnp.zeros(dimensions, jnp.float32)
        for n, leaf in enumerate(jax.tree.leaves(jax.grad(loss)(second, tokens, scope))):
            found += _sketch(leaf, jax.random.fold_in(jax.random.key(seed), n), dimensions)
        return found / jnp.maximum(l2_norm(found), 1e-20)

    return jax.vmap(project)(tokens, scope)


def _halves(adapters: Any) -> tuple[Any, Any]:
    """Returns the first and the second matrices of adapters, of stacked layers."""

    def those(end: str) -> dict[str, Any]:
        return {
            part: {name: w for name, w in weights.items() if name.endswith(end)}
            for part, weights in adapters["layers"].items()
        }

    return those(lora.A), those(lora.B)


def _joined(first: Any, second: Any) -> dict[str, Any]:
    return {"layers": {part: {**first[part], **second[part]} for part in first}}


def _sketch(leaf: Array, key: jax.Array, dimensions: int) -> Float[Array, "P"]:
    """Returns a count sketch: each entry with a random sign added to a random place.

    Inner products of sketches are those of the leaves in expectation, and no matrix of
    entries x dimensions is needed.
    """
    place, sign = jax.random.split(key)
    flat = leaf.astype(jnp.float32).reshape(-1)
    signs = jax.random.rademacher(sign, flat.shape, jnp.float32)
    places = jax.random.randint(place, flat.shape, 0, dimensions)
    return jnp.zeros(dimensions, jnp.float32).at[places].add(signs * flat)
