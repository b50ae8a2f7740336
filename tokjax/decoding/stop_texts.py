"""Stops at texts: byte for byte, wherever tokens begin and end."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from tokjax import struct
from tokjax.decoding.context import Context
from tokjax.decoding.stops import Stop
from tokjax.errors import ConfigError

_TEXT_SLOTS = 4  # texts are counted in fours and their bytes in eights, so that few compile
_BYTE_SLOTS = 8
_NO_BYTE = -1


@struct.dataclass
class TokenBytes:
    """The bytes that each token id stands for.

    Attributes:
        from_end: the k-th byte from a token's end is at k - 1; what follows means nothing.
        lengths: number of bytes of each token.
    """

    from_end: Int[Array, "V M"]
    lengths: Int[Array, "V"]

    @classmethod
    def of(cls, tokens: Sequence[bytes]) -> "TokenBytes":
        """Returns the table of every token's bytes, in the order of ids."""
        lengths = np.array([len(token) for token in tokens], np.int32)
        table = np.zeros((len(tokens), max(1, int(lengths.max()))), np.uint8)
        for i, token in enumerate(tokens):
            table[i, : len(token)] = np.frombuffer(token[::-1], np.uint8)
        return cls(table, lengths)  # type: ignore[arg-type]


@struct.dataclass
class _OnTexts:
    tokens: TokenBytes
    texts: Any  # [S, N], from their ends
    sizes: Any  # [S], 0 where there is no text

    def __call__(self, context: Context) -> Bool[Array, "B"]:
        tail, own = self._tail(context)
        M, N = self.tokens.from_end.shape[1], self.texts.shape[1]
        # A text that ends e bytes before the end, within the latest token.
        ends = jnp.arange(M)
        windows = tail[:, ends[:, None] + jnp.arange(N)]
        needed = jnp.arange(N) < self.sizes[:, None]
        same = (windows[:, None] == self.texts[None, :, None]) | ~needed[None, :, None]
        found = same.all(-1) & (ends < own[:, None])[:, None] & (self.sizes > 0)[None, :, None]
        return found.any(axis=(1, 2))

    def _tail(self, context: Context) -> tuple[Int[Array, "B Q"], Int[Array, "B"]]:
        """Returns the new text's latest bytes, last first, and how many the latest token has."""
        M, N = self.tokens.from_end.shape[1], self.texts.shape[1]
        at = context.step - 1 - jnp.arange(N)  # every token but the latest has a byte at least
        tokens = context.generated[:, jnp.maximum(at, 0)]
        lengths = jnp.where(at >= 0, self.tokens.lengths[tokens], 0)
        ends = jnp.cumsum(lengths, axis=1)
        place = jnp.arange(M + N - 1)
        which = (ends[:, :, None] <= place).sum(1)
        token = jnp.minimum(which, N - 1)
        rows = jnp.arange(tokens.shape[0])[:, None]
        within = place - (ends - lengths)[rows, token]
        found = self.tokens.from_end[tokens[rows, token], jnp.clip(within, 0, M - 1)]
        return jnp.where(which < N, found.astype(jnp.int32), _NO_BYTE), lengths[:, 0]


def on_texts(texts: Sequence[str], tokens: TokenBytes) -> Stop:
    """Returns the stop behind the token that completes any of these texts.

    Only new text counts. Tokens without bytes (special ones) within a text hide it.

    Args:
        texts: what to stop at.
        tokens: the bytes of every token of the model's vocabulary.

    Raises:
        ConfigError: a text is empty.
    """
    if any(not text for text in texts):
        raise ConfigError("a text to stop at is empty")
    encoded = [text.encode()[::-1] for text in texts]
    width = -(-max(map(len, encoded), default=1) // _BYTE_SLOTS) * _BYTE_SLOTS
    slots = max(1, -(-len(encoded) // _TEXT_SLOTS)) * _TEXT_SLOTS
    table, sizes = np.zeros((slots, width), np.int32), np.zeros(slots, np.int32)
    for i, text in enumerate(encoded):
        table[i, : len(text)] = np.frombuffer(text, np.uint8)
        sizes[i] = len(text)
    return _OnTexts(tokens, table, sizes)
