"""Which tokenizer a run uses: its configuration, and how one is built.

Nothing here imports TensorFlow.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokjax.data.tokenizer_base import Tokenizer
from tokjax.errors import ConfigError, nearest

__all__ = [
    "NAMES",
    "SMALLEST_BPE",
    "Tokenizer",
    "TokenizerConfig",
    "build_tokenizer",
    "sequence_ends",
]

NAMES = ("bytes", "words", "bpe", "sentencepiece", "huggingface", "gguf", "saved", "checkpoint")
_LOADED = {
    "sentencepiece": ".model file",
    "huggingface": "tokenizer.json or its folder",
    "gguf": ".gguf file",
    "saved": "folder that a tokenizer was saved to",
}
SMALLEST_BPE = 260  # 256 bytes, <|endoftext|>, and at least three merges


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer, and what it puts around a sequence."""

    # bytes, words (bytes in words), bpe (trained on `corpus`), sentencepiece, huggingface, gguf or
    # saved (from `path`), or checkpoint (that of the run's init_from)
    name: str = "bpe"
    path: str | None = None  # .model file; tokenizer.json or the folder that holds it; .gguf file
    vocab_size: int = 8192  # ids of the bpe, the special one and the 256 bytes included
    corpus: str = "stdlib"  # text the bpe learns from: stdlib, a UTF-8 file, or a folder of .txt
    word_bytes: int = 16  # of the tokenizer of words: most bytes of one
    # what that tokenizer cuts text into: words; or as a control patches of so many bytes
    word_pieces: Literal["words", "patches"] = "words"
    bos: str | None = None  # text of the begin token where the files do not name one
    eos: str | None = None  # text of the end token where the files do not name one
    pad: str | None = None  # text of the filling token where the files do not name one
    added: tuple[str, ...] = ()  # more special tokens, with ids behind all others
    add_bos: bool = True  # begin every sequence with the BOS id, if the tokenizer has one
    add_eos: bool = True  # end every sequence with the EOS id; the tokenizer must have one
    allow_lossy: bool = False  # encode also text that the tokenizer alters (normalises, drops)

    def __post_init__(self):
        if self.name not in NAMES:
            raise ConfigError(f"unknown tokenizer name {self.name!r}.{nearest(self.name, NAMES)}")
        if self.name in _LOADED and not self.path:
            wanted = _LOADED[self.name]
            raise ConfigError(f"tokenizer {self.name!r} needs tokenizer.path: the {wanted}.")
        if self.name in ("bytes", "words", "bpe"):
            for field in ("path", "bos", "eos", "pad"):
                if getattr(self, field):
                    raise ConfigError(
                        f"tokenizer.{field}={getattr(self, field)!r} has no meaning for the "
                        f"tokenizer {self.name!r}; leave it out, or name sentencepiece, "
                        "huggingface or gguf."
                    )
        if self.name == "bpe" and not SMALLEST_BPE <= self.vocab_size <= 1 << 20:
            raise ConfigError(
                f"tokenizer.vocab_size={self.vocab_size} is impossible for a byte-level BPE: it "
                f"holds 256 bytes, one special token and merges, so choose {SMALLEST_BPE} to "
                f"{1 << 20}."
            )


def build_tokenizer(config: TokenizerConfig, cache_dir: Path) -> Tokenizer:
    """Returns the tokenizer of a configuration; a BPE is trained on first use and cached.

    Args:
      config: which tokenizer.
      cache_dir: where a trained BPE is kept; see `tokjax.data.cache.cache_directory`.

    Raises:
      ConfigError: a path is missing or unreadable, a named special token does not exist, or the
        tokenizer has no EOS though `add_eos` is on.
      StorageError: the cache cannot be written.
    """
    if config.name == "bytes":
        from tokjax.data.byte_tokenizer import ByteTokenizer

        tokenizer: Tokenizer = ByteTokenizer()
    elif config.name == "words":
        from tokjax.data.word_tokenizer import WordTokenizer

        tokenizer = WordTokenizer(config.word_bytes, config.word_pieces)
    elif config.name == "bpe":
        from tokjax.data.bpe import cached_bpe

        tokenizer = cached_bpe(config.corpus, config.vocab_size, cache_dir)
    else:
        tokenizer = read_tokenizer(config)
    tokenizer = tokenizer.with_added(config.added)
    sequence_ends(config, tokenizer)  # refuses an impossible add_eos now
    return tokenizer


def read_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Returns a tokenizer that lies in files.

    Raises:
      ConfigError: the path is missing or unreadable, or there is none to read.
    """
    if config.name == "sentencepiece":
        from tokjax.data.sentencepiece_tokenizer import read_sentencepiece

        return read_sentencepiece(config)
    if config.name == "gguf":
        from tokjax.data.gguf_tokenizer import read_gguf_tokenizer

        return read_gguf_tokenizer(Path(config.path or "").expanduser(), config)
    if config.name == "huggingface":
        from tokjax.data.huggingface_tokenizer import read_huggingface

        return read_huggingface(config)
    if config.name == "saved":
        return Tokenizer.load(Path(config.path or "").expanduser())
    raise ConfigError(
        f"tokenizer {config.name!r} lies in no file of its own: 'checkpoint' needs a run with "
        f"init_from"
    )


def same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Returns whether each id stands for the same text, whatever else tokenizers say of theirs."""
    if one.fingerprint == other.fingerprint:
        return True
    if (one.vocab_size, one.special_tokens) != (other.vocab_size, other.special_tokens):
        return False
    return all(one.token_bytes(i) == other.token_bytes(i) for i in range(one.vocab_size))


def sequence_ends(config: TokenizerConfig, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Returns the ids to put before and after every sequence.

    Raises:
      ConfigError: `add_eos` is on and the tokenizer has no end token.
    """
    before = [tokenizer.bos_id] if config.add_bos and tokenizer.bos_id is not None else []
    if not config.add_eos:
        return before, []
    if tokenizer.eos_id is None:
        known = ", ".join(repr(text) for text in list(tokenizer.special_tokens)[:8])
        raise ConfigError(
            f"{tokenizer.title} names no end token: set tokenizer.eos to one of its special tokens "
            f"({known or 'it has none'}), or tokenizer.add_eos=False."
        )
    return before, [tokenizer.eos_id]
