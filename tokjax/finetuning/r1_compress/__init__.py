"""R1-Compress: long reasoning traces made shorter, chunk by chunk, before fine-tuning.

    lm = tokjax.load("qwen2.5-0.5b-instruct")
    rewriter = LMRewriter(lm, candidates=8)
    found = compress(traces, rewriter, LMScorer(lm), Settings(keep=0.5))

`python -m tokjax.compress` does this for a JSONL file.

Reference: "R1-Compress: Long Chain-of-Thought Compression via Chunk Compression and Search", arXiv
2505.16838. Which score is maximised, how many candidates there are and what share the length filter
keeps are recommendations of tokjax.
"""

from tokjax.finetuning.r1_compress.chunks import (
    MARKERS,
    Trace,
    chunks_of,
    count_markers,
    final_answer,
    split_trace,
)
from tokjax.finetuning.r1_compress.compressors import (
    PROMPT,
    Compressor,
    LMRewriter,
    TokenPruner,
    by_function,
    prune_tokens,
)
from tokjax.finetuning.r1_compress.scorers import FunctionScorer, LMScorer, Scorer
from tokjax.finetuning.r1_compress.search import Candidate, Found, keep_short, search
from tokjax.finetuning.r1_compress.traces import (
    Compressed,
    Dropped,
    Settings,
    Totals,
    compress,
    same_final_answer,
)

__all__ = [
    "MARKERS",
    "PROMPT",
    "Candidate",
    "Compressed",
    "Compressor",
    "Dropped",
    "Found",
    "FunctionScorer",
    "LMRewriter",
    "LMScorer",
    "Scorer",
    "Settings",
    "TokenPruner",
    "Totals",
    "Trace",
    "by_function",
    "chunks_of",
    "compress",
    "count_markers",
    "final_answer",
    "keep_short",
    "prune_tokens",
    "same_final_answer",
    "search",
    "split_trace",
]
