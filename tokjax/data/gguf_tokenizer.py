"""The tokenizer inside a GGUF file, as a `tokenizer.json`.

Two kinds: `gpt2`, byte-level BPE with a list of merges, and `llama`, SentencePiece's BPE, whose
merges follow from the scores of its pieces.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokjax.data.huggingface_tokenizer import HuggingFaceTokenizer
from tokjax.data.tokenizers import TokenizerConfig
from tokjax.errors import CheckpointError, ConfigError, nearest
from tokjax.gguf_file import GGUFFile, read_gguf

_SPACE = "\u2581"  # how SentencePiece writes a space
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # kinds of pieces
_ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}|"
    r" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2, _LLAMA3 = _WORDS.format(numbers=r"\p{N}"), _WORDS.format(numbers=r"\p{N}{1,3}")
# What cuts a text into words, by the name that files give it: patterns one after the other.
_PATTERNS: Mapping[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    **dict.fromkeys(("gpt-2", "gpt2", "phi-2", "mpt", "olmo"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), (_QWEN2,)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), (_LLAMA3,)),
}
_IGNORES_MERGES = ("llama-bpe", "llama3", "llama-v3")  # a word that is a token stays whole


def read_gguf_tokenizer(
    source: Path | GGUFFile, config: TokenizerConfig | None = None
) -> HuggingFaceTokenizer:
    """Returns the tokenizer of a GGUF file.

    Its ids are those of the runtime that the format comes from: texts are not normalised, and
    user-defined tokens are found in a text wherever they are spelled out.

    Args:
        source: the file.
        config: `bos`, `eos` and `pad` go before those that the file names; and `allow_lossy`.

    Raises:
        CheckpointError: the file is missing or damaged.
        ConfigError: it has no tokenizer, or one of a kind that is not known.
    """
    file = source if isinstance(source, GGUFFile) else read_gguf(source)
    config = config or TokenizerConfig(name="gguf", path=str(file.path))
    roles = {role: getattr(config, role) or _role(file, role) for role in ("bos", "eos", "pad")}
    return HuggingFaceTokenizer(
        tokenizer_spec(file),
        title=f"the tokenizer of {file.path}",
        chat_template=file.get("tokenizer.chat_template", str, None),
        allow_lossy=config.allow_lossy,
        **roles,
    )


def adds_bos(file: GGUFFile) -> bool:
    """Returns whether the file's model expects the BOS token before every text."""
    kind, pre = file.get("tokenizer.ggml.model", str, ""), file.get("tokenizer.ggml.pre", str, "")
    # What holds without the key is the runtime's rule.
    usual = kind == "llama" or pre in _IGNORES_MERGES
    return file.get("tokenizer.ggml.add_bos_token", bool, usual)


def tokenizer_spec(file: GGUFFile) -> dict[str, Any]:
    """Returns the `tokenizer.json` of the tokenizer in a file.

    Raises:
        ConfigError: there is none, or one of a kind that is not known.
        CheckpointError: its lists do not fit together.
    """
    kind = file.get("tokenizer.ggml.model", str)
    tokens = file.get("tokenizer.ggml.tokens", list)
    types = file.get("tokenizer.ggml.token_type", list, [1] * len(tokens))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(types) != len(tokens) or len(vocabulary) != len(tokens):
        raise CheckpointError(
            f"{file.path}: the vocabulary is damaged: {len(tokens)} tokens, {len(vocabulary)} "
            f"different ones, {len(types)} kinds"
        )
    if kind == "gpt2":
        parts = _byte_level(file, vocabulary)
    elif kind == "llama":
        parts = _sentencepiece(file, tokens, types, vocabulary)
    else:
        raise ConfigError(
            f"{file.path} has a tokenizer of the kind {kind!r}.{nearest(kind, ('gpt2', 'llama'))}"
        )
    return {"version": "1.0", "added_tokens": _added(file, tokens, types)} | parts


def _added(file: GGUFFile, tokens: Sequence[str], types: Sequence[int]) -> list[dict[str, Any]]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = {_id(file, role) for role in _ROLES}
    found = []
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        is_special = kind in (_CONTROL, _UNKNOWN) or i in special
        # One with this mark stands for spaces, and comes of merges.
        if token and (is_special or (kind == _USER_DEFINED and _SPACE not in token)):
            found.append({"id": i, "content": token, "special": is_special, **flags})
    return found


def _byte_level(file: GGUFFile, vocabulary: Mapping[str, int]) -> dict[str, Any]:
    name = file.get("tokenizer.ggml.pre", str, "default")
    if name not in _PATTERNS:
        raise ConfigError(
            f"{file.path} has a tokenizer that cuts words in the way {name!r}."
            f"{nearest(name, _PATTERNS)}"
        )
    merges = [merge.split(" ", 1) for merge in file.get("tokenizer.ggml.merges", list)]
    unknown = next((m for m in merges if len(m) < 2 or "".join(m) not in vocabulary), None)
    if unknown is not None:
        raise CheckpointError(
            f"{file.path}: the vocabulary is damaged: it lacks {''.join(unknown)!r}, which its "
            f"merges make"
        )
    cuts = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in _PATTERNS[name]
    ]
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*cuts, bytes_ | {"use_regex": False}],
        },
        "post_processor": None,
        "decoder": bytes_ | {"use_regex": True},
        "model": _bpe(vocabulary, merges, ignore_merges=name in _IGNORES_MERGES),
    }


def _sentencepiece(
    file: GGUFFile, tokens: Sequence[str], types: Sequence[int], vocabulary: Mapping[str, int]
) -> dict[str, Any]:
    scores = file.get("tokenizer.ggml.scores", list)
    if len(scores) != len(tokens):
        raise CheckpointError(
            f"{file.path}: the vocabulary is damaged: {len(tokens)} tokens, {len(scores)} scores"
        )
    # Special tokens and bytes do not come of merges.
    plain = {
        token: i for i, token in enumerate(tokens) if types[i] not in (_UNKNOWN, _CONTROL, _BYTE)
    }
    merges = _merges(plain, scores)
    to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    from_mark = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    decoders = [from_mark, {"type": "ByteFallback"}, {"type": "Fuse"}]
    normalizer: dict[str, Any] = to_mark
    if file.get("tokenizer.ggml.add_space_prefix", bool, True):
        first = {"type": "Prepend", "prepend": _SPACE}
        normalizer = {"type": "Sequence", "normalizers": [first, to_mark]}
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = _role(file, "unk")
    if unknown is None and _UNKNOWN in types:
        unknown = tokens[types.index(_UNKNOWN)]
    return {
        "normalizer": normalizer,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(vocabulary, merges, unk_token=unknown, byte_fallback=True, fuse_unk=True),
    }


def _bpe(vocabulary: Mapping[str, int], merges: list[list[str]], **changes: Any) -> dict[str, Any]:
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return model | changes | {"vocab": dict(vocabulary), "merges": merges}


def _merges(pieces: Mapping[str, int], scores: Sequence[float]) -> list[list[str]]:
    """Returns every pair of pieces that makes a third one, the best first.

    SentencePiece joins the pair whose piece has the highest score.
    """
    found = []
    for piece, i in pieces.items():
        pairs = [
            (pieces[piece[:cut]], pieces[piece[cut:]])
            for cut in range(1, len(piece))
            if piece[:cut] in pieces and piece[cut:] in pieces
        ]
        found += [(-scores[i], i, *pair) for pair in sorted(pairs)]
    found.sort(key=lambda merge: merge[:2])
    names = {i: piece for piece, i in pieces.items()}
    return [[names[left], names[right]] for _, _, left, right in found]


def _id(file: GGUFFile, role: str) -> int | None:
    return file.get(f"tokenizer.ggml.{_ROLES[role]}_token_id", int, None)


def _role(file: GGUFFile, role: str) -> str | None:
    """Returns the text of the token with a role."""
    found, tokens = _id(file, role), file.get("tokenizer.ggml.tokens", list)
    if found is not None and not 0 <= found < len(tokens):
        raise CheckpointError(
            f"{file.path}: the {_ROLES[role]} token {found} is not in the vocabulary of "
            f"{len(tokens)}"
        )
    return None if found is None else tokens[found]
