"""When a drafted token stands, and what replaces one that does not.

A rule is a dataclass of arrays with two functions of log-probabilities, so that another one is a
few lines. G is the number of drafted tokens throughout this package.
"""

from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from tokjax import struct
from tokjax.decoding.transforms.base import column, setting
from tokjax.decoding.transforms.truncation import entropy
from tokjax.errors import ConfigError

NO_RESIDUAL = 1e-12  # a residual of less mass is rounding: the target's own law replaces it


class Acceptance(Protocol):
    """Decides on drafted tokens."""

    def accepts(
        self,
        keys: Key[Array, "B"],
        target: Float[Array, "B G V"],
        draft: Float[Array, "B G V"],
        tokens: Int[Array, "B G"],
    ) -> Bool[Array, "B G"]:
        """Returns which drafted tokens stand, each as if those before it did.

        Args:
            keys: a random key for each row.
            target: log-probabilities by which the text is to be written.
            draft: log-probabilities from which the tokens were drawn.
            tokens: the drafted ones.
        """
        ...

    def residual(
        self, target: Float[Array, "B V"], draft: Float[Array, "B V"], tokens: Int[Array, "B"]
    ) -> Float[Array, "B V"]:
        """Returns the logits from which the replacement of a rejected token is drawn."""
        ...


class Grouping(Protocol):
    """Tokens that count as one."""

    def masses(
        self,
        keys: Key[Array, "B"],
        target: Float[Array, "B G V"],
        draft: Float[Array, "B G V"],
        tokens: Int[Array, "B G"],
    ) -> tuple[Float[Array, "B G"], Float[Array, "B G"]]:
        """Returns the probabilities of each token's group by the target and by the draft.

        Groups may overlap, depend on the distributions, or be drawn with the keys.
        """
        ...

    def residual(
        self, target: Float[Array, "B V"], draft: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """Returns logits whose groups follow (P - Q)_+; for `grouped(..., residual="group")`."""
        ...


@struct.dataclass
class Exact:
    """Accepts with probability min(1, p/q) and replaces from (p - q)_+: the law is the target's."""

    def accepts(self, keys, target, draft, tokens) -> Bool[Array, "B G"]:
        """Returns which drafted tokens stand."""
        return _below_ratio(keys, _probability(target, tokens), _probability(draft, tokens))

    def residual(self, target, draft, tokens) -> Float[Array, "B V"]:
        """Returns the logarithm of (p - q)_+, or that of p where this is nothing but rounding."""
        del tokens
        return positive_part(jnp.exp(target) - jnp.exp(draft), target)


@struct.dataclass
class ExactMatch:
    """Accepts what the target, drawing for itself, takes as well: the law is the target's."""

    def accepts(self, keys, target, draft, tokens) -> Bool[Array, "B G"]:
        """Returns which drafted tokens stand."""
        del draft
        probability = _probability(target, tokens)
        return _below_ratio(keys, probability, jnp.ones_like(probability))

    def residual(self, target, draft, tokens) -> Float[Array, "B V"]:
        """Returns the target's law of other tokens: that of its own draw, given no match."""
        del draft
        return jnp.where(jnp.arange(target.shape[-1]) == tokens[:, None], -jnp.inf, target)


@struct.dataclass
class Grouped:
    """Accepts by the ratio of the probabilities of a token's group."""

    groups: Any
    by: Literal["token", "group"] = struct.field(pytree_node=False, default="token")

    def accepts(self, keys, target, draft, tokens) -> Bool[Array, "B G"]:
        """Returns which drafted tokens stand."""
        keys = jax.vmap(jax.random.split)(keys)
        masses = self.groups.masses(keys[:, 0], target, draft, tokens)
        return _below_ratio(keys[:, 1], *masses)

    def residual(self, target, draft, tokens) -> Float[Array, "B V"]:
        """Returns the logits of the replacement, by tokens or by groups."""
        if self.by == "token":
            return Exact().residual(target, draft, tokens)
        return self.groups.residual(target, draft)


@struct.dataclass
class DisjointGroups:
    """Groups of which each token is in one: tokens of one label."""

    labels: Int[Array, "V"]

    def masses(
        self, keys, target, draft, tokens
    ) -> tuple[Float[Array, "B G"], Float[Array, "B G"]]:
        """Returns the probabilities of each token's group by the target and by the draft."""
        del keys
        self._check(target.shape[-1])
        # (asarray: labels made on the host are indexed by tokens of a program)
        labels = jnp.asarray(self.labels)
        members = labels == labels[tokens][..., None]
        of_group = lambda logprobs: jnp.where(members, jnp.exp(logprobs), 0.0).sum(-1)  # noqa: E731
        return of_group(target), of_group(draft)

    def residual(self, target, draft) -> Float[Array, "B V"]:
        """Returns the logarithm of (P - Q)_+ of each token's group times its share p / P."""
        p, q = jnp.exp(target), jnp.exp(draft)
        of_group = self._sums(p)
        share = p / jnp.where(of_group > 0, of_group, 1.0)
        return positive_part((of_group - self._sums(q)) * share, target)

    def _sums(self, p: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Returns the probability of each token's group."""
        self._check(p.shape[-1])
        sums = jnp.zeros_like(p).at[:, self.labels].add(p)
        return sums[:, self.labels]

    def _check(self, vocab_size: int) -> None:
        if self.labels.shape[0] != vocab_size:
            raise ConfigError(
                f"labels of {self.labels.shape[0]} tokens for a vocabulary of {vocab_size}: give "
                f"one for each id"
            )


@struct.dataclass
class RelativeThreshold:
    """Accepts tokens nearly as likely as the likeliest."""

    share: Any

    def accepts(self, keys, target, draft, tokens) -> Bool[Array, "B G"]:
        """Returns which drafted tokens stand."""
        del keys, draft
        best = jnp.exp(target.max(-1))
        return _probability(target, tokens) >= column(self.share) * best

    def residual(self, target, draft, tokens) -> Float[Array, "B V"]:
        """Returns the target's own law."""
        del draft, tokens
        return target


@struct.dataclass
class Typical:
    """Accepts tokens of at least a probability that falls with the target's entropy."""

    epsilon: Any
    delta: Any

    def accepts(self, keys, target, draft, tokens) -> Bool[Array, "B G"]:
        """Returns which drafted tokens stand."""
        del keys, draft
        floor = jnp.minimum(column(self.epsilon), column(self.delta) * jnp.exp(-_entropies(target)))
        return _probability(target, tokens) > floor

    def residual(self, target, draft, tokens) -> Float[Array, "B V"]:
        """Returns the target's own law."""
        del draft, tokens
        return target


def exact() -> Acceptance:
    """Returns the rule of speculative sampling; the text's law is exactly the target's.

    A token is accepted with probability 1 - TV(p, q). A residual of less mass than 1e-12 counts as
    rounding, and the target's law stands in for it.

    Reference: Leviathan et al. 2022, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318.
    """
    return Exact()


def exact_match() -> Acceptance:
    """Returns the rule that accepts what the target draws as well; exact, with any draft.

    The draft's probabilities are not used. A token is accepted with probability sum p q, never
    more often than by `exact`, and as often in greedy decoding.
    """
    return ExactMatch()


def grouped(groups: Grouping, *, residual: Literal["token", "group"] = "token") -> Acceptance:
    """Returns the rule that compares the probabilities of groups of tokens; it is lossy.

    Args:
        groups: for example `disjoint_groups`.
        residual: "token" replaces from (p - q)_+: neither the law of tokens nor that of groups is
            the target's. "group" draws a group from (P - Q)_+ and then a token of it by the target:
            the law of disjoint groups is the target's.

    Raises:
        ConfigError: an unknown residual.

    Reference: So et al., "Grouped Speculative Decoding for Autoregressive Image Generation",
    arXiv 2508.07747 (token residual).
    """
    if residual not in ("token", "group"):
        raise ConfigError(f"residual={residual!r} must be 'token' or 'group'")
    return Grouped(groups, residual)


def disjoint_groups(labels: Any) -> DisjointGroups:
    """Returns the grouping of tokens by labels; equal ones make a group.

    Args:
        labels: of each token id, 0 to V - 1.

    Raises:
        ConfigError: labels that are no such integers.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ConfigError(f"labels of shape {labels.shape} must be integers, one for each id")
    if labels.min() < 0 or labels.max() >= len(labels):
        raise ConfigError(
            f"labels must be 0 to {len(labels) - 1}, not {labels.min()} to "
            f"{labels.max()}: number the groups from 0"
        )
    return DisjointGroups(labels.astype(np.int32))  # type: ignore[arg-type]


def relative_threshold(share: Any) -> Acceptance:
    """Returns the rule that accepts tokens of at least `share` times the best one's probability.

    Lossy: the draft's tokens are over-represented, the more so the smaller the share. Replacements
    are drawn from the target; with share 1 and greedy sampling it is exact.

    Args:
        share: 0 accepts everything; one value, or one for each row.

    Raises:
        ConfigError: a share is not between 0 and 1.
    """
    ok = lambda v: (v >= 0) & (v <= 1)  # noqa: E731
    return RelativeThreshold(setting("share", share, np.float32, ok, "between 0 and 1"))


def typical_acceptance(epsilon: Any = 0.09, delta: Any = 0.3) -> Acceptance:
    """Returns the rule that accepts tokens of probability above min(epsilon, delta exp(-H)).

    H is the target's entropy. Lossy: the law is not the target's. Replacements are drawn from it.

    Raises:
        ConfigError: a value is not between 0 and 1.

    Reference: Cai et al., "Medusa", arXiv 2401.10774, section 2.3.1.
    """
    ok = lambda v: (v > 0) & (v <= 1)  # noqa: E731
    return Typical(
        setting("epsilon", epsilon, np.float32, ok, "above 0 and at most 1"),
        setting("delta", delta, np.float32, ok, "above 0 and at most 1"),
    )


def positive_part(
    difference: Float[Array, "B V"], fallback: Float[Array, "B V"]
) -> Float[Array, "B V"]:
    """Returns the logarithm of the positive part; the fallback in rows that have next to none."""
    positive = jnp.maximum(difference, 0.0)
    return jnp.where(positive.sum(-1, keepdims=True) < NO_RESIDUAL, fallback, jnp.log(positive))


def _probability(logprobs: Float[Array, "B G V"], tokens: Int[Array, "B G"]) -> jax.Array:
    return jnp.exp(jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0])


def _below_ratio(keys: jax.Array, p: Float[Array, "B G"], q: Float[Array, "B G"]) -> jax.Array:
    """Returns true with probability min(1, p/q): never where p is 0, and without a division."""
    uniform = jax.vmap(lambda key: jax.random.uniform(key, p.shape[1:]))(keys)
    return uniform * q < p


def _entropies(logprobs: Float[Array, "B G V"]) -> Float[Array, "B G"]:
    return entropy(logprobs)
