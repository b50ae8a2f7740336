"""One block of drafted tokens against the target's predictions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from tokjax import struct
from tokjax.decoding.speculative.acceptance import Acceptance, exact


@struct.dataclass
class Verdict:
    """What becomes of a block.

    Attributes:
        tokens: of each row, its accepted tokens and one of the target behind them; then zeros.
        accepted: number of accepted tokens.
        tested: number of tokens decided on: the accepted ones and a rejected one, if there is.
    """

    tokens: Int[Array, "B G+1"]
    accepted: Int[Array, "B"]
    tested: Int[Array, "B"]


def speculative_verify(
    keys: Key[Array, "B"],
    target_logprobs: Float[Array, "B G+1 V"],
    draft_logprobs: Float[Array, "B G V"],
    draft: Int[Array, "B G"],
    *,
    acceptance: Acceptance | None = None,
    proposed: Int[Array, "B"] | None = None,
) -> Verdict:
    """Returns which drafted tokens stand, and the token behind them.

    Tokens are decided on from left to right up to the first rejected one, which is replaced; if
    none is, one more is drawn from the target's prediction behind them.

    Args:
        keys: a random key for each row.
        target_logprobs: predictions at each drafted token and behind the last; they are normalised
            here, and may be logits.
        draft_logprobs: what the tokens were drawn from, likewise.
        draft: the drafted tokens.
        acceptance: the rule; default `exact()`, by which each token follows the target's law.
        proposed: how many of a row's tokens count; default all. It must not depend on the tokens.

    Reference: Leviathan et al. 2022, arXiv 2211.17192, algorithm 1.
    """
    acceptance = exact() if acceptance is None else acceptance
    G = draft.shape[1]
    target = jax.nn.log_softmax(target_logprobs.astype(jnp.float32), axis=-1)
    drawn_from = jax.nn.log_softmax(draft_logprobs.astype(jnp.float32), axis=-1)
    proposed = jnp.full(draft.shape[:1], G) if proposed is None else jnp.clip(proposed, 0, G)
    keys = jax.vmap(jax.random.split)(keys)
    stands = acceptance.accepts(keys[:, 0], target[:, :G], drawn_from, draft)
    stands &= jnp.arange(G) < proposed[:, None]
    accepted = jnp.cumprod(stands.astype(jnp.int32), axis=1).sum(1)
    rejected = accepted < proposed

    rows, last = jnp.arange(draft.shape[0]), jnp.minimum(accepted, G - 1)
    behind = target[rows, accepted]
    residual = acceptance.residual(behind, drawn_from[rows, last], draft[rows, last])
    logits = jnp.where(rejected[:, None], residual, behind)
    own = jax.vmap(jax.random.categorical)(keys[:, 1], logits).astype(jnp.int32)

    at = jnp.arange(G + 1)
    tokens = jnp.where(at < accepted[:, None], jnp.pad(draft, ((0, 0), (0, 1))), 0)
    tokens = jnp.where(at == accepted[:, None], own[:, None], tokens)
    return Verdict(tokens, accepted, accepted + rejected)
