import itertools

import numpy as np
import pytest

from tokjax.decoding import Prompts, on_tokens, temperature
from tokjax.decoding.search import Generator, particle_filter, rebase, step_beam
from tokjax.errors import ConfigError, DataError
from tokjax.training.compiles import CompileWatch

# Tokens 0 and 1 are content, 2 ends a step, 3 ends the text.
P = np.array([[0.3, 0.3, 0.3, 0.1], [0.2, 0.2, 0.5, 0.1], [0.4, 0.4, 0.0, 0.2], [0.25] * 4])
STEP, END = 2, 3
STARTS = [[0], [1], [2, 1]]


@pytest.fixture(scope="module")
def generator(table):
    return Generator(*table(P), max_new_tokens=3, stop=on_tokens([STEP]))


@pytest.fixture(scope="module")
def prompts():
    return Prompts.of(STARTS)


def ones(prompts, continuations):
    """A process reward: the share of token 1."""
    return [(1 + ids.count(1)) / (2 + len(ids)) for ids in continuations]


def check_path(path):
    """Steps are what the generator's stops say, rewards those of each beginning."""
    starts = (0, *path.steps[:-1])
    for start, end in zip(starts, path.steps, strict=True):
        step = path.tokens[start:end]
        assert 1 <= len(step) <= 3
        assert not {STEP, END} & set(step[:-1])
        assert step[-1] in (STEP, END) or len(step) == 3
    assert path.steps[-1] == len(path.tokens)
    assert path.finished == (path.tokens[-1] == END)
    assert END not in path.tokens[:-1]
    assert list(path.rewards) == [ones(None, [list(path.tokens[:n])])[0] for n in path.steps]


def check_logprob(path, start):
    p = [P[a, b] for a, b in itertools.pairwise((start, *path.tokens))]
    assert path.logprob == pytest.approx(np.log(p).sum(), abs=1e-4)


@pytest.mark.parametrize("aggregation", ["last", "min", "product"])
def test_a_step_beam_keeps_the_best_by_its_rewards(generator, prompts, aggregation):
    found = step_beam(
        generator,
        prompts,
        ones,
        beams=3,
        expand=4,
        max_steps=4,
        ends=[END],
        aggregation=aggregation,
    )
    value = {"last": lambda r: r[-1], "min": min, "product": np.prod}[aggregation]
    for start, paths in zip(STARTS, found.paths, strict=True):
        assert len(paths) == 3
        for path in paths:
            check_path(path)
            check_logprob(path, start[-1])
            assert path.value == pytest.approx(value(path.rewards))
            assert path.finished or len(path.steps) == 4
        assert [p.value for p in paths] == sorted([p.value for p in paths], reverse=True)
    assert found.tokens == [list(paths[0].tokens) for paths in found.paths]


def test_a_wider_search_finds_better_texts_than_a_random_verifier(generator):
    many = Prompts.of([[0]] * 60)

    def mean(score, **sizes):
        found = step_beam(generator, many, score, max_steps=3, ends=[END], **sizes)
        return np.mean(ones(None, found.tokens))

    one = mean(ones, beams=1, expand=1)
    wide = mean(ones, beams=3, expand=4)
    blind = mean(lambda p, c: [0.0] * len(c), beams=3, expand=4)
    assert wide > one + 0.15
    assert abs(blind - one) < 0.07


def test_every_turn_draws_the_same_number_of_rows(table, prompts):
    rows, plain = [], Generator(*table(P), max_new_tokens=3, stop=on_tokens([STEP]))

    class Counting(Generator):
        def __call__(self, given, seeds, *, samples=1):
            rows.append(len(given))
            drawn = super().__call__(given, seeds, samples=samples)
            costs.append(drawn.cost)
            return drawn

    costs = []
    counting = Counting(plain.model, plain.params, 3, stop=plain.stop)
    found = step_beam(counting, prompts, ones, beams=2, expand=2, max_steps=4, ends=[END])
    assert rows == [12] * len(rows) and 2 <= len(rows) <= 4
    assert found.cost.tokens == sum(each.tokens for each in costs)
    assert found.cost.forwards == sum(each.forwards for each in costs)
    step_beam(counting, prompts, ones, beams=2, expand=2, max_steps=4, ends=[END])
    with CompileWatch() as watch:
        step_beam(counting, prompts, ones, beams=2, expand=2, max_steps=4, ends=[END], seed=5)
        assert watch.count == 0


@pytest.mark.parametrize("search", ["step_beam", "rebase", "particle_filter"])
def test_a_prompts_search_does_not_depend_on_those_behind_it(generator, prompts, search):
    def run(prompts, seed=0):
        settings = {"max_steps": 3, "ends": [END], "seed": seed}
        if search == "step_beam":
            return step_beam(generator, prompts, ones, beams=2, expand=2, **settings).paths
        if search == "rebase":
            return rebase(generator, prompts, ones, budget=4, **settings).paths
        return particle_filter(generator, prompts, ones, particles=4, **settings).paths

    together = run(prompts)
    assert run(prompts) == together
    assert run(Prompts.of(STARTS[:1])) == together[:1]
    assert run(prompts, seed=1) != together


def test_rebase_spends_its_budget_and_returns_all_that_ends(generator, prompts):
    found = rebase(generator, prompts, ones, budget=6, max_steps=5, ends=[END], temperature=0.1)
    for start, paths in zip(STARTS, found.paths, strict=True):
        assert 1 <= len(paths) <= 6
        for path in paths:
            check_path(path)
            check_logprob(path, start[-1])
            assert path.finished or len(path.steps) == 5
        assert [p.value for p in paths] == sorted([p.value for p in paths], reverse=True)
    assert sum(path.finished for paths in found.paths for path in paths) > 3


def test_a_cold_rebase_continues_the_best_text_alone(generator):
    found = rebase(
        generator, Prompts.of([[0]]), ones, budget=5, max_steps=3, ends=[END], temperature=1e-4
    )
    unfinished = [path for path in found.paths[0] if not path.finished]
    assert unfinished
    assert len({path.rewards[1] for path in unfinished}) == 1


def law_of_two_tokens(potential):
    """The distribution of texts of two steps of one token, and E[potential]."""
    texts = {(3,): P[0, 3]}
    for a, b in itertools.product((0, 1, 2), range(4)):
        texts[a, b] = P[0, a] * P[a, b]
    mass = {text: p * potential(text) for text, p in texts.items()}
    total = sum(mass.values())
    return {text: m / total for text, m in mass.items()}, total


@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0])
def test_particles_are_a_weighted_sample_of_the_tilted_distribution(table, threshold):
    generator = Generator(*table(P), max_new_tokens=1)
    potential = lambda ids: np.exp(1.5 * list(ids).count(1) - 0.5 * len(ids))  # noqa: E731
    log_potential = lambda p, c: [np.log(potential(ids)) for ids in c]  # noqa: E731
    law, total = law_of_two_tokens(potential)
    many, count = 500, 16
    found = particle_filter(
        generator,
        Prompts.of([[0]] * many),
        log_potential,
        particles=count,
        max_steps=2,
        ends=[END],
        threshold=threshold,
    )
    np.testing.assert_allclose(found.weights.sum(1), 1)
    normalizers = np.exp(found.log_normalizer)
    error = normalizers.std() / np.sqrt(many)
    assert abs(normalizers.mean() - total) < 5 * error
    # Weighted by its normaliser, each run's estimate is unbiased.
    for text, p in law.items():
        mine = [[path.tokens == text for path in paths] for paths in found.paths]
        shares = normalizers * (found.weights * np.array(mine)).sum(1)
        assert abs(shares.mean() - p * total) < 5 * shares.std() / np.sqrt(many) + 1e-3
    for sizes in found.effective_sizes:
        assert all(1 <= size <= count + 1e-9 for size in sizes)


def test_an_impossible_text_has_no_weight(generator, prompts):
    def no_one(prompts, continuations):
        return [-np.inf if 1 in ids else 0.0 for ids in continuations]

    found = particle_filter(generator, prompts, no_one, particles=8, max_steps=3, ends=[END])
    for paths, weights in zip(found.paths, found.weights, strict=True):
        for path, weight in zip(paths, weights, strict=True):
            assert (weight > 0) == (1 not in path.tokens)
    nothing = particle_filter(
        generator, prompts, lambda p, c: [-np.inf] * len(c), particles=4, max_steps=3, ends=[END]
    )
    assert np.isneginf(nothing.log_normalizer).all() and not nothing.weights.any()
    with pytest.raises(DataError, match="is infinite"):
        particle_filter(
            generator, prompts, lambda p, c: [np.inf] * len(c), particles=4, max_steps=3, ends=[END]
        )


def test_a_real_model_is_continued_from_all_it_has_written(lm, rows):
    generator = Generator(
        lm.model, lm.params, 4, transform=temperature(1.5), stop=on_tokens(range(0, 61, 4))
    )
    found = step_beam(
        generator,
        Prompts.of(rows),
        lambda p, c: [float(np.mean(ids)) for ids in c],
        beams=2,
        expand=2,
        max_steps=2,
        ends=[60],
    )
    for row, paths in zip(rows, found.paths, strict=True):
        for path in paths:
            logits = lm.run([*row, *path.tokens])[0][len(row) - 1 : -1]
            logits -= logits.max(-1, keepdims=True)
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            own = logp[np.arange(len(path.tokens)), list(path.tokens)].sum()
            assert path.logprob == pytest.approx(own, abs=1e-3)


def test_what_cannot_be_meant_is_refused(generator, prompts):
    settings = {"max_steps": 3, "ends": [END]}
    with CompileWatch() as watch:
        with pytest.raises(ConfigError, match="expand=0 must be at least 1"):
            step_beam(generator, prompts, ones, beams=2, expand=0, **settings)
        with pytest.raises(ConfigError, match="aggregation='sum' must be one of"):
            step_beam(generator, prompts, ones, beams=2, expand=2, aggregation="sum", **settings)
        with pytest.raises(ConfigError, match="max_steps=0 must be at least 1"):
            rebase(generator, prompts, ones, budget=4, max_steps=0, ends=[END])
        with pytest.raises(ConfigError, match=r"temperature=0\.0 above 0"):
            rebase(generator, prompts, ones, budget=4, temperature=0.0, **settings)
        with pytest.raises(ConfigError, match="prompt 0 has 1 tokens; with max_steps=30"):
            rebase(generator, prompts, ones, budget=4, max_steps=30, ends=[END])
        with pytest.raises(ConfigError, match="threshold=nan must be 0 or more"):
            particle_filter(
                generator, prompts, ones, particles=4, threshold=float("nan"), **settings
            )
        assert watch.count == 0
