"""Three tokens of which a backbone knows the last and a reasoner the second; all by enumeration.

An answer y1 y2 y3 over {0..3} to a prompt x is right if y2 = 3 (a form) and y3 = (x + y1) mod 4 (a
fact). The backbone's logits know the fact and avoid the form; the reasoner sees the step and the
previous token, never the prompt: neither solves it alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tokjax.decoding.contrast.reasoners import guided_logits
from tokjax.rl.advantages import group_advantages
from tokjax.rl.policy_loss import policy_loss

SYMBOLS, STEPS, START = 4, 3, 4
FORM = 3  # the second token of a right answer
BANNED = 0  # the first token of a clean answer is another
_X, _Y1, _Y2, _Y3 = np.meshgrid(*[np.arange(SYMBOLS)] * 4, indexing="ij")
OUTCOMES = {
    "right": (_Y2 == FORM) & (_Y3 == (_X + _Y1) % SYMBOLS),
    "form": _Y2 == FORM,
    "clean": _Y1 != BANNED,
    "joint": (_Y2 == FORM) & (_Y1 != BANNED),
}


def backbone(knowledge: float, seed: int) -> tuple[np.ndarray, ...]:
    """Returns logits [x 4], [x y1 4] and [x y1 y2 4] of the three tokens.

    Args:
        knowledge: what is added to the logit of the right last token.
        seed: of the noise.
    """
    rng = np.random.default_rng([seed, int(10 * knowledge)])
    shapes = [(SYMBOLS,) * (n + 2) for n in range(STEPS)]
    first, second, third = (rng.normal(0, 0.3, shape).astype(np.float32) for shape in shapes)
    second[..., FORM] -= 1.0
    right = (np.arange(SYMBOLS)[:, None] + np.arange(SYMBOLS)) % SYMBOLS
    third += knowledge * np.eye(SYMBOLS, dtype=np.float32)[right][:, :, None]
    return first, second, third


def no_backbone() -> tuple[np.ndarray, ...]:
    """Returns logits of 0: what is left of a pair is the reasoner."""
    return tuple(np.zeros((SYMBOLS,) * (n + 2), np.float32) for n in range(STEPS))


def no_reasoner() -> jax.Array:
    """Returns the reasoner that adds nothing: logits by step and previous token."""
    return jnp.zeros((STEPS, SYMBOLS + 1, SYMBOLS))


def shifted(reasoner: jax.Array) -> jax.Array:
    """Returns the reasoner whose step t uses what it learnt for step t - 1."""
    return jnp.roll(reasoner, 1, axis=0)


def logprobs(
    tables: tuple[Any, ...], reasoners: list[Any], weights: list[float]
) -> tuple[jax.Array, ...]:
    """Returns log-probabilities of the guided model, by x and the tokens before."""
    found = []
    for step, table in enumerate(tables):
        own = [r[step, START] if step == 0 else r[step, :SYMBOLS] for r in reasoners]
        each = [jnp.broadcast_to(z, table.shape) for z in own]
        found.append(jax.nn.log_softmax(guided_logits(jnp.asarray(table), each, weights)))
    return tuple(found)


def outcome(
    tables: tuple[Any, ...], reasoners: list[Any], weights: list[float], name: str
) -> np.ndarray:
    """Returns the exact probability of an outcome for each prompt."""
    first, second, third = logprobs(tables, reasoners, weights)
    joint = jnp.exp(first[:, :, None, None] + second[..., None] + third)
    return np.asarray((joint * OUTCOMES[name]).sum((1, 2, 3)), float)


def trained(
    tables: tuple[Any, ...],
    name: str,
    seed: int,
    *,
    steps: int = 300,
    groups: int = 16,
    group: int = 8,
    rate: float = 0.05,
) -> jax.Array:
    """Returns the reasoner that GRPO makes of zeros beside a backbone, rewarded by an outcome."""
    optimizer = optax.adam(rate)
    reward, tables = jnp.asarray(OUTCOMES[name], jnp.float32), jax.tree.map(jnp.asarray, tables)
    rows = jnp.arange(groups * group)
    prompts = rows // group % SYMBOLS

    def at(table: jax.Array, *index: jax.Array) -> jax.Array:
        return table[index]

    def step(carry, key):
        reasoner, state = carry
        before = logprobs(tables, [reasoner], [1.0])
        taken: list[jax.Array] = []
        for t, one in enumerate(jax.random.split(key, STEPS)):
            taken.append(jax.random.categorical(one, at(before[t], prompts, *taken)))
        rewards = at(reward, prompts, *taken).reshape(groups, group)
        advantages = jnp.repeat(group_advantages(rewards).reshape(-1, 1), STEPS, 1)

        def of(reasoner):
            now = logprobs(tables, [reasoner], [1.0])
            parts = [at(now[t], prompts, *taken[: t + 1]) for t in range(STEPS)]
            return jnp.stack(parts, 1)

        def loss(reasoner):
            chosen = of(reasoner)
            mask = jnp.ones(chosen.shape, bool)
            total, weight = policy_loss(chosen, chosen, advantages, mask)
            return total / weight

        update, state = optimizer.update(jax.grad(loss)(reasoner), state)
        return (optax.apply_updates(reasoner, update), state), None

    start = no_reasoner()
    keys = jax.random.split(jax.random.key(seed), steps)
    run = jax.jit(lambda: jax.lax.scan(step, (start, optimizer.init(start)), keys)[0][0])
    return run()
