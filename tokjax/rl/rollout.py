"""What a policy did, aligned with the targets of a batch: a row is one answer to one prompt."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokjax import struct
from tokjax.data.batch import Batch


@struct.dataclass
class Rollout:
    """Answers to prompts and what is known of them; the G answers of a prompt are neighbours.

    Position t stands for the action that took token t + 1 of the row, as in a batch: there lie its
    log-probability, its advantage, and the value of the state that it was taken in.

    Attributes:
        batch: the rows; their weights are 1 at actions (an EOS included) and 0 elsewhere.
        reward: of each answer, all rewards together.
        rewards: of each answer by the reward's name, before its weight.
        logprobs: of the actions under the policy that took them, at the temperature of sampling,
            as training computes them.
        entropies: of the policy's distribution there, in nats.
        stopped: answers that ended by themselves; the others were cut at their limit.
        scores: whatever else the objective's pass over the rows gave: `reference` (log-probability
            under the reference), `value` (of the critic), ...
        token_rewards: a reward for each action, beside those of whole answers.
        extra: what the advantage gathered beforehand.
        progress: share of the stage that is done, 0 to 1.
        group: G.
    """

    batch: Batch
    reward: Float[Array, "R"]
    logprobs: Float[Array, "R T"]
    entropies: Float[Array, "R T"]
    stopped: Bool[Array, "R"]
    progress: Float[Array, ""]
    rewards: Mapping[str, Float[Array, "R"]] = struct.field(default_factory=dict)
    scores: Mapping[str, Float[Array, "R T"]] = struct.field(default_factory=dict)
    token_rewards: Float[Array, "R T"] | None = None
    extra: Mapping[str, Any] = struct.field(default_factory=dict)
    group: int = struct.field(pytree_node=False, default=1)

    @property
    def mask(self) -> Bool[Array, "R T"]:
        """True at actions."""
        return self.batch.weights != 0

    @property
    def lengths(self) -> Float[Array, "R"]:
        """Actions of each answer."""
        return self.mask.sum(-1).astype(jnp.float32)

    def by_prompt(self, values: Array) -> Array:
        """Returns values [R, ...] as [R / G, G, ...]."""
        return values.reshape(-1, self.group, *values.shape[1:])

    def flat(self, values: Array) -> Array:
        """Returns values [R / G, G, ...] as [R, ...]."""
        return values.reshape(-1, *values.shape[2:])

    def at_actions(self, values: Float[Array, "R"]) -> Float[Array, "R T"]:
        """Returns a value of each answer at all of its actions, and 0 elsewhere."""
        return jnp.where(self.mask, values[:, None], 0.0)
