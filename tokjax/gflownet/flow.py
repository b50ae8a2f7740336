"""What flow objectives share: a balance loss on paths, beside imitation of references.

A row of a batch is a prompt with a path: tokens, and the end token behind them. What it is worth
in every state comes along in the channels; see `tokjax.gflownet.collector`.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tokjax.data.batch import Batch
from tokjax.errors import ConfigError
from tokjax.gflownet.balance import subtb, trajectory_balance
from tokjax.models.parameters import Params
from tokjax.models.scalar_head import init_scalar_head, scalar_head
from tokjax.models.transformer import Transformer
from tokjax.signals import token_stats
from tokjax.training.objective import HEADS, Aux, Loss, PerToken, of_model
from tokjax.training.passes import forward
from tokjax.training.sampling import SamplingConfig

Balance = Literal["subtb", "db", "tb"]
FORCED = 2.0  # in the channel `state`: 1 is a state, this one where a path can but end


@dataclass(frozen=True)
class Flow(PerToken):
    """theta x imitation + (1 - theta) x balance of the model's own paths, each a mean of its own.

    Probabilities are those over the whole vocabulary, whatever paths were drawn from. Both means
    are taken over the rows of an update, however many micro-batches compute it.
    """

    rollouts: SamplingConfig = SamplingConfig()  # how paths are drawn
    # sub-trajectory balance; detailed balance, of neighbouring states alone; or trajectory balance,
    # of whole paths, with a head that estimates log Z of each prompt
    balance: Balance = "subtb"
    lam: float = 1.0  # a pair of states k tokens apart weighs lam^(k-1), in sub-trajectory balance
    theta: float = 0.0  # share of imitation of the references in the loss, 0 to 1

    channels = ("flow", "imitate", "log_reward", "state")

    def __post_init__(self):
        if not 0 <= self.theta <= 1:
            raise ConfigError(f"theta={self.theta} must lie within 0 and 1")
        if not self.lam >= 0:
            raise ConfigError(f"lam={self.lam} must not be negative")

    def init(self, key: jax.Array, model: Transformer, params: Params) -> Aux:
        """Returns nothing: there is no state."""
        return ()

    def init_heads(self, key: jax.Array, model: Transformer) -> dict[str, Any]:
        """Returns the estimate of log Z, for trajectory balance."""
        if self.balance != "tb":
            return {}
        return {"log_z": init_scalar_head(key, model.config.d_model)}

    def policy(self, model: Transformer, params: Params, aux: Aux) -> tuple[Any, Any]:
        """Returns what draws paths, and its parameters."""
        return model, of_model(params)

    def pairs(self, states: np.ndarray) -> np.ndarray:
        """Returns the weight of each path's terms in the balance loss, from its states' number."""
        states = np.asarray(states, np.float64)
        if self.balance == "tb":
            return (states > 0).astype(np.float64)
        apart = np.arange(1, max(int(states.max(initial=0)), 1) + 1, dtype=np.float64)
        lam = 0.0 if self.balance == "db" else self.lam
        return (lam ** (apart - 1) * np.maximum(states[..., None] - apart, 0.0)).sum(-1)

    def loss(
        self, model: Transformer, params: Params, aux: Aux, batch: Batch, key: jax.Array
    ) -> Loss:
        """Returns sums over a batch whose channels are already divided by their means' divisors."""
        channels = batch.channels
        states, imitated = channels["state"] != 0, channels["imitate"]
        last = states.shape[1] - 1 - jnp.argmax(states[:, ::-1], axis=1)[:, None]
        end = jnp.take_along_axis(batch.targets, last, axis=1)  # a path ends by its end token
        targets = jnp.stack([batch.targets, jnp.broadcast_to(end, states.shape)], axis=-1)
        x: Float[Array, "B T D"] = forward(model, params, batch).x
        found = token_stats(
            x, model.head(params), targets, ["logprob"], mask=batch.weights != 0
        ).logprob
        assert found is not None
        start = jnp.argmax(states, axis=1)[:, None]
        places = start + jnp.arange(self.rollouts.max_new_tokens + 1)
        inside = places < states.shape[1]
        at = jnp.minimum(places, states.shape[1] - 1)
        path = lambda a: jnp.take_along_axis(a, at, axis=1)  # noqa: E731
        # Where paths are cut the end is certain. Were its probability the model's, a cut path could
        # have any flow: the rest of it would lie behind the horizon, which no path sees.
        log_pterm = jnp.where(channels["state"] == FORCED, 0.0, found[..., 1])
        given = (path(found[..., 0]), path(log_pterm), path(channels["log_reward"]))
        sums, weights = self.balance_of(given, path(states) & inside, params, x, start)
        scale = jnp.take_along_axis(channels["flow"], start, axis=1)[:, 0]
        nll = -found[..., 0]
        used, imitates = scale != 0, imitated != 0
        metrics = {
            "flow_loss": _masked(sums, used, weights),
            "imitation_nll": _masked(nll, imitates, jnp.ones_like(nll)),
        }
        total = jnp.where(used, sums * scale, 0.0).sum()
        total = total + jnp.where(imitates, nll * imitated, 0.0).sum()
        return Loss(total, jnp.float32(states.shape[0]), metrics, aux)

    def balance_of(
        self,
        given: tuple[Array, Array, Array],
        states: Array,
        params: Params,
        x: Float[Array, "B T D"],
        start: Array,
    ) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
        """Returns the terms of each path and their weights; see `tokjax.gflownet.balance`."""
        if self.balance != "tb":
            return subtb(*given, states, 0.0 if self.balance == "db" else self.lam)
        first = jnp.take_along_axis(x, start[..., None], axis=1)[:, 0]
        log_z = scalar_head(params[HEADS]["log_z"], first)[:, 0]
        return trajectory_balance(*given, states, log_z)


def _masked(values: Array, mask: Array, weights: Array) -> tuple[Array, Array]:
    fixed = jax.lax.stop_gradient(values)
    return jnp.where(mask, fixed, 0.0).sum(), jnp.where(mask, weights, 0.0).sum()
