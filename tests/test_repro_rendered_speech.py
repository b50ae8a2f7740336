"""The invented speech of reproductions."""

import numpy as np

from tokjax.reproduction.tasks.rendered_speech import (
    BOS,
    END,
    FIRST,
    RenderedSpeech,
    symbol_errors,
)


def test_frames_hold_each_symbol_of_the_transcript_in_turn_with_silence_between():
    speech = RenderedSpeech(noise=0.0, seed=3)
    vectors = speech.vectors
    for each in speech.utterances(np.random.default_rng(0), 20):
        heard = []  # (symbol or -1 in silence, frames)
        for frame in each.frames:
            said = -1 if not frame.any() else int(np.square(vectors - frame).sum(1).argmin())
            if heard and heard[-1][0] == said:
                heard[-1][1] += 1
            else:
                heard.append([said, 1])
        assert [FIRST + said for said, _ in heard if said >= 0] == list(each.text[:-1])
        assert all(4 <= n <= 8 for said, n in heard if said >= 0)
        assert all(1 <= n <= 3 for said, n in heard if said < 0)
        assert 5 <= len(each.text) - 1 <= 10 and each.text[-1] == END and each.before == [BOS]
        assert len(each.frames) <= speech.most_frames and max(each.text) < speech.vocabulary


def test_a_seed_draws_the_speaker_and_noise_is_added():
    one, same = (RenderedSpeech(seed=s).vectors for s in (1, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - RenderedSpeech(seed=2).vectors).max() > 0.1
    loud, quiet = (
        RenderedSpeech(noise=noise).utterances(np.random.default_rng(0), 1)[0].frames
        for noise in (0.5, 0.0)
    )
    assert 0.4 < (loud - quiet).std() < 0.6


def test_errors_are_edits_over_the_length_of_the_transcript():
    examples = RenderedSpeech(lengths=(4, 4)).utterances(np.random.default_rng(1), 3)
    right = [list(each.text) for each in examples]
    written = [right[0] + [5], right[1][1:], []]
    assert symbol_errors(written, examples) == [0.0, 0.25, 1.0]
