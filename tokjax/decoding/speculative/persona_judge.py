"""Persona-judge: one model behind two prompts, one drafting, the other judging, in turns."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.decoding.engine import _row_keys, check_prompts
from tokjax.decoding.prompts import Prompts, bucket
from tokjax.decoding.samplers import Sampler, categorical
from tokjax.decoding.speculative.acceptance import Acceptance, exact
from tokjax.decoding.speculative.blocks import BlockPredictor, as_blocks
from tokjax.decoding.speculative.drafters import LAG, ModelDrafter
from tokjax.decoding.speculative.loop import (
    Rules,
    Side,
    SpeculativeGeneration,
    Swap,
    check_rules,
    write,
)
from tokjax.decoding.speculative.speculative import repeated
from tokjax.decoding.stops import Stop, never
from tokjax.decoding.transforms import Transform, chain, temperature, top_k, top_p
from tokjax.errors import ConfigError


def persona_judge(
    model: Any,
    params: Any,
    drafting: Prompts,
    judging: Prompts,
    *,
    max_new_tokens: Any = 128,
    gamma: int = 4,
    swap: Swap = "always",
    samples: int = 1,
    transform: Transform | None = None,
    sampler: Sampler | None = None,
    acceptance: Acceptance | None = None,
    stop: Stop | None = None,
    seeds: Any = None,
    key: Any = None,
) -> SpeculativeGeneration:
    """Returns texts written by one model behind two prompts, each judging the other's drafts.

    The persona of the first prompts drafts `gamma` tokens, that of the second verifies them as in
    speculative sampling; then they exchange their roles. A block follows the law of the persona
    that judges it, whoever drafts: preferences mix because the judges alternate. With
    swap="never" each text follows the judge's law alone, and the drafter has no influence on it.
    `block_of_token` tells which block wrote a token: with swap="always" the second persona judged
    the even ones.

    Costs a block: gamma passes over one token and one over gamma + 2, each persona with a cache of
    its own beside one set of weights.

    Args:
        model: a `Transformer` or a `BlockPredictor`.
        params: its parameters.
        drafting: prompts of the persona that drafts the first block; see `persona_prompts`.
        judging: prompts of the persona that judges it, as many; lengths may differ.
        max_new_tokens: one number, or one for each prompt.
        gamma: drafted tokens of a block.
        swap: "always" exchanges the roles behind each block. (That this is what the paper means
            is inferred from its abstract.) "once" exchanges them behind the first block only, as
            the reference code does; "never" keeps them.
        samples: texts of each pair of prompts, as in `decode`.
        transform: of the logits of both; default that of the reference code, temperature 0.9,
            top-k 20, top-p 0.9, in this order.
        sampler: default `categorical()`.
        acceptance: the rule by which drafts stand; default `exact()`.
        stop: what ends a row besides `max_new_tokens`; what a block holds behind is discarded.
        seeds: one integer for each row.
        key: a random key from which each row's own is derived, instead of seeds.

    Raises:
        ConfigError: a setting is impossible; another number of prompts; what `decode` refuses.
        DataError: a prompt's id is not in the vocabulary.

    Reference: "Persona-judge: Personalized Alignment of Large Language Models via Token-level
    Self-judgment", arXiv 2504.12663.
    """
    if swap not in ("always", "never", "once"):
        raise ConfigError(f"swap={swap!r} must be 'always', 'never' or 'once'")
    sampler = categorical() if sampler is None else sampler
    if transform is None:
        transform = chain(temperature(0.9), top_k(20), top_p(0.9))
    check_rules(transform, sampler, gamma)
    blocks = as_blocks(model)
    both, limits = _checked(blocks, drafting, judging, max_new_tokens)
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
    return _run(blocks, sizes, swap, params, both, rules)


def persona_prompts(
    chat: Callable[[Sequence[Mapping[str, str]]], list[int]],
    preference: str,
    questions: Sequence[str],
    *,
    role: str = "system",
) -> Prompts:
    """Returns a persona's prompts: its preference as a chat turn before each question.

    Args:
        chat: renders messages as ids: `lm.chat` of a loaded model.
        preference: what the persona wants, for example "Answer briefly."
        questions: one for each prompt.
        role: of the preference's turn.
    """
    return Prompts.of(
        [
            chat([{"role": role, "content": preference}, {"role": "user", "content": question}])
            for question in questions
        ]
    )


def _checked(
    blocks: BlockPredictor, drafting: Prompts, judging: Prompts, max_new_tokens: Any
) -> tuple[tuple[Prompts, Prompts], np.ndarray]:
    """Returns the prompts of both personas, padded to one width, and the limits."""
    if len(drafting.lengths) != len(judging.lengths):
        raise ConfigError(
            f"{len(drafting.lengths)} prompts of the drafting persona and {len(judging.lengths)} "
            f"of the judging one: give each row one of both"
        )
    found = []
    for name, prompts in (("drafting", drafting), ("judging", judging)):
        try:
            found.append(check_prompts(blocks, prompts, max_new_tokens))  # type: ignore[arg-type]
        except ValueError as error:
            raise type(error)(f"of the {name} persona: {error}") from error
    width = max(prompts.tokens.shape[1] for prompts, _ in found)
    first, second = (
        Prompts(np.pad(p.tokens, ((0, 0), (0, width - p.tokens.shape[1]))), p.lengths)  # type: ignore[arg-type]
        for p, _ in found
    )
    return (first, second), found[0][1]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(blocks: BlockPredictor, sizes, swap: Swap, params, both, rules) -> SpeculativeGeneration:
    width, samples, gamma = sizes
    chunk = gamma + LAG
    prepared, drafter = blocks.prepare(params), ModelDrafter(blocks)

    def side(prompts: Prompts) -> Side:
        capacity = prompts.tokens.shape[1] + width + chunk
        found = Side(prompts, drafter.start(prepared, prompts, capacity, chunk))
        return jax.tree.map(lambda a: jnp.repeat(jnp.asarray(a), samples, axis=0), found)

    return write(
        drafter,
        blocks,
        (prepared, prepared),
        (side(both[0]), side(both[1])),
        rules,
        width=width,
        gamma=gamma,
        # The side that judges has drafted the block before, and may be as far behind.
        lag=1 if swap == "never" else LAG,
        swap=swap,
    )
