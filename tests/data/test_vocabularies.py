import numpy as np
import pytest

from tokjax.errors import DataError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

TEXTS = ["héllo wörld", "", " a\nb\t日本 <|endoftext|>"]


@pytest.fixture(scope="module")
def tf():
    return pytest.importorskip("tensorflow")


@pytest.fixture(scope="module")
def seqio():
    return pytest.importorskip("seqio")


@pytest.fixture(scope="module")
def vocabulary():
    from tokjax.data.byte_tokenizer import ByteTokenizer
    from tokjax.data.vocabularies import SeqioVocabulary

    return SeqioVocabulary(ByteTokenizer())


def test_ids_and_sizes_are_the_tokenizers(vocabulary):
    assert vocabulary.vocab_size == 257
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id) == (256, 256, 256)
    assert vocabulary.unk_id is None
    for text in TEXTS:
        assert vocabulary.encode(text) == list(text.encode())
        assert vocabulary.decode(vocabulary.encode(text)) == text


def test_decoding_stops_at_eos_but_not_at_a_leading_bos(vocabulary, tf):
    ids = [256, *b"ab", 256, *b"junk"]
    assert vocabulary.decode(ids) == "ab"
    assert vocabulary.decode(tf.constant(ids)) == "ab"
    assert vocabulary.decode(np.asarray(ids, np.uint16)) == "ab"
    assert vocabulary.decode_tf(tf.constant([ids, ids])).numpy().tolist() == [b"ab", b"ab"]
    assert vocabulary.decode_tf(tf.constant(ids)).numpy() == b"ab"
    assert vocabulary.decode_tf(tf.ragged.constant([ids, [104, 105], []])).numpy().tolist() == [
        b"ab",
        b"hi",
        b"",
    ]


def test_tensorflow_side_gives_the_same_ids(vocabulary, tf):
    for text in TEXTS:
        ids = vocabulary.encode_tf(tf.constant(text))
        assert ids.dtype == tf.int32
        assert ids.numpy().tolist() == vocabulary.encode(text)
        assert vocabulary.decode_tf(ids).numpy().decode() == text
    many = vocabulary.encode_tf(tf.constant(TEXTS))
    assert [row.tolist() for row in many.numpy()] == [vocabulary.encode(t) for t in TEXTS]


def test_text_that_is_no_utf8_ends_with_the_reason(vocabulary, tf):
    with pytest.raises(DataError, match="no valid UTF-8"):
        vocabulary.encode_tf(tf.constant(b"\xff"))
    dataset = tf.data.Dataset.from_tensors(b"\xff").map(vocabulary.encode_tf)
    with pytest.raises(tf.errors.OpError, match="no valid UTF-8"):
        next(iter(dataset))


def test_equality_is_that_of_the_ids(vocabulary, tmp_path):
    from tokjax.data.byte_tokenizer import ByteTokenizer
    from tokjax.data.tokenizers import TokenizerConfig, build_tokenizer
    from tokjax.data.vocabularies import SeqioVocabulary

    same = SeqioVocabulary(ByteTokenizer())
    assert vocabulary == same
    assert hash(vocabulary) == hash(same)
    (tmp_path / "a.txt").write_text("one two three four five six seven eight " * 30)
    config = TokenizerConfig(vocab_size=265, corpus=str(tmp_path / "a.txt"))
    other = SeqioVocabulary(build_tokenizer(config, tmp_path))
    assert vocabulary != other
    assert vocabulary != "a vocabulary"


def test_a_seqio_task_tokenizes_with_it(vocabulary, seqio, tf):
    def source(split, shuffle_files, seed=None):
        del split, shuffle_files, seed
        return tf.data.Dataset.from_tensor_slices({"targets": TEXTS})

    name = "tokjax_vocabulary_test"
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(source, splits=["train"]),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"targets": seqio.Feature(vocabulary, add_eos=True, dtype=tf.int32)},
    )
    try:
        task = seqio.TaskRegistry.get(name)
        dataset = task.get_dataset(None, split="train", shuffle=False)
        rows = [row["targets"].tolist() for row in dataset.as_numpy_iterator()]
    finally:
        seqio.TaskRegistry.remove(name)
    assert rows == [[*vocabulary.encode(text), 256] for text in TEXTS]
    assert dataset.element_spec["targets"].shape.as_list() == [None]
