"""Decoding strategies by name, over a model with its tokenizer, for `LanguageModel.generate`."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokjax.data.tokenizers import Tokenizer
from tokjax.decoding.contrast import dola, guided, layercake, token_classes
from tokjax.decoding.prompts import Prompts
from tokjax.errors import ConfigError, nearest
from tokjax.models.transformer import Transformer

Rows = Sequence[Sequence[int]]


def build(
    strategy: str,
    model: Transformer,
    params: Any,
    tokenizer: Tokenizer,
    rows: Rows,
    options: Mapping[str, Any],
) -> tuple[Any, Any]:
    """Returns the predictor of a strategy and its parameters, for `decode`.

    Args:
        strategy: `sample` (the model's own predictions), `dola`, `layercake` or `guided`.
        model: the model.
        params: its parameters.
        tokenizer: LayerCake tells punctuation and concepts by the text of tokens.
        rows: the prompts' ids.
        options: of the strategy; see the function of its name in `tokjax.decoding.contrast`.
            `guided` takes `negative` as ids of one prompt, or of one for each row.

    Raises:
        ConfigError: there is no such strategy, or it has no such option.
    """
    makers: dict[str, Callable[..., tuple[Any, Any]]] = {
        "sample": lambda model, params: (model, params),
        "dola": dola,
        "layercake": layercake,
        "guided": guided,
    }
    if strategy not in makers:
        raise ConfigError(f"unknown strategy={strategy!r}.{nearest(strategy, makers)}")
    maker, given = makers[strategy], dict(options)
    known = [p for p in inspect.signature(maker).parameters if p not in ("model", "params")]
    for name in given:
        if name not in known:
            raise ConfigError(
                f"strategy {strategy!r} has no option {name!r}.{nearest(name, known)}"
            )
    if strategy == "layercake":
        bos = None if tokenizer.bos_id is None else tokenizer.token_text(tokenizer.bos_id)
        classes = [token_classes([tokenizer.token_text(i) for i in row], bos=bos) for row in rows]
        given.setdefault("punctuation", [c.punctuation for c in classes])
        given.setdefault("concept", [c.concept for c in classes])
    if strategy == "guided" and given.get("negative") is not None:
        negative = given["negative"]
        one = isinstance(negative[0], int)
        given["negative"] = Prompts.of([negative] * len(rows) if one else negative)
    return maker(model, params, **given)
