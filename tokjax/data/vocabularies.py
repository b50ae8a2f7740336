"""Any tokenizer as a seqio vocabulary. Importing this imports TensorFlow."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from tokjax.data.tokenizer_base import Tokenizer
from tokjax.errors import DataError


class SeqioVocabulary(seqio.Vocabulary):
    """A tokenizer for use as the vocabulary of a `seqio.Feature`.

    Two of them are equal when their tokenizers give the same ids. Decoding stops after the first
    EOS, as seqio's contract is; where BOS and EOS are one id, a leading one is BOS and does not
    stop it. The Python side of a dataset's graph runs the tokenizer, so such a graph cannot be
    saved and loaded elsewhere.
    """

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(extra_ids=0)
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer behind this vocabulary."""
        return self._tokenizer

    @property
    def bos_id(self) -> int | None:
        """The id that begins a sequence, or None."""
        return self._tokenizer.bos_id

    @property
    def eos_id(self) -> int | None:
        """The id that ends a sequence, or None."""
        return self._tokenizer.eos_id

    @property
    def pad_id(self) -> int:
        """The id used for filling."""
        return self._tokenizer.pad_id

    @property
    def unk_id(self) -> int | None:
        """None: nothing is unknown, text that cannot be encoded is an error."""
        return None

    @property
    def _base_vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    def _encode(self, s: str) -> Sequence[int]:
        return self._tokenizer.encode(s)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids up to the first EOS.

        Raises:
          DataError: an id is not in the vocabulary.
        """
        listed = np.asarray(ids if hasattr(ids, "__array__") else list(ids), np.int64).tolist()
        return self._tokenizer.decode(self._until_eos(listed))

    def _until_eos(self, ids: list[int]) -> list[int]:
        eos = self.eos_id
        leading = int(bool(ids) and ids[0] == eos == self.bos_id)
        return ids[: ids.index(eos, leading)] if eos in ids[leading:] else ids

    def _encode_tf(self, s: Any) -> Any:
        text = tf.convert_to_tensor(s, tf.string)
        if text.shape.rank == 0:
            ids = tf.numpy_function(self._encode_bytes, [text], tf.int32)
            return tf.ensure_shape(ids, [None])
        if text.shape.rank != 1:
            raise ValueError(
                f"can encode a string or a vector of strings, not rank {text.shape.rank}"
            )
        ids, lengths = tf.numpy_function(self._encode_many, [text], [tf.int32, tf.int64])
        return tf.RaggedTensor.from_row_lengths(  # type: ignore[attr-defined]
            tf.ensure_shape(ids, [None]), tf.ensure_shape(lengths, [None]), validate=False
        )

    def encode_tf(self, s: Any) -> Any:
        """Returns the ids of a string as Int32[n], of a vector of strings as a RaggedTensor.

        A text that is no UTF-8 or cannot be encoded ends the dataset with an error that holds the
        DataError's message.
        """
        return self._encode_tf(s)

    def _decode_tf(self, ids: Any) -> Any:
        tokens = tf.convert_to_tensor(ids)
        text = tf.numpy_function(self._decode_rows, [tokens], tf.string)
        return tf.ensure_shape(text, tokens.shape[:-1])

    def decode_tf(self, ids: Any) -> Any:
        """Returns the texts [...] of ids [..., n], each row read up to its first EOS."""
        if isinstance(ids, tf.RaggedTensor):
            return tf.map_fn(self._decode_tf, ids, fn_output_signature=tf.string)
        return self._decode_tf(ids)

    def _encode_bytes(self, text: Any) -> np.ndarray:
        scalar = np.asarray(text, object).item()  # bytes in a graph, an array when eager
        return np.asarray(self._tokenizer.encode(_utf8(scalar)), np.int32)

    def _encode_many(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        encoded = self._tokenizer.encode_batch([_utf8(text) for text in texts.tolist()])
        lengths = np.asarray([len(ids) for ids in encoded], np.int64)
        joined = [token for ids in encoded for token in ids]
        return np.asarray(joined, np.int32), lengths

    def _decode_rows(self, ids: np.ndarray) -> np.ndarray:
        rows = ids.reshape(-1, ids.shape[-1]) if ids.ndim > 1 else ids[None]
        texts = [self._tokenizer.decode(self._until_eos(row.tolist())).encode() for row in rows]
        return np.asarray(texts, dtype=object).reshape(ids.shape[:-1])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SeqioVocabulary):
            return NotImplemented
        return self._tokenizer.fingerprint == other._tokenizer.fingerprint

    def __hash__(self) -> int:
        return hash(self._tokenizer.fingerprint)

    def __str__(self) -> str:
        return f"SeqioVocabulary({self._tokenizer.title}, {self.vocab_size} ids)"


def _utf8(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"the text is no valid UTF-8: {error}") from error
