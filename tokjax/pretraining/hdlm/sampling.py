"""Texts written by a hyperschedule diffusion model, prompts kept in place.

Reference: "Unifying Autoregressive and Diffusion-Based Sequence Generation", arXiv 2504.06416.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from tokjax import struct
from tokjax.decoding.prompts import Prompts
from tokjax.errors import ConfigError
from tokjax.models import parameters
from tokjax.models.parameters import Params
from tokjax.models.transformer import Transformer
from tokjax.pretraining.hdlm.epsilon import EpsilonHybrid
from tokjax.pretraining.hdlm.objective import HDLM
from tokjax.pretraining.hdlm.passes import check_model
from tokjax.pretraining.hdlm.samplers import Sampler, acs, reverse
from tokjax.pretraining.hdlm.schedules import Block
from tokjax.pretraining.hdlm.walk import Plan, cached_walk, walk

_walk = functools.partial(jax.jit, static_argnums=0)(walk)
_cached_walk = functools.partial(jax.jit, static_argnums=0)(cached_walk)


@struct.dataclass
class Samples:
    """Texts of one length.

    Attributes:
        tokens: prompts and what was written behind them.
        prompt_lengths: number of tokens of each row's prompt.
    """

    tokens: Int[Array, "B L"]
    prompt_lengths: Int[Array, "B"]

    def rows(self, stop: Sequence[int] = ()) -> list[list[int]]:
        """Returns what was written in each row, up to the first of the ids `stop`, that included.

        Waits for the device.
        """
        tokens, lengths = jax.device_get((self.tokens, self.prompt_lengths))
        found = []
        for row, n in zip(tokens, lengths, strict=True):
            new = row[int(n) :].tolist()
            ends = [i for i, token in enumerate(new) if token in stop]
            found.append(new[: ends[0] + 1] if ends else new)
        return found


def sample(
    objective: HDLM,
    model: Transformer,
    params: Params,
    prompts: Prompts | None = None,
    *,
    length: int,
    schedule: Any = None,
    sampler: Sampler | None = None,
    temperature: float = 1.0,
    samples: int = 1,
    seed: int = 0,
    cache: bool | None = None,
) -> Samples:
    """Returns rows of `length` tokens that begin with their prompts.

    A row depends on its number and the seed, not on the rows beside it.

    Args:
        objective: that the model was trained with; its mask and attention are used.
        model: the model.
        params: its parameters.
        prompts: what each row begins with; None begins with nothing.
        length: of all rows, prompts included.
        schedule: hyperschedule to write by; None takes that of training. Its tau is the number of
            steps of a block, its width should be that of training.
        sampler: `original()`, `acs(eta)`, `remask()`; `reverse()` for gamma noise, which takes no
            other. None: acs(), or with gamma noise reverse().
        temperature: of the draws; 0 takes the likeliest token.
        samples: rows of each prompt, neighbours.
        seed: of all randomness.
        cache: keep keys and values of settled blocks instead of computing them again at each step;
            None does so where it is possible (blocks, several of them, whose settled tokens do not
            change). The texts are the same up to rounding.

    Raises:
        ConfigError: the model or the arguments do not fit together.
    """
    encoder = check_model(model)
    schedule = objective.schedule if schedule is None else schedule
    gamma = not isinstance(objective.noise, EpsilonHybrid)
    sampler = (reverse() if gamma else acs()) if sampler is None else sampler
    if gamma != (sampler.kind == "reverse"):
        raise ConfigError(
            f"sampler {sampler.kind!r} does not fit {type(objective.noise).__name__}: models of "
            f"the gamma-hybrid noise are sampled by reverse(), others by the rest"
        )
    if not temperature >= 0:
        raise ConfigError(f"temperature={temperature} must not be negative")
    if gamma and temperature != 1:
        raise ConfigError(f"temperature={temperature}: reverse() draws at temperature 1 alone")
    if samples < 1:
        raise ConfigError(f"samples={samples} must be at least 1")
    rows, lengths = _rows(prompts, length, samples, objective)
    if length > model.config.max_positions:
        raise ConfigError(
            f"length={length} is more than model.max_positions={model.config.max_positions}"
        )
    plan = Plan(encoder, objective, schedule, length)
    possible = isinstance(schedule, Block) and schedule.block(length) < length and not gamma
    possible &= objective.settled_attention != "full"
    if cache and not possible:
        raise ConfigError(
            "cache=True is for several blocks (a `Block` narrower than the row), whose settled "
            "tokens never change, and the epsilon-hybrid noise: leave cache at None"
        )
    run = _walk
    if possible and cache is not False:
        run, params = _cached_walk, parameters.unstack(params)
    given = jnp.asarray(np.arange(length) < lengths[:, None])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(len(rows)))
    tokens = run(plan, params, jnp.asarray(rows), given, sampler, jnp.float32(temperature), keys)
    return Samples(tokens, jnp.asarray(lengths))


def _rows(
    prompts: Prompts | None, length: int, samples: int, objective: HDLM
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of all rows, padded to one length, and the lengths of their prompts."""
    mask_id = objective.ids()[0]
    if prompts is None:
        if objective.shifted:
            raise ConfigError(
                "a model with shifted predictions does not predict the first token: give prompts"
            )
        return np.full((samples, length), mask_id, np.int32), np.zeros(samples, np.int32)
    tokens, lengths = np.asarray(prompts.tokens), np.asarray(prompts.lengths)
    if lengths.max() > length:
        raise ConfigError(
            f"length={length} is of prompt and new tokens together, but prompt "
            f"{int(lengths.argmax())} has {int(lengths.max())} tokens"
        )
    rows = np.full((len(tokens), length), mask_id, np.int32)
    width = min(length, tokens.shape[1])
    kept = np.arange(width) < lengths[:, None]
    if (tokens[:, :width] == mask_id)[kept].any():
        raise ConfigError(
            f"a prompt holds the mask, id {mask_id}, which stands for what is unknown"
        )
    rows[:, :width] = np.where(kept, tokens[:, :width], mask_id)
    return np.repeat(rows, samples, axis=0), np.repeat(lengths, samples).astype(np.int32)
