import re

import numpy as np
import pytest

from tokjax.data.tokenizers import TokenizerConfig, build_tokenizer
from tokjax.decoding import Prompts
from tokjax.decoding.search import (
    Generator,
    answers_of_texts,
    best_of_n,
    scores_of_texts,
    self_consistency,
)


@pytest.fixture
def given(table, tmp_path):
    """A byte tokenizer, and a generator that writes digits."""
    tokenizer = build_tokenizer(TokenizerConfig(name="bytes"), tmp_path)
    p = np.zeros(tokenizer.vocab_size)
    p[tokenizer.encode("0123456789")] = 0.1
    return tokenizer, Generator(*table([p] * len(p)), max_new_tokens=2)


def test_texts_are_scored_and_their_answers_counted(given):
    tokenizer, generator = given
    texts = ["one: ", "another: "]
    prompts = Prompts.of(tokenizer.encode_batch(texts))
    seen = []

    def score(prompts, continuations):
        seen.append((list(prompts), list(continuations)))
        return [int(text) for text in continuations]

    best = best_of_n(generator, prompts, scores_of_texts(tokenizer, score), n=6)
    ((asked, written),) = seen
    assert asked == [text for text in texts for _ in range(6)]
    assert all(re.fullmatch(r"\d\d", text) for text in written)
    for b in range(2):
        assert int(tokenizer.decode(best.tokens[b])) == max(map(int, written[6 * b : 6 * b + 6]))
    last = answers_of_texts(tokenizer, lambda text: int(text[1]) if text[0] != "0" else None)
    votes = self_consistency(generator, prompts, last, n=6).votes
    for b, vote in enumerate(votes):
        own = written[6 * b : 6 * b + 6]
        assert vote.unparsed == sum(text[0] == "0" for text in own)
        assert vote.totals[vote.answer] == max(vote.totals.values())
