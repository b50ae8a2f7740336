import numpy as np
import pytest

from tokjax.data.annotated import annotate
from tokjax.data.artifact import read_artifact
from tokjax.data.store import StoreWriter, TokenStore
from tokjax.errors import DataError
from tokjax.preference.token_weights import counted_targets, end_tokens, write_token_weights

PAIRS = [{"prompt": f"{n}", "chosen": "yes", "rejected": "no" * n} for n in range(3)]


@pytest.fixture(scope="module")
def store(stored):
    return stored(PAIRS, "preference")


def test_ends_are_those_of_sequences_and_turns(tmp_path):
    def written(name, **facts):
        with StoreWriter(tmp_path / name, vocab_size=10, tokenizer=facts) as writer:
            tokens = [9, 1, 9, 2, 9, 9, 1, 3, 9]  # 9 begins, ends turns, and ends
            writer.add(tokens, [0, 0, 0, 1, 1, 1, 0, -1, -1], key="0" * 16, name="x", cuts=(5,))
        return TokenStore.open(tmp_path / name)

    found = written("ended", after=[9])
    assert np.flatnonzero(end_tokens(found, 0)).tolist() == [4, 8]
    # The first token of a sequence is no target, whatever it weighs.
    assert np.flatnonzero(counted_targets(found, 0)).tolist() == [3, 4, 7, 8]
    assert not end_tokens(written("open", after=[]), 0).any()


def test_an_artifact_multiplies_the_data_and_says_what_made_it(store, tmp_path):
    weights = [np.full(n, 0.5, np.float32) for n in store.lengths]
    seen = [np.arange(n, dtype=np.float32) for n in store.lengths]
    write_token_weights(
        tmp_path / "a.parquet",
        store,
        weights,
        method="cdpo",
        options={"beta": 1.0},
        keep=[True, False, True],
        channels={"seen": seen},
    )
    found = annotate(store, str(tmp_path / "a.parquet"))
    assert found.kept.tolist() == [0, 2] and found.channels == ("seen",)
    for own, i in enumerate(found.kept.tolist()):
        np.testing.assert_array_equal(found.weights(own), store.weights(i) / 2)
        np.testing.assert_array_equal(found.channel("seen", own), seen[i])
    meta = read_artifact(tmp_path / "a.parquet").meta
    assert meta["method"] == "cdpo" and meta["options"] == {"beta": 1.0}
    assert meta["stores"] == {"pool": store.fingerprint}
    assert meta["counts"] == {"examples": 3, "kept": 2}


def test_weights_of_other_tokens_are_refused(store, tmp_path):
    weights = [np.ones(n, np.float32) for n in store.lengths]
    with pytest.raises(DataError, match="values for the"):
        write_token_weights(tmp_path / "a", store, [weights[0][1:], *weights[1:]], method="x")
    with pytest.raises(DataError, match="for 3 keys"):
        write_token_weights(tmp_path / "a", store, weights[1:], method="x")
    assert not (tmp_path / "a").exists()
