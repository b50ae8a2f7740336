"""Chats: messages through a Jinja2 chat template into text, and that text into ids.

Rendered text mixes what the template wrote, whose special tokens mean something, with what people
wrote, whose text never does, even when it spells a special token. `RenderedChat` keeps the two
apart, and says which characters the assistant produced: those carry weight in training.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from tokjax.data.offsets import Offsets
from tokjax.data.tokenizer_base import Tokenizer
from tokjax.data.traced import PLAIN, Traced, concat, marked
from tokjax.errors import ConfigError, DataError, nearest

ROLES = ("system", "developer", "user", "assistant", "tool")

BUILTIN_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
        "{{ '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}


@dataclass(frozen=True)
class Span:
    """The characters [start, end) of a rendered chat that belong to one message."""

    start: int  # first character
    end: int  # one past the last character
    message: int  # index of the message, from 0


@dataclass(frozen=True)
class RenderedChat:
    """A chat as text.

    Attributes:
      text: the whole of it.
      content: the characters that come from messages; the others are the template's.
      assistant: the characters the assistant produced: its content and the marker that ends its
        turn. They carry weight in training.
    """

    text: str
    content: tuple[Span, ...]
    assistant: tuple[Span, ...]


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled chat template and the special tokens it may write.

    What the assistant produced is what the template encloses in `{% generation %}`; in a template
    without that tag it is the content of each assistant message and the special token that
    follows it on the same line, if any.
    """

    source: str  # Jinja2 source
    bos_token: str = ""  # what `bos_token` is in the template
    eos_token: str = ""  # what `eos_token` is in the template
    special_tokens: tuple[str, ...] = field(default=(), repr=False)  # texts with a meaning

    def __post_init__(self):
        _compile(self.source)  # a template that is wrong is found out here

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> RenderedChat:
        """Returns the messages as text, the same that `transformers` gives for this template.

        `strftime_now` is not defined, so that a text does not depend on the day.

        Args:
          messages: mappings with `role` (system, developer, user, assistant or tool) and
            `content`, a string; other keys are passed on to the template.
          add_generation_prompt: end with the opening of an assistant turn.
          **variables: further variables of the template, such as `tools`.

        Raises:
          DataError: a message is malformed (its index and field are named), the template refuses
            the messages, or it transforms a message so that its text cannot be followed.
        """
        checked = _checked_messages(messages)
        settings = {**variables, "add_generation_prompt": add_generation_prompt}
        rendered = self._run(_traced(checked), settings)
        if any(token in text for text in _strings(checked) for token in self._markers()):
            self._check_injection(checked, settings, rendered)
        return RenderedChat(
            text=str.__str__(rendered),
            content=tuple(_content_spans(rendered.marks)),
            assistant=tuple(self._assistant_spans(rendered, checked)),
        )

    def _run(self, messages: list[dict[str, Any]], settings: Mapping[str, Any]) -> Traced:
        try:
            text = _compile(self.source).render(
                messages=messages, bos_token=self.bos_token, eos_token=self.eos_token, **settings
            )
        except Exception as error:  # a template is a program and can fail in any way
            raise DataError(f"the chat template refuses these messages: {error}") from error
        return concat([text])

    def _markers(self) -> list[str]:
        tokens = {*self.special_tokens, self.eos_token, self.bos_token} - {""}
        return sorted(tokens, key=len, reverse=True)

    def _check_injection(
        self, messages: list[dict[str, Any]], settings: Mapping[str, Any], rendered: Traced
    ) -> None:
        """Refuses a chat whose messages spell special tokens in text that lost its marks."""
        pattern = re.compile("|".join(map(re.escape, self._markers())))

        def disarm(text: str) -> str:
            return pattern.sub(lambda match: "\ue000" * len(match.group()), text)

        harmless = self._run(_traced(_map_strings(disarm, messages)), settings)
        if _written_by_template(pattern, rendered) != _written_by_template(pattern, harmless):
            raise DataError(
                "a message spells a special token, and the chat template transforms the message so "
                "that the two cannot be told apart: remove the special token from the message, or "
                "use a template that prints the content as it is."
            )

    def _assistant_spans(self, rendered: Traced, messages: list[dict[str, Any]]) -> Iterator[Span]:
        assistants = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        spans = _generated_spans(rendered.marks, assistants)
        if not spans:
            spans = self._spans_by_content(rendered, assistants)
        unseen = sorted(set(assistants) - {span.message for span in spans})
        if unseen:
            raise DataError(
                f"message {unseen[0]}: the chat template does not show this assistant message as "
                "it is, so its tokens cannot be found. Enclose the assistant's part of the "
                "template in {% generation %} ... {% endgeneration %}."
            )
        return iter(spans)

    def _spans_by_content(self, rendered: Traced, assistants: list[int]) -> list[Span]:
        markers = self._markers()
        pattern = re.compile("[ \\t]*(?:" + "|".join(map(re.escape, markers)) + ")")
        spans = []
        for i in assistants:
            mark = _mark(i)
            start, end = rendered.marks.find(mark), rendered.marks.rfind(mark) + 1
            if start < 0:
                continue
            ending = pattern.match(str.__str__(rendered), end) if markers else None
            if ending and not rendered.marks[end : ending.end()].strip(PLAIN):
                end = ending.end()
            spans.append(Span(start, end, i))
        return spans


def chat_template(tokenizer: Tokenizer, template: str | None = None) -> ChatTemplate:
    """Returns the template to render chats for a tokenizer with.

    Args:
      tokenizer: whose special tokens have a meaning.
      template: None for the tokenizer's own (chatml where it has none), the name of a built-in
        one ("chatml"), a path ending in .jinja, or Jinja2 source.

    Raises:
      ConfigError: the template is unknown, unreadable, or no valid Jinja2.
    """
    if template is None:
        source = tokenizer.chat_template or BUILTIN_TEMPLATES["chatml"]
    elif template in BUILTIN_TEMPLATES:
        source = BUILTIN_TEMPLATES[template]
    elif "{{" in template or "{%" in template:
        source = template
    elif template.endswith((".jinja", ".jinja2", ".j2")):
        try:
            source = Path(template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the chat template {template!r}: {error}") from error
    else:
        raise ConfigError(
            f"chat template {template!r} is no built-in name, no .jinja file and no Jinja2 source."
            f"{nearest(template, BUILTIN_TEMPLATES)}"
        )
    texts = {i: text for text, i in tokenizer.special_tokens.items()}
    return ChatTemplate(
        source,
        bos_token="" if tokenizer.bos_id is None else texts.get(tokenizer.bos_id, ""),
        eos_token="" if tokenizer.eos_id is None else texts.get(tokenizer.eos_id, ""),
        special_tokens=tuple(tokenizer.special_tokens),
    )


def encode_rendered(tokenizer: Tokenizer, rendered: RenderedChat) -> tuple[list[int], Offsets]:
    """Returns ids of a rendered chat and for each its characters [start, end) in `rendered.text`.

    Special tokens the template wrote become their ids; the same text inside a message stays
    text. Nothing is added: a template that wants a BOS writes it.

    Raises:
      DataError: the tokenizer cannot encode the text.
    """
    specials = []
    position = 0
    for span in [*rendered.content, Span(len(rendered.text), len(rendered.text), -1)]:
        if position < span.start:
            found = tokenizer.find_specials(rendered.text[position : span.start])
            specials += [(a + position, b + position, token) for a, b, token in found]
        position = span.end
    return tokenizer.encode_parts(rendered.text, specials)


def _mark(message: int, generated: bool = False) -> str:
    """Returns the mark of a message's text: chr(0) and chr(1) are left to the template's own."""
    return chr(2 * message + 2 + generated)


def _message(mark: str) -> int | None:
    return ord(mark) // 2 - 1 if ord(mark) >= 2 else None


def _checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError("the chat has no messages: give a list of {'role': ..., 'content': ...}.")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise DataError(f"message {i} is a {type(message).__name__}, not an object.")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in ROLES:
            remedy = nearest(role, ROLES) if isinstance(role, str) else nearest("", ROLES)
            raise DataError(f"message {i}: field 'role' is {role!r}.{remedy}")
        calls = role == "assistant" and bool(message.get("tool_calls"))
        if not isinstance(content, str) and not (calls and content is None):
            state = f"{type(content).__name__}, not a string" if "content" in message else "missing"
            raise DataError(f"message {i} ({role}): field 'content' is {state}.")
        if role == "assistant" and not calls and not str(content).strip():
            raise DataError(f"message {i} (assistant): field 'content' is empty.")
        checked.append(dict(message))
    return checked


def _traced(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    traced = []
    for i, message in enumerate(messages):
        # The role is one of a closed list that templates compare and print: their own text.
        rest = {key: value for key, value in message.items() if key != "role"}
        mark = _mark(i)
        traced.append(
            {"role": message["role"], **_map_strings(lambda s, mark=mark: marked(s, mark), rest)}
        )
    return traced


def _map_strings(change: Any, value: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_strings(change, child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_strings(change, child) for child in value]
    return value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for child in value.values():
            yield from _strings(child)
    elif isinstance(value, (list, tuple)):
        for child in value:
            yield from _strings(child)


def _runs(keys: Sequence[Any]) -> Iterator[tuple[Any, int, int]]:
    position = 0
    for key, group in itertools.groupby(keys):
        length = sum(1 for _ in group)
        yield key, position, position + length
        position += length


def _content_spans(marks: str) -> Iterator[Span]:
    for message, start, end in _runs([_message(mark) for mark in marks]):
        if message is not None:
            yield Span(start, end, message)


def _generated_spans(marks: str, assistants: list[int]) -> list[Span]:
    """Returns the runs marked by the generation tag, one for each message in them."""
    spans: list[Span] = []
    pending = iter(assistants)
    for generated, start, end in _runs([ord(mark) % 2 for mark in marks]):
        if not generated:
            continue
        inside = [m for m in map(_message, marks[start:end]) if m is not None]
        if not inside:  # what the template made of a message without marks: tool calls, say
            message = next((i for i in pending if i not in {s.message for s in spans}), None)
            inside = [] if message is None else [message]
        owners = list(dict.fromkeys(inside))
        for k, message in enumerate(owners):
            # Adjacent turns: the next one begins where its content does.
            first = start if k == 0 else marks.index(_mark(message, True), start)
            if k:
                spans[-1] = Span(spans[-1].start, first, spans[-1].message)
            spans.append(Span(first, end, message))
    return spans


def _written_by_template(pattern: re.Pattern[str], rendered: Traced) -> list[str]:
    text = str.__str__(rendered)
    found: list[str] = []
    for message, start, end in _runs([_message(mark) for mark in rendered.marks]):
        if message is None:
            found += pattern.findall(text[start:end])
    return found


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: marks what the assistant produces."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_generated")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _generated(self, caller: Any) -> Traced:
        text = concat([caller()])
        odd = {ord(mark): chr(ord(mark) | 1) for mark in set(text.marks)}
        return Traced(str.__str__(text), text.marks.translate(odd))


class _TracingGenerator(jinja2.compiler.CodeGenerator):
    """Compiles `a ~ b` to the environment's own joining, which keeps marks."""

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: Any) -> None:
        self.write("environment.concat(map(str, (")
        for child in node.nodes:
            self.visit(child, frame)
            self.write(", ")
        self.write(")))")


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    code_generator_class = _TracingGenerator
    concat = staticmethod(concat)  # type: ignore[assignment]


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes for HTML, which chat templates do not expect.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"the chat template, line {error.lineno}: {error.message}") from error
