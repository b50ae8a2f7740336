"""Texts that tasks ask for, in batches of equal settings and similar length."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokjax.errors import ConfigError
from tokjax.evaluation.requests import Writing
from tokjax.evaluation.scoring import batches
from tokjax.language_model import LanguageModel


def write_texts(
    lm: LanguageModel,
    contexts: Sequence[Sequence[int]],
    writings: Sequence[Writing],
    *,
    batch_size: int = 8,
    seed: int = 0,
    strategy: str = "sample",
    options: Mapping[str, Any] | None = None,
) -> tuple[list[str], int]:
    """Returns a text for each context, and how many contexts were cut from the left to fit.

    A text depends on its place and the seed, not on what is written beside it.

    Args:
        lm: the model.
        contexts: ids.
        writings: how each text is to be written.
        batch_size: texts written at a time.
        seed: of all randomness.
        strategy: whose predictions are sampled; see `LanguageModel.generate`.
        options: of the strategy.

    Raises:
        ConfigError: a text leaves no room for its context.
    """
    texts, cut = [""] * len(contexts), 0
    for kind in dict.fromkeys(writings):
        room = lm.model.config.max_positions - kind.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"max_gen_toks={kind.max_new_tokens} leaves no room for a context in the model's "
                f"{lm.model.config.max_positions} positions: lower it"
            )
        own = [i for i, w in enumerate(writings) if w == kind]
        cut += sum(len(contexts[i]) > room for i in own)
        for some in batches([len(contexts[i]) for i in own], batch_size):
            rows = [own[i] for i in some]
            # The last batch runs the program of the others.
            filled = rows + rows[:1] * (min(batch_size, len(own)) - len(rows))
            found = lm.generate(
                [list(contexts[i])[-room:] for i in filled],
                max_new_tokens=kind.max_new_tokens,
                stop=[*lm.eos_ids, *kind.until],
                seeds=[_seed(seed, i) for i in filled],
                strategy=strategy,
                **dict(kind.settings),
                **(options or {}),
            )
            for i, text in zip(rows, found.texts, strict=False):
                texts[i] = text
    return texts, cut


def _seed(seed: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
