"""An encoder of sentences in two languages (MEXMA, arXiv 2409.12737), from pairs of translations.

    python -m tokjax.train --workdir=runs/warm \
        --config=configs/mexma.py:data=pairs.jsonl,first=en,second=de,warm_up=True
    python -m tokjax.train --workdir=runs/mexma \
        --config=configs/mexma.py:data=pairs.jsonl,first=en,second=de,init=runs/warm

Each line is a JSON object with a text and its translation in the two fields. The first command is
masked language modelling of both languages; instead of its workdir `init` may name any encoder,
such as a folder of XLM-RoBERTa (with head_layers=6, the paper's). Embed texts by
`tokjax.retrieval.sentences.load_sentence_encoder("runs/mexma")`; `tokjax.retrieval.mining` says how
well translations find each other.
"""

from ml_collections import ConfigDict


def get_config(
    data: str = "pairs.jsonl",
    first: str = "first",
    second: str = "second",
    held_out: str = "",
    warm_up: bool = False,
    init: str = "",
    head_layers: int = 2,
    corpus: str = "stdlib",
    steps: int = 3000,
) -> ConfigDict:
    """Returns a run; `corpus` is the text file that the tokenizer learns from."""
    files = dict(name="jsonl", files=(data,))
    if warm_up:
        sources = [dict(files, kind="text", text=field) for field in (first, second)]
        corruption = dict(rate=0.15, masked=0.8, random=0.1)
        objective, held_out = dict(name="masked_lm", corruption=corruption), ""
    else:
        sources = [dict(files, kind="translation", prompt=first, response=second)]
        objective = dict(
            name="mexma",
            corruption=dict(rate=0.4, masked=0.8, random=0.1),
            head=dict(n_layers=head_layers),
            alignment_weight=1.0,
            unmasking_weight=1.0,
            koleo_weight=0.01,
        )
    tree = dict(
        title=f"{'masked words' if warm_up else 'translations'} of {data}",
        data=dict(
            train=[dict(source=source) for source in sources],
            evals=dict(held_out=dict(sources[0], files=(held_out,))) if held_out else dict(),
            seq_len=256,  # both texts of a pair share a row
            batch_size=32,
        ),
        objective=objective,
        steps=steps,
        optimizer=dict(name="adamw", peak_lr=1e-4 if init else 1e-3, weight_decay=0.01),
        schedule=dict(name="cosine", warmup_steps=max(3 * steps // 10, 1)),
        clip_norm=1.2,
        evaluation=dict(every_steps=200, max_batches=20),
        checkpoints=dict(every_steps=500),
    )
    if init:
        tree["init_from"] = init
    else:
        tree["model"] = dict(
            d_model=128, n_layers=4, n_heads=4, max_positions=256, vocab_size=4097, causal=False
        )
        # The tokenizer has no mask: the model has one id more.
        tree["data"]["tokenizer"] = dict(name="bpe", vocab_size=4096, corpus=corpus)
    return ConfigDict(tree)
