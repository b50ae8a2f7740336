"""The tokenizer every part of tokjax speaks to: text to ids and back, without loss.

`decode(encode(text)) == text` for every text, or `encode` raises. Nothing here imports TensorFlow.
"""

import abc
import copy
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from tokjax.data.cache import write_file_atomically
from tokjax.data.offsets import Offsets, monotone, offsets_from_bytes
from tokjax.errors import ConfigError, DataError, nearest

_METADATA = "tokjax_tokenizer.json"
_FORMAT = 1


class Tokenizer(abc.ABC):
    """Text to ids and back, by way of the bytes each id stands for.

    Subclasses call `_set` once and define `_encode_raw`; ids of special tokens stand for no bytes.

    Attributes:
      vocab_size: number of ids, special ones and holes included.
      bos_id: id that begins a sequence, or None.
      eos_id: id that ends a sequence, or None.
      pad_id: id used for filling; it may equal another id, and nothing is inferred from it.
      special_tokens: id of each special token by its text.
      chat_template: Jinja2 template that came with the tokenizer, or None.
      fingerprint: SHA-256 (hex) of everything that determines the ids of a text.
      allow_lossy: whether text that does not come back exactly is encoded all the same.
      lossless: whether every probed text comes back exactly.
      lossy_reason: what does not come back; empty for a lossless tokenizer.
      title: how error messages call this tokenizer.
    """

    kind: ClassVar[str] = ""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    special_tokens: Mapping[str, int]
    chat_template: str | None
    fingerprint: str
    allow_lossy: bool
    lossless: bool
    lossy_reason: str
    title: str

    def _set(
        self,
        *,
        title: str,
        identity: str | bytes,
        token_bytes: Sequence[bytes],
        special_tokens: Mapping[str, int],
        bos_id: int | None,
        eos_id: int | None,
        pad_id: int | None,
        chat_template: str | None = None,
        allow_lossy: bool = False,
        prefix: str = "never",
    ) -> None:
        """Fills in the attributes.

        Args:
          title: how error messages call this tokenizer.
          identity: what determines the ids; hashed into the fingerprint.
          token_bytes: the bytes of each id, b"" for special ones.
          special_tokens: id of each special token by its text.
          bos_id: id that begins a sequence, or None.
          eos_id: id that ends a sequence, or None.
          pad_id: id for filling; None takes `eos_id`, else 0.
          chat_template: Jinja2 template, or None.
          allow_lossy: encode also text that does not come back.
          prefix: where encoding puts a space before the text that decoding takes away again:
            "never", "first" (at the start of a text), "every" (also after each special token).
        """
        self.title = title
        self.vocab_size = len(token_bytes)
        self.special_tokens = dict(special_tokens)
        self.bos_id, self.eos_id = bos_id, eos_id
        self.pad_id = pad_id if pad_id is not None else eos_id if eos_id is not None else 0
        self.chat_template = chat_template
        self.allow_lossy = allow_lossy
        self._token_bytes = list(token_bytes)
        self._special_text: dict[int | None, str] = {
            i: text for text, i in self.special_tokens.items()
        }
        self._prefix = prefix
        self._strip: dict[int, tuple[bool, bool]] = {}
        self._added: tuple[str, ...] = ()
        self._special_pattern = _pattern(self.special_tokens)
        ids = json.dumps([self.kind, _FORMAT, self.bos_id, self.eos_id, self.pad_id]).encode()
        content = identity.encode() if isinstance(identity, str) else identity
        self.fingerprint = hashlib.sha256(ids + b"\n" + content).hexdigest()
        self.lossless, self.lossy_reason = True, ""

    def with_added(self, texts: Sequence[str]) -> "Tokenizer":
        """Returns this tokenizer with more special tokens, whose ids come behind all others.

        All other ids stay as they are, and so does what every text is encoded to.

        Raises:
          ConfigError: a text is empty, occurs twice, or is a special token already.
        """
        for number, text in enumerate(texts):
            if not text or text in self.special_tokens or text in texts[:number]:
                raise ConfigError(
                    f"tokenizer.added={list(texts)} must name new special tokens of {self.title}, "
                    f"each once: {text!r} cannot be added"
                )
        if not texts:
            return self
        grown = copy.copy(self)
        ids = {text: self.vocab_size + i for i, text in enumerate(texts)}
        grown.special_tokens = {**self.special_tokens, **ids}
        grown.vocab_size = self.vocab_size + len(texts)
        grown._token_bytes = [*self._token_bytes, *[b""] * len(texts)]
        grown._special_text = {i: text for text, i in grown.special_tokens.items()}
        grown._special_pattern = _pattern(grown.special_tokens)
        grown._added = (*self._added, *texts)
        for text in texts:
            told = json.dumps([grown.fingerprint, text]).encode()
            grown.fingerprint = hashlib.sha256(told).hexdigest()
        return grown

    @abc.abstractmethod
    def _encode_raw(self, texts: Sequence[str], prefix: bool) -> list[list[int]]:
        """Returns the ids of each text, with the tokenizer's leading space only if `prefix`."""

    def _raw_offsets(self, text: str, prefix: bool) -> Offsets:
        """Returns the backend's own ranges: used where the bytes of the tokens are not the text."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, none of them special, whatever the text contains.

        Raises:
          DataError: the text is no valid Unicode, or this tokenizer would alter it and
            `allow_lossy` is off.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text; faster than one by one.

        Raises:
          DataError: as `encode`, for the first text that cannot be encoded.
        """
        return self._checked(texts, self._prefix != "never")

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """Returns the ids and for each the range [start, end) of characters of `text` it touches.

        A character made of several tokens is in the range of each of them. Otherwise ranges do not
        overlap; they are monotone and cover the text (where a lossy tokenizer drops characters,
        they do not).

        Raises:
          DataError: as `encode`.
        """
        return self._piece_with_offsets(text, self._prefix != "never")

    def encode_parts(
        self, text: str, specials: Sequence[tuple[int, int, int]]
    ) -> tuple[list[int], Offsets]:
        """Returns ids and character ranges of a text some parts of which are special tokens.

        Args:
          text: the text.
          specials: `(start, end, id)` of the parts to be read as special tokens, in order and
            without overlap; everything else is plain text even if it reads like a special token.
            Blanks beside a special token that is declared to take them get no id and no range.

        Raises:
          DataError: as `encode`.
        """
        ids: list[int] = []
        offsets: Offsets = []
        position = 0
        for start, end, token in [*specials, (len(text), len(text), -1)]:
            takes_before, takes_after = self._strip.get(token, (False, False))
            piece = text[position:start]
            if takes_before:
                piece = piece.rstrip()
            if piece:
                prefix = self._prefix == "every" or (self._prefix == "first" and position == 0)
                found, ranges = self._piece_with_offsets(piece, prefix)
                ids += found
                offsets += [(a + position, b + position) for a, b in ranges]
            if token >= 0:
                ids.append(token)
                offsets.append((start, end))
            position = end
            if takes_after:
                rest = text[end:]
                position += len(rest) - len(rest.lstrip())
        return ids, offsets

    def find_specials(self, text: str) -> list[tuple[int, int, int]]:
        """Returns `(start, end, id)` of every special token spelled out in `text`, in order."""
        if self._special_pattern is None:
            return []
        return [
            (match.start(), match.end(), self.special_tokens[match.group()])
            for match in self._special_pattern.finditer(text)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of the ids; special ones give nothing, broken UTF-8 gives U+FFFD.

        The ids are taken for a whole text: where the tokenizer puts a space before one, the first
        space is dropped. The text of a continuation is what decoding prompt and continuation
        together adds to the text of the prompt.

        Raises:
          DataError: an id is not in the vocabulary.
        """
        return b"".join(self._pieces(ids, self._prefix != "never")).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes a token stands for inside a text; b"" for special tokens.

        Raises:
          DataError: the id is not in the vocabulary.
        """
        if not 0 <= token_id < self.vocab_size:
            raise DataError(
                f"token id {token_id} is not in the vocabulary of {self.title}, whose ids are 0 to "
                f"{self.vocab_size - 1}: was the text made with another tokenizer?"
            )
        return self._token_bytes[token_id]

    def token_text(self, token_id: int) -> str:
        r"""Returns a readable form of a token: special ones by name, odd bytes as \xNN.

        Raises:
          DataError: the id is not in the vocabulary.
        """
        data = self.token_bytes(token_id)
        if not data:
            return self._special_text.get(token_id, f"<id {token_id}>")
        return data.decode("utf-8", "backslashreplace")

    @property
    def decodes_by_bytes(self) -> bool:
        """Whether the text of ids is that of their bytes one behind the other."""
        return True

    def save(self, directory: Path) -> None:
        """Writes all that `Tokenizer.load` needs into `directory`.

        Raises:
          StorageError: the directory cannot be written.
        """
        for name, data in self._files().items():
            write_file_atomically(Path(directory) / name, data)
        metadata = {
            "format": _FORMAT,
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "title": self.title,
            "roles": {
                "bos": self._special_text.get(self.bos_id),
                "eos": self._special_text.get(self.eos_id),
                "pad": self._special_text.get(self.pad_id),
            },
            "allow_lossy": self.allow_lossy,
            "chat_template": self.chat_template,
            "added": list(self._added),
        }
        # Last: a folder with this file in it is complete.
        text = json.dumps(metadata, indent=2, ensure_ascii=False) + "\n"
        write_file_atomically(Path(directory) / _METADATA, text.encode())

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Returns the tokenizer saved in `directory`.

        Raises:
          DataError: there is none, or its files are damaged.
        """
        path = Path(directory) / _METADATA
        try:
            metadata = json.loads(path.read_bytes())
            kind, fingerprint = metadata["kind"], metadata["fingerprint"]
            if metadata["format"] != _FORMAT:
                raise DataError(
                    f"{path} has format {metadata['format']}, this version reads {_FORMAT}: "
                    "load it with the tokjax that saved it."
                )
            tokenizer = _class_of(kind)._load(Path(directory), metadata)
            tokenizer = tokenizer.with_added(metadata.get("added", ()))
        except OSError as error:
            raise DataError(f"no saved tokenizer in {directory}: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"the saved tokenizer in {directory} is damaged: {error!r}") from error
        if tokenizer.fingerprint != fingerprint:
            raise DataError(
                f"the saved tokenizer in {directory} is damaged: its files do not have the "
                f"fingerprint {fingerprint[:16]} written in {path.name}. Restore the folder."
            )
        return tokenizer

    def _files(self) -> dict[str, bytes]:
        return {}

    @classmethod
    def _load(cls, directory: Path, metadata: Mapping[str, Any]) -> "Tokenizer":
        raise NotImplementedError

    def _pieces(self, ids: Sequence[int], prefix: bool) -> list[bytes]:
        """Returns the bytes of each id, without the leading space encoding put there."""
        table = self._token_bytes
        try:
            if len(ids) and min(ids) < 0:
                raise IndexError
            pieces = [table[i] for i in ids]
        except IndexError:
            for i in ids:
                self.token_bytes(int(i))
            raise
        if prefix:
            for k, piece in enumerate(pieces):
                if piece:
                    pieces[k] = piece.removeprefix(b" ")
                    break
        return pieces

    def _restored(self, ids: Sequence[int], prefix: bool) -> str:
        return b"".join(self._pieces(ids, prefix)).decode("utf-8", "replace")

    def _checked(self, texts: Sequence[str], prefix: bool) -> list[list[int]]:
        for text in texts:
            if not text.isascii():
                _require_unicode(text)
        encoded = self._encode_raw(texts, prefix)
        if not self.allow_lossy:
            for text, ids in zip(texts, encoded, strict=True):
                restored = self._restored(ids, prefix)
                if restored != text:
                    raise DataError(self._difference(text, restored))
        return encoded

    def _piece_with_offsets(self, text: str, prefix: bool) -> tuple[list[int], Offsets]:
        ids = self._checked([text], prefix)[0]
        pieces = self._pieces(ids, prefix)
        if b"".join(pieces) == text.encode():
            return ids, offsets_from_bytes(text, pieces)
        return ids, monotone(self._raw_offsets(text, prefix))

    def _difference(self, text: str, restored: str) -> str:
        pairs = zip(text, restored, strict=False)
        at = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(text), len(restored)))
        around = slice(max(0, at - 8), at + 8)
        return (
            f"{self.title} cannot hold this text exactly: at character {at}, {text[around]!r} "
            f"comes back as {restored[around]!r}. Change the text, choose another tokenizer, or "
            "set tokenizer.allow_lossy=True to take what it keeps."
        )

    def _probe(self) -> None:
        """Sets `lossless` and `lossy_reason` from what becomes of texts known to be difficult."""
        from tokjax.data.probes import probes

        texts = probes(self.special_tokens)
        prefix = self._prefix != "never"
        try:
            encoded = self._encode_raw(texts, prefix)
        except DataError as error:
            self.lossless, self.lossy_reason = False, str(error)
            return
        for text, ids in zip(texts, encoded, strict=True):
            restored = self._restored(ids, prefix)
            if restored != text:
                self.lossless = False
                self.lossy_reason = f"{text!r} comes back as {restored!r}"
                return


def _pattern(special_tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Returns what finds special tokens in a text, the longest first."""
    longest_first = sorted((t for t in special_tokens if t), key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first))
    return re.compile(pattern) if pattern else None


def special_id(special_tokens: Mapping[str, int], text: str | None, role: str) -> int | None:
    """Returns the id of the special token `text`, None for None.

    Raises:
      ConfigError: there is no such special token.
    """
    if text is None:
        return None
    if text not in special_tokens:
        raise ConfigError(
            f"tokenizer.{role}={text!r} is no special token of this tokenizer."
            f"{nearest(text, special_tokens)}"
        )
    return special_tokens[text]


def _require_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text is no valid Unicode: character {error.start} is the lone surrogate "
            f"U+{ord(text[error.start]):04X}. Read the file as UTF-8 and drop or replace it."
        ) from error


def _class_of(kind: str) -> type[Tokenizer]:
    if kind == "bytes":
        from tokjax.data.byte_tokenizer import ByteTokenizer

        return ByteTokenizer
    if kind == "words":
        from tokjax.data.word_tokenizer import WordTokenizer

        return WordTokenizer
    if kind == "sentencepiece":
        from tokjax.data.sentencepiece_tokenizer import SentencePieceTokenizer

        return SentencePieceTokenizer
    if kind == "huggingface":
        from tokjax.data.huggingface_tokenizer import HuggingFaceTokenizer

        return HuggingFaceTokenizer
    raise ValueError(f"unknown kind {kind!r}")
