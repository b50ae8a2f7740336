"""DiscRec (arXiv 2506.15576) on a log of interactions; `method=tiger` is the plain model.

    python -m tokjax.recommend --config=configs/recommend/discrec.py:interactions=log.csv,texts=items.jsonl \
        --workdir=runs/discrec

`log.csv` has the columns user, item and, if `time` names it, the time; `items.jsonl` has lines
{"item": ..., "text": ...}, or with `embeddings=` instead of `texts=` {"item": ..., "embedding":
[...]}. The sizes are the authors' for sets of about 10,000 items and 200,000 interactions, which
want an accelerator; `small=True` is for a few hundred items on a processor.
"""  # noqa: E501

from ml_collections import ConfigDict

from tokjax.errors import ConfigError


def get_config(
    interactions: str = "log.csv",
    texts: str = "",
    embeddings: str = "",
    time: str = "",
    method: str = "discrec",
    small: bool = False,
) -> ConfigDict:
    """Returns a recommender over a log."""
    if method not in ("discrec", "tiger"):
        raise ConfigError(f"method={method!r} must be 'discrec' or 'tiger'")
    if not texts and not embeddings:
        texts = "items.jsonl"
    tree = dict(
        interactions=interactions,
        texts=texts or None,
        embeddings=embeddings or None,
        time=time or None,
        codes=dict(),
        model=dict(),
        fit=dict(),
    )
    if method == "tiger":
        tree["model"] = dict(positions=False, branch="none", gate=False)
    if small:
        tree["codes"] = dict(levels=3, size=32, hidden=(128,), width=16, epochs=500)
        tree["model"] |= dict(d_model=64, d_ff=128, n_heads=4, head_dim=16, n_layers=2)
        tree["model"] |= dict(branch_d_ff=128)
        tree["fit"] = dict(epochs=30, patience=5, batch_size=128, peak_lr=2e-3)
    return ConfigDict(tree)
