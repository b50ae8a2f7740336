"""Speculative decoding: drafts are verified by the target, several tokens in one pass."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.decoding.engine import _row_keys, check_prompts
from tokjax.decoding.prompts import Prompts, bucket
from tokjax.decoding.samplers import Sampler, greedy
from tokjax.decoding.speculative.acceptance import Acceptance, exact
from tokjax.decoding.speculative.blocks import BlockPredictor, as_blocks
from tokjax.decoding.speculative.drafters import LAG, Drafter, as_drafter
from tokjax.decoding.speculative.loop import (
    Rules,
    Side,
    SpeculativeGeneration,
    check_rules,
    write,
)
from tokjax.decoding.stops import Stop, never
from tokjax.decoding.transforms import Transform, chain
from tokjax.errors import ConfigError


def speculative_decode(
    target: Any,
    target_params: Any,
    prompts: Prompts,
    *,
    draft: Any,
    max_new_tokens: Any,
    gamma: int = 4,
    samples: int = 1,
    transform: Transform | None = None,
    sampler: Sampler | None = None,
    acceptance: Acceptance | None = None,
    stop: Stop | None = None,
    seeds: Any = None,
    key: Any = None,
) -> SpeculativeGeneration:
    """Returns continuations of the prompts by the target's law, in fewer passes of it.

    Each block, the draft proposes `gamma` tokens, which one pass of the target verifies; those up
    to the first rejected one stand, and one more token comes from the target. Greedy texts are
    those of `decode`, and sampled ones have their distribution (not their draws), up to the
    rounding by which a pass over several tokens differs from passes over one.

    Rows advance by what each accepts, and a row's text depends on its own prompt, seed and
    settings alone. One program is compiled as for `decode`, and one for each `gamma`.

    Costs a block: one pass of the target over gamma + 1 tokens, and gamma passes of the draft
    (none with `prompt_lookup`).

    Args:
        target: a `Transformer`, or any `BlockPredictor` (`ModelBlocks` for a cache of "int8").
        target_params: its parameters.
        prompts: what to continue.
        draft: `(model, params)` of the same vocabulary, `early_exit(layers)`, or
            `prompt_lookup()`; or a `Drafter`, alone or with its parameters.
        max_new_tokens: one number, or one for each prompt.
        gamma: drafted tokens of a block.
        samples: continuations of each prompt, as in `decode`.
        transform: of the logits of both, one that looks at nothing else (temperature, top-k,
            top-p, ...); default none.
        sampler: `greedy()` (default) or `categorical()`, for both.
        acceptance: the rule by which drafts stand; default `exact()`. Others are lossy where they
            say so.
        stop: what ends a row besides `max_new_tokens`; what a block holds behind is discarded.
        seeds: one integer for each row, as in `decode`.
        key: a random key from which each row's own is derived, instead of seeds.

    Raises:
        ConfigError: what `decode` refuses; a draft of another vocabulary or of too few positions;
            a transform that depends on the text; no positive gamma.
        DataError: a prompt's id is not in the target's vocabulary.

    Reference: Leviathan et al. 2022, "Fast Inference from Transformers via Speculative Decoding",
    arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318.
    """
    sampler = greedy() if sampler is None else sampler
    transform = chain() if transform is None else transform
    check_rules(transform, sampler, gamma)
    judge = as_blocks(target)
    drafter, draft_params = as_drafter(draft, judge)
    prompts, limits = check_prompts(judge, prompts, max_new_tokens)  # type: ignore[arg-type]
    drafter.check(judge, int(np.max(np.asarray(prompts.lengths) + limits)))
    limits = repeated(limits, samples)
    rules = Rules(
        transform=transform,
        sampler=sampler,
        acceptance=exact() if acceptance is None else acceptance,
        stop=never() if stop is None else stop,
        keys=_row_keys(len(limits), seeds, key, needed=sampler.draws),
        limits=limits,
    )
    sizes = bucket(int(limits.max())), samples, gamma
    return _run(judge, drafter, sizes, target_params, draft_params, prompts, rules)


def repeated(limits: np.ndarray, samples: int) -> np.ndarray:
    """Returns the limit of each row.

    Raises:
        ConfigError: no positive number of samples.
    """
    if samples < 1:
        raise ConfigError(f"samples={samples} must be at least 1")
    return np.repeat(limits, samples)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    judge: BlockPredictor, drafter: Drafter, sizes, params, draft_params, prompts, rules
) -> SpeculativeGeneration:
    width, samples, gamma = sizes
    # Blocks may reach beyond a row's end, and what a side is behind is read with them.
    chunk = gamma + LAG
    capacity = prompts.tokens.shape[1] + width + chunk
    target = judge.prepare(params)
    prepared = drafter.prepare(draft_params, target)
    sides = (
        Side(prompts, drafter.start(prepared, prompts, capacity, chunk)),
        Side(prompts, judge.start(target, prompts, capacity, chunk)),
    )
    sides = jax.tree.map(lambda a: jnp.repeat(jnp.asarray(a), samples, axis=0), sides)
    return write(drafter, judge, (prepared, target), sides, rules, width=width, gamma=gamma, lag=1)
