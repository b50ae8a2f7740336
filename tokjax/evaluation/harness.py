"""A tokjax model as lm-evaluation-harness calls one; importing this needs the extra `eval`."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]

from tokjax import strategies
from tokjax.data.chat import chat_template
from tokjax.errors import ConfigError
from tokjax.evaluation.requests import fitted, rolling_pairs, split_pair, writing
from tokjax.evaluation.scoring import score_pairs
from tokjax.evaluation.writing import write_texts
from tokjax.language_model import LanguageModel

log = logging.getLogger(__name__)


class HarnessModel(LM):
    """The `LM` that `lm_eval.simple_evaluate(model=...)` takes.

    Attributes:
        truncated: number of requests so far whose context was cut from the left.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        batch_size: int = 8,
        seed: int = 0,
        strategy: str = "sample",
        options: Mapping[str, Any] | None = None,
    ):
        """Wraps a model.

        Args:
            lm: from `tokjax.load`.
            batch_size: requests computed at a time.
            seed: of sampled texts.
            strategy: whose predictions are scored and sampled; see `LanguageModel.generate`.
            options: of the strategy.

        Raises:
            ConfigError: the tokenizer has neither BOS nor EOS, so that nothing can begin a text.
        """
        super().__init__()
        self.lm, self.batch_size, self.seed = lm, batch_size, seed
        self.strategy, self.options = strategy, dict(strategies.opened(strategy, options or {}))
        self.truncated = 0
        self._chat = False  # until the harness asks for a chat, special tokens are plain text
        if lm.tokenizer.bos_id is not None:
            self._prefix = lm.tokenizer.bos_id
        elif lm.tokenizer.eos_id is not None:
            self._prefix = lm.tokenizer.eos_id
        else:
            raise ConfigError("the tokenizer has neither BOS nor EOS: nothing can begin a text")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Returns the log-probability of each continuation, and whether it is the greedy one."""
        positions = self.lm.model.config.max_positions
        pairs = []
        for request in requests:
            context, continuation = request.args
            before, ids = split_pair(self._encode, context, continuation, self._prefix)
            pairs.append(fitted(before, ids, positions))
        self._count(sum(p.dropped > 0 for p in pairs), len(pairs))
        return self._score(pairs)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Returns the log-probability of each whole text, in windows of the model's positions."""
        positions = self.lm.model.config.max_positions
        each = [
            rolling_pairs(self.lm.tokenizer.encode(request.args[0]), self._prefix, positions)
            for request in requests
        ]
        scores = iter(self._score([pair for pairs in each for pair in pairs]))
        return [sum(next(scores)[0] for _ in pairs) for pairs in each]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Returns a text for each context, which ends before the first of its `until`."""
        contexts = [self._encode(request.args[0]) or [self._prefix] for request in requests]
        texts, cut = write_texts(
            self.lm,
            contexts,
            [writing(request.args[1]) for request in requests],
            batch_size=self.batch_size,
            seed=self.seed,
            strategy=self.strategy,
            options=self.options,
        )
        self._count(cut, len(contexts))
        return texts

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's caches."""
        return self.lm.tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the source of the chat template, None where none is wanted."""
        return self.lm.tokenizer.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns a chat as text; special tokens spelled out in it are read as such."""
        if self.lm.tokenizer.chat_template is None:
            raise ConfigError("no chat template came with this model's tokenizer: leave out --chat")
        self._chat = True
        template = chat_template(self.lm.tokenizer, None)
        return template.render(chat_history, add_generation_prompt=add_generation_prompt).text

    def _encode(self, text: str) -> list[int]:
        if not self._chat:
            return self.lm.encode(text)
        tokenizer = self.lm.tokenizer
        return tokenizer.encode_parts(text, tokenizer.find_specials(text))[0]

    def _score(self, pairs: Sequence[Any]) -> list[tuple[float, bool]]:
        return score_pairs(
            self.lm,
            pairs,
            batch_size=self.batch_size,
            strategy=self.strategy,
            options=self.options,
        )

    def _count(self, cut: int, of: int) -> None:
        self.truncated += cut
        if cut:
            log.warning(
                "%d of %d contexts are longer than the model's %d positions and were cut from the "
                "left",
                cut,
                of,
                self.lm.model.config.max_positions,
            )
