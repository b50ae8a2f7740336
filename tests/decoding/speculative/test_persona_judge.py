import itertools

import jax
import numpy as np
import pytest

from tokjax.decoding import Prompts, categorical, chain, greedy, on_tokens, temperature
from tokjax.decoding.speculative import persona_judge, persona_prompts
from tokjax.decoding.speculative.persona_judge import _run
from tokjax.errors import ConfigError, DataError
from tokjax.training.compiles import CompileWatch

RUNS = 20_000
P, Q = [0.5, 0.3, 0.15, 0.05], [0.2, 0.4, 0.3, 0.1]
# The first token of a prompt chooses the table: 0 is the judging persona's p, 1 the other's q.
JUDGE, DRAFT = Prompts.of([[0]]), Prompts.of([[1, 2, 2]])
AS_IT_IS = chain()


@pytest.fixture(scope="module")
def iid(tables, context_free):
    """A function writing with personas whose laws are p and q, whatever the text."""

    def run(swap, drafting=DRAFT, judging=JUDGE, **settings):
        settings = {"max_new_tokens": 5, "gamma": 1, "transform": AS_IT_IS, **settings}
        return jax.device_get(
            persona_judge(
                tables(4),
                context_free(P, Q),
                drafting,
                judging,
                swap=swap,
                samples=RUNS,
                key=jax.random.key(3),
                **settings,
            )
        )

    return run


def _of_blocks(found, parity):
    """The first tokens of blocks of a parity, of all runs."""
    mask = np.asarray(found.mask)
    block = np.where(mask, np.asarray(found.block_of_token), -1)
    first = np.diff(block, axis=1, prepend=-1) > 0
    return np.asarray(found.tokens)[first & mask & (block % 2 == parity)]


def test_blocks_follow_the_persona_that_judges_them(iid, follows):
    found = iid("always")
    follows(found.tokens[:, 0], P)
    follows(found.tokens[:, 1], 0.7 * np.array(P) + 0.3 * np.array(Q))  # [.41, .33, .195, .065]
    follows(_of_blocks(found, 0), P)
    follows(_of_blocks(found, 1), Q)
    # The bonus token of a block follows its judge too.
    both = found.accepted[:, 0] == 1
    assert abs(both.mean() - 0.7) < 0.015
    follows(found.tokens[both, 1], P)
    second = (found.accepted[:, 0] == 0) & (found.accepted[:, 1] == 1)
    follows(found.tokens[second, 2], Q)


def test_without_swap_every_token_follows_the_judge(iid, follows):
    found = iid("never", gamma=4, max_new_tokens=16)
    for at in (0, 1, 7, 15):
        follows(found.tokens[:, at], P)
    # Blocks that no limit cuts: their length is (1 - .7^5) / .3.
    assert abs(found.accepted[:, :2].mean() + 1 - 2.7731) < 0.02
    assert abs(found.accepted.sum() / found.tested.sum() - 0.7) < 0.005


def test_swapping_once_leaves_the_roles_reversed(iid, follows):
    found = iid("once")
    first = np.asarray(found.block_of_token) == 0
    mask = np.asarray(found.mask)
    follows(found.tokens[first & mask], P)
    for block in (1, 2):
        here = (np.asarray(found.block_of_token) == block) & mask
        # (The first token of a block: how many follow depends on what was accepted.)
        starts = np.argmax(here, axis=1)[here.any(1)]
        follows(found.tokens[here.any(1), starts], Q)


def test_one_persona_twice_accepts_everything_and_follows_its_law(iid, follows):
    found = iid("always", drafting=JUDGE, gamma=4, max_new_tokens=10)
    np.testing.assert_array_equal(found.acceptance_rate, 1)
    np.testing.assert_array_equal(found.accepted[:, :2], 4)
    np.testing.assert_array_equal(found.tokens_per_pass, 5)
    for at in (0, 4, 5, 9):
        follows(found.tokens[:, at], P)


def test_without_swap_the_joint_law_is_the_judges(tables, follows):
    logits = jax.random.normal(jax.random.key(2), (2, 4, 4)) * 1.5
    found = persona_judge(
        tables(4),
        logits,
        DRAFT,
        JUDGE,
        swap="never",
        gamma=2,
        samples=RUNS,
        max_new_tokens=3,
        transform=AS_IT_IS,
        seeds=np.arange(RUNS),
    )
    law, p = np.zeros((4, 4, 4)), np.asarray(jax.nn.softmax(logits[0]))
    for a, b, c in itertools.product(range(4), repeat=3):
        law[a, b, c] = p[0, a] * p[a, b] * p[b, c]
    follows(np.asarray(found.tokens)[:, :3] @ [16, 4, 1], law)
    assert 0.2 < found.acceptance_rate.mean() < 0.9


@pytest.fixture(scope="module")
def personas(rows):
    """Ragged prompts of two personas; in one row only their last tokens differ."""
    drafting = [[11, 12, *rows[0]], [7], [13, 14, 15, *rows[2]], [60, 0, 60, 0, 12]]
    judging = [[21, *rows[0]], [22, 7], [7], rows[3]]
    return drafting, judging


def _expected(logits, drafting, judging, count, gamma, swap):
    """What two personas write that take the likeliest token, by passes over whole texts."""
    personas, new, accepted = [drafting, judging], [], []
    while len(new) < count:
        draft = []
        for _ in range(gamma):
            draft.append(int(logits([*personas[0], *new, *draft])[-1].argmax()))
        behind = len(personas[1]) + len(new) - 1
        own = logits([*personas[1], *new, *draft])[behind:].argmax(-1).tolist()
        stood = next((i for i in range(gamma) if own[i] != draft[i]), gamma)
        stood = min(stood, count - len(new) - 1)
        new += own[: stood + 1]
        accepted.append(stood)
        if swap == "always" or (swap == "once" and len(accepted) == 1):
            personas.reverse()
    return new, accepted


@pytest.mark.parametrize(
    ("swap", "changes"),
    [("always", {"sliding_window": 4, "window_pattern": (True, False)}), ("once", {})],
    ids=["always, with windows", "once"],
)
def test_cached_personas_write_what_whole_passes_do(make, personas, swap, changes):
    lm = make(**changes)
    found = persona_judge(
        lm.model,
        lm.params,
        *map(Prompts.of, personas),
        swap=swap,
        gamma=3,
        max_new_tokens=14,
        sampler=greedy(),
        transform=AS_IT_IS,
    )
    some = 0
    for b, (text, drafting, judging) in enumerate(zip(found.rows(), *personas, strict=True)):
        expected, accepted = _expected(lm.logits, drafting, judging, 14, 3, swap)
        assert text == expected
        assert found.accepted[b, : found.blocks[b]].tolist() == accepted
        some += sum(accepted)
    assert some > 0
    assert len({tuple(row) for row in np.asarray(found.accepted).tolist()}) > 1


def test_a_row_depends_on_its_own_personas_and_seed_alone(lm, personas):
    def run(drafting, judging, seeds, **settings):
        prompts = Prompts.of(drafting), Prompts.of(judging)
        settings = {"max_new_tokens": 12, "transform": chain(temperature(0.7)), **settings}
        return persona_judge(lm.model, lm.params, *prompts, seeds=seeds, **settings)

    together = run(*personas, [5, 6, 7, 8])
    mixed = [[side[b] for b in (2, 1, 3, 0)] for side in personas]
    size = _run._cache_size()
    with CompileWatch() as watch:
        again = run(*mixed, [7, 1, 8, 2], max_new_tokens=[12, 3, 12, 1])
        run(*personas, [5, 6, 7, 8], transform=chain(temperature(1.3)))
    assert _run._cache_size() == size
    assert watch.count == 0
    assert again.rows()[0] == together.rows()[2]
    assert again.rows()[2] == together.rows()[3]
    assert again.lengths.tolist() == [12, 3, 12, 1]


def test_a_stop_ends_a_row_within_a_block(iid):
    found = iid("always", gamma=4, max_new_tokens=12, stop=on_tokens([2]), sampler=categorical())
    tokens, lengths, mask = found.tokens, found.lengths, np.asarray(found.mask)
    is_stop = (tokens == 2) & mask
    assert (tokens[~mask] == 0).all()
    np.testing.assert_array_equal(is_stop.any(1), found.stopped)
    np.testing.assert_array_equal(lengths[~found.stopped], 12)
    np.testing.assert_array_equal(is_stop.argmax(1)[found.stopped] + 1, lengths[found.stopped])


def test_the_defaults_are_those_of_the_reference_code(tables, context_free):
    # Temperature .9 and top-p .9 leave three of p's four tokens, whoever judges.
    found = persona_judge(
        tables(4), context_free(P, P), DRAFT, JUDGE, samples=200, key=jax.random.key(0)
    )
    assert found.tokens.shape == (200, 128)
    assert set(np.unique(found.tokens)) == {0, 1, 2}
    law = np.array(P[:3]) ** (1 / 0.9)
    law /= law.sum()
    np.testing.assert_allclose(np.exp(found.sampling_logprobs), law[found.tokens], rtol=1e-4)


def test_a_personas_prompt_is_its_preference_before_each_question():
    def chat(messages):
        return [len(m["role"]) * 100 + int(n) for m in messages for n in m["content"].split()]

    found = persona_prompts(chat, "7 8", ["1", "2 3"])
    assert found.tokens.tolist() == [[607, 608, 401, 0], [607, 608, 402, 403]]
    assert found.lengths.tolist() == [3, 4]
    other = persona_prompts(chat, "7", ["1"], role="user")
    assert other.tokens.tolist() == [[407, 401]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"swap": "sometimes"}, ConfigError, "swap='sometimes'"),
        ({"gamma": 0}, ConfigError, "gamma=0"),
        (
            {"judging": Prompts.of([[1], [2]])},
            ConfigError,
            "1 prompts of the drafting persona and 2",
        ),
        ({"judging": Prompts.of([[99]])}, DataError, "of the judging persona: prompt 0 has id 99"),
        ({"drafting": Prompts.of([[1] * 90])}, ConfigError, "of the drafting persona"),
        ({"seeds": None}, ConfigError, "give seeds"),
        ({"samples": 0}, ConfigError, "samples=0"),
    ],
)
def test_what_cannot_be_meant_is_refused(lm, change, error, message):
    given = {"drafting": Prompts.of([[1]]), "judging": Prompts.of([[2]]), "seeds": [0], **change}
    with pytest.raises(error, match=message):
        persona_judge(
            lm.model,
            {},
            given.pop("drafting"),
            given.pop("judging"),
            **{"max_new_tokens": 8, **given},
        )
