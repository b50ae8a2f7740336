"""The tokenizer with no training: one id per UTF-8 byte and one special id."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokjax.data.tokenizer_base import Tokenizer

END_OF_TEXT = "<|endoftext|>"


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are bytes; 256 is `<|endoftext|>`, which begins, ends and fills.

    >>> ByteTokenizer().encode("é")
    [195, 169]
    """

    kind = "bytes"

    def __init__(self):
        self._set(
            title="the byte tokenizer",
            identity="utf-8",
            token_bytes=[bytes([byte]) for byte in range(256)] + [b""],
            special_tokens={END_OF_TEXT: 256},
            bos_id=256,
            eos_id=256,
            pad_id=256,
        )

    def _encode_raw(self, texts: Sequence[str], prefix: bool) -> list[list[int]]:
        del prefix  # bytes need none
        return [list(text.encode("utf-8")) for text in texts]

    @classmethod
    def _load(cls, directory: Path, metadata: Mapping[str, Any]) -> "ByteTokenizer":
        del directory
        tokenizer = cls()
        tokenizer.chat_template = metadata["chat_template"]
        return tokenizer
