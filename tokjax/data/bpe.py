"""A byte-level BPE trained on a corpus at first use and kept in the cache."""

import hashlib
import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from tokjax.data.byte_tokenizer import END_OF_TEXT
from tokjax.data.cache import cached_bytes
from tokjax.data.huggingface_tokenizer import HuggingFaceTokenizer
from tokjax.errors import ConfigError

_VERSION = 1  # of this recipe: a change makes every cached BPE train anew


def cached_bpe(corpus: str, vocab_size: int, cache_dir: Path) -> HuggingFaceTokenizer:
    """Returns the BPE of a corpus, from the cache or trained now (seconds) and put there.

    Args:
      corpus: "stdlib", a UTF-8 text file, or a folder of .txt files.
      vocab_size: number of ids.
      cache_dir: the cache.

    Raises:
      ConfigError: the corpus cannot be read, or is too small for the vocabulary.
      StorageError: the cache cannot be written.
    """
    recipe = [_VERSION, metadata.version("tokenizers"), corpus_identity(corpus), vocab_size]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    path = Path(cache_dir) / "tokenizers" / f"bpe-{vocab_size}-{key}.json"
    content = cached_bytes(
        path, lambda: _seal(train_bpe(corpus_texts(corpus), vocab_size)), _sealed
    )
    spec = json.loads(content.split(b"\n", 1)[1])
    title = f"the BPE of {vocab_size} tokens trained on {corpus}"
    return HuggingFaceTokenizer(
        spec, title=title, **dict.fromkeys(("bos", "eos", "pad"), END_OF_TEXT)
    )


def train_bpe(texts: Iterator[str], vocab_size: int) -> str:
    """Returns the `tokenizer.json` of a byte-level BPE with `<|endoftext|>` as only special token.

    Args:
      texts: what it learns from.
      vocab_size: number of ids, of which 256 are bytes and one is special.

    Raises:
      ConfigError: the texts do not have that many merges.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # Split as GPT-2 does: words with their leading space, numbers, runs of signs and of blanks.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise ConfigError(
            f"tokenizer.vocab_size={vocab_size} is more than the corpus has: its pairs give only "
            f"{tokenizer.get_vocab_size()} tokens. Ask for that many or fewer, or give more text."
        )
    return tokenizer.to_str()


def corpus_texts(corpus: str) -> Iterator[str]:
    """Yields the texts a BPE learns from; of the embedded corpus, the training part only.

    Raises:
      ConfigError: the corpus is no readable UTF-8 text.
    """
    if corpus == "stdlib":
        from tokjax.data import stdlib_corpus

        for name, text in stdlib_corpus.documents():
            if stdlib_corpus.split_of(name) == "train":
                yield text
        return
    for path in _files(corpus):
        try:
            yield path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"tokenizer.corpus: cannot read {path} as UTF-8: {error}") from error


def corpus_identity(corpus: str) -> str:
    """Returns a hash of the content of a corpus.

    Raises:
      ConfigError: the corpus cannot be read.
    """
    if corpus == "stdlib":
        from tokjax.data import stdlib_corpus

        return stdlib_corpus.identity()
    digest = hashlib.sha256()
    for path in _files(corpus):
        try:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ConfigError(f"tokenizer.corpus: cannot read {path}: {error}") from error
    return digest.hexdigest()


def _files(corpus: str) -> list[Path]:
    path = Path(corpus).expanduser()
    if path.is_dir():
        found = sorted(path.rglob("*.txt"))
        if not found:
            raise ConfigError(f"tokenizer.corpus={corpus!r} is a folder without .txt files.")
        return found
    if not path.is_file():
        raise ConfigError(
            f"tokenizer.corpus={corpus!r} does not exist: give 'stdlib' (the text every Python "
            "installation has), a UTF-8 text file, or a folder of .txt files."
        )
    return [path]


def _seal(text: str) -> bytes:
    data = text.encode()
    return hashlib.sha256(data).hexdigest().encode() + b"\n" + data


def _sealed(content: bytes) -> bool:
    digest, _, data = content.partition(b"\n")
    return digest == hashlib.sha256(data).hexdigest().encode()
