"""Where examples come from: the choices of a `source` in a configuration.

A source says what its records are; `read_documents` turns them into documents, one at a time, and
says where each came from. A record that cannot be used becomes a `Problem` in its place, so that
the caller decides whether that is fatal. Only a `tfds` or `seqio` source needs TensorFlow.
"""

import hashlib
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tokjax.config.schema import register, registered_name
from tokjax.data.rankings import PASSAGE_TOKENS, QUERY_TOKENS, Limits, Ranking
from tokjax.data.thinking import Insertion, Thinking
from tokjax.errors import ConfigError

RecordKind = Literal[
    "text", "response", "messages", "rated", "preference", "ranking", "translation", "reasoned"
]
StdlibPart = Literal["topics", "docstrings", "sources"]


@dataclass(frozen=True)
class Document:
    """One record, ready to be tokenised.

    Attributes:
      name: where it came from, for people: "file.jsonl:12".
      key: 16 hexadecimal digits; see `make_key`.
      text: its text; "" when it is a chat, whose text is rendered with the tokenizer at hand.
      weights: (start, end, weight) of character ranges of `text`, later ones over earlier ones,
        0 where there is none; None: 1 throughout.
      messages: the chat, each message with "role", "content" and perhaps "weight", or None.
      end_weight: weight of the end token, where `weights` are given.
      explicit_key: whether `key` was made from an id that the record carries.
      rejected: of a pair, the answer that is not wanted; its weights are negated later.
      by_token: (start, end, weights): a weight of each token that ends within these characters.
      ranking: a query with its passages, which are then all that counts; `text` is "".
      translation: of a pair of translations, the second text; `text` is the first.
      insertion: thinking tokens that go into a text with weights.
    """

    name: str
    key: str
    text: str
    weights: tuple[tuple[int, int, float], ...] | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    end_weight: float = 1.0
    explicit_key: bool = False
    rejected: "Document | None" = None
    by_token: tuple[int, int, tuple[float, ...]] | None = None
    ranking: Ranking | None = None
    translation: str | None = None
    insertion: Insertion | None = None


@dataclass(frozen=True)
class Problem:
    """A record that cannot be used.

    Attributes:
      name: where it is.
      reason: what is wrong, in words that many records share.
      detail: what exactly is wrong with this one.
    """

    name: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.name, self.reason, self.detail) if part)


@register("source", "stdlib")
@dataclass(frozen=True)
class StdlibSource:
    """The text that every Python installation has: no download, no files."""

    # which parts: documentation topics, docstrings, sources
    parts: tuple[StdlibPart, ...] = ("topics", "docstrings", "sources")
    split: Literal["train", "validation", "all"] = "train"  # documents are split by module
    validation_share: float = 0.02  # part of the modules that is held out, 0 to 1

    def __post_init__(self):
        if not self.parts:
            raise ConfigError(f"parts is empty; name some of {', '.join(get_args(StdlibPart))}")
        if not 0 <= self.validation_share <= 1:
            raise ConfigError(
                f"validation_share is {self.validation_share}; it must lie within 0 and 1"
            )


@dataclass(frozen=True, kw_only=True)
class FileSource:
    """Files, compressed by gzip if their name ends in .gz."""

    files: tuple[str, ...]  # paths or glob patterns, ** for any depth

    def __post_init__(self):
        if not self.files or not all(self.files):
            raise ConfigError("files is empty; name at least one file or glob pattern")


@register("source", "text")
@dataclass(frozen=True, kw_only=True)
class TextSource(FileSource):
    """UTF-8 text files."""

    # what one document is: a file, a line, or lines up to a blank one
    per: Literal["file", "line", "paragraph"] = "file"


@dataclass(frozen=True, kw_only=True)
class RecordSource:
    """Records with named fields, and which of them make an example."""

    # what a record is: plain text (every token counts); a prompt with a response, or a chat (only
    # responses and assistant turns count); a prompt with a response that is good or bad (weights of
    # bad ones are negative); a prompt with a chosen and a rejected response (weights of the
    # rejected one are negative); a query with passages to be ranked; a text (the prompt) with its
    # translation (the response), each a sequence of its own; a prompt with a rationale and a
    # response (both count), perhaps with thinking tokens
    kind: RecordKind = "text"
    text: str = "text"  # kind text: field of the text
    prompt: str = "prompt"  # kinds with a prompt: field of the prompt
    response: str = "response"  # kinds response and rated: field of the response
    # kind rated: field that is true for a good response; the answers of a chat (field `messages`)
    # are rated where a record has one instead of prompt and response
    label: str = "label"
    # kind preference: field of the better response; it may also be a chat, of which the last
    # message counts (the prompt may then be a chat too, or missing)
    chosen: str = "chosen"
    rejected: str = "rejected"  # kind preference: field of the worse response, as the better one
    query: str = "query"  # kind ranking: field of the query's text
    # kind ranking: field of the passages, a list of texts or of {"text", "title", "score"} objects;
    # the title and the teacher's score may be missing
    passages: str = "passages"
    # kind ranking: optional field of the passages' relevances, a list of numbers; the first passage
    # alone is relevant where a record has none
    labels: str = "labels"
    query_tokens: int | None = QUERY_TOKENS  # kind ranking: most tokens of a query; None: all
    passage_tokens: int | None = PASSAGE_TOKENS  # the same of a passage with its title
    # kinds with a prompt: how it is joined to a response; {prompt} and {response} are these two,
    # any other {name} is the field of that name
    template: str = "{prompt}{response}"
    rationale: str = "rationale"  # kind reasoned: field that {rationale} in the template stands for
    # kind reasoned: the last occurrence of this text in the response parts the rationale from the
    # answer, and {rationale} and {response} stand for these; "": each has a field of its own
    rationale_end: str = ""
    thinking: Thinking = Thinking()  # kind reasoned: tokens that are read and never predicted
    messages: str = "messages"  # kind messages: field of the list of {"role", "content"}
    # chats: Jinja2 template, path of a .jinja file, or "chatml"; None: the tokenizer's own, else
    # chatml
    chat_template: str | None = None
    # optional field of weights: [[start, end, weight], ...] in characters of the text or response,
    # or one number for each of its tokens (in a chat each message may have a "weight" instead;
    # those of a rejected response are in the field of this name behind "rejected_"); "" ignores
    # such a field
    weights: str = "weights"
    id: str = "id"  # optional field of a unique id (text or whole number); "" ignores such a field

    def __post_init__(self):
        used = {
            "text": ("text",),
            "response": ("prompt", "response"),
            "messages": ("messages",),
            "rated": ("label",),
            "preference": ("prompt", "chosen", "rejected"),
            "ranking": ("query", "passages"),
            "translation": ("prompt", "response"),
            "reasoned": ("prompt", "rationale", "response"),
        }[self.kind]
        for field in used:
            if not getattr(self, field):
                raise ConfigError(f"{field} is empty; name the field of the records to read")
        Limits(self.query_tokens, self.passage_tokens)
        parse_template(self.template)
        self._check_reasoned()

    def _check_reasoned(self) -> None:
        if self.kind != "reasoned":
            for name, used in (
                ("thinking.count", self.thinking.used),
                ("rationale_end", self.rationale_end),
            ):
                if used:
                    raise ConfigError(f"{name} is for kind='reasoned', this is {self.kind!r}")
            return
        names = [name for _, name in self.pieces if name]
        if "rationale" not in names:
            if self.thinking.used and self.thinking.place in ("rationale", "all_words"):
                raise ConfigError(
                    f"thinking.place={self.thinking.place!r} needs {{rationale}} in the template "
                    f"{self.template!r}"
                )
        elif names.count("rationale") > 1 or names[-2:] != ["rationale", "response"]:
            raise ConfigError(
                f"template {self.template!r} must end in {{rationale}}, once, and {{response}}"
            )

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields every record must have."""
        if self.kind == "text":
            return (self.text,)
        if self.kind == "messages":
            return (self.messages,)
        if self.kind == "preference":
            return (self.chosen, self.rejected)
        if self.kind == "rated":
            return (self.label,)
        if self.kind == "ranking":
            return (self.query, self.passages)
        if self.kind == "translation":
            return (self.prompt, self.response)
        if self.kind == "reasoned":
            split = {self.rationale} if self.rationale_end else set()
            matched = (self.rationale,) if self.thinking.matched else ()
            return tuple(f for f in (*self.template_fields, *matched) if f not in split)
        return self.template_fields

    @property
    def template_fields(self) -> tuple[str, ...]:
        """The fields that the template names, the response's included."""
        return tuple(dict.fromkeys(self.field_of(name) for _, name in self.pieces if name))

    @property
    def optional_fields(self) -> tuple[str, ...]:
        """The fields that a record may have besides."""
        more = {
            "preference": (self.prompt, f"rejected_{self.weights}", *self.template_fields),
            "rated": (self.messages, *self.template_fields),
            "ranking": (self.labels,),
        }
        return (self.id, self.weights, *more.get(self.kind, ()))

    @property
    def pieces(self) -> list[tuple[str, str | None]]:
        """The template as (text, name of the field after it or None)."""
        return parse_template(self.template)

    def field_of(self, name: str) -> str:
        """Returns the field of the records that {name} in the template stands for."""
        fields = {"prompt": self.prompt, "response": self.response}
        if self.kind == "reasoned":
            fields["rationale"] = self.rationale
        return fields.get(name, name)


@register("source", "jsonl")
@dataclass(frozen=True, kw_only=True)
class JsonlSource(RecordSource, FileSource):
    """Files with one JSON object a line."""

    def __post_init__(self):
        FileSource.__post_init__(self)
        RecordSource.__post_init__(self)


@register("source", "parquet")
@dataclass(frozen=True, kw_only=True)
class ParquetSource(RecordSource, FileSource):
    """Parquet files; a record is a row."""

    def __post_init__(self):
        FileSource.__post_init__(self)
        RecordSource.__post_init__(self)


@register("source", "tfds")
@dataclass(frozen=True, kw_only=True)
class TfdsSource(RecordSource):
    """A data set of TensorFlow Datasets, by its name there."""

    dataset: str  # "name", "name/config" or "name/config:1.0.0"
    split: str = "train"  # a split, also as "train[:10%]"
    data_dir: str | None = None  # where it lies; None: $TFDS_DATA_DIR or ~/tensorflow_datasets
    module: str | None = None  # module to import that defines the data set; None: none
    download: bool = True  # fetch and build the data set where it is not there

    def __post_init__(self):
        RecordSource.__post_init__(self)
        if not self.dataset or not self.split:
            raise ConfigError("a tfds source needs dataset and split")


@register("source", "seqio")
@dataclass(frozen=True, kw_only=True)
class SeqioSource:
    """A task or mixture that is registered with seqio."""

    task: str  # its registered name
    module: str | None = None  # module to import that registers it; None: it is registered already
    split: str = "train"  # split of the task
    inputs: str = "inputs"  # optional feature before the targets, with weight 0
    targets: str = "targets"  # feature of the targets, with weight 1
    weights: str = "weights"  # optional feature of weights, one for each target
    # whose ids the features hold: those of the configured tokenizer; of the task's own vocabulary,
    # to be decoded and encoded again; or ids to be taken as they are
    ids: Literal["tokenizer", "retokenize", "as_is"] = "tokenizer"
    examples: int | None = None  # how many to draw; None: one pass (a mixture has no end: name it)
    seed: int = 0  # seed that a mixture draws with
    version: str = ""  # change it when the data behind the task changed: it is not looked at

    def __post_init__(self):
        if not self.task:
            raise ConfigError("a seqio source needs the name of a task or mixture")
        if self.examples is not None and self.examples < 1:
            raise ConfigError(f"examples is {self.examples}; it must be at least 1")


def source_name(source: Any) -> str:
    """Returns the name a source has in a configuration."""
    name = registered_name(type(source))
    if name is None:
        raise TypeError(f"{type(source).__name__} is no registered source")
    return name


def split_label(source: Any) -> str:
    """Returns the split of a source; "all" for files, which have none."""
    return getattr(source, "split", "all")


def namespace(source: Any) -> str:
    """Returns what the keys of a source's examples share: its kind of data, not its files.

    Moving a record to another file or split, or adding records, leaves its key.
    """
    facts = [source_name(source)]
    facts += [
        str(getattr(source, f)) for f in ("per", "kind", "dataset", "task") if hasattr(source, f)
    ]
    return "/".join(facts)


def make_key(namespace: str, content: str, *, explicit: bool = False) -> str:
    """Returns the key of an example: 16 hexadecimal digits of a SHA-256.

    Args:
      namespace: what sort of data it is; see `namespace`.
      content: its text before tokenisation, or the id that the record carries.
      explicit: whether `content` is such an id.

    >>> make_key("text/line", "a") == make_key("text/line", "a")
    True
    """
    mark = "id" if explicit else "content"
    data = f"{namespace}\0{mark}\0{content}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(data).hexdigest()[:16]


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Returns a template as (text, name of the field after it or None).

    Raises:
      ConfigError: it has no {response} or more than one, or its braces do not pair.

    >>> parse_template("Q: {prompt}{response}")
    [('Q: ', 'prompt'), ('', 'response')]
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"template {template!r}: {error}. Write {{{{ and }}}} for literal braces"
        ) from error
    pieces = []
    for text, name, specification, conversion in parsed:
        if specification or conversion or name == "":
            raise ConfigError(f"template {template!r}: write a field as {{name}} and nothing else")
        pieces.append((text, name))
    count = [name for _, name in pieces].count("response")
    if count != 1:
        raise ConfigError(
            f"template {template!r} has {{response}} {count} times; it must have it once, where "
            "the text that carries weight goes"
        )
    return pieces


def read_documents(source: Any) -> Iterator[Document | Problem]:
    """Yields the documents of a source in order, a `Problem` for each record that is none.

    Explicit ids that occur twice are problems from the second time on.

    Raises:
      ConfigError: a file is missing or a glob pattern matches nothing.
      DataError: a file cannot be read as what it should be.
    """
    from tokjax.data import reading

    seen = reading.SeenKeys()
    for item in reading.read(source):
        if isinstance(item, Document) and item.explicit_key and not seen.add(int(item.key, 16)):
            yield Problem(item.name, "the id occurs a second time", "ids must be unique")
        else:
            yield item
