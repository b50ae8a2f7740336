"""Balance losses of flows over token sequences, in which every state may end.

State i lies before token i of a sequence; from it the policy takes a token or the end token. With
the reward R(s) of ending in s, the flow of a state is F(s) = R(s) / pi(end | s). Flows balance when
F(s_i) pi(s_i -> ... -> s_j) = F(s_j) for all i < j; each loss is a sum of the squared logarithms of
such ratios. All are zero at once where the policy samples in proportion to R.

Reference: Madan et al., "Learning GFlowNets from partial episodes for improved convergence and
stability", arXiv 2209.12782 (SubTB); Hu et al., "Amortizing intractable inference in large language
models", arXiv 2310.04363 (the form with an end in every state).
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def action_mask(
    tokens: Int[Array, "*B L"], end: Int[Array, "..."] | int, offset: int = 0
) -> Bool[Array, "*B L"]:
    """Returns which tokens count, where what follows the first end token is end tokens too.

    Args:
        tokens: actions.
        end: id of the end token.
        offset: end tokens that count: 0 masks where their number so far is >= 1, which leaves the
            transitions between states (Flower); 1 masks where it is > 1, which leaves the states
            themselves, the first end token being the last action (LaCoT).

    >>> action_mask(jnp.array([5, 7, 0, 0]), 0).tolist()
    [True, True, False, False]
    >>> action_mask(jnp.array([5, 7, 0, 0]), 0, offset=1).tolist()
    [True, True, True, False]
    """
    return jnp.cumsum((tokens == end).astype(jnp.int32), axis=-1) <= offset


def subtb(
    log_pf: Float[Array, "B L"],
    log_pterm: Float[Array, "B L"],
    log_r: Float[Array, "B L"],
    states: Bool[Array, "B L"],
    lam: float = 1.0,
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Returns sums over the pairs of each row's states, and the pairs' weights.

    The loss is the first over the second, both summed over all rows. A pair of states that k
    transitions of the row lie between weighs lam^(k-1).

    Args:
        log_pf: log-probability of the token taken in a state, among all tokens.
        log_pterm: of the end token there, among all tokens.
        log_r: log of the reward of ending there, a constant.
        states: which count. Where some between two are left out, the tokens between those two are
            one transition.
        lam: 1 weighs all alike, 0 leaves neighbours only (detailed balance).
    """
    between = jnp.where(states[..., :, None] & states[..., None, :], 1.0, 0.0)
    apart = jnp.cumsum(states.astype(jnp.int32), axis=-1)
    apart = apart[..., None, :] - apart[..., :, None]
    weights = jnp.where((between > 0) & (apart > 0), _power(lam, apart - 1, log_pf.dtype), 0.0)
    levels = _levels(log_pf, log_pterm, log_r, states)
    squares = jnp.square(levels[..., None, :] - levels[..., :, None])
    return (weights * squares).sum((-1, -2)), weights.sum((-1, -2))


def subtb_loss(
    log_pf: Float[Array, "B L"],
    log_pterm: Float[Array, "B L"],
    log_r: Float[Array, "B L"],
    states: Bool[Array, "B L"],
    lam: float = 1.0,
) -> Float[Array, ""]:
    """Returns the mean over all pairs of states of all rows; see `subtb`."""
    total, weight = subtb(log_pf, log_pterm, log_r, states, lam)
    return total.sum() / weight.sum()


def detailed_balance(
    log_pf: Float[Array, "B L"],
    log_pterm: Float[Array, "B L"],
    log_r: Float[Array, "B L"],
    states: Bool[Array, "B L"],
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Returns sums over neighbouring states alone, and their number; see `subtb`."""
    return subtb(log_pf, log_pterm, log_r, states, 0.0)


def trajectory_balance(
    log_pf: Float[Array, "B L"],
    log_pterm: Float[Array, "B L"],
    log_r: Float[Array, "B L"],
    states: Bool[Array, "B L"],
    log_z: Float[Array, "B"] | float,
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Returns the squared log-ratio of each whole sequence, and ones (0 of rows without states).

    It is log Z + log pi(sequence) - log R(sequence).

    Args:
        log_pf: log-probability of the token taken in a state, among all tokens.
        log_pterm: of the end token there.
        log_r: log of the reward of ending there, a constant.
        states: which count; a row ends in the last one.
        log_z: log of the sum of all rewards: a parameter, or known.
    """
    levels = _levels(log_pf, log_pterm, log_r, states)
    last = states.shape[-1] - 1 - jnp.argmax(states[..., ::-1], axis=-1)
    whole = jnp.take_along_axis(levels, last[..., None], axis=-1)[..., 0]
    some = states.any(-1)
    return jnp.where(some, jnp.square(log_z + whole), 0.0), some.astype(levels.dtype)


def _levels(log_pf: Array, log_pterm: Array, log_r: Array, states: Array) -> Array:
    """Returns the log-ratio between what the policy gives each state and what its reward asks for.

    Its difference between two states is how far the flow between them is from balance.
    """
    # Before the last state every token counts, also where no state is.
    last = states.shape[-1] - 1 - jnp.argmax(states[..., ::-1], axis=-1)
    taken = jnp.where(jnp.arange(states.shape[-1]) < last[..., None], log_pf, 0.0)
    before = jnp.cumsum(taken, axis=-1) - taken
    return before + jnp.where(states, log_pterm - log_r, 0.0)


def _power(lam: float, exponents: Array, dtype: jnp.dtype) -> Array:
    return jnp.asarray(lam, dtype) ** jnp.maximum(exponents, 0).astype(dtype)
