import numpy as np
import pytest
import scipy.special

from tokjax.decoding import ModelPredictor, Prompts, decode, on_tokens, suppress
from tokjax.decoding.search import contrastive_search, contrastive_search_scores
from tokjax.errors import ConfigError
from tokjax.models import ModelConfig, Transformer
from tokjax.training.compiles import CompileWatch

NEW, K = 12, 4


def reference(lm, prompt, alpha, new=NEW, forbidden=()):
    """Tokens, penalties and the least lead of a choice, by one whole pass for each candidate."""
    ids, penalties, lead = list(prompt), [], np.inf
    for _ in range(new):
        logits, earlier = lm.run(ids)
        logits[-1, list(forbidden)] = -np.inf
        p = scipy.special.softmax(logits[-1])
        candidates = np.argsort(-p)[:K]
        unit = earlier / np.linalg.norm(earlier, axis=1, keepdims=True)
        found = []
        for v in candidates:
            h = lm.run([*ids, int(v)])[1][-1]
            cosine = (unit @ (h / np.linalg.norm(h))).max()
            found.append(((1 - alpha) * p[v] - alpha * cosine, int(v), cosine))
        found.sort(reverse=True)
        lead = min(lead, found[0][0] - found[1][0])
        ids.append(found[0][1])
        penalties.append(found[0][2])
    return ids[len(prompt) :], penalties, lead


def test_scores_are_the_papers():
    p, similarity = np.array([0.5, 0.3, 0.2]), np.array([0.9, 0.2, 0.1])
    scores = contrastive_search_scores(p, similarity, 0.6)
    np.testing.assert_allclose(scores, [-0.34, 0, 0.02], atol=1e-7)
    assert int(scores.argmax()) == 2
    rows = contrastive_search_scores(np.stack([p, p]), np.stack([similarity] * 2), np.array([0, 1]))
    assert rows.argmax(-1).tolist() == [0, 2]
    assert np.isneginf(contrastive_search_scores(np.array([0.0]), np.array([-1.0]), 0.9))


@pytest.mark.parametrize("window", [None, 4])
def test_search_equals_whole_passes_for_each_candidate(lm, run_of, rows, prompts, window):
    if window is not None:
        model = Transformer(
            ModelConfig(
                vocab_size=61,
                d_model=32,
                n_layers=2,
                n_heads=4,
                n_kv_heads=2,
                max_positions=96,
                sliding_window=window,
                window_pattern=(True, False),
                tie_embeddings=False,
            )
        )
        lm = run_of(model, lm.params)
    alphas = [0.6, 0.3, 0.6, 0.8]
    found = contrastive_search(
        lm.model, lm.params, prompts, max_new_tokens=NEW, top_k=K, alpha=alphas
    )
    changed = 0
    for b, (row, alpha) in enumerate(zip(rows, alphas, strict=True)):
        tokens, penalties, lead = reference(lm, row, alpha)
        assert lead > 1e-5
        assert found.rows()[b] == tokens
        np.testing.assert_allclose(found.recorded["penalty"][b, :NEW], penalties, atol=1e-5)
        logits = lm.run([*row, *tokens])[0][len(row) - 1 : -1]
        logp = scipy.special.log_softmax(logits, axis=-1)
        np.testing.assert_allclose(found.logprobs[b, :NEW], logp[np.arange(NEW), tokens], atol=1e-4)
        changed += int((logp.argmax(-1) != tokens).sum())
    assert changed > 10  # the penalty decided


def test_no_weight_or_one_candidate_is_greedy_decoding(lm, prompts):
    limits, stop = [12, 3, 9, 1], on_tokens([8, 15])
    greedy = decode(lm.model, lm.params, prompts, max_new_tokens=limits, stop=stop)
    for settings in ({"top_k": K, "alpha": 0.0}, {"top_k": 1, "alpha": 0.9}):
        found = contrastive_search(
            lm.model, lm.params, prompts, max_new_tokens=limits, stop=stop, **settings
        )
        assert found.rows() == greedy.rows()
        np.testing.assert_array_equal(found.stopped, greedy.stopped)
        np.testing.assert_allclose(found.entropies, greedy.entropies, atol=1e-4)
        np.testing.assert_allclose(found.logprobs, greedy.logprobs, atol=1e-4)


def test_forbidden_tokens_are_no_candidates_even_if_fewer_than_k_are_left(lm, rows, prompts):
    kept = [3, 50]
    forbidden = [v for v in range(61) if v not in kept]
    found = contrastive_search(
        lm.model, lm.params, prompts, max_new_tokens=6, top_k=K, transform=suppress(forbidden)
    )
    assert {t for row in found.rows() for t in row} == set(kept)


def test_a_row_says_alone_what_it_says_among_others(lm, rows, prompts):
    settings = {"max_new_tokens": NEW, "top_k": K, "alpha": 0.6}
    together = contrastive_search(lm.model, lm.params, prompts, **settings)
    alone = contrastive_search(lm.model, lm.params, Prompts.of([rows[1]] * 4), **settings)
    assert alone.rows() == [together.rows()[1]] * 4


def test_new_values_compile_nothing(lm, prompts):
    def run(alpha, ids, limit):
        contrastive_search(
            lm.model,
            lm.params,
            prompts,
            max_new_tokens=limit,
            top_k=K,
            alpha=alpha,
            stop=on_tokens(ids),
        ).tokens.block_until_ready()

    run(0.6, [1], NEW)
    with CompileWatch() as watch:
        run(0, [2, 3], NEW - 1)
        run(np.float64(1), [], [3, 1, 8, 2])
        assert watch.count == 0


def test_what_cannot_be_meant_is_refused(lm, prompts):
    def run(model=lm.model, **settings):
        contrastive_search(model, lm.params, prompts, **{"max_new_tokens": 4, **settings})

    relative = Transformer(ModelConfig(61, d_model=32, positions="relative"))
    with CompileWatch() as watch:
        for settings, message in (
            ({"top_k": 0}, "top_k=0 must be 1 to the 61 ids"),
            ({"top_k": 62}, "top_k=62 must be 1 to the 61 ids"),
            ({"alpha": 1.5}, "alpha=1.5 must be between 0 and 1"),
            ({"alpha": float("nan")}, "alpha=nan must be between 0 and 1"),
            ({"model": ModelPredictor(lm.model)}, "it needs a Transformer, not a ModelPredictor"),
            ({"model": relative}, "cannot run a model with relative positions"),
        ):
            with pytest.raises(ConfigError, match=message):
                run(**settings)
        assert watch.count == 0
