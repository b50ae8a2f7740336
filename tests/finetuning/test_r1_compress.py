import itertools
import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokjax import cli
from tokjax import compress as command
from tokjax.config import resolve
from tokjax.data.byte_tokenizer import ByteTokenizer
from tokjax.errors import ConfigError, DataError
from tokjax.evaluation.requests import Pair
from tokjax.evaluation.scoring import score_pairs
from tokjax.finetuning.r1_compress import (
    Candidate,
    Compressed,
    Dropped,
    FunctionScorer,
    LMRewriter,
    LMScorer,
    Settings,
    TokenPruner,
    Totals,
    by_function,
    chunks_of,
    compress,
    keep_short,
    prune_tokens,
    search,
    split_trace,
)
from tokjax.finetuning.r1_compress import scorers as scorers_module
from tokjax.finetuning.r1_compress.chunks import body_of
from tokjax.language_model import LanguageModel
from tokjax.models import ModelConfig, Transformer
from tokjax.training.config import TrainConfig
from tokjax.training.loop import train
from tokjax.training.run import build_run


def model_of(**options):
    tokenizer = ByteTokenizer()
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_positions": 512} | options
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, **sizes))
    params = model.init(jax.random.key(0))
    return LanguageModel(model, {**params, "embedding": 30 * params["embedding"]}, tokenizer)


@pytest.fixture(scope="module")
def lm():
    return model_of()


def no_score(context, chosen, text):
    return 0.0


WORDS = FunctionScorer(no_score)


def trace_of(*sizes):
    """Thinking of paragraphs with so many words, and an answer."""
    paragraphs = [" ".join(f"p{i}w{j}" for j in range(n)) for i, n in enumerate(sizes)]
    return "<think>\n" + "\n\n".join(paragraphs) + "\n</think>\n\nIt is 7."


# ---- chunks


@given(st.text(st.sampled_from("ab1 \n\t\u00e9"), max_size=80), st.integers(1, 6))
def test_chunks_joined_are_the_text_and_have_enough_words(text, least):
    chunks = chunks_of(text, least)
    assert "".join(chunks) == text
    assert len(chunks) < 2 or all(len(chunk.split()) >= least for chunk in chunks)
    for chunk in chunks:
        assert "".join(body_of(chunk)) == chunk


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([30, 30, 60, 10], [60, 70]), ([10], [10]), ([50, 49], [99]), ([50, 50], [50, 50])],
)
def test_chunks_have_fifty_words_and_a_short_last_piece_joins_the_one_before(sizes, expected):
    chunks = chunks_of(split_trace(trace_of(*sizes)).thinking)
    assert [len(chunk.split()) for chunk in chunks] == expected


@given(st.text(st.sampled_from("ab \n"), max_size=30), st.booleans(), st.booleans())
def test_parts_of_a_response_joined_give_it_back(text, begun, ended):
    whole = "<think>" * begun + text + "</think> 7" * ended
    trace = split_trace(whole)
    assert trace.head + trace.thinking + trace.answer == whole
    assert trace.tagged == ended and (begun or not trace.head)
    assert not ended or trace.thinking == trace.thinking.rstrip()


def test_a_boundary_may_be_a_word():
    assert chunks_of("a b ; c ; d ;", 3, " ;") == ["a b ;", " c ; d ;"]
    assert body_of(" c ; d ;", " ;") == (" ", "c ; d", " ;")


# ---- choosing


def test_the_length_filter_keeps_the_shortest_and_nothing_longer_than_the_chunk():
    assert keep_short([12, 8, 20, 9], 30, 0.5) == [1, 3]
    assert keep_short([5, 5, 5, 5], 30, 0.5) == [0, 1]  # of equals the earliest
    assert keep_short([12, 8, 20, 9], 8, 0.5) == [1]
    assert keep_short([12, 8], 7, 1.0) == []  # the chunk itself stays
    assert keep_short([3, np.inf, np.inf], 9, 0.5) == [0]  # cut ones count among the M
    assert [len(keep_short([1] * 8, 9, share)) for share in (0.01, 0.5, 0.51, 1)] == [1, 4, 5, 8]
    with pytest.raises(ConfigError, match="keep=0"):
        keep_short([1], 1, 0)


@pytest.mark.parametrize("normalise", ["mean", "total"])
def test_of_the_kept_the_likeliest_is_chosen_by_mean_and_by_total(normalise):
    totals = {"a": -30.0, "b": -16.0, "c": -44.0, "d": -13.5}
    lengths = dict(zip("abcd", [12, 8, 20, 9], strict=True))
    kept = keep_short([*lengths.values()], 30, 0.5)
    candidates = [Candidate("abcd"[i], lengths["abcd"[i]]) for i in kept]
    scorer = FunctionScorer(lambda context, chosen, text: totals[text])
    found = search([candidates], scorer, normalise=normalise)
    assert candidates[found.chosen[0]].text == "d"
    assert found.score == pytest.approx(-1.5 if normalise == "mean" else -13.5)
    assert found.scored_tokens == 17


def test_total_prefers_the_shorter_where_mean_does_not():
    candidates = [Candidate("short", 2), Candidate("long", 10)]
    scorer = FunctionScorer(lambda c, b, text: {"short": -4.0, "long": -10.0}[text])
    assert search([candidates], scorer).chosen == (1,)
    assert search([candidates], scorer, normalise="total").chosen == (0,)


@pytest.mark.parametrize("beams", [1, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_is_exhaustive_where_chunks_are_independent(seed, beams):
    rng = np.random.default_rng(seed)
    table = -rng.random((3, 3)) * 9
    chunks = [[Candidate(f"{n}{m}", 1 + m) for m in range(3)] for n in range(3)]
    scorer = FunctionScorer(lambda context, chosen, text: table[int(text[0]), int(text[1])])
    found = search(chunks, scorer, beams=beams)

    def worth(picks):
        return sum(table[n, m] / (1 + m) for n, m in enumerate(picks))

    best = max(itertools.product(range(3), repeat=3), key=worth)
    assert found.chosen == best
    assert found.score == pytest.approx(worth(best))


def test_wide_beams_find_what_one_beam_misses():
    def function(context, chosen, text):
        return {(): {"a": -1.0, "b": -2.0}, ("a",): {"c": -9.0}, ("b",): {"c": -1.0}}[chosen][text]

    chunks = [[Candidate("a", 1), Candidate("b", 1)], [Candidate("c", 1)]]
    assert search(chunks, FunctionScorer(function)).chosen == (0, 0)
    wide = search(chunks, FunctionScorer(function), beams=8)
    assert (wide.chosen, wide.score) == ((1, 0), -3.0)


def test_the_ablation_conditions_on_the_original_chunks():
    seen = []

    def function(context, chosen, text):
        seen.append(chosen)
        return -float(len(text))

    chunks = [[Candidate("aa", 1), Candidate("a", 1)], [Candidate("b", 1)]]
    originals = [Candidate("original", 3), Candidate("two", 3)]
    found = search(chunks, FunctionScorer(function), originals=originals)
    assert found.chosen == (1, 0)
    assert {*seen} == {(), ("original",)}


def test_impossible_searches_are_refused():
    one = [[Candidate("a", 1)]]
    with pytest.raises(ConfigError, match="normalise='max'"):
        search(one, WORDS, normalise="max")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="chunk 1 has no candidate"):
        search([*one, []], WORDS)
    with pytest.raises(DataError, match="NaN"):
        search(one, FunctionScorer(lambda *_: float("nan")))


# ---- scores of a model

CHUNKS = [
    ["alpha beta\n\n", "a b\n\n", "alpha, then beta of it\n\n"],
    ["wait: 12\n\n", "wait, that is 12 again\n\n"],
    ["so 7", "7", "so it must be seven then", "it is 7, as 12 less 5"],
]
PICKS, BEAMS = ([2, 0], [1, 0], [0, 0]), ([0, 0], [1, 0], [0, 1])


def direct(lm, context, text):
    pair = Pair(tuple(lm.encode(context)), tuple(lm.tokenizer.encode(text)))
    return score_pairs(lm, [pair])[0][0]


@pytest.mark.parametrize(
    "options",
    [{}, {"positions": "learned", "max_positions": 128}, {"sliding_window": 8}],
    ids=["rotary", "learned", "window"],
)
def test_scores_with_the_shared_cache_are_those_of_rescoring_everything(options):
    lm = model_of(**options)
    scorer = LMScorer(lm)
    state = scorer.begin("Question? ", 2, 30, 90)
    chosen = ["", ""]
    for texts, picks, beams in zip(CHUNKS, PICKS, BEAMS, strict=True):
        found, state = scorer.score(state, texts, 4)
        expected = [[direct(lm, "Question? " + c, text) for text in texts] for c in chosen]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        state = scorer.choose(state, beams, picks)
        chosen = [chosen[b] + texts[p] for b, p in zip(beams, picks, strict=True)]


def test_a_search_by_the_model_is_the_search_by_rescoring(lm):
    scorer = LMScorer(lm)
    chunks = [[Candidate(text, scorer.count(text)) for text in own] for own in CHUNKS]
    slow = FunctionScorer(lambda context, chosen, text: direct(lm, context + "".join(chosen), text))
    for beams in (1, 3):
        fast, other = (search(chunks, s, "x ", beams=beams) for s in (scorer, slow))
        assert fast.chosen == other.chosen
        assert fast.score == pytest.approx(other.score, abs=1e-4)


def test_other_texts_of_like_length_compile_nothing(lm):
    scorer = LMScorer(lm)

    def run(word):
        own = [[Candidate(word * n, n) for n in (3, 5)], [Candidate(word, 1), Candidate("", 0)][:1]]
        search(own, scorer, "x ")

    run("a")
    sizes = scorers_module._score._cache_size(), scorers_module._choose._cache_size()
    run("b")
    assert sizes == (scorers_module._score._cache_size(), scorers_module._choose._cache_size())


def test_too_long_for_the_model_is_said_before_anything_runs(lm):
    with pytest.raises(ConfigError, match="max_positions=512"):
        LMScorer(lm).begin("x" * 500, 1, 20, 40)
    long = trace_of(60, 60)
    (found,) = compress([long], by_function(lambda t, s: ["a"]), LMScorer(lm))
    assert found == Dropped("longer than the search model's positions")


# ---- whole traces


def test_one_candidate_and_no_filter_is_the_candidates_joined():
    text = trace_of(60, 55, 70)
    short = by_function(lambda chunk, seed: [" ".join(chunk.split()[:3])])
    (found,) = compress([text], short, WORDS, Settings(keep=1.0))
    assert isinstance(found, Compressed)
    first = [" ".join(f"p{i}w{j}" for j in range(3)) for i in range(3)]
    assert found.text == "<think>\n" + "\n\n".join(first) + "\n</think>\n\nIt is 7."
    assert (found.tokens, found.chunks, found.unchanged) == ((185, 9), 3, 0)
    assert found.ratio == 9 / 185


def test_only_the_original_as_candidate_changes_nothing():
    text = trace_of(60, 55)
    (found,) = compress([text], by_function(lambda chunk, seed: [chunk] * 3), WORDS)
    assert isinstance(found, Compressed)
    assert (found.text, found.ratio, found.unchanged) == (text, 1.0, 2)


def test_a_trace_of_one_chunk_is_rewritten_and_without_thinking_it_is_dropped():
    one, none = compress([trace_of(5), "<think></think>7"], by_function(lambda t, s: ["w"]), WORDS)
    assert isinstance(one, Compressed) and one.text == "<think>\nw\n</think>\n\nIt is 7."
    assert none == Dropped("there is no thinking to shorten")


def test_unusable_candidates_are_discarded_and_counted_and_the_chunk_stays():
    bad = ["", "  ", "stop </think> 9", "far " * 99, None]
    (found,) = compress([trace_of(52)], lambda texts, seeds: [bad for _ in texts], WORDS)
    assert isinstance(found, Compressed) and found.text == trace_of(52)
    assert found.discarded == {"empty": 2, "a tag of thinking in it": 1, "cut off": 1}


def test_numbers_that_are_needed_later_must_stay():
    text = "<think>12 and 30 make\n\nso 12 it is</think>12"
    versions = by_function(lambda t, s: ["30", "12 x", "12 30 y"] if "make" in t else [t])

    def first(numbers):
        settings = Settings(keep=1.0, min_words=3, numbers=numbers)
        (found,) = compress([text], versions, WORDS, settings)
        assert isinstance(found, Compressed)
        return found.text[7:].split("\n\n")[0], dict(found.discarded)

    assert first("none") == ("30", {})
    assert first("later") == ("12 x", {"a number lost": 1})
    assert first("all") == ("12 30 y", {"a number lost": 2})


def test_a_changed_answer_drops_the_trace():
    text = "six and one make 7"  # without a tag the answer is in what is rewritten
    found = compress([text] * 2, lambda texts, seeds: [["makes 7"], ["makes 8"]], WORDS)
    assert isinstance(found[0], Compressed) and found[0].text == "makes 7"
    assert found[1] == Dropped("the final answer changed")
    totals = Totals()
    for one in found:
        totals.add(one)
    assert (totals.kept, totals.dropped) == (1, {"the final answer changed": 1})
    assert totals.tokens == (5, 2)


def test_reflection_is_counted_before_and_after():
    text = "<think>Wait, let me check. Hmm.\n</think>7"
    (found,) = compress([text], by_function(lambda t, s: ["wait"]), WORDS)
    assert isinstance(found, Compressed) and found.markers == (3, 1)


def test_baselines_choose_by_their_own_rule():
    versions = ["w w w w", "w", "w w", "w w w"]
    likes = {f" {v}" if v == "w" else v: -float(v == "w w w w") for v in versions}
    scorer = FunctionScorer(lambda c, b, text: -100.0 * (len(text.split()) < 4))
    texts = [trace_of(60, 60)] * 40

    def lengths(method, **options):
        compressor = by_function(lambda t, s: versions)
        found = compress(texts, compressor, scorer, Settings(method=method, **options))
        return [len(split_trace(one.text).thinking.split("\n\n")[0].split()) for one in found]

    assert likes and {*lengths("shortest")} == {1}
    assert {*lengths("likelihood")} == {4}
    assert {*lengths("r1")} == {2}  # the likeliest a token of the two shortest
    drawn = lengths("random")
    assert {*drawn} == {1, 2} and 8 < drawn.count(1) < 32
    assert drawn == lengths("random") != lengths("random", seed=1)
    whole = compress(texts[:1], by_function(lambda t, s: ["all"]), scorer, Settings("instance"))
    assert split_trace(whole[0].text).thinking == "all"


def test_a_random_scorer_is_a_random_choice_among_the_filtered():
    versions = ["w w w w", "w", "w w", "w w w"]
    rng = np.random.default_rng(0)
    scorer = FunctionScorer(lambda c, b, text: rng.normal() * len(text.split()))
    found = compress([trace_of(60)] * 200, by_function(lambda t, s: versions), scorer)
    counts = np.bincount([one.tokens[1] for one in found])
    assert counts[1] + counts[2] == 200
    assert 70 < counts[1] < 130  # 100 expected, 4 deviations


def test_what_becomes_of_a_trace_depends_on_its_number_alone():
    versions = by_function(lambda t, s: [f"w{s % 97}", f"v{s % 89} v"])
    texts, settings = [trace_of(60, 55), trace_of(80)], Settings(method="random", keep=1.0)
    both = compress(texts, versions, WORDS, settings, numbers=[4, 9])
    assert [*compress(texts[1:], versions, WORDS, settings, numbers=[9])] == both[1:]


def test_settings_that_make_no_sense_are_refused():
    for options in ({"method": "r2"}, {"keep": 1.5}, {"beams": 0}, {"min_words": 0}, {"end": ""}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            Settings(**options)
    with pytest.raises(DataError, match="answered 0 of 1"):
        compress(["a"], lambda texts, seeds: [], WORDS)
    with pytest.raises(DataError, match="instead of a list"):
        compress(["a"], by_function(lambda t, s: "b"), WORDS)


# ---- compressors


def test_the_rewriter_writes_the_same_versions_in_any_batches(lm):
    texts = ["the cat sat on the mat", "a dog", "it was 12 minutes past"]
    many = LMRewriter(lm, 3, prompt="Shorter: {chunk}\n", batch_size=8)(texts, [5, 6, 7])
    few = LMRewriter(lm, 3, prompt="Shorter: {chunk}\n", batch_size=2)(texts[1:], [6, 7])
    assert [len(own) for own in many] == [3, 3, 3]
    assert few == many[1:]


def test_the_rewriter_leaves_out_what_is_longer_than_the_text_or_has_no_room(lm):
    never = LanguageModel(lm.model, lm.params, lm.tokenizer)
    found = LMRewriter(never, 2, prompt="{chunk}")(["ab", "x" * 400], [0, 1])
    for own, text in zip(found, ["ab", "x" * 400], strict=True):
        assert all(v is None or len(v.encode()) <= len(text) for v in own)
    assert found[1] == [None, None]
    with pytest.raises(ConfigError, match="chunk"):
        LMRewriter(lm, prompt="Shorter!")
    with pytest.raises(ConfigError, match="temperature 0"):
        LMRewriter(lm, 2, temperature=0.0)


def test_pruning_drops_the_least_surprising_tokens(lm):
    text = "the cat sat on the mat"
    scores = lm.score([text])
    (half,) = prune_tokens(lm, [text], 0.5)
    value = scores.nll[0][scores.mask[0]]
    kept = np.sort(np.argsort(-value, kind="stable")[: len(text) // 2])
    assert half == "".join(text[i] for i in kept)
    assert prune_tokens(lm, [text], 1.0) == [text]
    vowels = prune_tokens(lm, [text], 6 / 22, importance=lambda t, s: [c in "aeiou" for c in t])
    assert vowels == ["eaaoea"]
    assert TokenPruner(lm, 0.5)([text, text], [0, 1]) == [[half], [half]]
    with pytest.raises(ConfigError, match="keep=0"):
        TokenPruner(lm, 0)
    with pytest.raises(DataError, match="1 numbers for 22 tokens"):
        prune_tokens(lm, [text], 0.5, importance=lambda t, s: [1.0])


# ---- the command


def halved(text, seed):
    words = text.split()
    return [" ".join(words[: len(words) // 2]), "", " ".join(words[::2])]


@pytest.fixture(scope="module")
def folder(lm, tmp_path_factory):
    place = tmp_path_factory.mktemp("model") / "saved"
    lm.save(place)
    return place


def short_trace(i):
    return f"<think>wait {i} a b c d\n\nso {i} e f g h</think>{i}"


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "traces.jsonl"
    records = [{"prompt": f"q{i} ", "response": short_trace(i), "id": f"e{i}"} for i in range(5)]
    records[2]["response"] = "x " * 600
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        cli.run(command.main, list(map(str, words)))
    return ended.value.code, capsys.readouterr()


def records_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_command_writes_what_fine_tuning_reads_and_goes_on_where_it_stopped(
    folder, data, tmp_path, capsys
):
    common = [f"--data={data}", f"--model={folder}", "--min_words=4", "--traces=2"]
    common += [f"--compressor={__name__}:halved"]
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "deep/parts.jsonl"
    code, shown = run(capsys, *common, f"--out={whole}")
    assert code == 0
    assert "4 of 5 traces" in shown.out and "10 empty" not in shown.out
    assert "8 empty" in shown.out and "1 longer than the search model's positions" in shown.out
    found = records_of(whole)
    assert [r["id"] for r in found] == ["e0", "e1", "e3", "e4"]
    assert [r["compression"]["index"] for r in found] == [0, 1, 3, 4]
    assert all(r["response"].endswith(f"</think>{r['id'][1]}") for r in found)
    assert all(len(r["response"]) < len(short_trace(0)) for r in found)
    (dropped,) = records_of(tmp_path / "whole.dropped.jsonl")
    assert (dropped["index"], dropped["reason"][:6]) == (2, "longer")

    parts.parent.mkdir()
    lines = whole.read_text().splitlines(keepends=True)
    parts.write_text(lines[0] + lines[1][:20])  # killed in the middle of a line
    code, again = run(capsys, *common, f"--out={parts}")
    assert (code, parts.read_text()) == (0, whole.read_text())
    assert again.out.replace(str(parts), str(whole)).replace("parts", "whole") == shown.out
    before = parts.read_bytes()
    assert run(capsys, *common, f"--out={parts}")[0] == 0
    assert parts.read_bytes() == before
    code, shown = run(capsys, *common, f"--out={parts}", "--keep=1")
    assert (code, "another model" in shown.err) == (ConfigError.exit_code, True)

    source = {"name": "jsonl", "files": (str(whole),), "kind": "response"}
    tree = {
        "init_from": str(folder),
        "data": {"train": [{"source": source}], "evals": {}, "seq_len": 64, "batch_size": 8},
        "objective": {"name": "sft"},
        "steps": 1,
    }
    assert train(build_run(resolve(TrainConfig, tree)), tmp_path / "run").finished


def test_chats_keep_their_messages_and_the_models_own_rewriter_runs(folder, tmp_path, capsys):
    file, out = tmp_path / "chats.jsonl", tmp_path / "out.jsonl"
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": short_trace(3)}]
    file.write_text(json.dumps({"messages": chat}) + "\n")
    words = [f"--data={file}", f"--model={folder}", f"--out={out}", "--min_words=4"]
    asked = tmp_path / "asked.txt"
    asked.write_text("Shorter: {chunk}\n")
    code, shown = run(capsys, *words, "--candidates=2", "--batch_size=2", f"--prompt_file={asked}")
    assert code == 0, shown.err
    (record,) = records_of(out)
    assert record["messages"][0] == chat[0]
    assert record["messages"][1]["role"] == "assistant"
    assert record["messages"][1]["content"].endswith("</think>3")


def test_the_command_says_what_is_wrong(folder, data, tmp_path, capsys):
    common = [f"--data={data}", f"--model={folder}", f"--out={tmp_path / 'o.jsonl'}"]
    for words, told in (
        (["--method=r2"], "method='r2'"),
        (["--compressor=none"], "names no function"),
        (["--verifier=near"], "near"),
        (["--candidates=0"], "--candidates=0"),
        (["--prompt_file=/none"], "--prompt_file=/none"),
    ):
        code, shown = run(capsys, *common, *words)
        assert (code, told in shown.err) == (ConfigError.exit_code, True), shown.err
    data.write_text('{"prompt": "a"}\n')
    code, shown = run(capsys, *common)
    assert (code, "traces.jsonl:1" in shown.err) == (DataError.exit_code, True)
    assert run(capsys, "--help")[0] == 0
