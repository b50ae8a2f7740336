"""Tokenizers described by a Hugging Face `tokenizer.json`."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokjax.data.offsets import Offsets
from tokjax.data.tokenizer_base import Tokenizer, special_id
from tokjax.data.tokenizers import TokenizerConfig
from tokjax.errors import ConfigError, DataError

_FILE = "tokenizer.json"
_SPACE = "\u2581"  # how SentencePiece-like vocabularies write a space
_ROLES = ("bos", "eos", "pad")


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` whose special tokens are never read out of plain text.

    Deviations from the `tokenizers` library, all towards `decode(encode(x)) == x`: no special
    tokens are added, truncation, padding and BPE dropout are off, and a literal U+2581, which
    these vocabularies would turn into a space, is encoded by its bytes.
    """

    kind = "huggingface"

    def __init__(
        self,
        spec: Mapping[str, Any],
        *,
        title: str,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
        chat_template: str | None = None,
        allow_lossy: bool = False,
    ):
        """Builds the tokenizer of a parsed `tokenizer.json`.

        Args:
          spec: the parsed file.
          title: how error messages call this tokenizer.
          bos: text of the begin token.
          eos: text of the end token.
          pad: text of the filling token.
          chat_template: Jinja2 template.
          allow_lossy: encode also text that does not come back.

        Raises:
          ConfigError: the description cannot be used, or a named token is not in it.
        """
        self._spec = _plain_text_spec(spec, [name for name in (bos, eos, pad) if name])
        self._backend = _backend(self._spec, title)
        self._bare: Any = None  # the backend that puts no space first, built when needed
        specials = {t["content"]: t["id"] for t in self._spec["added_tokens"] if t["special"]}
        self._byte_level = bool(_parts(self._spec, "ByteLevel"))
        self._byte_ids = _byte_ids(self._spec)
        self._fallback = not self._byte_level and len(self._byte_ids) == 256
        self._decodes_by_bytes = self._byte_level or self._fallback
        unknown = self._spec["model"].get("unk_token")
        self._set(
            title=title,
            identity=json.dumps(self._spec, sort_keys=True),
            token_bytes=self._table(specials),
            special_tokens=specials,
            bos_id=special_id(specials, bos, "bos"),
            eos_id=special_id(specials, eos, "eos"),
            pad_id=special_id(specials, pad, "pad"),
            chat_template=chat_template,
            allow_lossy=allow_lossy,
            prefix=_prefix(self._spec),
        )
        self._unread = frozenset(i for text, i in specials.items() if text != unknown)
        self._strip = {
            t["id"]: (bool(t.get("lstrip")), bool(t.get("rstrip")))
            for t in self._spec["added_tokens"]
            if t["special"]
        }
        self._probe()

    def _table(self, specials: Mapping[str, int]) -> list[bytes]:
        size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        table = [b""] * size
        added = {t["id"]: t["content"] for t in self._spec["added_tokens"]}
        special_ids = set(specials.values())
        alphabet = _byte_alphabet() if self._byte_level else {}
        metaspace = bool(_parts(self._spec, "Metaspace"))
        fallback = {i: bytes([byte]) for byte, i in self._byte_ids.items()}
        for token, i in self._backend.get_vocab(with_added_tokens=True).items():
            if i in special_ids:
                continue
            if i in added:
                table[i] = added[i].encode()
            elif self._byte_level and all(c in alphabet for c in token):
                table[i] = bytes(alphabet[c] for c in token)
            elif self._fallback or metaspace:
                table[i] = fallback.get(i) or token.replace(_SPACE, " ").encode()
            else:
                table[i] = self._backend.decode([i], skip_special_tokens=False).encode()
        return table

    @property
    def decodes_by_bytes(self) -> bool:
        """Whether the text of ids is that of their bytes one behind the other."""
        return self._decodes_by_bytes

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of the ids; special ones give nothing, broken UTF-8 gives U+FFFD.

        Raises:
          DataError: an id is not in the vocabulary.
        """
        if self._decodes_by_bytes:
            return super().decode(ids)
        for i in ids:
            self.token_bytes(int(i))
        return self._restored(ids, True)

    def _restored(self, ids: Sequence[int], prefix: bool) -> str:
        if self._decodes_by_bytes:
            return super()._restored(ids, prefix)
        special_ids = self._special_text
        # Decoders of WordPiece and the like join words by rules: only the library knows them.
        return self._backend.decode([int(i) for i in ids if i not in special_ids])

    def _encode_raw(self, texts: Sequence[str], prefix: bool) -> list[list[int]]:
        encoded = self._encode_plain(texts, prefix)
        for k, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
            if self._fallback and _SPACE in text:
                encoded[k] = self._with_literal_marks(text, prefix)
            elif not self._unread.isdisjoint(ids):
                encoded[k] = self._without_specials(text, prefix)
        return encoded

    def _encode_plain(self, texts: Sequence[str], prefix: bool) -> list[list[int]]:
        backend = self._backend
        if not prefix and self._prefix != "never":
            if self._bare is None:
                self._bare = _backend(_without_prefix(self._spec), self.title)
            backend = self._bare
        if len(texts) == 1:
            return [backend.encode(texts[0], add_special_tokens=False).ids]
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _with_literal_marks(self, text: str, prefix: bool) -> list[int]:
        mark = [self._byte_ids[byte] for byte in _SPACE.encode()]
        ids: list[int] = []
        for k, part in enumerate(text.split(_SPACE)):
            if k:
                ids += mark
            if part:
                ids += self._encode_raw([part], prefix and not ids)[0]
        return ids

    def _without_specials(self, text: str, prefix: bool) -> list[int]:
        """Returns ids of a text in which the model itself, not its list, found special tokens.

        Unigram and word-level models hold special tokens among their pieces. Cutting each spelled
        out special token after its first character keeps them from being found.
        """
        ids: list[int] = []
        last = 0
        cuts = [start + 1 for start, end, _ in self.find_specials(text) if end - start > 1]
        for cut in [*cuts, len(text)]:
            if last < cut:
                ids += self._encode_plain([text[last:cut]], prefix and last == 0)[0]
            last = cut
        if not self._unread.isdisjoint(ids):
            found = self._special_text[next(i for i in ids if i in self._unread)]
            raise DataError(f"{self.title} cannot read {found!r} in a text as plain text.")
        return ids

    def _raw_offsets(self, text: str, prefix: bool) -> Offsets:
        backend = self._bare if not prefix and self._bare is not None else self._backend
        encoding = backend.encode(text, add_special_tokens=False)
        expected = self._encode_raw([text], prefix)[0]
        if encoding.ids == expected:
            return encoding.offsets
        # Escaped text: the library never saw these ids, so spread them evenly over the text.
        count = len(expected)
        return [(k * len(text) // count, (k + 1) * len(text) // count) for k in range(count)]

    def _files(self) -> dict[str, bytes]:
        return {_FILE: json.dumps(self._spec, ensure_ascii=False).encode()}

    @classmethod
    def _load(cls, directory: Path, metadata: Mapping[str, Any]) -> "HuggingFaceTokenizer":
        return cls(
            json.loads((directory / _FILE).read_bytes()),
            title=metadata["title"],
            chat_template=metadata["chat_template"],
            allow_lossy=metadata["allow_lossy"],
            **metadata["roles"],
        )


def read_huggingface(config: TokenizerConfig) -> HuggingFaceTokenizer:
    """Returns the tokenizer at `config.path`, a `tokenizer.json` or the folder that holds one.

    Files beside it (tokenizer_config.json, special_tokens_map.json, chat_template.jinja) name the
    begin, end and filling tokens and the chat template; `config.bos`, `eos`, `pad` go first.

    Raises:
      ConfigError: the path is missing or what is there is no such tokenizer.
    """
    path = Path(config.path or "").expanduser()
    folder = path if path.is_dir() else path.parent
    file = path / _FILE if path.is_dir() else path
    if not file.is_file():
        there = sorted(p.name for p in folder.iterdir())[:12] if folder.is_dir() else []
        listed = f" That folder holds: {', '.join(there)}." if there else ""
        models = [name for name in there if name.endswith(".model")]
        remedy = (
            f" For {models[0]} use tokenizer.name='sentencepiece' with its path." if models else ""
        )
        raise ConfigError(
            f"tokenizer.path={config.path!r}: no file {file}. Give a local tokenizer.json or the "
            f"folder that holds it (names on a model hub must be downloaded first).{listed}{remedy}"
        )
    settings = _settings(folder)
    roles = {role: getattr(config, role) or settings.get(role) for role in _ROLES}
    return HuggingFaceTokenizer(
        _read_json(file),
        title=f"the tokenizer {file}",
        chat_template=settings.get("chat_template"),
        allow_lossy=config.allow_lossy,
        **roles,
    )


def _settings(folder: Path) -> dict[str, str | None]:
    settings: dict[str, str | None] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the latter wins
        path = folder / name
        values = _read_json(path) if path.is_file() else {}
        for role in _ROLES:
            value = values.get(f"{role}_token")
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str) and text:
                settings[role] = text
        template = values.get("chat_template")
        if isinstance(template, list):  # several named ones
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        if isinstance(template, str):
            settings["chat_template"] = template
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            settings["chat_template"] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the chat template {path}: {error}") from error
    return settings


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}. Fetch it again.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__}, not an object.")
    return value


def _plain_text_spec(spec: Mapping[str, Any], named: Sequence[str]) -> dict[str, Any]:
    """Returns the description without what changes ids between calls, its named tokens special."""
    spec = copy.deepcopy(dict(spec))
    if not isinstance(spec.get("model"), dict):
        raise ConfigError("the tokenizer.json has no section 'model': it is not a tokenizer's.")
    # Truncation would drop text, dropout make it random; special tokens are added elsewhere.
    spec.update(truncation=None, padding=None, post_processor=None)
    if "dropout" in spec["model"]:
        spec["model"]["dropout"] = None
    spec["added_tokens"] = list(spec.get("added_tokens") or [])
    try:
        added = {token["content"]: token for token in spec["added_tokens"]}
        for token in spec["added_tokens"]:
            token.setdefault("special", False)
    except (TypeError, KeyError, AttributeError) as error:
        raise ConfigError("the tokenizer.json has a malformed entry in added_tokens.") from error
    vocabulary = spec["model"].get("vocab")
    if isinstance(vocabulary, list):  # unigram models: [text, score] by id
        vocabulary = {row[0]: i for i, row in enumerate(vocabulary)}
    for name in named:
        if name in added:
            added[name]["special"] = True
        elif vocabulary and name in vocabulary:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            entry = {"id": vocabulary[name], "content": name, "special": True, **flags}
            spec["added_tokens"].append(entry)
    spec["added_tokens"].sort(key=lambda token: token["id"])
    return spec


def _backend(spec: Mapping[str, Any], title: str) -> Any:
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_str(json.dumps(spec))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(
            f"{title} is no usable tokenizer.json: {error}. Fetch it again."
        ) from error
    backend.encode_special_tokens = True  # a special token spelled out in a text stays text
    return backend


def _parts(spec: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    """Returns the normalizers and pre-tokenizers of a kind, those inside sequences included."""
    found = []
    todo = [spec.get("normalizer"), spec.get("pre_tokenizer")]
    while todo:
        part = todo.pop()
        if isinstance(part, dict):
            todo += part.get("normalizers") or part.get("pretokenizers") or []
            if part.get("type") == kind:
                found.append(part)
    return found


def _scheme(metaspace: Mapping[str, Any]) -> str:
    old = "always" if metaspace.get("add_prefix_space", True) else "never"
    return metaspace.get("prepend_scheme") or old


def _prefix(spec: Mapping[str, Any]) -> str:
    schemes = {_scheme(part) for part in _parts(spec, "Metaspace")}
    every = any(part.get("add_prefix_space", True) for part in _parts(spec, "ByteLevel"))
    if every or _parts(spec, "Prepend") or "always" in schemes:
        return "every"
    return "first" if "first" in schemes else "never"


def _without_prefix(spec: Mapping[str, Any]) -> dict[str, Any]:
    bare = copy.deepcopy(dict(spec))
    for part in _parts(bare, "Metaspace"):
        part.update(prepend_scheme="never", add_prefix_space=False)
    for part in _parts(bare, "ByteLevel"):
        part["add_prefix_space"] = False
    for part in _parts(bare, "Prepend"):
        part["prepend"] = ""
    return bare


def _byte_ids(spec: Mapping[str, Any]) -> dict[int, int]:
    """Returns the id of each byte in a vocabulary that spells unknown characters by bytes."""
    model = spec["model"]
    if not model.get("byte_fallback"):
        return {}
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, list):
        vocabulary = {row[0]: i for i, row in enumerate(vocabulary)}
    names = {byte: f"<0x{byte:02X}>" for byte in range(256)}
    return {byte: vocabulary[name] for byte, name in names.items() if name in vocabulary}


def _byte_alphabet() -> dict[str, int]:
    """Returns the byte each printable character of a byte-level vocabulary stands for.

    Printable bytes of Latin-1 stand for themselves; the others take the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return alphabet | {chr(0x100 + k): byte for k, byte in enumerate(others)}
