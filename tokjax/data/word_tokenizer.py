"""The tokenizer of a hierarchical model: bytes, and a symbol behind each word."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokjax.data.byte_tokenizer import END_OF_TEXT
from tokjax.data.tokenizer_base import Tokenizer
from tokjax.data.word_splitter import fixed_patches, split_words
from tokjax.errors import ConfigError, nearest

END_OF_WORD = "<|endofword|>"
WORD_END = 256  # id of the symbol behind each word
TEXT_END = 257  # id of what begins, ends and fills
PIECES = ("words", "patches")
_FILE = "words.json"


class WordTokenizer(Tokenizer):
    """Ids 0 to 255 are bytes, 256 ends a word, 257 is `<|endoftext|>`.

    Likelihoods of its sequences are those of a text and its words: every word pays for its end.

    >>> WordTokenizer().encode("a b")
    [97, 256, 32, 98, 256]
    """

    kind = "words"

    def __init__(self, longest: int = 16, pieces: str = "words"):
        """Makes one.

        Args:
            longest: most bytes of a word.
            pieces: words; or as a control patches of so many bytes whatever the text says.

        Raises:
            ConfigError: either makes no sense.
        """
        if longest < 1:
            raise ConfigError(f"longest={longest} bytes of a word must be at least 1")
        if pieces not in PIECES:
            raise ConfigError(f"unknown pieces={pieces!r}.{nearest(pieces, PIECES)}")
        self.longest, self.pieces = longest, pieces
        self._set(
            title=f"the tokenizer of {pieces} of at most {longest} bytes",
            identity=f"utf-8 {pieces} {longest}",
            token_bytes=[bytes([byte]) for byte in range(256)] + [b"", b""],
            special_tokens={END_OF_WORD: WORD_END, END_OF_TEXT: TEXT_END},
            bos_id=TEXT_END,
            eos_id=TEXT_END,
            pad_id=TEXT_END,
        )

    def split(self, text: str) -> list[bytes]:
        """Returns the words (or patches) of a text; joined they are its UTF-8."""
        if self.pieces == "patches":
            return fixed_patches(text, self.longest)
        return split_words(text, self.longest)

    def begin(self, text: str) -> list[int]:
        """Returns the ids of a text whose last word goes on: a prompt to be continued there."""
        ids = self.encode(text)
        return ids[:-1] if ids else ids

    def _encode_raw(self, texts: Sequence[str], prefix: bool) -> list[list[int]]:
        del prefix  # bytes need none
        return [[i for word in self.split(text) for i in (*word, WORD_END)] for text in texts]

    def _files(self) -> dict[str, bytes]:
        told = {"longest": self.longest, "pieces": self.pieces}
        return {_FILE: (json.dumps(told) + "\n").encode()}

    @classmethod
    def _load(cls, directory: Path, metadata: Mapping[str, Any]) -> "WordTokenizer":
        tokenizer = cls(**json.loads((directory / _FILE).read_bytes()))
        tokenizer.chat_template = metadata["chat_template"]
        return tokenizer
