"""Tokenizers described by a SentencePiece `.model` file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokjax.data.offsets import Offsets
from tokjax.data.tokenizer_base import Tokenizer, special_id
from tokjax.data.tokenizers import TokenizerConfig
from tokjax.errors import ConfigError

_FILE = "tokenizer.model"
_SPACE = "\u2581"  # how SentencePiece writes a space
# Protocol buffers merge when concatenated: this sets normalizer_spec.add_dummy_prefix = false.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; the space it puts before a text is taken away again on decoding.

    Ids are those of the SentencePiece library, except that a literal U+2581, which the library
    turns into a space, is encoded by its bytes where the model has byte fallback.
    """

    kind = "sentencepiece"

    def __init__(
        self,
        model: bytes,
        *,
        title: str,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
        chat_template: str | None = None,
        allow_lossy: bool = False,
    ):
        """Builds the tokenizer of a serialized model.

        Args:
          model: content of the `.model` file.
          title: how error messages call this tokenizer.
          bos: text of the begin token; None takes the model's.
          eos: text of the end token; None takes the model's.
          pad: text of the filling token; None takes the model's.
          chat_template: Jinja2 template.
          allow_lossy: encode also text that does not come back.

        Raises:
          ConfigError: the bytes are no SentencePiece model, or a named token is not in it.
        """
        self._model = model
        self._processor = _processor(model, title)
        self._bare: Any = None  # the processor that puts no space first, built when needed
        processor = self._processor
        size = processor.get_piece_size()
        pieces = [processor.id_to_piece(i) for i in range(size)]
        specials = {
            piece: i
            for i, piece in enumerate(pieces)
            if processor.is_control(i) or processor.is_unknown(i)
        }
        table = []
        self._byte_ids: dict[int, int] = {}
        for i, piece in enumerate(pieces):
            if processor.is_byte(i):
                self._byte_ids[int(piece[3:5], 16)] = i
                table.append(bytes([int(piece[3:5], 16)]))
            elif processor.is_control(i) or processor.is_unknown(i):
                table.append(b"")
            else:
                table.append(piece.replace(_SPACE, " ").encode())
        adds_space = processor.encode("a", out_type=str)[:1] != _bare_pieces(model, title)
        roles = dict(zip(("bos", "eos", "pad"), (bos, eos, pad), strict=True))
        ids = {role: special_id(specials, text, role) for role, text in roles.items()}
        own = {"bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id()}
        for role, token in own.items():
            if ids[role] is None and token >= 0:
                ids[role] = token
        self._set(
            title=title,
            identity=model,
            token_bytes=table,
            special_tokens=specials,
            bos_id=ids["bos"],
            eos_id=ids["eos"],
            pad_id=ids["pad"],
            chat_template=chat_template,
            allow_lossy=allow_lossy,
            prefix="every" if adds_space else "never",
        )
        self._probe()

    def _encode_raw(self, texts: Sequence[str], prefix: bool) -> list[list[int]]:
        processor = self._processor
        if not prefix and self._prefix != "never":
            if self._bare is None:
                self._bare = _processor(self._model + _NO_DUMMY_PREFIX, self.title)
            processor = self._bare
        encoded = processor.encode(list(texts))
        if len(self._byte_ids) == 256:
            for k, text in enumerate(texts):
                if _SPACE in text:
                    encoded[k] = self._with_literal_marks(text, prefix)
        return encoded

    def _with_literal_marks(self, text: str, prefix: bool) -> list[int]:
        mark = [self._byte_ids[byte] for byte in _SPACE.encode()]
        ids: list[int] = []
        for k, part in enumerate(text.split(_SPACE)):
            if k:
                ids += mark
            if part:
                ids += self._encode_raw([part], prefix and not ids)[0]
        return ids

    def _raw_offsets(self, text: str, prefix: bool) -> Offsets:
        ids = self._encode_raw([text], prefix)[0]
        processor = self._bare if not prefix and self._bare is not None else self._processor
        pieces = processor.encode(text, out_type="immutable_proto").pieces
        if [piece.id for piece in pieces] == ids:
            return [(piece.begin, piece.end) for piece in pieces]
        # Escaped text: the library never saw these ids, so spread them evenly over the text.
        count = len(ids)
        return [(k * len(text) // count, (k + 1) * len(text) // count) for k in range(count)]

    def _files(self) -> dict[str, bytes]:
        return {_FILE: self._model}

    @classmethod
    def _load(cls, directory: Path, metadata: Mapping[str, Any]) -> "SentencePieceTokenizer":
        return cls(
            (directory / _FILE).read_bytes(),
            title=metadata["title"],
            chat_template=metadata["chat_template"],
            allow_lossy=metadata["allow_lossy"],
            **metadata["roles"],
        )


def read_sentencepiece(config: TokenizerConfig) -> SentencePieceTokenizer:
    """Returns the tokenizer of the `.model` file at `config.path`.

    Raises:
      ConfigError: the file is missing or is no SentencePiece model.
    """
    path = Path(config.path or "").expanduser()
    if path.is_dir():
        models = sorted(p.name for p in path.glob("*.model"))
        hint = f" It holds {', '.join(models)}." if models else " It holds no .model file."
        raise ConfigError(f"tokenizer.path={config.path!r} is a folder; name the file.{hint}")
    try:
        model = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"tokenizer.path={config.path!r}: cannot read the SentencePiece model: {reason}."
        ) from error
    return SentencePieceTokenizer(
        model,
        title=f"the SentencePiece model {path}",
        bos=config.bos,
        eos=config.eos,
        pad=config.pad,
        allow_lossy=config.allow_lossy,
    )


def _processor(model: bytes, title: str) -> Any:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{title} cannot be read ({error}): fetch the file again.") from error


def _bare_pieces(model: bytes, title: str) -> list[str]:
    return _processor(model + _NO_DUMMY_PREFIX, title).encode("a", out_type=str)[:1]
