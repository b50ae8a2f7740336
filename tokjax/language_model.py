"""The front door: a model, its parameters and its tokenizer in one frozen bundle.

    lm = tokjax.load("smollm2-135m")
    lm.score(["The capital of Japan is Tokyo"]).table()
    lm.generate(["The capital of Japan is"], max_new_tokens=20).texts

Everything here is a few lines over the functions of `tokjax.models`, `tokjax.signals` and
`tokjax.decoding`, which take `lm.model`, `lm.params` and `lm.tokenizer` as they are.
"""

import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax import strategies
from tokjax.data.tokenizers import Tokenizer
from tokjax.decoding.constrained import TokenTable, choices, constrained, json_schema, regex
from tokjax.decoding.engine import Generation, decode
from tokjax.decoding.prompts import Prompts, bucket
from tokjax.decoding.samplers import categorical
from tokjax.decoding.stop_texts import TokenBytes, on_texts
from tokjax.decoding.stops import Stop, any_of, on_tokens
from tokjax.decoding.streaming import Callback
from tokjax.decoding.text import continuation, sampling_transform
from tokjax.decoding.text_stream import TextStream, cut, pieces
from tokjax.decoding.transforms import Transform, chain
from tokjax.errors import ConfigError
from tokjax.models import huggingface
from tokjax.models.transformer import Transformer
from tokjax.scores import Scores
from tokjax.signals.token_stats import TokenStats, token_stats

_WANTED = ("nll", "logprob", "entropy", "rank", "top_k")


@dataclass(frozen=True, eq=False)
class Generated:
    """Continuations of prompts, without the prompts. N is the longest one.

    Slots from a row's length on hold zeros and mean nothing.

    Attributes:
        texts: the continuations.
        tokens: ids, the one that stopped the row included.
        lengths: number of new tokens of each row.
        stopped: rows that a stop ended; the others were cut at `max_new_tokens`.
        logprobs: log-probability of each token at temperature 1, before any setting, by what
            the strategy predicts.
        entropies: of that distribution, in nats.
    """

    texts: list[str]
    tokens: Int[np.ndarray, "B N"] = field(repr=False)
    lengths: Int[np.ndarray, "B"]
    stopped: Bool[np.ndarray, "B"]
    logprobs: Float[np.ndarray, "B N"] = field(repr=False)
    entropies: Float[np.ndarray, "B N"] = field(repr=False)


@dataclass(frozen=True, eq=False, repr=False)
class LanguageModel:
    """A language model ready for use; see `load`.

    Attributes:
        model: the pure functions.
        params: its parameters, stacked over layers.
        tokenizer: between text and ids.
        add_bos: whether the model expects the BOS id before every text.
        stop_ids: ids that end a text besides the tokenizer's EOS, as the end of a turn may.
    """

    model: Transformer
    params: Mapping[str, Any]
    tokenizer: Tokenizer
    add_bos: bool = True
    stop_ids: tuple[int, ...] = ()

    def __repr__(self) -> str:
        config, count = self.model.config, sum(p.size for p in jax.tree.leaves(self.params))
        return (
            f"LanguageModel({config.family}, {count:,} parameters in {config.param_dtype}, "
            f"{config.n_layers} layers of width {config.d_model}, {self.tokenizer.title}, "
            f"add_bos={self.add_bos})"
        )

    @property
    def eos_ids(self) -> list[int]:
        """The ids that end a text: the tokenizer's EOS, and the model's `stop_ids`."""
        own = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
        return list(dict.fromkeys([*own, *self.stop_ids]))

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text as the model expects it, BOS included.

        Raises:
            DataError: the tokenizer cannot hold the text exactly.
        """
        return [*self._before, *self.tokenizer.encode(text)]

    def logits(self, tokens: Int[Array, "B T"] | Sequence[Sequence[int]]) -> Float[Array, "B T V"]:
        """Returns the logits of the token behind each position.

        Args:
            tokens: ids; rows are of one length.
        """
        return _logits(self.model, self.params, jnp.asarray(tokens, jnp.int32))

    def score(self, texts: Sequence[str], *, top_k: int = 5, batch_size: int = 16) -> Scores:
        """Returns how the model predicts each token of the texts.

        Args:
            texts: special tokens spelled out in them are plain text.
            top_k: how many of the likeliest tokens are kept at each place.
            batch_size: texts that are computed at a time.

        Raises:
            ConfigError: there is no text, or one is longer than the model's positions.
            DataError: the tokenizer cannot hold a text exactly.
        """
        _check_list(texts, "texts")
        before = self._before
        ids, offsets = [], []
        for i, text in enumerate(texts):
            own, ranges = self.tokenizer.encode_with_offsets(text)
            ids.append([*before, *own])
            offsets.append((*((0, 0) for _ in before), *ranges))
            if len(ids[-1]) > self.model.config.max_positions:
                raise ConfigError(
                    f"text {i} has {len(ids[-1])} tokens, but the model has max_positions="
                    f"{self.model.config.max_positions}: shorten or cut it"
                )
        lengths = np.array([len(row) for row in ids], np.int32)
        tokens = np.zeros((len(ids), bucket(int(lengths.max()))), np.int32)
        for b, row in enumerate(ids):
            tokens[b, : len(row)] = row
        size = min(batch_size, len(ids))
        found = []
        for first in range(0, len(ids), size):
            some, limits = tokens[first : first + size], lengths[first : first + size]
            fill = size - len(some)  # rows of no length, so that every batch runs one program
            width = bucket(max(2, int(limits.max())))
            some = np.pad(some, ((0, fill), (0, max(0, width - some.shape[1]))))[:, :width]
            limits = np.pad(limits, (0, fill))
            stats = jax.device_get(_score(self.model, self.params, some, limits, top_k))
            found.append(jax.tree.map(lambda a, n=size - fill: a[:n], stats))
        longest = int(lengths.max())
        positions = np.arange(longest)
        return Scores(
            texts=tuple(texts),
            tokens=tokens[:, :longest],
            lengths=lengths,
            offsets=tuple(offsets),
            mask=(positions > 0) & (positions < lengths[:, None]),
            stats=_joined(found, lengths, longest),
            tokenizer=self.tokenizer,
        )

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        stop: Iterable[int | str] | None = None,
        regex: str | Sequence[str | None] | None = None,
        json_schema: Any = None,
        choices: Sequence[str] | Sequence[Sequence[str] | None] | None = None,
        strategy: str = "sample",
        **options: Any,
    ) -> Generated:
        """Returns continuations of the prompts; the same arguments give the same ones.

        Args:
            prompts: texts (special tokens spelled out in them are plain text), or ids, which are
                taken as they are: see `chat`.
            max_new_tokens: most tokens of a continuation.
            temperature: 0 takes the likeliest token, 1 draws as the model predicts.
            top_k: how many of the likeliest tokens may be drawn; 0 means all.
            top_p: probability mass of the likeliest tokens that may be drawn; 1 means all.
            min_p: least probability of a drawn token over that of the likeliest; 0 means any.
            repetition_penalty: 1 means none.
            seed: of all randomness.
            seeds: one for each prompt, 0 to 2^32 - 1, instead of `seed`: a row's text then does not
                depend on its place.
            stop: ids, special tokens or texts that end a row; default `eos_ids`. A text ends
                before it, its tokens are kept.
            regex: an expression that each whole continuation matches, or one for each prompt (None
                for none); needs the extra `constrained`, as `json_schema` does.
            json_schema: a schema (a mapping, or JSON text) by which each continuation is valid
                JSON, or a list of one for each prompt.
            choices: texts of which each continuation is one, or a list of such for each prompt.
            strategy: whose predictions are sampled: the model's own (`sample`), or those of `dola`,
                `layercake`, `guided` (classifier-free guidance) or `reasoners` (other models'
                logits are added); or how texts are searched for: `beam`, `contrastive_search`,
                `speculative`.
            options: of the strategy, such as `alpha`, `weight` or `beams`; see the function of its
                name in `tokjax.decoding.contrast`, or in `tokjax.strategies`. LayerCake's token
                classes default to those of a heuristic, `token_classes`; `negative` of `guided`
                may be a text, and `reasoners` of `reasoners` workdirs or names of models.

        Raises:
            ConfigError: a setting is impossible, there is no prompt, one is empty and the model
                expects no BOS, prompt and new tokens exceed the model's positions, or no text of
                `max_new_tokens` satisfies a constraint.
            DataError: the tokenizer cannot hold a prompt exactly.
        """
        plan = self._plan(
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            seeds=seeds,
            stop=stop,
            regex=regex,
            json_schema=json_schema,
            choices=choices,
            strategy=strategy,
            **options,
        )
        found = jax.device_get(plan.decode())
        longest = int(found.lengths.max())
        rows = [row[:n].tolist() for row, n in zip(found.tokens, found.lengths, strict=True)]
        texts = [continuation(self.tokenizer, p, n) for p, n in zip(plan.ids, rows, strict=True)]
        return Generated(
            texts=[cut(text, plan.ends) for text in texts],
            tokens=found.tokens[:, :longest],
            lengths=found.lengths,
            stopped=found.stopped,
            logprobs=found.logprobs[:, :longest],
            entropies=found.entropies[:, :longest],
        )

    @overload
    def stream(self, prompts: str, **settings: Any) -> Iterator[str]: ...

    @overload
    def stream(
        self, prompts: Sequence[int] | Sequence[str | Sequence[int]], **settings: Any
    ) -> Iterator[Any]: ...

    def stream(self, prompts: Any, **settings: Any) -> Iterator[Any]:
        """Returns an iterator over the pieces of a continuation, while it is being written.

        Together they are the text that `generate` returns. Leaving the iterator ends the decode.

        Args:
            prompts: one prompt, a text or its ids, for pieces of text; or a list of prompts, for
                pairs of a prompt's number and a piece.
            settings: those of `generate`.

        Raises:
            ConfigError: as `generate`.
            DataError: as `generate`.
        """
        one = isinstance(prompts, str) or (
            len(prompts) > 0 and isinstance(prompts[0], int | np.integer)
        )
        plan = self._plan([prompts] if one else prompts, **settings)
        if not plan.streams:
            raise ConfigError(f"strategy={settings['strategy']!r} writes no text piece by piece")
        rows = [TextStream(self.tokenizer, ids, plan.ends) for ids in plan.ids]
        found = pieces(plan.decode, rows)
        return (piece for _, piece in found) if one else found

    def _plan(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        stop: Iterable[int | str] | None = None,
        regex: Any = None,
        json_schema: Any = None,
        choices: Any = None,
        strategy: str = "sample",
        **options: Any,
    ) -> "_Plan":
        """Returns what is to be decoded; see `generate`."""
        _check_list(prompts, "prompts")
        ids = [self.encode(p) if isinstance(p, str) else [int(i) for i in p] for p in prompts]
        stops, ends = self._stop(stop)
        if isinstance(options.get("negative"), str):
            options["negative"] = self.encode(options["negative"])
        searches = strategy in strategies.SEARCHES
        maximises = searches and strategy != "speculative"
        if maximises and temperature not in (0, 1):
            raise ConfigError(
                f"strategy={strategy!r} draws nothing, so temperature={temperature} has no meaning"
            )
        transform = sampling_transform(
            temperature=1.0 if maximises else temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        constraint = self._constraint(
            len(ids), regex=regex, json_schema=json_schema, choices=choices
        )
        settings = {
            "max_new_tokens": max_new_tokens,
            "transform": transform if constraint is None else chain(constraint, transform),
            "sampler": categorical(),
            "stop": stops,
            "key": jax.random.key(seed) if seeds is None else None,
            "seeds": seeds,
        }
        if searches:
            found = functools.partial(
                strategies.search, strategy, self.model, self.params, settings=settings
            )
            return _Plan(ids, ends, functools.partial(found, options=options), streams=False)
        predictor, params = strategies.build(
            strategy, self.model, self.params, self.tokenizer, ids, options
        )
        return _Plan(ids, ends, functools.partial(decode, predictor, params, **settings))

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, template: str | None = None
    ) -> list[int]:
        """Returns the ids of a chat up to where the assistant speaks: a prompt for `generate`.

        Args:
            messages: mappings with `role` and `content`; special tokens spelled out in a content
                are plain text.
            template: the name of a built-in template, a .jinja file or its source; default the
                one that came with the tokenizer.

        Raises:
            ConfigError: no template came with the tokenizer, or this one is no valid Jinja2.
            DataError: a message is malformed, or the template refuses it.
        """
        from tokjax.data.chat import chat_template, encode_rendered

        if template is None and self.tokenizer.chat_template is None:
            raise ConfigError(
                "no chat template came with this model's tokenizer: give template='chatml', a "
                ".jinja file, or Jinja2 source"
            )
        rendered = chat_template(self.tokenizer, template).render(
            messages, add_generation_prompt=True
        )
        return encode_rendered(self.tokenizer, rendered)[0]

    def save(self, folder: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Writes the model and its tokenizer as a Hugging Face checkpoint, which `load` reads.

        Args:
            folder: where; it appears whole or not at all.
            overwrite: replace a folder that holds something already.

        Raises:
            ConfigError: no family of checkpoints can express the model.
            StorageError: the folder is not empty, or cannot be written.
        """
        tokenizer = self.tokenizer
        names = {i: text for text, i in tokenizer.special_tokens.items()}
        ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
        settings: dict[str, Any] = {
            f"{role}_token": names[i] for role, i in ids.items() if i in names
        }
        settings |= {"add_bos_token": self.add_bos, "tokenizer_class": "PreTrainedTokenizerFast"}
        if tokenizer.chat_template is not None:
            settings["chat_template"] = tokenizer.chat_template
        with tempfile.TemporaryDirectory() as temporary:
            tokenizer.save(Path(temporary))
            for name, content in (
                ("tokenizer_config.json", settings),
                ("config.json", {f"{role}_token_id": i for role, i in ids.items()}),
                ("generation_config.json", _generation_config(self.eos_ids, ids)),
            ):
                (Path(temporary) / name).write_text(json.dumps(content, indent=2) + "\n")
            huggingface.save(folder, self.model, self.params, source=temporary, overwrite=overwrite)

    @property
    def _before(self) -> list[int]:
        bos = self.tokenizer.bos_id
        return [bos] if self.add_bos and bos is not None else []

    @functools.cached_property
    def _token_table(self) -> TokenTable:
        size = self.model.config.vocabulary
        return TokenTable.of(self.tokenizer, vocab_size=size, eos_ids=self.eos_ids)

    def _constraint(self, count: int, **given: Any) -> Transform | None:
        """Returns the transform of a constraint, None where there is none."""
        kinds = [name for name, value in given.items() if value is not None]
        if not kinds:
            return None
        if len(kinds) > 1:
            raise ConfigError(f"give {' or '.join(kinds)}, one of them")
        (kind,) = kinds
        value: Any = given[kind]
        table = self._token_table
        one = isinstance(value, str | Mapping | bool) or (
            kind == "choices" and all(isinstance(v, str) for v in value)
        )
        each: Any = (value,) if one else value
        if not one and len(each) != count:
            raise ConfigError(
                f"{kind} has {len(each)} constraints for {count} prompts: give one for all, or one "
                f"for each (None for none)"
            )
        build: Any = {"regex": regex, "json_schema": json_schema, "choices": choices}[kind]
        return constrained([None if v is None else build(v, table) for v in each])

    @functools.cached_property
    def _token_bytes(self) -> TokenBytes:
        known, size = self.tokenizer.vocab_size, self.model.config.vocabulary
        return TokenBytes.of(
            [self.tokenizer.token_bytes(i) if i < known else b"" for i in range(size)]
        )

    def _stop(self, stop: Iterable[int | str] | None) -> tuple[Stop, list[str]]:
        """Returns the stop, and the texts among what was given."""
        if stop is None:
            return on_tokens(self.eos_ids), []
        if isinstance(stop, str):
            raise ConfigError(f"stop={stop!r} must be a list of ids or texts")
        special, given = self.tokenizer.special_tokens, list(stop)
        texts = [s for s in given if isinstance(s, str) and s not in special]
        ids = [special[s] if isinstance(s, str) else s for s in given if s not in texts]
        if not texts:
            return on_tokens(ids), []
        return any_of(on_tokens(ids), on_texts(texts, self._token_bytes)), texts


@dataclass(frozen=True)
class _Plan:
    """A decode that is ready to run, of prompts with these ids and texts with these ends."""

    ids: list[list[int]]
    ends: list[str]
    run: Callable[..., Generation]
    streams: bool = True

    def decode(self, stream: Callback | None = None) -> Generation:
        return self.run(Prompts.of(self.ids), **({} if stream is None else {"stream": stream}))


def _generation_config(eos_ids: list[int], ids: Mapping[str, int | None]) -> dict[str, Any]:
    found: dict[str, Any] = {f"{role}_token_id": i for role, i in ids.items() if i is not None}
    if eos_ids:
        found["eos_token_id"] = eos_ids if len(eos_ids) > 1 else eos_ids[0]
    return found


def _check_list(given: Any, name: str) -> None:
    if isinstance(given, str) or not len(given):
        raise ConfigError(f"{name} must be a list of one or more, not {given!r}")


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Transformer, params: Any, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    return model(params, tokens)[0]


@functools.partial(jax.jit, static_argnums=(0, 4))
def _score(
    model: Transformer, params: Any, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], k: int
) -> TokenStats:
    """Returns statistics of the tokens from the second on, [B, T - 1]."""
    x = model.backbone(params, model.embed(params, tokens)).x
    mask = jnp.arange(1, tokens.shape[1]) < lengths[:, None]
    return token_stats(x[:, :-1], model.head(params), tokens[:, 1:], want=_WANTED, k=k, mask=mask)


def _joined(batches: list[TokenStats], lengths: np.ndarray, longest: int) -> TokenStats:
    """Returns the statistics of all batches, [B, longest], NaN or -1 where nothing is predicted."""
    fields = {}
    for name in (f.name for f in dataclasses.fields(TokenStats)):
        parts = [getattr(batch, name) for batch in batches]
        if parts[0] is None:
            continue
        nothing = np.nan if np.issubdtype(parts[0].dtype, np.floating) else -1
        shape = (len(lengths), longest, *parts[0].shape[2:])
        whole = np.full(shape, nothing, parts[0].dtype)
        first = 0
        for part in parts:
            for row in part:
                n = int(lengths[first])
                whole[first, 1:n] = row[: max(n - 1, 0)]
                first += 1
        fields[name] = whole
    return TokenStats(**fields)
