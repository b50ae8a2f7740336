"""From text to text: prompts are encoded, continued and decoded."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax

from tokjax.data.tokenizers import Tokenizer
from tokjax.decoding import transforms
from tokjax.decoding.engine import check_prompts, decode
from tokjax.decoding.predictors import as_predictor
from tokjax.decoding.prompts import Prompts
from tokjax.decoding.samplers import categorical
from tokjax.decoding.stops import on_tokens


def encode_prompts(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    add_bos: bool = True,
) -> Prompts:
    """Returns the prompts' ids; all that can be wrong with them is found here.

    Args:
        model: a `Transformer` or a `Predictor`.
        tokenizer: the one the model was trained with.
        prompts: texts; special tokens spelled out in them are plain text.
        max_new_tokens: number of tokens there must be room for.
        add_bos: begin with the BOS id, if the tokenizer has one.

    Raises:
        ConfigError: a prompt is empty and there is no BOS id, or it leaves no room.
        DataError: the tokenizer cannot hold a prompt exactly, or has ids the model has not.
    """
    before = [tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else []
    encoded = Prompts.of([[*before, *ids] for ids in tokenizer.encode_batch(list(prompts))])
    return check_prompts(as_predictor(model), encoded, max_new_tokens)[0]


def generate_text(
    model: Any,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    add_bos: bool = True,
    stop_ids: Iterable[int] | None = None,
) -> list[str]:
    """Returns the continuation of each prompt, without the prompt itself.

    The same arguments give the same texts. A row's randomness comes from the seed and its place in
    the list.

    Args:
        model: a `Transformer` or a `Predictor`.
        params: its parameters.
        tokenizer: the one the model was trained with.
        prompts: texts to continue; special tokens spelled out in them are plain text.
        max_new_tokens: most tokens of a continuation.
        temperature: 0 takes the likeliest token.
        top_k: how many of the likeliest tokens may be drawn; 0 means all.
        top_p: probability mass of the likeliest tokens that may be drawn; 1 means all.
        min_p: least probability of a drawn token over that of the likeliest; 0 means any.
        repetition_penalty: 1 means none.
        seed: of all randomness.
        add_bos: begin with the BOS id, if the tokenizer has one; as in training.
        stop_ids: tokens that end a text; default the tokenizer's EOS id, if it has one.

    Raises:
        ConfigError: a setting is impossible, a prompt is empty and there is no BOS id, or prompt
            and new tokens exceed the model's positions.
        DataError: the tokenizer cannot hold a prompt exactly, or has ids the model has not.
    """
    if not prompts:
        return []
    if stop_ids is None:
        stop_ids = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    encoded = encode_prompts(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, add_bos=add_bos
    )
    generation = decode(
        model,
        params,
        encoded,
        max_new_tokens=max_new_tokens,
        transform=sampling_transform(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        ),
        sampler=categorical(),
        stop=on_tokens(stop_ids),
        key=jax.random.key(seed),
    )
    return [
        continuation(tokenizer, ids[:length].tolist(), new)
        for ids, length, new in zip(encoded.tokens, encoded.lengths, generation.rows(), strict=True)
    ]


def sampling_transform(
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> transforms.Transform:
    """Returns the usual changes to logits in their usual order; see `generate_text`.

    Raises:
        ConfigError: a setting is impossible.
    """
    # A transform that is off is left out: it would cost time at every token.
    steps = [transforms.temperature(temperature)]
    if repetition_penalty != 1:
        steps.insert(0, transforms.repetition_penalty(repetition_penalty))
    if top_k != 0:
        steps.append(transforms.top_k(top_k))
    if top_p != 1:
        steps.append(transforms.top_p(top_p))
    if min_p != 0:
        steps.append(transforms.min_p(min_p))
    return transforms.chain(*steps)


def continuation(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> str:
    """Returns the text that new ids add to a prompt's.

    They are decoded together, because a tokenizer may drop the space a text begins with.
    """
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *new])
    return whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(new)
